"""The gradio app of raftdiff."""

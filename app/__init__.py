"""The web app: compare models side by side, vote on them blind, and watch runs. `raftdiff app` starts it."""

"""What the tabs share of gradio."""

from __future__ import annotations

from typing import Any

import gradio as gr

# For events of the page itself: no client lists them, and gradio draws no progress of its own over what they change.
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def html(value: Any = None, *, id: str) -> gr.HTML:
    """A place for one of the templates of `pages`."""
    return gr.HTML(value, elem_classes="rd", elem_id=id, apply_default_css=False)

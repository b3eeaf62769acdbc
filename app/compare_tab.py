"""The tab that draws models side by side."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from raftdiff.checkpoint import write_file
from raftdiff.errors import ConfigError, RaftdiffError

from . import pages
from .comparison import Comparison, Row, archive, draw, parse, parse_seeds
from .follow import Cancels, Made, Told, follow, in_words
from .models import Cancelled, Models
from .widgets import PRIVATE, html

logger = logging.getLogger(__name__)

SHOWN_SIDE = 512  # smaller pictures are enlarged to it in the slider
MOST_SLIDERS = 8
# The link in the box becomes a whole address, and the page's own, so that reloading keeps the settings.
WHOLE_LINK = """(query) => {
  if (!query.startsWith("?")) return query;
  history.replaceState(null, "", location.pathname + query);
  return location.origin + location.pathname + query;
}"""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a session has on its board."""

    asked: Comparison
    rows: list[Row]

    @property
    def names(self) -> list[str]:
        return [contender.name for contender in self.asked.contenders]


class CompareTab:
    """Args:
    suggested: the settings that the form begins with.
    folder: where downloads are put for as long as the app runs.
    """

    def __init__(self, models: Models, suggested: Comparison, folder: Path):
        self.models, self.suggested, self.folder = models, suggested, folder
        self._cancels = Cancels()

    # -- layout ---------------------------------------------------------------------------------------------------

    def build(self, page: gr.Blocks) -> None:
        """Put the tab's components and events on the page."""
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                self._form()
            with gr.Column(scale=2, min_width=320):
                self._results()
        outputs = [self.status, self.board, self.shown, self.link, self.download]
        outputs += [self.row, self.left, self.right, self.closer]
        drawn = gr.on(
            [self.draw.click, self.prompts.submit, *(weight.release for weight in self.weights)],
            self._draw,
            self.inputs,
            outputs,
            trigger_mode="always_last",
            **PRIVATE,
        )
        drawn.then(None, self.link, self.link, js=WHOLE_LINK)
        drawn.then(self._slide, [self.shown, self.row, self.left, self.right], self.slider, **PRIVATE)
        self.cancel.click(self._cancel, None, None, **PRIVATE)
        gr.on(
            [self.row.input, self.left.input, self.right.input],
            self._slide,
            [self.shown, self.row, self.left, self.right],
            self.slider,
            **PRIVATE,
        )
        page.load(self._restore, None, [*self.inputs, self.status], **PRIVATE)
        page.unload(self._cancel)

    def _form(self) -> None:
        suggested, models = self.suggested, self.models
        self.prompts = gr.Textbox(
            label="Prompt (one a line)",
            value="\n".join(suggested.prompts),
            lines=2,
            max_lines=8,
            elem_id="rd-prompts",
            max_length=20_000,
        )
        with gr.Row():
            self.seeds = gr.Textbox(label="Seeds", value="0, 1", elem_id="rd-seeds", min_width=100, max_length=200)
            self.steps = gr.Slider(1, 150, suggested.steps, step=1, label="Steps", min_width=140, elem_id="rd-steps")
        names = list(models.loras)
        self.loras = gr.CheckboxGroup(
            names, value=list(suggested.loras), label="LoRAs beside the base", visible=bool(names), elem_id="rd-loras"
        )
        with gr.Accordion("Mix the LoRAs", open=False, visible=bool(names), elem_id="rd-mix"):
            self.weights = [
                gr.Slider(-1, 2, 0, step=0.05, label=name, elem_id=f"rd-weight-{i}")
                for i, name in enumerate(names[:MOST_SLIDERS])
            ]
        with gr.Accordion("Guidance, size, best of N", open=False, elem_id="rd-more"):
            start = models.guidance.default if suggested.guidance is None else suggested.guidance
            self.guidance = gr.Slider(
                1, 20, start, step=0.1, label="Guidance (1: none)", visible=models.guidance.exists
            )
            with gr.Row():
                self.width = gr.Number(suggested.width, label="Width", precision=0, step=models.multiple, min_width=100)
                self.height = gr.Number(
                    suggested.height, label="Height", precision=0, step=models.multiple, min_width=100
                )
            self.best_of = gr.Slider(
                1, 16, 1, step=1, label="Best of N", visible=bool(models.rewards), elem_id="rd-best-of"
            )
            rewards = models.reward_names
            self.rank_by = gr.Dropdown(
                rewards, value=rewards[0] if rewards else None, label="chosen by", visible=bool(rewards)
            )
        with gr.Row():
            self.draw = gr.Button("Draw", variant="primary", elem_id="rd-draw", min_width=120)
            self.cancel = gr.Button("Cancel", elem_id="rd-cancel", min_width=100)
        self.inputs = [
            *(self.prompts, self.seeds, self.steps, self.loras, self.guidance, self.width, self.height),
            *(self.best_of, self.rank_by, *self.weights),
        ]

    def _results(self) -> None:
        nothing = pages.empty(
            "Nothing drawn yet",
            "Write a prompt, choose LoRAs, and press Draw: every model starts from the same noise, so that what "
            "differs is the model.",
        )
        self.status = html(id="rd-compare-status")
        self.board = html(nothing, id="rd-board")
        with gr.Column(visible=False) as self.closer:
            self.row = gr.Dropdown([], label="Look closer at", elem_id="rd-row")
            with gr.Row():
                self.left = gr.Dropdown([], label="Left", min_width=100, elem_id="rd-slider-left")
                self.right = gr.Dropdown([], label="Right", min_width=100, elem_id="rd-slider-right")
            self.slider = gr.ImageSlider(
                label="Drag to compare",
                interactive=False,
                format="png",
                max_height=520,
                elem_id="rd-slider",
                buttons=["fullscreen"],
            )
            self.link = gr.Textbox(
                label="Link to these settings", interactive=False, buttons=["copy"], max_lines=3, elem_id="rd-link"
            )
            self.download = gr.DownloadButton("Download the pictures with their settings", elem_id="rd-download")
        self.shown = gr.State(None)

    # -- events ---------------------------------------------------------------------------------------------------

    def _asked(self, values: Sequence[Any]) -> Comparison:
        prompts, seeds, steps, loras, guidance, width, height, best_of, rank_by, *weights = values
        texts = [line.strip() for line in (prompts or "").splitlines() if line.strip()]
        if not texts:
            raise ConfigError("Write a prompt first.")
        mix = {name: weight for name, weight in zip(self.models.loras, weights, strict=False) if weight}
        return parse(
            {
                "prompts": texts,
                "seeds": parse_seeds(seeds or "0"),
                "steps": steps,
                "loras": loras or [],
                "mix": mix,
                "guidance": guidance if self.models.guidance.exists else None,
                "width": width or None,
                "height": height or None,
                "best_of": best_of if self.models.rewards else 1,
                "rank_by": rank_by if self.models.rewards and best_of > 1 else None,
            }
        )

    def _draw(self, request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        cancel = self._cancels.new(request.session_hash)

        def work(tell: Callable[[Told | Made], None]) -> None:
            for rows in draw(
                asked,
                self.models,
                progress=lambda what, done, total: tell(
                    Told(text=f"Drawing {what}: step {done} of {total}", share=done / total)
                ),
                on_wait=lambda ahead: tell(Told(text=f"Waiting: {ahead} ahead of you")),
                cancel=cancel,
            ):
                tell(Made(value=list(rows)))

        try:
            asked = self._asked(values)
            yield {self.status: pages.status("Starting")}
            rows: list[Row] = []
            for told in follow(work, cancel):
                if isinstance(told, Made):
                    rows = told.value
                    yield {self.board: pages.board(rows)}
                else:
                    yield {self.status: pages.status(told.text, share=told.share)}
            yield self._finished(Shown(asked=asked, rows=rows), request.session_hash)
        except Cancelled:
            yield {self.status: pages.status("Cancelled. What was drawn stays below.")}
        except Exception as error:
            if not isinstance(error, RaftdiffError):
                logger.exception("drawing failed")
            yield {self.status: pages.status(in_words(error), "error")}

    def _finished(self, shown: Shown, session: str | None) -> dict[Any, Any]:
        # One for each session, which the next drawing replaces; the session's name comes from the browser.
        download = self.folder / hashlib.sha256(str(session).encode()).hexdigest()[:16] / "raftdiff-pictures.zip"
        write_file(download, archive(shown.asked, shown.rows, self.models.model.path))
        names = shown.names
        count = sum(len(row.cells) for row in shown.rows)
        return {
            self.status: pages.status(f"{count} pictures from the same seeds", "done"),
            self.shown: shown,
            self.link: "?" + shown.asked.query(),
            self.download: gr.DownloadButton(value=str(download)),
            self.closer: gr.Column(visible=True),
            self.row: gr.Dropdown([(row.label, i) for i, row in enumerate(shown.rows)], value=0),
            self.left: gr.Dropdown(names, value=names[0]),
            self.right: gr.Dropdown(names, value=names[-1]),
        }

    def _cancel(self, request: gr.Request) -> None:
        self._cancels.stop(request.session_hash)

    def _slide(self, shown: Shown | None, row: int, left: str, right: str) -> Any:
        if shown is None or not isinstance(row, int) or not 0 <= row < len(shown.rows):
            return gr.skip()
        pictures = {cell.contender: cell.drawn.image for cell in shown.rows[row].cells}
        if left not in pictures or right not in pictures:
            return gr.skip()
        return enlarged(pictures[left]), enlarged(pictures[right])

    def _restore(self, request: gr.Request) -> list[Any]:
        """The form of a link that was opened."""
        nothing = [gr.skip()] * len(self.inputs)
        try:
            asked = Comparison.from_query(str(request.query_params))
            if asked is None:
                return [*nothing, gr.skip()]
            asked.check(self.models)
        except RaftdiffError as error:
            return [*nothing, pages.status(f"This link cannot be restored: {error}", "error")]
        weights = [asked.mix.get(name, 0) for name in self.models.loras][:MOST_SLIDERS]
        return [
            "\n".join(asked.prompts),
            ", ".join(map(str, asked.seeds)),
            *(
                asked.steps,
                list(asked.loras),
                asked.guidance or self.models.guidance.default,
                asked.width,
                asked.height,
            ),
            *(asked.best_of, asked.rank_by or gr.skip(), *weights),
            pages.status("The settings of the link are in the form; press Draw."),
        ]


def enlarged(image: Image.Image) -> Image.Image:
    """The picture, with larger pixels where it is small."""
    factor = SHOWN_SIDE // max(image.size)
    return (
        image if factor < 2 else image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    )

"""Prompts that a language model writes for the rounds of an image model: the p(x) of ReST."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

from .config import WriterConfig, parse_config
from .errors import RaftdiffError
from .pipelines.llm import LanguagePolicy, check_language_model, load_language_model
from .pipelines.loading import load_lora
from .prompts import written_prompts
from .reward_models.texts import completion
from .types import Prompt


class PromptWriter:
    """A frozen language model that completes openings. What it writes is the prompt, without the opening, as the reward
    `pictures` has it. It is loaded when it is first asked, and is on the device only while it writes."""

    def __init__(self, settings: WriterConfig, *, held_out: Sequence[Prompt], seed: int, device: str = "cpu") -> None:
        """`held_out` are never written; `seed` is that of the run."""
        plain = settings.model_dump(exclude={"lora"})
        model = {name: plain.pop(name) for name in ("path", "revision", "dtype", "chat_template")}
        adapter = {"rank": 1, "targets": "linear"}  # which is never switched on
        self._config = parse_config(
            {"model": {"modality": "text", **model}, "adapter": adapter, "sampling": plain}, where="prompts.writer"
        )
        self._lora, self._device, self._seed = settings.lora, device, seed
        self._held_out = {prompt.text for prompt in held_out}

    def check(self, openings: Sequence[Prompt]) -> None:
        """Raise WeightsError or ConfigError where, without its weights, it is seen that the model cannot write from
        these openings."""
        with _named():
            check_language_model(self._config, openings, self._lora)

    def __call__(self, openings: Sequence[Prompt], *, round: int) -> list[Prompt]:
        """As `written_prompts`. Raises WeightsError as well, where the model cannot be loaded."""
        model = self._policy.model.to(self._device)
        try:
            return written_prompts(self._write, openings, kept_out=self._held_out, round=round, seed=self._seed)
        finally:
            model.to("cpu")

    @cached_property
    def _policy(self) -> LanguagePolicy:
        with _named():
            model = load_language_model(self._config.model)
            if self._lora is not None:
                load_lora(model, self._lora)
            return LanguagePolicy.from_config(self._config, model)

    def _write(self, openings: Sequence[Prompt], seeds: Sequence[int]) -> list[str]:
        with self._policy.reference():
            samples = self._policy.sample(openings, seeds)
        return ["" if sample.flaw else completion(sample) for sample in samples]


@contextmanager
def _named() -> Iterator[None]:
    """While open, errors say that they are of the writer, and not of the model that is aligned."""
    try:
        yield
    except RaftdiffError as error:
        raise type(error)(f"prompts.writer: {error}") from error

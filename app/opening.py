"""What the app opens on: which base, LoRAs, rewards and prompts, from the command line and the folder of runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from raftdiff.build import build_reward
from raftdiff.config import ModelConfig, RewardConfig, SamplingConfig
from raftdiff.errors import ConfigError, DataError, RaftdiffError, WeightsError
from raftdiff.prompts import load_prompts
from raftdiff.protocols import Reward

from .comparison import MIX, Comparison
from .models import BASE, LoraFile
from .runs import RunFolder, Runs

EMBEDDED = "shapes"
EMBEDDED_REWARDS = (
    RewardConfig(name="aesthetic", options={"model": EMBEDDED, "head": EMBEDDED}),
    RewardConfig(name="clip", options={"model": EMBEDDED}),
    RewardConfig(name="shapes-oracle"),
)
EMBEDDED_PROMPTS = "shapes:open/48/12"
MOST_LORAS = 8  # found in the folder of runs; the newest


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What there is to compare and to vote on.

    Opening(model=ModelConfig(path="shapes"), loras=[LoraFile(name="demo", path=...)], rewards=[...],
            prompts=["a red circle", ...], suggested=Comparison(prompts=("a red circle",), loras=("demo",)), notes=[])
    """

    model: ModelConfig
    loras: list[LoraFile]
    rewards: list[Reward]
    prompts: list[str]
    """Of the arena."""
    suggested: Comparison
    """The settings that the form begins with."""
    notes: list[str] = field(default_factory=list)
    """What is not as one may expect, for the top of the page."""


def open_on(
    runs: Runs,
    *,
    base: str | None = None,
    loras: Sequence[str] = (),
    rewards: Sequence[RewardConfig] = (),
    prompts: str | None = None,
    device: str = "cpu",
) -> Opening:
    """Choose what was not said: the embedded model, the LoRAs in `runs` that were trained from the base, the rewards
    and held-out prompts of their runs.

    Args:
        loras: run folders, LoRA folders or safetensors files; without any, those of finished runs on this base.
        prompts: a source of prompts for the arena, as `load_prompts` takes it.

    Raises:
        WeightsError: there is no LoRA at one of the paths.
        RaftdiffError: a reward or prompts that were asked for cannot be had.
    """
    given = [_lora(Path(path)) for path in loras]
    found = [] if given else list(_finished(runs))
    origin = [run for _, run in given if run is not None] or found
    wanted = base or (None if given else EMBEDDED)
    fitting = (run.config.model for run in origin if wanted is None or _is(run, wanted))
    model = next(fitting, ModelConfig(path=wanted or EMBEDDED))
    if model.modality != "image":
        raise ConfigError(f"{model.path} writes text, and the app compares pictures: its runs are in the tab Runs")
    trained = [run for run in origin if given or _is(run, model.path)][:MOST_LORAS]
    files = _named([file for file, _ in given] or [LoraFile(name=run.name, path=run.path / "lora") for run in trained])
    notes: list[str] = []
    if not files:
        notes.append("No LoRA of this base yet: `raftdiff demo` makes one for the embedded model in minutes.")
    texts = _prompts(prompts, trained, model, notes)
    sampling = trained[0].config.sampling if trained else SamplingConfig()
    return Opening(
        model=model,
        loras=files,
        rewards=_rewards(rewards, trained, model, device, notes),
        prompts=texts,
        suggested=Comparison(
            prompts=(texts[0][:1000] if texts else "a photograph of a lighthouse at dusk",),
            loras=tuple(file.name for file in files[:3]),
            steps=min(sampling.num_inference_steps, 150),
            guidance=sampling.guidance_scale and min(max(sampling.guidance_scale, 1.0), 20.0),
        ),
        notes=notes,
    )


def _lora(path: Path) -> tuple[LoraFile, RunFolder | None]:
    """The LoRA at a path that the command line gave, and the run that it came from where there is one."""
    folder = path / "lora" if (path / "config.yaml").is_file() else path
    if not (folder.is_dir() or folder.suffix == ".safetensors") or not folder.exists():
        raise WeightsError(f"{path}: there is no LoRA; give a run folder, a LoRA folder or a .safetensors file")
    run = folder.parent if folder.name == "lora" and (folder.parent / "config.yaml").is_file() else None
    name = run.resolve().name if run else folder.resolve().stem
    return LoraFile(name=name, path=folder), RunFolder(run, name) if run else None


def _finished(runs: Runs) -> Iterator[RunFolder]:
    for name in runs.names():
        try:
            run = runs.open(name)
        except RaftdiffError:
            continue  # the tab of runs says what is wrong with it
        if run.lora is not None:
            yield run


def _is(run: RunFolder, base: str) -> bool:
    path = run.config.model.path
    return path == base or (
        Path(path).exists() and Path(base).exists() and Path(path).resolve() == Path(base).resolve()
    )


def _named(files: Sequence[LoraFile]) -> list[LoraFile]:
    """Each under a name of its own."""
    named: list[LoraFile] = []
    for file in files:
        taken = {BASE, MIX, *(other.name for other in named)}
        names = (file.name, *(f"{file.name}-{i}" for i in range(2, 1000)))
        named.append(LoraFile(name=next(name for name in names if name not in taken), path=file.path))
    return named


def _prompts(source: str | None, trained: Sequence[RunFolder], model: ModelConfig, notes: list[str]) -> list[str]:
    if source is not None:
        return [prompt.text for prompt in load_prompts(source)]
    for run in trained:
        try:
            return [p.text for p in load_prompts(run.config.evaluation.prompts or run.config.prompts.source)]
        except (DataError, OSError) as error:
            notes.append(f"The prompts of {run.name} cannot be read: {error}")
    return [prompt.text for prompt in load_prompts(EMBEDDED_PROMPTS)] if model.path == EMBEDDED else []


def _rewards(
    asked: Sequence[RewardConfig], trained: Sequence[RunFolder], model: ModelConfig, device: str, notes: list[str]
) -> list[Reward]:
    """Those that were asked for; else those of the runs, else of the embedded world. One that a run had and that
    cannot be had here is a note."""
    if asked:
        return [build_reward(config, device=device).reward for config in asked]
    configs = [c for run in trained for c in (*run.config.rewards, *run.config.evaluation.rewards)]
    rewards: dict[str, Reward] = {}
    for config in configs or (EMBEDDED_REWARDS if model.path == EMBEDDED else ()):
        try:
            if (config.label or config.name) not in rewards:
                reward = build_reward(config, device=device).reward
                rewards.setdefault(reward.name, reward)
        except RaftdiffError as error:
            notes.append(f"No scores of {config.label or config.name}: {error}")
    return list(rewards.values())

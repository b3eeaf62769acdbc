"""`raftdiff plan`: what a run will do and what it will take, before it is begun.

`counts` walks through the rounds as `run_rounds` does, with numbers in place of samples. How much an algorithm trains
on, and how often its loss goes through the denoiser, it says itself: its `select` and `loss` are called on stand-ins.
`probe` draws, scores and trains on one batch of the real run, and the time of the rest is what that took, in
proportion. Nothing is written but to a temporary folder.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import numpy as np
import torch
from rich.table import Table

from . import sampling, scoring
from .build import build, build_algorithm, build_prompts
from .checkpoint import Checkpoints
from .config import RunConfig
from .data import count_rows
from .errors import ConfigError
from .interrupts import StopRequest
from .prompts import round_prompts
from .protocols import Algorithm, Writer
from .report import duration
from .rounds import Run, mixed_in_counts
from .sampling import Job
from .scoring import WeightedReward
from .store import SampleStore
from .training import Trainer, steps_and_rows
from .types import (
    Batch,
    Completion,
    Denoised,
    Draw,
    Example,
    Group,
    Phase,
    Prompt,
    RoundReport,
    Sample,
    Scored,
    Trajectory,
)

SHORT, LONG = 2, 6  # denoising steps of the two drawings that a probe extrapolates from
STEPS = 3  # optimizer steps of a probe; the first warms up


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one stage does, in one round or in all.

    Work(stage="train", images=2048, steps=64, forward=2048, passes=6144)
    """

    stage: str
    """`write`, `sample`, `score`, `log-ratio`, `train`, or `evaluate at G` for each guidance scale."""
    images: int = 0
    """Drawn or scored; in training, rows of its batches; of `write`, prompts."""
    scorings: int = 0
    """Images times the rewards that see them."""
    steps: int = 0
    """Of the optimizer."""
    forward: int = 0
    """Rows through the denoiser, each once."""
    passes: int = 0
    """The same as the run's ledger counts them: rows with gradients three times."""

    @property
    def units(self) -> int:
        """What the time of the stage is proportional to."""
        return self.scorings if self.stage == "score" else self.images

    def __add__(self, other: Work) -> Work:
        assert self.stage == other.stage
        names = ("images", "scorings", "steps", "forward", "passes")
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large a run is.

    Sizes(prompts=64, held_out=48, rows={"sample": 20, "evaluate at 1.5": 20, "evaluate at 1": 10})
    """

    prompts: int
    """In a round."""
    held_out: int
    data: int = 0
    """The user's own pictures or pairs."""
    guidance_scale: float = 1.0
    """Of sampling."""
    rows: Mapping[str, int]
    """Rows through the denoiser for one image: of `sample`, and of `evaluate at G` for each guidance scale. A text has
    a row for each token, of its prompt too."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured on this machine."""

    device: str
    seconds: float
    """That the probe took."""
    rows: Mapping[str, int]
    """As in `Sizes`."""
    seconds_each: Mapping[str, float]
    """Stage to seconds for each of `Work.units`."""
    bytes_each: Mapping[str, float]
    """Stage to bytes that an image takes in the store."""
    checkpoint_bytes: int = 0
    adapter_bytes: int = 0
    peak_bytes: int
    """Of the GPU, as torch allocated it; else of the process."""
    micro_batch_size: int | None = None
    """That training fell back to, where the configured one did not fit."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run as far as it can be known before."""

    config: RunConfig
    sizes: Sizes
    rounds: Sequence[Sequence[Work]]
    """The stages of each round; the first is the evaluation of the base."""
    probe: Probe | None = None

    @property
    def stages(self) -> list[Work]:
        """Each stage's work in the whole run."""
        total: dict[str, Work] = {}
        for work in (work for stages in self.rounds for work in stages):
            total[work.stage] = total[work.stage] + work if work.stage in total else work
        return sorted(total.values(), key=lambda work: work.stage.startswith("evaluate"))

    def seconds(self, work: Work) -> float | None:
        return self.probe.seconds_each[work.stage] * work.units if self.probe else None


def plan(config: RunConfig, *, probing: bool = True, allow_code: bool = False) -> Plan:
    """The plan of a run; without `probing`, the counts alone, for which no weights are loaded.

    Raises:
        ConfigError: what `build` refuses or, without `probing`, a pipeline whose guidance scale is not known here.
    """
    if not probing:
        algorithm = build_algorithm(config, allow_code=allow_code)
        guidance = _guidance_scale(config)
        data = count_rows(config.data.path, pairs=algorithm.pairs) if config.data else 0
        sizes = _sizes(config, _rows(config, algorithm, guidance), guidance, data)
        return Plan(config=config, sizes=sizes, rounds=counts(config, algorithm, sizes))
    with TemporaryDirectory() as scratch:
        elsewhere = config.model_copy(update={"output": scratch, "tracker": "none"})
        return probed(build(elsewhere, allow_code=allow_code), config)


def probed(run: Run, config: RunConfig) -> Plan:
    """The plan of `config` with a probe of `run`, which was built for it."""
    found = probe(run)
    sizes = _sizes(config, found.rows, _guidance_of(run.policy), len(run.data))
    return Plan(config=config, sizes=sizes, rounds=counts(config, run.algorithm, sizes), probe=found)


# -- sizes, without a model -------------------------------------------------------------------------------------------


def _sizes(config: RunConfig, rows: Mapping[str, int], guidance_scale: float, data: int) -> Sizes:
    prompts, held_out = map(len, build_prompts(config))
    prompts = min(config.prompts.per_round or prompts, prompts)
    return Sizes(prompts=prompts, held_out=held_out, data=data, guidance_scale=guidance_scale, rows=rows)


def _rows(config: RunConfig, algorithm: Algorithm, guidance_scale: float) -> dict[str, int]:
    """Rows for one image by the rule: one a step, and with guidance two. For one text, its tokens at most."""
    if config.model.modality == "text":
        tokens = _tokens_of_text(config) * _readings(algorithm)
        return {_evaluation(1): tokens} | ({"sample": tokens} if algorithm.samples else {})
    steps = config.sampling.num_inference_steps
    rows = {_evaluation(scale): rows_of_image(steps, scale) for scale in _scales(config, guidance_scale)}
    if algorithm.samples:
        own = steps if algorithm.noise_level is None else config.sampling.trajectory_steps or steps
        rows["sample"] = rows_of_image(own, guidance_scale)
    return rows


def rows_of_image(steps: int, guidance_scale: float) -> int:
    """Rows through the denoiser for one image: with guidance, each step predicts with the prompt and without.

    >>> rows_of_image(25, 7.5)
    50
    """
    return steps * (2 if guidance_scale > 1 else 1)


def _readings(algorithm: Algorithm) -> int:
    """How often a sampled text goes through a model: a value head and the base model each read it once more."""
    return 3 if "log_prob_and_value" in algorithm.needs else 1


def _tokens_of_text(config: RunConfig) -> int:
    """Of the mean prompt, and of the longest completion."""
    from .pipelines.llm import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    prompts = {prompt.text for group in build_prompts(config) for prompt in group}
    lengths = [len(ids) for ids in tokenizer([*prompts]).input_ids]
    return config.sampling.max_new_tokens + round(sum(lengths) / len(lengths))


def _guidance_of(policy: Any) -> float:
    """A language model knows none."""
    return getattr(policy, "guidance_scale", 1.0)


def _scales(config: RunConfig, guidance_scale: float) -> list[float]:
    return config.evaluation.guidance_scales or [guidance_scale]


def _evaluation(scale: float) -> str:
    return f"evaluate at {scale:g}"


def _guidance_scale(config: RunConfig) -> float:
    """Of sampling: the configured one, or the default of the pipeline's class."""
    if config.model.modality == "text":
        return 1.0
    if config.sampling.guidance_scale is not None:
        return config.sampling.guidance_scale
    import diffusers

    from .pipelines.replay import GuidanceArgument
    from .shapes import WEIGHTS

    path = str(WEIGHTS / "pipeline") if config.model.path == "shapes" else config.model.path
    try:
        index = diffusers.DiffusionPipeline.load_config(path, revision=config.model.revision)
        kind = getattr(diffusers, index["_class_name"])
    except Exception as error:  # the hub and diffusers each raise their own
        raise ConfigError(
            f"model.path {config.model.path!r}: the guidance scale of this pipeline is not known here "
            f"({' '.join(str(error).split())[:200]}); set sampling.guidance_scale"
        ) from error
    pipeline = object.__new__(kind)  # without its weights
    pipeline.register_to_config()
    return float(GuidanceArgument(pipeline).default)


# -- counts: functions of the settings, the algorithm and the sizes ----------------------------------------------------


def counts(config: RunConfig, algorithm: Algorithm, sizes: Sizes) -> list[list[Work]]:
    """The work of each stage of each round, the base's evaluation first, if nothing but the budget ends the run early.

    Rewards are taken to be drawn from a standard normal distribution, as standardized ones nearly are, and to rise from
    round to round: it matters to algorithms that select by a threshold, or decide by evaluations what a round is.
    """
    rounds = [_evaluations(config, sizes)]
    groups = _groups(config, algorithm, sizes)
    data = _data(algorithm, sizes)
    reports = [_report(0, Phase(grown=0), 0)]
    replayable = spent = 0
    for round in range(1, config.rounds + 1):
        phase = algorithm.phase(round, reports)
        chosen = algorithm.select(groups, round=round, seed=config.seed, phase=phase) if algorithm.samples else data
        mixed = _mixed_in(config, algorithm, sizes, len(chosen), replayable) if algorithm.samples else 0
        stages = _sampling(config, algorithm, sizes, first=round == 1) if phase.grown == round else []
        stages += _log_ratio(config, algorithm, sizes)
        stages.append(_training(config, algorithm, sizes, [*chosen, *data], len(chosen) + mixed))
        spent += sum(work.passes for work in stages)
        last = round == config.rounds or spent >= (config.budget or math.inf)
        rounds.append(stages + (_evaluations(config, sizes) if last or round % config.evaluation.every == 0 else []))
        reports.append(_report(round, phase, len(chosen)))
        replayable += sum(not _is_data(example) for example in chosen)
        if last:
            break
    return rounds


def _sampling(config: RunConfig, algorithm: Algorithm, sizes: Sizes, *, first: bool) -> list[Work]:
    if not algorithm.samples:
        return []
    images = sizes.prompts * config.sampling.samples_per_prompt
    rows = images * sizes.rows["sample"]
    scored = images + (sizes.data if algorithm.scores_data and first else 0)
    return [
        *([Work(stage="write", images=sizes.prompts)] if config.prompts.writer else []),
        Work(stage="sample", images=images, forward=rows, passes=rows),
        Work(stage="score", images=scored, scorings=scored * len(config.rewards)),
    ]


def _log_ratio(config: RunConfig, algorithm: Algorithm, sizes: Sizes) -> list[Work]:
    """The errors of the current model and of the reference on each sample."""
    if not (algorithm.samples and algorithm.needs_log_ratio):
        return []
    images = sizes.prompts * config.sampling.samples_per_prompt + (sizes.data if algorithm.scores_data else 0)
    rows = images * 2 * rows_of_image(1, config.training.guidance_scale) * _row(config, algorithm, sizes)
    return [Work(stage="log-ratio", images=images, forward=rows, passes=rows)]


def _row(config: RunConfig, algorithm: Algorithm, sizes: Sizes) -> int:
    """What one sample in training counts: of a text, its tokens."""
    return max(sizes.rows.values()) // _readings(algorithm) if config.model.modality == "text" else 1


def _training(config: RunConfig, algorithm: Algorithm, sizes: Sizes, examples: Sequence[Example], count: int) -> Work:
    steps, rows = steps_and_rows(config.training, count)
    batch = examples[: config.training.batch_size] if rows else []
    if not batch:
        return Work(stage="train")
    counter = _Counter(guided=config.training.guidance_scale > 1, row=_row(config, algorithm, sizes))
    draw = Draw(
        noise=torch.zeros(len(batch), 1, 1, 1),
        quantile_B=torch.full((len(batch),), 0.5),
        dropped_B=torch.zeros(len(batch), dtype=torch.bool),
    )
    algorithm.loss(counter, Batch(examples=batch, weight_B=torch.ones(len(batch)), draw=draw, updates=1))
    forward, passes = (round(rows * count / len(batch)) for count in (counter.forward, counter.passes))
    return Work(stage="train", images=rows, steps=steps, forward=forward, passes=passes)


def _mixed_in(config: RunConfig, algorithm: Algorithm, sizes: Sizes, own: int, replayable: int) -> int:
    """Examples from earlier rounds and of the user's own data, each in its share of the whole, beside `own`."""
    data = config.data.share if config.data and not algorithm.scores_data else 0.0
    return sum(mixed_in_counts(own, [(replayable, config.algorithm.replay), (sizes.data, data)]))


def _evaluations(config: RunConfig, sizes: Sizes) -> list[Work]:
    images = sizes.held_out * config.evaluation.seeds_per_prompt
    scorings = images * (len(config.rewards) + len(config.evaluation.rewards))
    return [
        Work(stage=stage, images=images, scorings=scorings, forward=images * rows, passes=images * rows)
        for stage, rows in sizes.rows.items()
        if stage != "sample"
    ]


def _report(round: int, phase: Phase, selected: int) -> RoundReport:
    """As much of a round as can be known before it."""
    return RoundReport(
        round=round, requested=0, scored=0, failed=0, skipped=0, selected=selected, rewards={}, training={}, phase=phase
    )


# -- stand-ins, on which the algorithm's own functions are called ------------------------------------------------------


def _groups(config: RunConfig, algorithm: Algorithm, sizes: Sizes) -> list[Group]:
    """A round's samples, and the user's own data where they are selected from, with rewards by chance."""
    if not algorithm.samples:
        return []
    trajectory = _trajectory(config, algorithm, sizes)
    texts = {f"prompt {p}": config.sampling.samples_per_prompt for p in range(sizes.prompts)}
    texts |= {f"data {p}": 1 for p in range(sizes.data if algorithm.scores_data else 0)}
    groups = [[_sample(text, k, trajectory) for k in range(count)] for text, count in texts.items()]
    return _with_chance_rewards(groups)


def _with_chance_rewards(groups: Sequence[Sequence[Sample]]) -> list[Group]:
    rng = np.random.default_rng(0)
    return [
        Group(
            prompt=samples[0].prompt,
            samples=tuple(Scored(sample=s, parts={}, reward=float(rng.standard_normal())) for s in samples),
        )
        for samples in groups
    ]


def _trajectory(config: RunConfig, algorithm: Algorithm, sizes: Sizes) -> Trajectory | None:
    if algorithm.noise_level is None or config.model.modality == "text":
        return None
    steps = config.sampling.trajectory_steps or config.sampling.num_inference_steps
    return Trajectory(
        states=torch.zeros(steps + 1, 1, 1, 1),
        times=torch.arange(steps, -1.0, -1.0),
        log_prob_T=torch.zeros(steps),
        noise_level=algorithm.noise_level,
        guidance_scale=sizes.guidance_scale,
    )


def _sample(text: str, k: int, trajectory: Trajectory | None = None) -> Sample:
    prompt = Prompt(text=text)
    latents, image = torch.zeros(1, 1, 1), torch.zeros(3, 1, 1, dtype=torch.uint8)
    number = torch.zeros(1)
    token = Completion(tokens_T=number.long(), log_prob_T=number, value_T=number, reference_log_prob_T=number)
    sample = Sample(id=f"{text}-{k}", prompt=prompt, seed=k, image=image, latents=latents, trajectory=trajectory)
    return replace(sample, completion=token)  # of either modality


def _data(algorithm: Algorithm, sizes: Sizes) -> list[Example]:
    examples = [Example(sample=_sample(f"data {i}", 0)) for i in range(sizes.data)]
    return [replace(e, rejected=e.sample) for e in examples] if algorithm.pairs else examples


def _is_data(example: Example) -> bool:
    return example.sample.prompt.text.startswith("data ")


class _Counter:
    """In the place of a policy: counts the rows that a loss sends through the denoiser."""

    modality: Literal["image"] = "image"

    def __init__(self, *, guided: bool, row: int):
        self._guided, self._row = guided, row
        self.forward = self.passes = 0

    def error(self, samples: Sequence[Sample], draw: Draw) -> torch.Tensor:
        return self._predicted(len(samples)).flatten(1).mean(1)

    def denoised(self, samples: Sequence[Sample], draw: Draw) -> Denoised:
        prediction = self._predicted(len(samples))
        return Denoised(x0=torch.zeros_like(prediction), predicted_x0=prediction, prediction=prediction)

    def log_prob(self, samples: Sequence[Sample], steps: Sequence[int | None]) -> torch.Tensor:
        trajectory = samples[0].trajectory
        for _ in range(rows_of_image(1, trajectory.guidance_scale if trajectory else 1.0)):
            self._count(len(samples))
        return torch.zeros(len(samples), 1, requires_grad=True)

    def token_log_prob(self, samples: Sequence[Sample]) -> torch.Tensor:
        self._count(len(samples))
        return torch.zeros(len(samples), 1, requires_grad=True)

    def log_prob_and_value(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        self._count(len(samples))
        return torch.zeros(len(samples), 1, requires_grad=True), torch.zeros(len(samples), 1, requires_grad=True)

    def parameters(self) -> list[torch.nn.Parameter]:
        return []

    def reference(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _predicted(self, rows: int) -> torch.Tensor:
        self._count(rows)
        if self._guided:
            with torch.no_grad():
                self._count(rows)
        return torch.zeros(rows, 1, 1, 1, requires_grad=True)

    def _count(self, rows: int) -> None:
        self.forward += rows * self._row
        self.passes += rows * self._row * (3 if torch.is_grad_enabled() else 1)


# -- the probe --------------------------------------------------------------------------------------------------------


_Kind = tuple[Any, float, float | None]
"""Images of one cost: the policy that draws them, the guidance scale, the noise level."""


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """A batch of images, and what drawing and storing it took."""

    samples: Sequence[Sample]
    seconds: float
    passes: float
    bytes: float


def probe(run: Run) -> Probe:
    """Draw one batch of images in few steps, score it and train on it, and measure. The adapter of `run` is changed."""
    began = time.perf_counter()
    config, policy = run.config, cast(Any, run.policy)
    dealt_out = round_prompts(run.prompts, round=0, per_round=config.prompts.per_round, seed=config.seed)
    prompts, writing = _written(run.writer, dealt_out)
    jobs = sampling.jobs(prompts, config.sampling.samples_per_prompt, run_seed=config.seed, round=1)
    jobs = jobs[: max(2, config.sampling.batch_size)]  # with fewer than two there is nothing to select
    kinds: dict[str, _Kind] = {
        _evaluation(scale): (policy, scale, None) for scale in _scales(config, _guidance_of(policy))
    }
    if run.algorithm.samples:
        sampler = cast(Any, run.teacher or policy)
        kinds["sample"] = (sampler, _guidance_of(sampler), run.algorithm.noise_level)
    drawn = {kind: _drawn(*kind, jobs) for kind in dict.fromkeys(kinds.values())}
    of_stage = {stage: drawn[kind] for stage, kind in kinds.items()}
    samples = [replace(sample, flaw=None) for sample in next(reversed(of_stage.values())).samples]
    scoring_seconds = {w.reward.name: _scoring_seconds(w, samples, config) for w in (*run.rewards, *run.watched)}
    judging = sum(scoring_seconds.values())
    trainer, seconds_a_row = _trained(run, samples)
    return Probe(
        device=str(run.accelerator.device),
        rows={stage: round(batch.passes / len(jobs)) for stage, batch in of_stage.items()},
        bytes_each={stage: batch.bytes / len(jobs) for stage, batch in of_stage.items()},
        seconds_each={
            stage: batch.seconds / len(jobs) + (0 if stage == "sample" else judging)
            for stage, batch in of_stage.items()
        }
        | {
            "write": writing,
            "score": sum(scoring_seconds[w.reward.name] for w in run.rewards) / len(run.rewards),
            "log-ratio": _log_ratio_seconds(run, samples),
            "train": seconds_a_row,
        },
        checkpoint_bytes=sum(map(_bytes, trainer.state().values())),
        adapter_bytes=_bytes(policy.adapter_state()),
        peak_bytes=_peak_bytes(run.accelerator.device),
        micro_batch_size=trainer.micro_batch_size,
        seconds=time.perf_counter() - began,
    )


def _written(writer: Writer | None, openings: Sequence[Prompt]) -> tuple[Sequence[Prompt], float]:
    """The prompts of the first round, and the seconds that writing each has taken."""
    if writer is None:
        return openings, 0.0
    writer(openings[:1], round=1)  # the model is loaded
    began = time.perf_counter()
    prompts = writer(openings, round=1)
    return prompts, (time.perf_counter() - began) / len(openings)


def _drawn(policy: Any, scale: float, noise_level: float | None, jobs: Sequence[Job]) -> _Drawn:
    """One batch in all its steps. More than LONG are not taken: each further one is as those between SHORT and LONG."""
    if policy.modality == "text":
        _draw(policy, scale, noise_level, jobs[:1])  # kernels are chosen
        return _draw(policy, scale, noise_level, jobs)
    steps = policy.num_inference_steps if noise_level is None else policy.trajectory_steps
    _draw(policy, scale, noise_level, jobs, min(SHORT, steps))  # kernels are chosen, prompts encoded
    if steps <= LONG:
        return _draw(policy, scale, noise_level, jobs, steps)
    short, long = (_draw(policy, scale, noise_level, jobs, n) for n in (SHORT, LONG))
    further = (steps - LONG) / (LONG - SHORT)
    return _Drawn(
        samples=long.samples,
        seconds=long.seconds + further * max(0.0, long.seconds - short.seconds),
        passes=long.passes + further * (long.passes - short.passes),
        bytes=long.bytes + further * max(0.0, long.bytes - short.bytes) if noise_level is not None else long.bytes,
    )


def _draw(
    policy: Any, scale: float, noise_level: float | None, jobs: Sequence[Job], steps: int | None = None
) -> _Drawn:
    prompts, seeds = [job.prompt for job in jobs], [job.seed for job in jobs]
    with TemporaryDirectory() as scratch, _steps(policy, steps) if steps else nullcontext():
        began, passes = time.perf_counter(), policy.passes
        made = policy.sample(prompts, seeds, guidance_scale=scale, noise_level=noise_level)
        samples = [replace(sample, id=job.id) for sample, job in zip(made, jobs, strict=True)]
        SampleStore(Path(scratch)).write_samples(1, 0, samples)
        return _Drawn(
            samples=samples,
            seconds=time.perf_counter() - began,
            passes=policy.passes - passes,
            bytes=sum(file.stat().st_size for file in Path(scratch).rglob("*.parquet")),
        )


@contextmanager
def _steps(policy: Any, steps: int) -> Iterator[None]:
    before = policy.num_inference_steps, policy.trajectory_steps
    policy.num_inference_steps = policy.trajectory_steps = steps
    try:
        yield
    finally:
        policy.num_inference_steps, policy.trajectory_steps = before


def _scoring_seconds(weighted: WeightedReward, samples: Sequence[Sample], config: RunConfig) -> float:
    """Of one image. Rewards remember what they have seen, so that one half warms up and the other is timed."""
    half = len(samples) // 2
    for part in (samples[:half], samples[half:]):
        began = time.perf_counter()
        scoring.score_parts(part, weighted.reward, batch_size=config.sampling.batch_size, max_failed=1.0)
    return (time.perf_counter() - began) / len(part)


def _trained(run: Run, samples: Sequence[Sample]) -> tuple[Trainer, float]:
    """The trainer after a few optimizer steps on what the algorithm selects of `samples`, and the seconds of a row:
    NaN where it selects nothing."""
    groups = _with_chance_rewards([list(of_prompt) for _, of_prompt in groupby(samples, lambda s: s.prompt)])
    phase = run.algorithm.phase(1, [_report(0, Phase(grown=0), 0)])
    examples = list(run.data)
    if run.algorithm.samples:
        examples = run.algorithm.select(groups, round=1, seed=run.config.seed, phase=phase)
    settings = run.config.training.model_copy(update={"steps": STEPS})
    trainer = Trainer(
        run.policy, run.algorithm, settings, seed=run.config.seed, rounds=run.config.rounds, accelerator=run.accelerator
    )
    times: list[float] = []
    trainer.train(examples, round=1, after_step=lambda step, metrics: times.append(time.perf_counter()))
    return trainer, (times[-1] - times[0]) / (STEPS - 1) / settings.batch_size if times else math.nan


def _log_ratio_seconds(run: Run, samples: Sequence[Sample]) -> float:
    """Of one image."""
    if not (run.algorithm.samples and run.algorithm.needs_log_ratio):
        return 0.0
    scored = [Scored(sample=sample, parts={}, reward=0.0) for sample in samples]
    size = run.config.sampling.batch_size
    began = time.perf_counter()
    scoring.with_log_ratio(scored, run.policy, seed=0, round=1, batch_size=size, stop=StopRequest())
    return (time.perf_counter() - began) / len(samples)


def _bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# -- what is shown ----------------------------------------------------------------------------------------------------


def table(plan: Plan) -> Table:
    """The stages of the run, a line each, and their sum."""
    columns = ("", _noun(plan), "scorings", "steps", "forward", "passes", "round 1", *(["time"] if plan.probe else []))
    rows = Table(box=None, pad_edge=False)
    for column in columns:
        rows.add_column(column, justify="right" if column else "left", no_wrap=True)
    first = {work.stage: work.passes for work in plan.rounds[1]}
    for work in plan.stages:
        numbers = (work.images, work.scorings, work.steps, work.forward, work.passes, first.get(work.stage, 0))
        measured = [duration(plan.seconds(work))] if plan.probe else []
        stage = work.stage.removesuffix(" at 1") if plan.config.model.modality == "text" else work.stage
        rows.add_row(stage, *(f"{number:,}" if number else "" for number in numbers), *measured)
    sums = [sum(work.forward for work in plan.stages), sum(work.passes for work in plan.stages), sum(first.values())]
    measured = [duration(total_seconds(plan))] if plan.probe else []
    rows.add_row("in all", "", "", "", *(f"{number:,}" for number in sums), *measured, style="bold")
    return rows


def _noun(plan: Plan) -> str:
    return {"image": "images", "text": "texts"}[plan.config.model.modality]


def total_seconds(plan: Plan) -> float:
    """Of all stages; NaN without a probe, or where one stage could not be measured."""
    return sum(math.nan if (seconds := plan.seconds(work)) is None else seconds for work in plan.stages)


def lines(plan: Plan) -> list[str]:
    """What the table cannot say."""
    config, sizes, rounds = plan.config, plan.sizes, len(plan.rounds) - 1
    drawn, held_out = config.sampling.samples_per_prompt, config.evaluation.seeds_per_prompt
    evaluations = sum(any(work.stage.startswith("evaluate") for work in stages) for stages in plan.rounds)
    rows = "tokens through the model" if config.model.modality == "text" else "rows through the denoiser"
    said = [
        f"rounds: {rounds}, each of {sizes.prompts} prompts x {drawn} = {sizes.prompts * drawn} {_noun(plan)}"
        if "sample" in sizes.rows
        else f"rounds: {rounds}, each on {sizes.data} examples of your own data",
        f"evaluations: {evaluations}, the base's among them, of {sizes.held_out} prompts x {held_out}",
        f"forward: {rows}; passes: the same as the run's ledger and `budget` count them, "
        "those with gradients three times; round 1: its passes",
    ]
    if config.prompts.writer:
        said.append("write: prompts by a language model, not images; its tokens are no passes")
    if rounds < config.rounds:
        said.append(f"the budget of {config.budget:,} passes is spent after {rounds} of {config.rounds} rounds")
    if config.evaluation.plateau_rounds is not None:
        said.append(f"it may end sooner, on a plateau of {config.evaluation.plateau_rounds} evaluations")
    if not any(work.images for work in plan.stages if work.stage == "train"):
        said.append("nothing was selected from standard normal rewards; a threshold of the algorithm may be for others")
    return said + (_measured_lines(plan, plan.probe) if plan.probe else [])


def _measured_lines(plan: Plan, probe: Probe) -> list[str]:
    where = "the process" if probe.device == "cpu" else probe.device
    pictures, checkpoints = disk_bytes(plan, probe)
    said = [
        f"time: {duration(total_seconds(plan))}, estimated from a probe of {probe.seconds:.0f} seconds on "
        f"{probe.device}, for one process; loading, reports and checkpoints come on top",
        f"memory: {size(probe.peak_bytes)}, the peak of {where} in the probe",
        f"disk: {size(pictures + checkpoints)}, of it {size(pictures)} samples",
    ]
    training = plan.config.training
    if (probe.micro_batch_size or math.inf) < (training.micro_batch_size or training.batch_size):
        said.append(f"training did not fit into the memory but by {probe.micro_batch_size} rows at once")
    return said


def disk_bytes(plan: Plan, probe: Probe) -> tuple[float, int]:
    """Of the samples of all rounds and evaluations; of the checkpoints that are kept at once and the adapter."""
    pictures = sum(work.images * probe.bytes_each.get(work.stage, 0.0) for work in plan.stages)
    config, rounds = plan.config, len(plan.rounds) - 1
    # The newest ones, the best round's where it is older, and one within a round.
    kept = min(rounds, Checkpoints(config.folder).keep + 1) + bool(config.training.save_every_steps)
    return pictures, kept * probe.checkpoint_bytes + probe.adapter_bytes


def size(count: float) -> str:
    """`43 MB`, `1.2 GB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"

"""The loop: sample, score, select, train, evaluate, publish; one call a stage."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator

from . import objectives, sampling, scoring
from .card import HERE, provenance, write_card
from .checkpoint import Checkpoint, Checkpoints, RunLock, clean_staging, publish_folder, sort_header, write_file
from .config import RunConfig, difference, dump_config, is_identity, load_config, parse_config
from .errors import ResumeError
from .evaluation import Embed, Verdict, best_held_out, measure, picture_moments, run_verdict, trend
from .interrupts import StopRequest, stop_requests
from .ledger import Ledger
from .prompts import load_prompts, round_prompts, save_prompts
from .protocols import Algorithm, Policy, Writer
from .report import append_metrics, read_metrics, truncate_metrics, write_report
from .sampling import Job
from .scoring import WeightedReward
from .sharding import sharded
from .store import SampleStore
from .training import Trainer
from .types import Evaluation, Example, Group, Moments, Phase, Prompt, RoundReport, Sample, Scored, StageCost

logger = logging.getLogger(__name__)

HELD_OUT_ROUND = 1 << 30  # seeds of evaluation: those of a round that no run reaches
SHOWN = 8  # of the best and of the worst samples, in the report
EMPTY_ROUNDS = 2  # rounds in a row that select nothing, after which the run stops


class Display(Protocol):
    """What a run tells the person who watches it."""

    def stage(self, round: int, name: str, total: int) -> None: ...
    def advance(self, count: int = 1, metrics: Mapping[str, float] | None = None) -> None: ...
    def round_done(self, report: RoundReport) -> None: ...
    def say(self, message: str) -> None: ...


class Quiet:
    """Tells nothing."""

    def stage(self, round: int, name: str, total: int) -> None:
        pass

    def advance(self, count: int = 1, metrics: Mapping[str, float] | None = None) -> None:
        pass

    def round_done(self, report: RoundReport) -> None:
        pass

    def say(self, message: str) -> None:
        logger.info(message)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a run needs, put together by `raftdiff.build`."""

    config: RunConfig
    policy: Policy
    algorithm: Algorithm
    rewards: Sequence[WeightedReward]
    """What is trained on, and with weight 0 what is watched on every sample."""
    watched: Sequence[WeightedReward]
    """What is only measured, in evaluations."""
    embed: Embed | None = None
    """What diversity is measured with; if absent, the embeddings of the first reward that gives them."""
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    data: Sequence[Example] = ()
    """The user's own pictures or preferences: mixed into each round's examples, or all there is to train on."""
    teacher: Policy | None = None
    writer: Writer | None = None
    """What makes each round's prompts of those dealt out of `prompts`, which then are openings."""
    accelerator: Accelerator = field(default_factory=Accelerator)
    display: Display = field(default_factory=Quiet)
    track: Callable[[int, Mapping[str, float]], None] = lambda round, values: None
    """Sends a round's curves to the tracker."""
    load_line: str = ""
    """The line of Python that loads the result."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished run leaves."""

    folder: Path
    lora_path: Path
    """The best round's adapter, as the model's own library loads it."""
    report_path: Path
    reports: tuple[RoundReport, ...]
    verdict: Verdict
    load_line: str = ""
    """The line of Python that loads it."""

    @property
    def base(self) -> tuple[Evaluation, ...]:
        return self.reports[0].evaluations

    @property
    def aligned(self) -> tuple[Evaluation, ...]:
        """The evaluations of the round whose adapter is exported."""
        return _exported(self.reports, self.verdict).evaluations


def run_rounds(run: Run, *, resume: bool = False) -> Result:
    """Align `run.policy`: the whole of the method.

    Args:
        resume: go on with what the run folder holds; without it the folder must be new.

    Raises:
        ResumeError: the folder holds a run already, or one that cannot be gone on with as asked.
        RunLockedError: another process is writing to the folder.
        Interrupted: SIGTERM or Ctrl-C; `resume` goes on from there.
    """
    main = run.accelerator.is_main_process
    with RunLock(run.config.folder) if main else nullcontext(), stop_requests() as stop:
        stages = _Stages(run, stop)
        done, step = stages.begin(resume)
        reports = read_metrics(stages.metrics)
        if not reports:
            reports.append(stages.base())
        for round in range(done + 1, run.config.rounds + 1):
            if reason := stages.reason_to_stop(reports):
                run.display.say(f"stopped after round {done}: {reason}")
                break
            phase = run.algorithm.phase(round, reports)
            samples = stages.sample(phase)
            groups, moments = stages.score(phase, samples, reports)
            examples = stages.select(round, phase, groups)
            training = stages.train(round, phase, examples, first_step=step)
            step = 0
            evaluations = stages.evaluate(round, reports)
            reports.append(stages.publish(round, phase, groups, moments, examples, training, evaluations, reports))
            done = round
        return stages.finish(reports)


class _Stages:
    """The stages of one run with what they share."""

    def __init__(self, run: Run, stop: StopRequest):
        self.run, self.config, self.stop = run, run.config, stop
        self.folder = run.config.folder
        self.metrics = self.folder / "metrics.jsonl"
        self.store = SampleStore(self.folder)
        self.checkpoints = Checkpoints(self.folder / "checkpoints")
        sampler = run.teacher or run.policy
        self.ledger = Ledger(lambda: run.policy.passes + (sampler.passes if sampler is not run.policy else 0))
        self.trainer = Trainer(
            run.policy,
            run.algorithm,
            run.config.training,
            seed=run.config.seed,
            rounds=run.config.rounds,
            accelerator=run.accelerator,
        )
        # A policy that knows no guidance, such as a language model, is one without guidance.
        self.scales = run.config.evaluation.guidance_scales or [getattr(run.policy, "guidance_scale", 1.0)]
        self.weights = {w.reward.name: w.weight for w in run.rewards}
        self._base: tuple[Evaluation, ...] = ()

    # -- beginning and end ----------------------------------------------------------------------------------------

    def begin(self, resume: bool) -> tuple[int, int]:
        """(rounds done, optimizer steps done in the next) of the run that the folder holds, with its state loaded."""
        config_file = self.folder / "config.yaml"
        started = config_file.exists()
        if started and not resume:
            raise ResumeError(
                f"{self.folder} holds a run already: `raftdiff resume {self.folder}` goes on with it, "
                "or choose another --name"
            )
        if resume and not started:
            raise ResumeError(f"{self.folder} holds no run to resume: it has no config.yaml")
        found: Checkpoint | None = None
        if started:
            found, skipped = self.checkpoints.newest()
            # A checkpoint knows what it was made with; config.yaml may have been edited since.
            begun = parse_config(found.meta["config"], where=str(found.folder)) if found else load_config(config_file)
            begun = begun.model_copy(update={"output": self.config.output, "name": self.config.name})
            changed = difference(begun, self.config)
            fixed = {key: values for key, values in changed.items() if is_identity(key)}
            if fixed:
                lines = "; ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in fixed.items())
                raise ResumeError(f"{self.folder} was begun with other settings ({lines}): use a new --name for those")
            for key, (old, new) in changed.items():
                self.run.display.say(f"resuming with {key}: {old!r} -> {new!r}")
            for line in skipped:
                self.run.display.say(line)
            # The first round is in the metrics a moment before its checkpoint is there.
            if found is None and (skipped or read_metrics(self.metrics)[2:]):
                raise ResumeError(f"{self.folder}: no checkpoint can be read; start again with another --name")
        self.run.accelerator.wait_for_everyone()  # no process writes before all have read
        if self.run.accelerator.is_main_process:
            clean_staging(self.folder)
            self._forget_after(found.round if found else 0)
            write_file(config_file, dump_config(self.config).encode())
        self.run.accelerator.wait_for_everyone()
        if found is None:
            return 0, 0
        self._load(found)
        where = f"round {found.round}" + (f" and {found.step} steps" if found.step else "")
        self.run.display.say(f"resumed after {where} from {found.folder}")
        return found.round, found.step

    def _forget_after(self, round: int) -> None:
        """Remove what is of a course that the run leaves by going on after `round`: the samples of the next round are
        the model's as it is then, but nothing later is sure to be."""
        truncate_metrics(self.metrics, round)
        stores = {self.store: round + 1}
        stores |= {SampleStore(folder): round for folder in (self.folder / "evaluation").glob("guidance-*")}
        for store, last in stores.items():
            for later in store.rounds():
                if later > last:
                    store.discard_round(later)

    def _load(self, checkpoint: Checkpoint) -> None:
        if checkpoint.meta["fingerprint"] != self.run.policy.fingerprint():
            raise ResumeError(
                f"{checkpoint.folder} was made from another base model "
                f"({checkpoint.meta['fingerprint']}, here {self.run.policy.fingerprint()})"
            )
        self.trainer.load_state({name: checkpoint.tensors(name) for name in checkpoint.meta["parts"]})

    def finish(self, reports: Sequence[RoundReport]) -> Result:
        """The last word: the best round's adapter put on the policy and exported, and the report."""
        judged = self.verdict(reports)
        best = _exported(reports, judged).round
        lora = self.folder / "lora"
        if best:  # else no round was evaluated, and the adapter stays as it is
            checkpoint = self.checkpoints.load(best)
            self.run.policy.load_adapter(checkpoint.tensors(_exported_part(checkpoint)))
        if self.run.accelerator.is_main_process:
            with publish_folder(lora, meta={"round": best, "fingerprint": self.run.policy.fingerprint()}) as staging:
                self.run.policy.export(staging, provenance(self.config))
                for file in staging.rglob("*.safetensors"):
                    sort_header(file)
                before, after = self._pictures(reports)
                write_card(
                    staging,
                    config=self.config,
                    modality=self.run.policy.modality,
                    reports=reports,
                    verdict=judged,
                    before=before,
                    after=after,
                    load_line=self.run.load_line.replace(str(lora), HERE),
                )
            self.report(reports)
        self.run.accelerator.wait_for_everyone()
        return Result(
            folder=self.folder,
            lora_path=lora,
            report_path=self.folder / "report.html",
            reports=tuple(reports),
            verdict=judged,
            load_line=self.run.load_line,
        )

    # -- the stages -----------------------------------------------------------------------------------------------

    def sample(self, phase: Phase) -> list[Sample]:
        """The samples of the phase, made or, where an earlier round has grown them, read again."""
        if not self.run.algorithm.samples:
            return []
        settings, round = self.config.sampling, phase.grown
        prompts = self.prompts(round)
        wanted = sampling.jobs(prompts, settings.samples_per_prompt, run_seed=self.config.seed, round=round)
        self.run.display.stage(round, "sample", len(wanted))
        with self.ledger.stage("sample"), self.trainer.averaged():
            return self._sample(
                self.run.teacher or self.run.policy,
                wanted,
                self.store,
                round,
                noise_level=self.run.algorithm.noise_level,
            )

    def prompts(self, round: int) -> list[Prompt]:
        """Those that are dealt out to a round or, where there is a writer, written from these: once in a run, by the
        main process, and from then on read."""
        dealt_out = round_prompts(
            self.run.prompts, round=round - 1, per_round=self.config.prompts.per_round, seed=self.config.seed
        )
        if self.run.writer is None:
            return dealt_out
        file = self.folder / "prompts" / f"round-{round:04d}.jsonl"
        self.run.display.stage(round, "write", len(dealt_out))
        with self.ledger.stage("write"):
            if self.run.accelerator.is_main_process and not file.exists():
                save_prompts(file, self.run.writer(dealt_out, round=round))
            self.run.accelerator.wait_for_everyone()
        self.run.display.advance(len(dealt_out))
        getattr(self.run.policy, "forget_prompts", lambda: None)()  # those of earlier rounds hardly come again
        return load_prompts(file)

    def _sample(
        self,
        policy: Policy,
        wanted: Sequence[Job],
        store: SampleStore,
        round: int,
        *,
        scale: float | None = None,
        noise_level: float | None = None,
    ) -> list[Sample]:
        return sampling.sample(
            policy,
            wanted,
            store=store,
            round=round,
            batch_size=self.config.sampling.batch_size,
            accelerator=self.run.accelerator,
            stop=self.stop,
            guidance_scale=scale,
            noise_level=noise_level,
            on_batch=self.run.display.advance,
        )

    def score(
        self, phase: Phase, samples: Sequence[Sample], reports: Sequence[RoundReport]
    ) -> tuple[list[Group], dict[str, Moments]]:
        """The samples with their rewards, and the user's own data with theirs where the algorithm selects from both;
        and the running statistics of the rewards, with these samples in them."""
        moments = dict(reports[-1].moments)
        if not samples:
            return [], moments
        round = phase.grown
        self.run.display.stage(round, "score", len(samples) * len(self.run.rewards))
        with self.ledger.stage("score"):
            values = self._score(samples, self.run.rewards, self.store, round)
            scoring.warn_of_constants(values, self.weights)
            if not phase.improve:  # else they are in them already
                moments = objectives.with_values(moments, values)
            if self.run.algorithm.scores_data and self.run.data:
                data = [example.sample for example in self.run.data]
                of_data = self._score(data, self.run.rewards, self.store, 0)  # once in a run
                samples = [*samples, *data]
                values = {name: torch.cat([value_N, of_data[name]]) for name, value_N in values.items()}
            how = replace(scoring.combination(self.config, reports, grown=round), moments=moments)
            scored = scoring.combined(samples, values, how)
        if self.run.algorithm.needs_log_ratio:
            self.run.display.stage(round, "log-ratio", len(samples))
            with self.ledger.stage("log-ratio"):
                scored = scoring.with_log_ratio(
                    scored,
                    self.run.policy,
                    seed=self.config.seed,
                    round=round,
                    batch_size=self.config.sampling.batch_size,
                    stop=self.stop,
                    fixed=sharded(self.run.accelerator),
                )
        return scoring.by_prompt(scored), moments

    def _score(
        self, samples: Sequence[Sample], rewards: Sequence[WeightedReward], store: SampleStore, round: int
    ) -> dict[str, torch.Tensor]:
        return {
            weighted.reward.name: scoring.score_stored(
                samples,
                weighted.reward,
                store=store,
                round=round,
                batch_size=self.config.sampling.batch_size,
                max_failed=self.config.max_failed,
                accelerator=self.run.accelerator,
                stop=self.stop,
                progress=self._progress(),
            )
            for weighted in rewards
        }

    def _progress(self) -> scoring.Progress:
        seen = 0

        def progress(name: str, done: int, total: int) -> None:
            nonlocal seen
            self.stop.check()
            self.run.display.advance(done - seen)
            seen = done

        return progress

    def select(self, round: int, phase: Phase, groups: Sequence[Group]) -> list[Example]:
        """What the round trains on, with what it chose of its own samples in the store."""
        if not self.run.algorithm.samples:
            return list(self.run.data)
        with self.ledger.stage("select"):
            chosen = self.run.algorithm.select(groups, round=round, seed=self.config.seed, phase=phase)
            if self.run.accelerator.is_main_process:
                self.store.write_selection(round, chosen, grown=phase.grown)
            return chosen + self._mixed_in(round, len(chosen))

    def _mixed_in(self, round: int, own: int) -> list[Example]:
        """What earlier rounds selected and the user's own data, each drawn to its share of the whole, beside `own`
        examples of the round."""
        data = () if self.run.algorithm.scores_data else self.run.data
        sources = [
            (self._selected_before(round), self.config.algorithm.replay),
            (data, self.config.data.share if self.config.data else 0.0),
        ]
        counts = mixed_in_counts(own, [(len(pool), share) for pool, share in sources])
        mixed: list[Example] = []
        for i, ((pool, _), wanted) in enumerate(zip(sources, counts, strict=True)):
            if wanted:
                rng = np.random.default_rng([self.config.seed, round, i])
                drawn = rng.choice(len(pool), size=wanted, replace=wanted > len(pool))
                mixed += [pool[j] for j in drawn]
        return mixed

    def _selected_before(self, round: int) -> list[Example]:
        if not self.config.algorithm.replay:
            return []
        return [example for earlier in range(1, round) for example in self.store.read_selection(earlier)]

    def train(self, round: int, phase: Phase, examples: Sequence[Example], *, first_step: int) -> dict[str, float]:
        every = self.config.training.save_every_steps

        def after_step(step: int, metrics: Mapping[str, float]) -> None:
            self.run.display.advance(1, metrics)
            # All processes must agree to stop: one that went on alone would wait for the others for ever.
            stopping = bool(self.trainer.total(float(bool(self.stop))))
            if stopping or (every and step % every == 0):
                self._checkpoint(round - 1, step)
            if stopping:
                self.run.accelerator.wait_for_everyone()
                self.stop.signum = self.stop.signum or 15
                self.stop.check()

        self.run.display.stage(round, "train", self.trainer.steps_in(examples) - first_step)
        with self.ledger.stage("train"):
            return self.trainer.train(
                examples, round=round, learning_rate=phase.learning_rate, first_step=first_step, after_step=after_step
            )

    def _checkpoint(self, round: int, step: int) -> None:
        """Save the state; the round whose adapter would be exported now is kept with it."""
        if self.run.accelerator.is_main_process:
            parts = self.trainer.state()
            meta = {
                "fingerprint": self.run.policy.fingerprint(),
                "parts": sorted(parts),
                "config": self.config.model_dump(mode="json"),
                "rewards": {
                    w.reward.name: getattr(w.reward, "weights_from", None)
                    for w in (*self.run.rewards, *self.run.watched)
                },
                "diversity": getattr(self.run.embed, "weights_from", None),
            }
            reports = read_metrics(self.metrics)
            self.checkpoints.save(round, step, parts, meta, self._kept(reports))

    def _kept(self, reports: Sequence[RoundReport]) -> list[int]:
        """The rounds that would be exported now, or after an alarm that may come."""
        kept = [_exported(reports, self.verdict(reports)).round]
        if self.config.evaluation.sentinel == "rollback":
            evaluated = _evaluated(reports)
            kept.append(evaluated[best_held_out([r.evaluations[0] for r in evaluated], self.held_out)].round)
        return kept

    # -- evaluation -----------------------------------------------------------------------------------------------

    def base(self) -> RoundReport:
        """Round 0: the base model on the held-out prompts."""
        with self.run.policy.reference():
            evaluations = self.evaluations(0)
        report = RoundReport(
            round=0,
            requested=0,
            scored=0,
            failed=0,
            skipped=0,
            selected=0,
            rewards={},
            training={},
            evaluations=evaluations,
            ledger=self._costs(),
        )
        if self.run.accelerator.is_main_process:
            append_metrics(self.metrics, report)
        self.run.display.round_done(report)
        return report

    def evaluate(self, round: int, earlier: Sequence[RoundReport]) -> tuple[Evaluation, ...]:
        spent = training_passes(earlier) + int(self.trainer.total(self.ledger.passes))
        last = round == self.config.rounds or spent >= (self.config.budget or math.inf)
        if round % self.config.evaluation.every and not last:
            return ()
        with self.trainer.averaged():
            return self.evaluations(round)

    def evaluations(self, round: int) -> tuple[Evaluation, ...]:
        """The policy as it is now on the held-out prompts, at each guidance scale."""
        wanted = sampling.jobs(
            self.run.held_out,
            self.config.evaluation.seeds_per_prompt,
            run_seed=self.config.seed,
            round=HELD_OUT_ROUND,
        )
        rewards = [*self.run.rewards, *self.run.watched]
        self.run.display.stage(round, "evaluate", len(wanted) * len(self.scales) * (1 + len(rewards)))
        evaluations = []
        for i, scale in enumerate(self.scales):
            with self.ledger.stage("evaluate"):
                store = SampleStore(self.folder / "evaluation" / f"guidance-{scale:g}")
                samples = self._sample(self.run.policy, wanted, store, round, scale=scale)
                values = self._score(samples, rewards, store, round)
                base = self._base_evaluations()[i] if round else None
                found = measure(
                    samples,
                    self._with_combined(values, base),
                    guidance_scale=scale,
                    base=base,
                    embed=self.run.embed or next((e for w in rewards if (e := getattr(w.reward, "embed", None))), None),
                )
                if self.config.evaluation.sentinel != "off":
                    before = store.read_samples(0) if round else ()
                    found = replace(found, statistics=picture_moments(samples, before))
                evaluations.append(found)
        return tuple(evaluations)

    def _base_evaluations(self) -> tuple[Evaluation, ...]:
        if not self._base:
            self._base = read_metrics(self.metrics)[0].evaluations
        return self._base

    def _with_combined(self, values: Mapping[str, torch.Tensor], base: Evaluation | None) -> dict[str, torch.Tensor]:
        """The values with the combined reward beside them. Standardised parts are measured against the base model's
        mean and deviation, so that all rounds share one scale; under a weighted sum the base has 0."""
        weighted = {}
        for name, weight in self.weights.items():
            if weight:
                value_N = values[name].double()
                if self.config.combine != "sum":
                    reference = value_N if base is None else torch.tensor(base.per_sample[name], dtype=torch.float64)
                    value_N = scoring.standardize(value_N, objectives.moments(reference))
                weighted[name] = weight * value_N
        scalarize = objectives.SCALARIZERS[self.config.combine]
        z_NR = torch.stack(list(weighted.values()), dim=1).tolist()
        combined_N = [math.nan if any(map(math.isnan, z_R)) else scalarize(z_R) for z_R in z_NR]
        return {"reward": torch.tensor(combined_N, dtype=torch.float64), **values}

    @property
    def held_out(self) -> list[str]:
        """The rewards that are not trained on."""
        return [w.reward.name for w in self.run.watched]

    def verdict(self, reports: Sequence[RoundReport]) -> Verdict:
        return run_verdict(self.config.evaluation, reports, self.held_out)

    def reason_to_stop(self, reports: Sequence[RoundReport]) -> str | None:
        """Why no round shall follow on these, or None."""
        latest = reports[1:][-EMPTY_ROUNDS:]
        if len(latest) == EMPTY_ROUNDS and not any(report.selected for report in latest):
            return f"{EMPTY_ROUNDS} rounds in a row selected nothing to train on"
        budget = self.config.budget
        if budget is not None and (spent := training_passes(reports)) >= budget:
            return f"{spent} passes of a budget of {budget} are spent"
        judged = self.verdict(reports)
        if self.config.evaluation.plateau_rounds is not None and judged.kind == "plateau":
            return judged.message
        if self.config.evaluation.sentinel in ("stop", "rollback") and judged.alarm:
            return judged.message
        return None

    # -- publishing -----------------------------------------------------------------------------------------------

    def publish(
        self,
        round: int,
        phase: Phase,
        groups: Sequence[Group],
        moments: Mapping[str, Moments],
        examples: Sequence[Example],
        training: Mapping[str, float],
        evaluations: tuple[Evaluation, ...],
        earlier: Sequence[RoundReport],
    ) -> RoundReport:
        """Make the round durable: the metrics, then the checkpoint that commits it, then the report."""
        own = {example.sample.id for example in self.run.data}  # the user's, which the round did not draw
        groups = [replace(group, samples=tuple(s for s in group.samples if s.sample.id not in own)) for group in groups]
        scored = [s for group in groups for s in group.samples]
        ranked = [s for s in scored if s.reward is not None]
        skipped = sum(s.sample.flaw is not None for s in scored)
        report = RoundReport(
            round=round,
            requested=len(scored),
            scored=len(ranked),
            failed=len(scored) - len(ranked) - skipped,
            skipped=skipped,
            selected=len(examples),
            rewards=_reward_means(groups, ranked),
            training=dict(training),
            evaluations=evaluations,
            ledger=self._costs(),
            phase=phase,
            moments=moments,
        )
        reports = [*earlier, report]
        if self.run.accelerator.is_main_process:
            append_metrics(self.metrics, report)
            self._checkpoint(round, 0)
            self.report(reports)
            self.run.track(round, _curves(report))
        self.run.accelerator.wait_for_everyone()
        self.run.display.round_done(report)
        judged = self.verdict(reports)
        if evaluations and judged.alarm and self.config.evaluation.sentinel != "off":
            self.run.display.say(f"round {round}: {judged.message}")
        return report

    def _costs(self) -> tuple[StageCost, ...]:
        """What the ledger has, with the passes of all processes."""
        return tuple(replace(cost, passes=int(self.trainer.total(cost.passes))) for cost in self.ledger.take())

    def _pictures(self, reports: Sequence[RoundReport]) -> tuple[list[Sample], list[Sample]]:
        """What the base and the round that would be exported made of the held-out prompts."""
        pictures = SampleStore(self.folder / "evaluation" / f"guidance-{self.scales[0]:g}")
        last = _exported(reports, self.verdict(reports)).round
        return pictures.read_samples(0), pictures.read_samples(last)

    def report(self, reports: Sequence[RoundReport]) -> Path:
        """Write report.html."""
        before, after = self._pictures(reports)
        grown = reports[-1].phase.grown
        how = scoring.combination(self.config, reports, grown=grown)
        scored = scoring.stored(self.store, grown, how)
        history = [report.evaluations[0] for report in _evaluated(reports)]
        ranked = sorted((s for s in scored if s.reward is not None), key=lambda s: -(s.reward or 0.0))
        return write_report(
            self.folder,
            title=self.config.name,
            reports=reports,
            verdict=self.verdict(reports),
            before=before,
            after=after,
            best=ranked[:SHOWN],
            worst=ranked[-SHOWN:],
            config_yaml=dump_config(self.config),
            load_line=self.run.load_line,
            trained=[name for name, weight in self.weights.items() if weight],
            together=objectives.together(scoring.by_prompt(scored), list(how.floors)),
            trends={
                name: trend(history, name, weight=weight, patience=self.config.evaluation.plateau_rounds or 3)
                for name, weight in self.weights.items()
                if weight and len(history) > 1
            },
        )


def evaluate_run(run: Run) -> tuple[tuple[Evaluation, ...], tuple[Evaluation, ...]]:
    """The base and the exported adapter of a finished run on `run.held_out`, from nothing: what a person asks for who
    wants other prompts, seeds or guidance scales than the run had. The run folder is not written to."""
    reports = read_metrics(run.config.folder / "metrics.jsonl")
    if len(reports) < 2:
        raise ResumeError(f"{run.config.folder} has no finished round to evaluate")
    with TemporaryDirectory() as scratch, stop_requests() as stop:
        elsewhere = replace(run, config=run.config.model_copy(update={"output": scratch}))
        stages = _Stages(elsewhere, stop)
        base = stages.base()
        kept = _Stages(run, stop)
        best = _exported(reports, kept.verdict(reports)).round
        checkpoint = kept.checkpoints.load(best)
        run.policy.load_adapter(checkpoint.tensors(_exported_part(checkpoint)))
        return base.evaluations, stages.evaluations(best)


def rewrite_report(run: Run) -> Path:
    """Make the report.html of a run folder again."""
    with stop_requests() as stop:
        return _Stages(run, stop).report(read_metrics(run.config.folder / "metrics.jsonl"))


def mixed_in_counts(own: int, pools: Sequence[tuple[int, float]]) -> list[int]:
    """How many examples of pools, each with its size and its share of the whole, come beside `own` of the round; an
    empty pool leaves its share to the others."""
    room = 1 - sum(share for size, share in pools if size)
    return [int(own * share / room + 0.5) if size else 0 for size, share in pools]


def training_passes(reports: Sequence[RoundReport]) -> int:
    """Denoiser passes of a run in all but its evaluations."""
    return sum(cost.passes for report in reports for cost in report.ledger if cost.stage != "evaluate")


def _evaluated(reports: Sequence[RoundReport]) -> list[RoundReport]:
    return [report for report in reports if report.evaluations]


def _exported(reports: Sequence[RoundReport], judged: Verdict) -> RoundReport:
    """The round whose adapter is exported: the best, or the last where none is better than the base."""
    return _evaluated(reports)[judged.best or -1]


def _exported_part(checkpoint: Checkpoint) -> str:
    return "average" if "average" in checkpoint.meta["parts"] else "adapter"


def _reward_means(groups: Sequence[Group], ranked: Sequence[Scored]) -> dict[str, float]:
    if not ranked:
        return {}
    means = {name: float(np.mean([s.parts[name] for s in ranked if name in s.parts])) for name in ranked[0].parts}
    means["reward"] = float(np.mean([s.reward for s in ranked]))
    best = [max(s.reward for s in group.ranked if s.reward is not None) for group in groups if group.ranked]
    means["best_of_group"] = float(np.mean(best))
    means["log_ratio"] = float(np.mean([s.log_ratio for s in ranked]))
    return means


def _curves(report: RoundReport) -> dict[str, float]:
    curves = {f"train/{name}": value for name, value in report.training.items()}
    curves |= {f"samples/{name}": value for name, value in report.rewards.items()}
    for evaluation in report.evaluations:
        for name, interval in evaluation.metrics.items():
            curves[f"held-out/{name}/guidance-{evaluation.guidance_scale:g}"] = interval.mean
    for cost in report.ledger:
        curves[f"seconds/{cost.stage}"] = cost.seconds
    return curves

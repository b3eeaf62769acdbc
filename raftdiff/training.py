"""The optimizer loop. It knows no algorithm by name and no model.

A step is a function of (run seed, round, step): its rows, its noise and its timesteps are drawn for the whole batch
on the CPU, and each process takes its share of the rows. So any number of processes takes the same steps, and a run
that is resumed goes on as it would have.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from .batches import halved
from .checkpoint import load_optimizer_tensors, optimizer_tensors
from .config import TrainingConfig
from .errors import MissingExtraError, TrainingError, WeightsError
from .protocols import Algorithm, Policy
from .sharding import idle_turns, sharded
from .types import Batch, Draw, Example

SKIPS = 3  # steps in a row whose gradient is not finite, after which the run stops


class Trainer:
    """Holds the optimizer over the whole run; `train` is one round.

    Args:
        rounds: of the run, for the learning rate's schedule.
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        config: TrainingConfig,
        *,
        seed: int,
        rounds: int,
        accelerator: Accelerator,
    ):
        self.policy, self.algorithm, self.config = policy, algorithm, config
        self.seed, self.rounds, self.accelerator = seed, rounds, accelerator
        self.parameters = policy.parameters()
        self.optimizer = _optimizer(self.parameters, config)
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=config.precision == "fp16")
        self.average = [p.detach().clone() for p in self.parameters] if config.ema_decay else None
        self.micro_batch_size = config.micro_batch_size or config.batch_size
        self.steps_done = 0
        self._tally: dict[str, float] = {}  # of this round: steps, skipped steps, sums of the metrics

    # -- one round ------------------------------------------------------------------------------------------------

    def steps_in(self, examples: Sequence[Example]) -> int:
        return steps_and_rows(self.config, len(examples))[0]

    def train(
        self,
        examples: Sequence[Example],
        *,
        round: int,
        learning_rate: float = 1.0,
        first_step: int = 0,
        after_step: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
    ) -> dict[str, float]:
        """Take the steps of one round from `first_step` on, at `learning_rate` times the configured rate;
        `after_step` is called with the number of steps taken and the metrics of the last one. Returns the means over
        the whole round, also of the steps before `first_step` (which `load_state` brought back), with the number of
        steps and of skipped ones.

        Raises:
            TrainingError: several steps in a row gave values that are not finite.
            ConfigError: the device ran out of memory with one sample.
        """
        steps = self.steps_in(examples)
        if first_step == 0:
            self._tally = {"steps": 0.0, "skipped_steps": 0.0}
        in_a_row = 0
        for step in range(first_step, steps):
            self._set_learning_rate(round, step / steps, learning_rate)
            metrics = self._step(examples, round, step)
            finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"])
            if finite:
                in_a_row = 0
                self._count(metrics | {"steps": 1.0})
            else:
                self._count({"skipped_steps": 1.0})
                in_a_row += not self._overflowed(metrics["loss"])
                if in_a_row >= SKIPS:
                    raise TrainingError(
                        f"round {round}, step {step}: the gradient was not finite {SKIPS} times in a row; "
                        "lower training.learning_rate, or train in bf16 or fp32. The last checkpoint is whole"
                    )
            after_step(step + 1, metrics)
        counts = {name: self._tally[name] for name in ("steps", "skipped_steps")}
        return {name: total / counts["steps"] for name, total in self._tally.items() if name not in counts} | counts

    def _count(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._tally[name] = self._tally.get(name, 0.0) + value

    def _overflowed(self, loss: float) -> bool:
        """Whether it was the scaled gradient of fp16 that was not finite: the scaler has lowered its scale for that,
        as it does several times at the start of every run."""
        return self.scaler.is_enabled() and math.isfinite(loss) and self.scaler.get_scale() >= 1

    def _step(self, examples: Sequence[Example], round: int, step: int) -> dict[str, float]:
        rows = [examples[i] for i in self._rows(examples, round, step)]
        draw = self.policy.draw([row.sample for row in rows], _generator(self.seed, round, step, "draw"))
        mine = list(range(self.accelerator.process_index, len(rows), self.accelerator.num_processes))
        idle = idle_turns(len(rows), self.accelerator)
        while True:
            sums = self._accumulate(rows, draw, mine, idle, step)
            if not self.total(float(sums is None)):  # all processes agree on the size
                break
            self.optimizer.zero_grad(set_to_none=True)
            self._shrink(len(rows))
        assert sums is not None
        metrics = {name: total / len(rows) for name, total in self._reduced(sums).items()}
        self._sum_gradients()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        metrics["gradient_norm"] = float(norm)
        metrics["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        if math.isfinite(metrics["gradient_norm"]) and math.isfinite(metrics["loss"]):
            self.scaler.step(self.optimizer)
            self.steps_done += 1
            self._update_average()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics

    def _shrink(self, rows: int) -> None:
        """Halve the micro-batch: of `rows` in all processes, one has at most its share at once."""
        self.micro_batch_size = halved(
            min(self.micro_batch_size, math.ceil(rows / self.accelerator.num_processes)),
            "samples at once (training.micro_batch_size)",
            "set model.dtype: bf16, model.gradient_checkpointing, or make smaller images or shorter texts",
            fixed=sharded(self.accelerator),
        )

    def _accumulate(
        self, rows: Sequence[Example], draw: Draw, mine: Sequence[int], idle: int, step: int
    ) -> dict[str, float] | None:
        """Gradients of this process's rows, in micro-batches, and of `idle` more that do not count; the sums of loss
        and metrics, or None where the device ran out of memory."""
        sums: dict[str, float] = {"loss": 0.0}
        turns = [*mine, *[0] * idle]
        try:
            for start in range(0, len(turns), self.micro_batch_size):
                part = turns[start : start + self.micro_batch_size]
                own = slice(max(0, len(mine) - start))
                batch = Batch(
                    examples=[rows[i] for i in part],
                    weight_B=torch.tensor([rows[i].weight for i in part], device=self.accelerator.device),
                    draw=draw.rows(part),
                    updates=step,
                    averaged=self.averaged,
                )
                loss_B, metrics = self.algorithm.loss(self.policy, batch)
                self.scaler.scale(loss_B[own].sum() / len(rows)).backward()
                for name, value_B in {"loss": loss_B, **metrics}.items():
                    sums[name] = sums.get(name, 0.0) + float(value_B.detach()[own].sum())
        except torch.OutOfMemoryError:
            if sharded(self.accelerator):  # the others wait for this process in the middle of their pass
                self._shrink(len(rows))  # which raises
            return None
        return sums

    def _reduced(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The sums over all processes; one that has no row of a small last batch knows no names but the loss."""
        if self.accelerator.num_processes == 1:
            return dict(sums)
        everyone = gather_object([dict(sums)])
        names = sorted({name for one in everyone for name in one})
        return {name: math.fsum(one.get(name, 0.0) for one in everyone) for name in names}

    def _rows(self, examples: Sequence[Example], round: int, step: int) -> list[int]:
        """The rows of a step: epochs are shuffled one by one, and only the last batch of the round may be short."""
        count, size = len(examples), self.config.batch_size
        total = steps_and_rows(self.config, count)[1]
        rows: list[int] = []
        for position in range(step * size, min((step + 1) * size, total)):
            epoch, place = divmod(position, count)
            rows.append(self._permutation(count, round, epoch)[place])
        return rows

    def _permutation(self, count: int, round: int, epoch: int) -> list[int]:
        return torch.randperm(count, generator=_generator(self.seed, round, epoch, "order")).tolist()

    def _set_learning_rate(self, round: int, progress_in_round: float, share: float) -> None:
        progress = (round - 1 + progress_in_round) / self.rounds
        factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        warm = min(1.0, (self.steps_done + 1) / (self.config.warmup_steps + 1))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor[self.config.schedule] * warm * share

    def _update_average(self) -> None:
        """EMA with the usual warm-up: the decay grows as (1 + n) / (10 + n) up to the configured one."""
        if self.average is not None:
            decay = min(self.config.ema_decay, (1 + self.steps_done) / (10 + self.steps_done))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the policy has the moving average of its weights, where there is one."""
        if self.average is None:
            yield
            return
        trained = [p.data for p in self.parameters]
        try:
            for p, mean in zip(self.parameters, self.average, strict=True):
                p.data = mean
            yield
        finally:
            for p, data in zip(self.parameters, trained, strict=True):
                p.data = data

    # -- processes ------------------------------------------------------------------------------------------------

    def total(self, value: float) -> float:
        """The sum of `value` over the processes."""
        if self.accelerator.num_processes == 1:
            return value
        values = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(values, "sum").item()

    def _sum_gradients(self) -> None:
        """Add up the processes' gradients in one exchange. (DistributedDataParallel would wrap the denoiser, and the
        pipeline needs it as it is.)"""
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.accelerator.num_processes == 1:
            return
        flat = torch.cat([p.grad.flatten() for p in self.parameters])  # type: ignore[union-attr]
        flat = self.accelerator.reduce(flat, "sum")
        for p, grad in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            p.grad = grad.view_as(p)

    # -- state ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """What a checkpoint needs: the adapter, the optimizer, counters, and the average where there is one."""
        counters = {"steps_done": torch.tensor(self.steps_done), "loss_scale": torch.tensor(self.scaler.get_scale())}
        counters |= {f"tally.{name}": torch.tensor(value, dtype=torch.float64) for name, value in self._tally.items()}
        parts = {"adapter": self.policy.adapter_state(), "optimizer": optimizer_tensors(self.optimizer)}
        parts["counters"] = counters
        if self.average is not None:
            with self.averaged():
                parts["average"] = self.policy.adapter_state()
        return parts

    def load_state(self, parts: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        if self.average is not None:
            if "average" not in parts:
                raise WeightsError("the checkpoint has no moving average; set training.ema_decay to 0 to go on")
            self.policy.load_adapter(parts["average"])
            self.average = [p.detach().clone() for p in self.parameters]
        self.policy.load_adapter(parts["adapter"])
        load_optimizer_tensors(self.optimizer, parts["optimizer"])
        counters = parts["counters"]
        self.steps_done = int(counters["steps_done"])
        tally = {name.removeprefix("tally."): value for name, value in counters.items() if name.startswith("tally.")}
        self._tally = {name: float(value) for name, value in tally.items()}
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": float(counters["loss_scale"])})


def steps_and_rows(config: TrainingConfig, examples: int) -> tuple[int, int]:
    """Optimizer steps of a round that trains on so many examples, and the rows of their batches together."""
    if not examples:
        return 0, 0
    if config.steps:
        return config.steps, config.steps * config.batch_size
    return math.ceil(config.epochs * examples / config.batch_size), config.epochs * examples


def _optimizer(parameters: Sequence[torch.nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW
    if config.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise MissingExtraError(
                "training.optimizer: adamw8bit needs bitsandbytes; pip install 'raftdiff[bitsandbytes]'"
            ) from error
        kind = AdamW8bit
    settings: dict[str, Any] = {"betas": config.betas, "weight_decay": config.weight_decay}
    return kind(parameters, lr=config.learning_rate, **settings)  # type: ignore[call-arg]


def _generator(seed: int, round: int, step: int, purpose: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{round}/{step}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

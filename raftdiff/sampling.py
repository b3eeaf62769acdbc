"""Prompts x K, over batches and processes.

The store is where processes meet: each takes its share of the batches, writes each as one part, and reads the others'
once all are done. A batch that a killed run has already written is not sampled again. What is in a batch does not
depend on the number of processes, so the samples do not either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from accelerate import Accelerator

from .interrupts import StopRequest
from .prompts import sample_seed
from .protocols import Policy
from .sharding import idle_turns
from .store import SampleStore
from .types import Prompt, Sample


@dataclass(frozen=True, kw_only=True)
class Job:
    """One sample to make."""

    id: str
    prompt: Prompt
    seed: int


def jobs(prompts: Sequence[Prompt], samples_per_prompt: int, *, run_seed: int, round: int) -> list[Job]:
    """The jobs of a round, prompt by prompt; no two have the same seed."""
    return [
        Job(
            id=f"{round:04d}-{prompt.id}-{k:03d}",
            prompt=prompt,
            seed=sample_seed(run_seed, round, prompt.id, k),
        )
        for prompt in prompts
        for k in range(samples_per_prompt)
    ]


def sample(
    policy: Policy,
    wanted: Sequence[Job],
    *,
    store: SampleStore,
    round: int,
    batch_size: int,
    accelerator: Accelerator,
    stop: StopRequest,
    guidance_scale: float | None = None,
    noise_level: float | None = None,
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[Sample]:
    """The samples of `wanted`, in its order, made or read from the store. `on_batch` is told how many more are there.

    Raises:
        Interrupted: a stop was asked for; the batches that are done stay in the store.
    """
    batches = [wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size)]
    there = {
        part: samples
        for part, samples in store.parts(round).items()
        if part < len(batches) and [s.id for s in samples] == [job.id for job in batches[part]]
    }
    accelerator.wait_for_everyone()  # no process writes before all have read
    for samples in there.values():
        on_batch(len(samples))

    def made(batch: Sequence[Job]) -> list[Sample]:
        samples = policy.sample(
            [job.prompt for job in batch],
            [job.seed for job in batch],
            guidance_scale=guidance_scale,
            noise_level=noise_level,
        )
        return [replace(sample, id=job.id) for sample, job in zip(samples, batch, strict=True)]

    missing = [part for part in range(len(batches)) if part not in there]
    for part in missing[accelerator.process_index :: accelerator.num_processes]:
        stop.check()
        there[part] = made(batches[part])
        store.write_samples(round, part, there[part])
        on_batch(len(batches[part]))
    for _ in range(idle_turns(len(missing), accelerator)):
        made(batches[missing[0]])
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        there = store.parts(round)
    return [sample for part in range(len(batches)) for sample in there[part]]

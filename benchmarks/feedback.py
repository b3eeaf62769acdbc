"""Preference models from simulated feedback on pictures of the embedded model: how often each is right about what the
judge was asked, by the noise in the judge's answers, and whether several are right about overall preferences more
often than one model of these.

    python -m benchmarks.feedback
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.common import arguments, configured, console, table
from raftdiff.build import build_policy
from raftdiff.feedback import Choice, Feedback, label_run, model_folder, train_models, weigh
from raftdiff.pipelines.loading import load_pipeline
from raftdiff.preferences import accuracy, split_by_prompt
from raftdiff.principles import load_principles
from raftdiff.prompts import load_prompts, sample_seed
from raftdiff.reward_models.judge import build_judge
from raftdiff.reward_models.preference import PreferenceReward
from raftdiff.reward_models.preference_training import differences
from raftdiff.store import SampleStore
from raftdiff.types import Interval

HELD_OUT = 0.25


def draw(run: Path, prompts: int, candidates: int) -> None:
    """Pictures of the base, where there are none yet."""
    store = SampleStore(run)
    if store.rounds():
        return
    settings = {"sampling.guidance_scale": 2.0, "sampling.num_inference_steps": 20}
    config = configured("claims", str(run.parent), run.name, settings)
    policy = build_policy(config, load_pipeline(config.model, "cpu"))
    wanted = [(prompt, k) for prompt in load_prompts(f"shapes:all/{prompts}/7") for k in range(candidates)]
    samples = policy.sample([p for p, _ in wanted], [sample_seed(0, 1, p.id, k) for p, k in wanted])
    store.write_samples(1, 0, samples)


def labelled(run: Path, noise: float, per_prompt: int) -> Feedback:
    name, options = f"noise-{noise:g}-{per_prompt}", {"noise": noise}
    principles = [principle for principle in load_principles(["shapes"]) if principle.name != "background"]
    judge = build_judge("oracle", options)
    label_run(run, judge, principles, made_of=("oracle", options), per_prompt=per_prompt, name=name)
    return Feedback(run, name)


def show(interval: Interval) -> str:
    return f"{100 * interval.mean:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def main() -> None:
    options = arguments(__doc__ or "", prompts=160, candidates=8, pairs=12, noise=[0.0, 0.1, 0.2, 0.3])
    run = Path(options.output) / f"feedback-{options.prompts}-{options.candidates}"
    draw(run, options.prompts, options.candidates)
    exact = labelled(run, 0.0, options.pairs)
    right: dict[str, list[str]] = {}
    combined: list[str] = []
    for noise in options.noise:
        labels = labelled(run, noise, options.pairs)
        for fitted in train_models(run, Choice(model="shapes"), name=labels.folder.name):
            name = fitted.principle.name
            trained, _ = split_by_prompt(labels.preferences(name), HELD_OUT)
            seen = {preference.chosen.prompt.id for preference in trained}
            others = [p for p in exact.preferences(name) if p.chosen.prompt.id not in seen]
            model = PreferenceReward(model_folder(run, name))
            right.setdefault(name, []).append(show(accuracy(differences(model.score, others))))
        weighed = weigh(run, name=labels.folder.name)
        combined.append(f"{show(weighed.combined)}; {100 * weighed.alone['overall'].mean:.1f}")
        console.print(f"noise {noise:g}: done")
    columns = ["principle", *(f"noise {noise:g}" for noise in options.noise)]
    table(
        "\nRight about the exact judge on held-out prompts, % (95% interval)",
        columns,
        [[n, *r] for n, r in right.items()],
    )
    table(
        "\nRight about held-out overall labels, %: all weighed; the one of overall labels", columns, [["", *combined]]
    )


if __name__ == "__main__":
    main()

"""Methods at an equal budget: what runs, what is gone on with, and what the comparison says of it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_runs import PROMPTS, Told, three_weights_run

from raftdiff.compare import CompareConfig, Outcome, by_method, compare, gain, lines, load_compare, merged
from raftdiff.config import RunConfig
from raftdiff.errors import ConfigError, ResumeError
from raftdiff.evaluation import paired_interval

BUDGET = 60


def settings(output: Path, **changes: Any) -> dict[str, Any]:
    base = {
        "adapter": {"rank": 2},
        "prompts": {"source": PROMPTS},
        "rewards": [{"name": "redness"}],
        "sampling": {"samples_per_prompt": 2, "batch_size": 4, "guidance_scale": 1.0},
        "training": {"learning_rate": 0.1, "batch_size": 2, "steps": 3},
        "evaluation": {"seeds_per_prompt": 2, "every": 2},
        "tracker": "none",
    }
    methods = {"best": {}, "random": {"algorithm": {"options": {"selection": "random"}}}}
    return {"output": str(output), "budget": BUDGET, "base": base, "methods": methods} | changes


def compared(output: Path, built: list[str] | None = None, **changes: Any) -> list[Outcome]:
    def build(config: RunConfig, **rest: Any) -> Any:
        if built is not None:
            built.append(config.name)
        return three_weights_run(config, **rest)

    config = CompareConfig.model_validate(settings(output, **changes))
    return compare(config, build, lambda run: contextlib.nullcontext(Told()))


def test_every_method_spends_the_budget_and_no_round_more(tmp_path):
    for outcome in compared(tmp_path):
        rounds = [r for r in outcome.reports if r.round]
        # 4 prompts x 2 samples, then 3 steps x 2 rows there and back: 26 a round
        assert outcome.spent()[0] == 26 * len(rounds) == 78
        assert outcome.spent(rounds[-2].round)[0] < BUDGET
        assert rounds[-1].evaluations  # although only every second round is


def test_what_is_finished_is_not_run_again_and_what_broke_off_is_gone_on_with(tmp_path):
    built: list[str] = []
    first = compared(tmp_path, built)
    (tmp_path / "compare" / "random-0" / "lora" / "manifest.json").unlink()
    second = compared(tmp_path, built)
    assert built == ["best-0", "random-0", "random-0"]
    assert [o.reports for o in second] == [o.reports for o in first]


def test_a_run_with_other_settings_is_not_taken_for_the_same(tmp_path):
    compared(tmp_path)
    with pytest.raises(ResumeError, match="best-0 holds a run with other settings"):
        compared(tmp_path, budget=BUDGET + 1)


def test_gains_are_paired_by_prompt_and_seed_over_all_run_seeds(tmp_path):
    groups = by_method(compared(tmp_path, seeds=[0, 1]))
    assert [len(runs) for runs in groups.values()] == [2, 2]
    best, random = groups.values()
    differences = [
        np.array(b.last.per_sample["reward"]) - np.array(r.last.per_sample["reward"])
        for b, r in zip(best, random, strict=True)
    ]
    prompts = [text for text in PROMPTS for _ in range(2)] * 2
    assert gain(best, "reward", over=random) == paired_interval(np.concatenate(differences), prompts)
    over_base = gain(best[:1], "reward")
    assert over_base.mean == pytest.approx(best[0].last.gains["reward"].mean)
    assert over_base.count == len(PROMPTS)


def test_the_table_has_gains_drift_and_what_was_spent(tmp_path):
    best, random = lines(compared(tmp_path))
    assert (best.method, random.method) == ("best", "random")
    assert list(best.gains) == ["reward", "redness", "diversity", "drift"]
    assert best.gains["reward"].mean > random.gains["reward"].mean
    assert best.gains["drift"].low > 0  # in both directions pictures only move away
    assert best.passes == 78 and best.rounds == 3 and 0 <= best.scorer_seconds <= best.seconds


def test_the_page_shows_every_method_and_escapes_what_came_from_outside(tmp_path):
    prompts = ["<script>alert(1)</script>", *PROMPTS[1:]]
    base = settings(tmp_path)["base"] | {"prompts": {"source": prompts}}
    compared(tmp_path, base=base)
    html = (tmp_path / "compare" / "compare.html").read_text()
    assert "<th>best</th>" in html and "<th>random</th>" in html and "drift" in html
    assert "&lt;script&gt;" in html and "<script" not in html
    assert html.count("<img") == 4 * 3  # prompts x (base and two methods)


def test_options_are_replaced_and_other_settings_merged():
    first = {"a": {"b": 1, "c": 2}, "algorithm": {"name": "raft", "options": {"keep": 2}}}
    second = {"a": {"c": 3}, "algorithm": {"options": {"selection": "random"}}}
    assert merged(first, second) == {
        "a": {"b": 1, "c": 3},
        "algorithm": {"name": "raft", "options": {"selection": "random"}},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0}, "budget: Input should be greater than or equal to 1"),
        ({"budgets": 5}, "budgets: Extra inputs are not permitted"),
        ({"methods": {}}, "methods: "),
        ({"methods": {"../up": {}}}, "methods.*: "),
        ({"seeds": []}, "seeds: "),
    ],
)
def test_a_file_that_cannot_be_run_is_refused_with_its_key(tmp_path, changes, message):
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path, **changes)))
    with pytest.raises(ConfigError, match=message):
        load_compare(path)


def test_a_methods_wrong_setting_is_named_with_the_method(tmp_path):
    config = CompareConfig.model_validate(settings(tmp_path, methods={"x": {"training": {"learning_rat": 1}}}))
    with pytest.raises(ConfigError, match=r"compare, method x: unknown key 'training.learning_rat'; did you mean"):
        config.runs()

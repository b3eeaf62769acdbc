"""The plan of a run: counts by hand, against the ledger of real runs, and a probe of a real one."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
from diffusers import HeunDiscreteScheduler
from PIL import Image
from test_cli import call, refused
from tiny_runs import pipeline_run, tiny_config, tiny_pipeline

from raftdiff.build import build_algorithm
from raftdiff.config import load_preset
from raftdiff.plan import (
    LONG,
    Plan,
    Probe,
    Sizes,
    Work,
    counts,
    disk_bytes,
    lines,
    plan,
    probed,
    rows_of_image,
    size,
)
from raftdiff.report import read_metrics
from raftdiff.rounds import run_rounds


def planned(config) -> list[dict[str, Work]]:
    return [{work.stage: work for work in stages} for stages in plan(config, probing=False).rounds]


def test_the_demo_is_counted_as_by_hand():
    base, first, second, last = planned(load_preset("demo"))
    # 48 held-out prompts x 3 seeds, 10 steps, with two rows a step at guidance 1.5; four rewards see each
    at_1_5 = Work(stage="evaluate at 1.5", images=144, scorings=576, forward=2880, passes=2880)
    assert base["evaluate at 1.5"] == last["evaluate at 1.5"] == at_1_5
    assert base["evaluate at 1"].passes == 1440
    # 64 prompts x 8 samples, and two rewards
    assert first["sample"] == Work(stage="sample", images=512, forward=10240, passes=10240)
    assert first["score"] == Work(stage="score", images=512, scorings=1024)
    assert first["train"] == Work(stage="train", images=2048, steps=64, forward=2048, passes=6144)
    assert first == second and list(first) == ["sample", "score", "train"]


def test_guidance_doubles_the_rows_of_an_image():
    assert [rows_of_image(25, scale) for scale in (7.5, 1.0, 0.5)] == [50, 25, 25]


def test_epochs_train_on_what_earlier_rounds_and_the_own_data_add(tmp_path):
    config = tiny_config(
        tmp_path,
        rounds=3,
        training={"steps": None, "epochs": 2},
        algorithm={"replay": 0.25},
        data={"path": "nowhere", "share": 0.25},
    )
    sizes = Sizes(prompts=6, held_out=1, data=10, rows={"sample": 2})
    rounds = counts(config, build_algorithm(config), sizes)
    trained = [work.images for stages in rounds for work in stages if work.stage == "train"]
    # 6 selected and 6 * .25 / .75 = 2 of the data; from the second round on 6 * .25 / .5 = 3 of each
    assert trained == [2 * (6 + 2), 2 * (6 + 3 + 3), 2 * (6 + 3 + 3)]


def test_guidance_in_the_loss_costs_a_forward_pass_a_row(tmp_path):
    _, first, *_ = planned(tiny_config(tmp_path, training={"guidance_scale": 3.0}))
    assert (first["train"].forward, first["train"].passes) == (6 * 2, 6 * (3 + 1))


def test_dpo_costs_both_sides_of_a_pair_with_the_policy_and_with_the_reference(tmp_path):
    _, first, *_ = planned(tiny_config(tmp_path, algorithm={"name": "dpo"}))
    assert (first["train"].images, first["train"].forward, first["train"].passes) == (6, 6 * 4, 6 * (2 * 3 + 2))


def test_the_budget_ends_the_plan_with_an_evaluation(tmp_path):
    # a round: 8 images x 2 steps, and 3 optimizer steps x 2 rows x 3
    made = plan(tiny_config(tmp_path, rounds=9, budget=35, evaluation={"every": 5}), probing=False)
    assert [sum(w.passes for w in stages if w.stage in ("sample", "train")) for stages in made.rounds] == [0, 34, 34]
    assert [any(w.stage == "evaluate at 1" for w in stages) for stages in made.rounds] == [True, False, True]
    assert "the budget of 35 passes is spent after 2 of 9 rounds" in lines(made)


RUNS = {
    "raft": {},
    "guided": {"sampling": {"guidance_scale": 2.0}, "training": {"guidance_scale": 2.0}},
    "epochs and replay": {"training": {"steps": None, "epochs": 2}, "algorithm": {"replay": 0.3}, "rounds": 3},
    "log-ratio": {"algorithm": {"options": {"kl_beta": 0.1}}},
    "scales": {"evaluation": {"guidance_scales": [2.0, 1.0], "every": 2}},
    "budget": {"budget": 30, "evaluation": {"every": 3}, "rounds": 4},
    "dpo": {"algorithm": {"name": "dpo"}},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_counts_are_the_ledger_of_the_run(tmp_path, name):
    config = tiny_config(tmp_path, **RUNS[name])
    run_rounds(pipeline_run(config))
    spent = [
        {cost.stage: cost.passes for cost in report.ledger if cost.passes}
        for report in read_metrics(config.folder / "metrics.jsonl")
    ]
    expected = []
    for stages in plan(config, probing=False).rounds:
        of_round: dict[str, int] = defaultdict(int)
        for work in stages:
            of_round[work.stage.split(" at ")[0]] += work.passes
        expected.append({stage: passes for stage, passes in of_round.items() if passes})
    assert spent == expected


def test_own_pictures_are_counted_where_they_are_all_there_is(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(folder / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": "red"}) for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    config = tiny_config(
        tmp_path, algorithm={"name": "sft"}, data={"path": str(folder)}, training={"steps": None, "epochs": 4}
    )
    _, first, _ = planned(config)
    assert (first["train"].steps, first["train"].passes) == (6, 4 * 3 * 3)
    assert "sample" not in first
    assert "rounds: 2, each on 3 examples of your own data" in lines(plan(config, probing=False))


def test_the_guidance_scale_of_a_pipeline_is_known_without_its_weights(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    for weights in (tmp_path / "model").rglob("*.safetensors"):
        weights.unlink()
    settings = {"model": {"path": str(tmp_path / "model")}, "sampling": {"guidance_scale": None}}
    assert "evaluate at 7.5" in planned(tiny_config(tmp_path, **settings))[0]


def test_a_probe_measures_every_stage_and_leaves_no_file(tmp_path):
    config = tiny_config(
        tmp_path,
        sampling={"num_inference_steps": LONG + 3},
        evaluation={"guidance_scales": [2.0, 1.0]},
        algorithm={"options": {"kl_beta": 0.1}},
    )
    made = probed(pipeline_run(config), config)
    assert list(tmp_path.iterdir()) == []
    assert made.rounds == plan(config, probing=False).rounds  # what was measured is what was counted
    assert {work.stage for work in made.stages} == {
        "sample", "score", "log-ratio", "train", "evaluate at 2", "evaluate at 1"
    }  # fmt: skip
    assert all(made.seconds(work) > 0 for work in made.stages)
    assert any("estimated from a probe of" in line for line in lines(made))


def test_a_probe_sees_the_rows_of_a_scheduler_of_second_order(tmp_path):
    config = tiny_config(tmp_path, sampling={"num_inference_steps": 20})
    pipeline = tiny_pipeline()
    pipeline.scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    made = probed(pipeline_run(config, pipeline=pipeline), config)
    assert made.probe.rows["sample"] == 2 * 20 - 1


def test_the_disk_is_that_of_the_run(tmp_path):
    config = tiny_config(tmp_path, rounds=2)
    pictures, checkpoints = disk_bytes(made := probed(pipeline_run(config), config), made.probe)
    run_rounds(pipeline_run(config))
    parts = [*config.folder.glob("samples/**/*.parquet"), *config.folder.glob("evaluation/*/samples/**/*.parquet")]
    assert pictures == pytest.approx(sum(file.stat().st_size for file in parts), rel=0.1)
    tensors = [*config.folder.glob("checkpoints/**/*.safetensors"), *config.folder.glob("lora/*.safetensors")]
    on_disk = sum(file.stat().st_size for file in tensors)
    assert 0.5 * on_disk < checkpoints < on_disk  # names and shapes weigh much where the tensors are tiny


def test_time_is_measured_seconds_times_counts(tmp_path):
    config = tiny_config(tmp_path)
    sizes = Sizes(prompts=4, held_out=4, rows={"sample": 2, "evaluate at 1": 2})
    each = {"sample": 1.0, "score": 0.5, "train": 2.0, "evaluate at 1": 3.0}
    probe = Probe(device="cpu", seconds=1.0, rows={}, seconds_each=each, bytes_each={}, peak_bytes=0)
    made = Plan(config=config, sizes=sizes, rounds=counts(config, build_algorithm(config), sizes), probe=probe)
    seconds = {work.stage: made.seconds(work) for work in made.stages}
    # two rounds of 8 images, 8 scorings and 6 rows; three evaluations of 4 images
    assert seconds == {"sample": 16.0, "score": 8.0, "train": 24.0, "evaluate at 1": 36.0}


def test_sizes_are_in_the_unit_that_fits():
    assert [size(count) for count in (43_200_000, 1_240_000_000)] == ["43 MB", "1.2 GB"]


def test_the_command_takes_settings_as_train_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = call("plan", "--preset", "demo", "--no-probe", "--rounds", "1", "--sampling.samples-per-prompt=4")
    assert shown.code == 0
    assert "rounds: 1, each of 64 prompts x 4 = 256 images" in shown.out
    assert list(tmp_path.iterdir()) == []
    assert "give a file or a --preset, not both" in refused("plan", "run.yaml", "--preset", "demo", "--no-probe")

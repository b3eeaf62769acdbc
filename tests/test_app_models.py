"""Drawing in the app: the stock pipeline's pictures, adapters switched and mixed, one at a time, seen and stopped."""

from __future__ import annotations

import json
import threading
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_families_a import pixart_sigma
from tiny_models import stable_diffusion_3
from tiny_runs import ADAPTER_FILE, tiny_pipeline

from raftdiff.app.comparison import (
    MOST_PICTURES,
    Comparison,
    archive,
    best_by_reward,
    draw,
    parse,
    parse_seeds,
    plain,
)
from raftdiff.app.follow import Cancels, Made, Told, follow
from raftdiff.app.models import BASE, Contender, Drawing, LoraFile, Models
from raftdiff.app.turns import Busy, Cancelled, Turns
from raftdiff.config import AdapterConfig, ModelConfig
from raftdiff.errors import ConfigError, WeightsError
from raftdiff.pipelines.diffusion import DiffusionPolicy
from raftdiff.reward_models.function import FunctionReward

DRAWING = Drawing(steps=2, guidance=1.0)


def write_lora(folder: Path, seed: int) -> Path:
    """A LoRA of chance for the tiny pipeline, as a run exports it."""
    policy = DiffusionPolicy(tiny_pipeline(), AdapterConfig(rank=2), num_inference_steps=2)
    generator = torch.Generator().manual_seed(seed)
    state = policy.adapter_state()
    policy.load_adapter({name: torch.randn(t.shape, generator=generator) for name, t in state.items()})
    folder.mkdir(parents=True)
    policy.export(folder)
    return folder


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {name: write_lora(folder / name, seed) for seed, name in enumerate(("one", "two"))}


@pytest.fixture
def models(loras) -> Models:
    def brightness(images, prompts):
        return [float(np.asarray(image).mean()) for image in images]

    return Models(
        ModelConfig(path="tiny"),
        [LoraFile(name=name, path=path) for name, path in loras.items()],
        [FunctionReward(brightness, "brightness")],
        pipeline=tiny_pipeline(),
    )


def alone(*names: str, weight: float = 1.0) -> Contender:
    return Contender(name="+".join(names) or BASE, weights=tuple((name, weight) for name in names))


def pixels(models: Models, contender: Contender, seed: int = 3) -> torch.Tensor:
    [drawn] = models.draw(contender, "a red circle", [seed], DRAWING)
    return drawn.sample.image


def stock(lora: Path | None = None, weight: float = 1.0, seed: int = 3) -> torch.Tensor:
    """What the pipeline itself draws with a LoRA that its own method loads."""
    pipeline = tiny_pipeline()
    if lora is not None:
        pipeline.load_lora_weights(str(lora), adapter_name="it")
        pipeline.set_adapters(["it"], [weight])
    output = pipeline(
        prompt=["a red circle"],
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(seed)],
    )
    return torch.from_numpy(np.array(output.images[0])).permute(2, 0, 1)


# ------------------------------------------------------------------------------------------------ adapters


def test_the_base_and_each_lora_draw_what_the_stock_pipeline_draws(models, loras):
    assert torch.equal(pixels(models, alone("one")), stock(loras["one"]))
    assert torch.equal(pixels(models, alone()), stock())
    assert torch.equal(pixels(models, alone("two")), stock(loras["two"]))
    assert torch.equal(pixels(models, alone("one", weight=0.5)), stock(loras["one"], 0.5))
    assert torch.equal(pixels(models, alone(), seed=4), stock(seed=4)), "the base carries a LoRA after a LoRA was drawn"
    assert not torch.equal(stock(), stock(loras["one"]))


def test_a_mix_of_one_lora_with_another_at_zero_is_that_lora(models, loras):
    mixed = Contender(name="mix", weights=(("one", 1.0), ("two", 0.0)))
    assert torch.equal(pixels(models, mixed), stock(loras["one"]))
    both = Contender(name="mix", weights=(("one", 1.0), ("two", 1.0)))
    assert not torch.equal(pixels(models, both), stock(loras["one"]))


@pytest.mark.parametrize(
    ("family", "call"), [(stable_diffusion_3, {}), (pixart_sigma, {"use_resolution_binning": False})]
)
def test_other_families_switch_their_loras_too(tmp_path, family, call):
    pipeline = family()
    policy = DiffusionPolicy(pipeline, AdapterConfig(rank=2), num_inference_steps=2, call=call)
    policy.load_adapter({name: torch.ones_like(tensor) for name, tensor in policy.adapter_state().items()})
    (tmp_path / "lora").mkdir()
    policy.export(tmp_path / "lora")
    models = Models(
        ModelConfig(path="tiny", call=call), [LoraFile(name="one", path=tmp_path / "lora")], pipeline=family()
    )
    base = pixels(models, alone())
    assert not torch.equal(base, pixels(models, alone("one")))
    models._kept = type(models._kept)(1 << 20)  # so that the base is drawn once more
    assert torch.equal(base, pixels(models, alone()))


def test_a_lora_that_is_missing_or_of_another_model_is_refused(tmp_path, models):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    save_file({"unet.nothing.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "other" / ADAPTER_FILE)
    for name, message in (("empty", "there is no LoRA in safetensors"), ("other", "use the base")):
        models.loras[name] = LoraFile(name=name, path=tmp_path / name)
        with pytest.raises(WeightsError, match=message):
            pixels(models, alone(name))
    assert torch.equal(pixels(models, alone()), stock())


def test_a_damaged_lora_is_told_of_and_the_others_can_be_drawn_with(tmp_path, models, loras):
    file = tmp_path / "cut-off.safetensors"
    file.write_bytes(b"half a header")
    models.loras["cut-off"] = LoraFile(name="cut-off", path=file)
    [line] = models.differing()
    assert line.startswith(f"{file} cannot be read as safetensors")
    assert torch.equal(pixels(models, alone("one")), stock(loras["one"]))
    assert models.differing() == [line], "a LoRA that is on the base makes it another base"


def test_pickled_weights_are_not_read(tmp_path, models):
    (tmp_path / "pickled").mkdir()
    torch.save({"unet.x": torch.zeros(1)}, tmp_path / "pickled" / "pytorch_lora_weights.bin")
    models.loras["pickled"] = LoraFile(name="pickled", path=tmp_path / "pickled")
    with pytest.raises(WeightsError, match="no LoRA in safetensors"):
        pixels(models, alone("pickled"))


def test_another_training_of_the_same_name_is_another_model(tmp_path, models):
    before = models.identity(alone("one"))
    assert before == models.identity(alone("one")) and before.startswith("one@")
    models.loras["one"] = LoraFile(name="one", path=write_lora(tmp_path / "one", 5))
    assert models.identity(alone("one")) != before


# ------------------------------------------------------------------------------------------------ drawing


def test_what_was_drawn_is_kept_and_every_step_is_told(models):
    told: list[tuple[int, int]] = []
    first = models.draw(alone(), "a", [1, 2], DRAWING, progress=lambda *steps: told.append(steps))
    assert told[0] == (0, 4) and told[-1] == (4, 4) and told == sorted(told)
    told.clear()
    again = models.draw(alone(), "a", [2, 5], DRAWING, progress=lambda *steps: told.append(steps))
    assert again[0] is first[1] and again[1].sample.seed == 5 and told[-1] == (2, 2)
    assert first[0].scores["brightness"] == pytest.approx(first[0].sample.image.float().mean().item(), abs=1e-3)


def test_drawing_stops_at_the_next_step_and_the_pipeline_goes_on_working(models):
    cancel, steps = threading.Event(), []

    def progress(done: int, total: int) -> None:
        steps.append(done)
        cancel.set()

    with pytest.raises(Cancelled):
        models.draw(alone("one"), "a", [1], Drawing(steps=20, guidance=1.0), progress=progress, cancel=cancel)
    assert len(steps) == 1
    assert torch.equal(pixels(models, alone()), stock())


def test_a_black_picture_is_not_scored(models):
    models.pipeline.vae.forward = None
    models.pipeline.vae.decode = lambda latents, **_: (torch.full((len(latents), 3, 16, 16), -1.0),)
    [drawn] = models.draw(alone(), "a", [1], DRAWING)
    assert drawn.sample.flaw == "black image" and drawn.scores == {}


def test_a_size_that_the_model_does_not_draw_is_refused(models):
    with pytest.raises(ConfigError, match="height 20: this model draws in multiples of 8"):
        models.draw(alone(), "a", [1], Drawing(steps=2, guidance=1.0, height=20))
    [drawn] = models.draw(alone(), "a", [1], Drawing(steps=2, guidance=1.0, height=24, width=16))
    assert drawn.image.size == (16, 24)


def test_turns_are_one_at_a_time_in_order_and_the_line_has_an_end():
    turns, order, waits = Turns(most=2), [], []
    inside, release = threading.Event(), threading.Event()

    def work(name: str) -> None:
        with turns.turn(on_wait=lambda ahead: waits.append((name, ahead))):
            order.append(name)
            inside.set()
            release.wait(10)

    threads = []
    for number, name in enumerate("abc"):
        threads.append(threading.Thread(target=work, args=(name,)))
        threads[-1].start()
        while turns.waiting != number:
            inside.wait(0.01)
        inside.wait(10)
    assert turns.busy and turns.waiting == 2
    with pytest.raises(Busy, match="2 drawings wait already"), turns.turn():
        pass
    cancelled = threading.Event()
    release.set()
    for thread in threads:
        thread.join(10)
    assert order == list("abc") and not turns.busy
    assert ("b", 1) in waits and ("c", 2) in waits
    with turns.turn():
        cancelled.set()
        with pytest.raises(Cancelled), turns.turn(cancelled):
            pass
    assert turns.waiting == 0


def test_when_the_app_ends_what_draws_and_what_waits_stops_before_it_does(models):
    drawing, ends = threading.Event(), []

    def draw() -> None:
        try:
            with models.turns.turn():
                models.draw(alone(), "a", [1], Drawing(steps=900, guidance=1.0), progress=lambda *_: drawing.set())
        except Cancelled as error:
            ends.append(str(error))

    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert drawing.wait(10)
    while not models.turns.waiting:
        threads[1].join(0.01)
    models.turns.close(10)
    assert not models.turns.busy
    for thread in threads:
        thread.join(10)
    assert len(ends) == 2
    with pytest.raises(Cancelled), models.turns.turn():
        pass


def test_a_reader_who_leaves_stops_the_work():
    cancel = threading.Event()
    stopped = threading.Event()

    def work(tell) -> None:
        tell(Made(value=1))
        cancel.wait(10)
        stopped.set()

    reading = follow(work, cancel)
    assert next(reading) == Made(value=1)
    reading.close()
    assert stopped.wait(10)


def test_errors_of_the_work_reach_the_reader_and_a_new_drawing_stops_the_old():
    def work(tell) -> None:
        tell(Told(text="step 1"))
        raise Busy("full")

    with pytest.raises(Busy, match="full"):
        list(follow(work, threading.Event()))
    cancels = Cancels()
    first = cancels.new("session")
    second, other = cancels.new("session"), cancels.new("other")
    assert first.is_set() and not second.is_set() and not other.is_set()
    cancels.stop("session")
    assert second.is_set() and not other.is_set()


# ------------------------------------------------------------------------------------------------ comparisons


def test_every_model_draws_from_the_same_seed_and_the_better_is_marked(models):
    asked = Comparison(
        prompts=("a", "b"), seeds=(0, 7), loras=("one",), mix={"one": 0.5, "two": 0.5}, steps=2, guidance=1
    )
    *_, rows = draw(asked, models)
    assert [(row.prompt, row.seed) for row in rows] == [("a", 0), ("a", 7), ("b", 0), ("b", 7)]
    for row in rows:
        assert [cell.contender for cell in row.cells] == ["base", "one", "mix"]
        assert {cell.drawn.sample.seed for cell in row.cells} == {row.seed}
        values = [cell.drawn.scores["brightness"] for cell in row.cells]
        assert [bool(cell.best) for cell in row.cells] == [value == max(values) for value in values]


def test_best_of_n_takes_the_highest_of_its_candidates(models):
    asked = Comparison(prompts=("a",), seeds=(2,), steps=2, guidance=1, best_of=3, rank_by="brightness")
    *_, [row] = draw(asked, models)
    candidates = models.draw(alone(), "a", [6, 7, 8], asked.drawing)
    assert row.cells[0].drawn.scores == max((c.scores for c in candidates), key=lambda s: s["brightness"])
    assert row.cells[0].candidates == 3


def test_the_best_is_the_single_highest():
    assert best_by_reward([{"a": 1, "b": 2, "c": 3}, {"a": 2, "b": 2}, {"a": 0, "d": 1}]) == {"a": 1}


def test_a_link_restores_the_settings():
    asked = Comparison(
        prompts=("a red & blue circle?", "né 日本"),
        seeds=(3, 2**40),
        loras=("one", "two"),
        mix={"one": 0.25, "a:b": -1.5},
        steps=7,
        guidance=1.5,
        height=64,
        best_of=4,
        rank_by="clip",
    )
    assert Comparison.from_query(asked.query()) == asked
    assert Comparison.from_query(Comparison(prompts=("a",)).query()) == Comparison(prompts=("a",))
    assert Comparison.from_query("") is None and Comparison.from_query("utm_source=x") is None


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("prompt=a&steps=9999", "steps: Input should be less than or equal to 150"),
        ("prompt=a&seed=x", "seeds 0: Input should be a valid integer"),
        ("prompt=a&mix=9:one", "mix one"),
        ("prompt=" + "a" * 1001, "at most 1000 characters"),
        ("prompt=a&" * 2000, "the link is too long"),
        ("prompt=a&width=99999", "width"),
        ("&".join(f"prompt={i}" for i in range(17)), "at most 16 items"),
    ],
)
def test_a_link_that_asks_for_too_much_is_refused_in_words(query, message):
    with pytest.raises(ConfigError, match=message):
        Comparison.from_query(query)


def test_more_pictures_than_one_may_ask_for_are_refused(models):
    with pytest.raises(ConfigError, match=f"at most {MOST_PICTURES}"):
        parse({"prompts": ["a", "b"], "seeds": list(range(16)), "best_of": 16, "rank_by": "brightness"})
    with pytest.raises(ConfigError, match="there is no LoRA called 'oen' here; did you mean 'one'"):
        Comparison(prompts=("a",), loras=("oen",)).check(models)
    with pytest.raises(ConfigError, match="needs a reward to choose by"):
        Comparison(prompts=("a",), best_of=2).check(models)
    with pytest.raises(ConfigError, match="no LoRA called '../../etc/passwd'"):
        Comparison(prompts=("a",), mix={"../../etc/passwd": 1.0}).check(models)


def test_seeds_are_numbers_and_ranges():
    assert parse_seeds("0-3, 17 5") == [0, 1, 2, 3, 17, 5]
    for text in ("a", "1-", "-1", "3-x", "0-1000000000"):
        with pytest.raises(ConfigError, match="seeds"):
            parse_seeds(text)


def test_the_download_holds_the_pictures_and_what_made_them(models):
    asked = Comparison(prompts=("a",), seeds=(1,), loras=("one",), steps=2, guidance=1)
    *_, rows = draw(asked, models)
    with zipfile.ZipFile(BytesIO(archive(asked, rows, "tiny"))) as file:
        settings = json.loads(file.read("settings.json"))
        assert file.testzip() is None and len(file.namelist()) == 3
    assert settings["base"] == "tiny" and settings["steps"] == 2
    assert [(p["model"], p["seed"]) for p in settings["pictures"]] == [("base", 1), ("one", 1)]
    assert parse({name: settings[name] for name in Comparison.model_fields}) == asked
    assert [picture["model"] for picture in plain(rows)] == ["base", "one"]
    assert plain(rows)[0]["image"].startswith("data:image/png;base64,")

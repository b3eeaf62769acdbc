"""Configurations: what is refused and how it is said, and that YAML goes out and comes back the same."""

from __future__ import annotations

import re

import pytest
import yaml

from raftdiff.build import build_algorithm
from raftdiff.config import (
    RunConfig,
    difference,
    dump_config,
    is_identity,
    load_config,
    load_preset,
    parse_config,
    presets,
)
from raftdiff.errors import ConfigError


def refusal(values: dict) -> str:
    with pytest.raises(ConfigError) as refused:
        parse_config(values, where="run.yaml")
    message = str(refused.value)
    assert message.startswith("run.yaml: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"roundz": 3}, "unknown key 'roundz'; did you mean 'rounds'?"),
        ({"training": {"learning_rat": 1}}, "unknown key 'training.learning_rat'; did you mean 'learning_rate'?"),
        ({"rewards": [{"nam": "clip"}]}, "unknown key 'rewards.0.nam'; did you mean 'name'?"),
        ({"evaluation": {"rewards": [{"name": "x", "wait": 1}]}}, "'evaluation.rewards.0.wait'; did you mean 'weight'"),
        ({"data": {"path": "x", "shares": 0.1}}, "unknown key 'data.shares'; did you mean 'share'?"),
        ({"xylophone": 3}, "unknown key 'xylophone'"),
        ({"rounds": "many"}, "rounds: Input should be a valid integer"),
        ({"rounds": 2.5}, "rounds: Input should be a valid integer"),
        ({"rounds": 0}, "rounds: Input should be greater than or equal to 1, found 0"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0, found -1"),
        ({"training": {"learning_rate": 0}}, "training.learning_rate: Input should be greater than 0"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate: Input should be"),
        ({"training": {"learning_rate": float("inf")}}, "training.learning_rate: Input should be a finite number"),
        ({"training": {"precision": "fp8"}}, "training.precision: Input should be 'fp32', 'bf16' or 'fp16'"),
        ({"training": {"betas": [0.9]}}, "training.betas"),
        ({"training": {"caption_dropout": 1.5}}, "training.caption_dropout: Input should be less than or equal to 1"),
        ({"training": 3}, "training: "),
        ({"rewards": "clip"}, "rewards: Input should be a valid list"),
        ({"rewards": []}, "at least one reward needs a weight other than 0"),
        ({"rewards": [{"name": "clip", "weight": 0}]}, "at least one reward needs a weight other than 0"),
        (
            {"rewards": [{"name": "clip"}, {"name": "clip"}]},
            "two rewards are called 'clip'; give one of them a `label`",
        ),
        ({"name": "../elsewhere"}, "'../elsewhere' is not a folder name"),
        ({"name": ".."}, "'..' is not a folder name"),
        ({"name": "a\nb"}, "is not a folder name"),
        ({"algorithm": {"replay": 1.0}}, "algorithm.replay: Input should be less than 1"),
        ({"algorithm": {"replay": 0.5}, "data": {"path": "x", "share": 0.5}}, "must leave room"),
        ({"model": {"device": "cpu", "dtype": "fp16"}}, "fp16 needs a GPU"),
        ({"model": {"device": "cpu"}, "training": {"precision": "fp16"}}, "fp16 needs a GPU"),
    ],
)
def test_a_setting_that_cannot_be_run_is_refused_by_its_key(values, message):
    assert message in refusal(values)


def test_every_mistake_is_named_at_once():
    message = refusal({"roundz": 3, "seed": "x", "training": {"epoch": 1}})
    assert "'roundz'" in message and "seed:" in message and "did you mean 'epochs'?" in message


def write(path, text: str | bytes):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1\n- 2\n", "expected a mapping of settings, found list"),
        ("just words", "expected a mapping of settings, found str"),
        ("", "expected a mapping of settings, found NoneType"),
        ("a: [1, 2", "not a YAML file"),
        ("rounds: 3\n\trounds: 4", "not a YAML file"),
        (b"name: \xff\xfe", "not a YAML file"),
        ("a: !!python/object/apply:os.system ['true']", "not a YAML file"),
        ("1: 2", "1"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_by_its_name(tmp_path, content, message):
    path = write(tmp_path / "run.yaml", content)
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)
    assert message in str(refused.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file; `raftdiff show-config"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_a_byte_order_mark_and_windows_line_ends_are_no_trouble(tmp_path):
    path = write(tmp_path / "run.yaml", b"\xef\xbb\xbfrounds: 7\r\nname: caf\xc3\xa9\r\n")
    assert (load_config(path).rounds, load_config(path).name) == (7, "café")


def test_numbers_as_yaml_has_them_are_numbers(tmp_path):
    path = write(tmp_path / "run.yaml", "training: {learning_rate: 3e-4, betas: [0.5, 0.9]}")
    assert load_config(path).training.learning_rate == 3e-4


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_valid_and_says_what_it_is(name):
    config = load_preset(name)
    assert config.name == name
    assert parse_config(yaml.safe_load(dump_config(config)), where="") == config


def test_yaml_out_and_in_is_the_same_configuration(tmp_path):
    config = RunConfig(
        prompts={"source": ["ein Kreis", "円", "- :#'\"", "yes", "1e3"]},
        rewards=[{"name": "clip", "options": {"model": "shapes", "list": [1, None]}}],
        data={"path": "own"},
        model={"call": {"clip_skip": 2}},
    )
    assert load_config(write(tmp_path / "run.yaml", dump_config(config))) == config


def test_a_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().rounds = 3


def test_a_difference_names_each_setting_that_changed():
    old = RunConfig(rounds=2, rewards=[{"name": "clip"}])
    new = RunConfig(rounds=3, rewards=[{"name": "jpeg"}], training={"learning_rate": 0.5})
    found = difference(old, new)
    assert found["rounds"] == (2, 3) and found["training.learning_rate"] == (1e-4, 0.5)
    assert set(found) == {"rounds", "rewards", "training.learning_rate"}


def test_what_identifies_a_run():
    fixed = ["seed", "model.path", "adapter.rank", "prompts.source", "rewards", "combine", "algorithm.options"]
    fixed += ["data.path", "sampling.num_inference_steps", "sampling.guidance_scale", "evaluation.prompts"]
    free = ["rounds", "name", "output", "model.device", "training.learning_rate", "sampling.batch_size", "max_failed"]
    assert [key for key in fixed if not is_identity(key)] == []
    assert [key for key in free if is_identity(key)] == []


def test_every_setting_is_documented_where_it_is_defined():
    def undocumented(model, prefix=""):
        for name, field in model.model_fields.items():
            nested = field.annotation
            if isinstance(nested, type) and hasattr(nested, "model_fields"):
                yield from undocumented(nested, f"{prefix}{name}.")
            elif not field.description:
                yield prefix + name

    assert list(undocumented(RunConfig)) == []
    assert re.fullmatch(r"[A-Z].*\.", RunConfig.model_fields["rounds"].description or "")


def test_an_unknown_algorithm_or_option_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"unknown algorithm 'rft'; did you mean 'raft'\?"):
        build_algorithm(RunConfig.model_validate({"algorithm": {"name": "rft"}}))
    with pytest.raises(ConfigError, match=r"raft has no option 'keeep'; did you mean 'keep'\?"):
        build_algorithm(RunConfig.model_validate({"algorithm": {"options": {"keeep": 1}}}))

"""The command line, called in this process: what each command does, and one clear line for what it cannot do."""

from __future__ import annotations

import io
import json
import logging
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny_runs import tiny_pipeline

from raftdiff import cli
from raftdiff.cli import main
from raftdiff.config import RunConfig, load_config, parse_config, presets


@contextmanager
def quiet_logging():
    """Put back the handlers of the root logger, which the command line sets."""
    root = logging.getLogger()
    before = root.handlers[:]
    try:
        yield
    finally:
        root.handlers[:] = before


def call(*arguments: object) -> SimpleNamespace:
    """Exit code, standard output and standard error of one command."""
    out, err = io.StringIO(), io.StringIO()
    console, cli.console = cli.console, cli.Console(file=out, width=200)
    try:
        with redirect_stdout(out), redirect_stderr(err), quiet_logging():
            try:
                code = main([str(argument) for argument in arguments])
            except SystemExit as stopped:  # argparse and tyro
                code = stopped.code or 0
    finally:
        cli.console = console
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def refused(*arguments: object, code: int = 2) -> str:
    """The one line that a command which fails says."""
    result = call(*arguments)
    assert result.code == code, (result.out, result.err)
    (line,) = result.err.strip().split("\n")
    assert line.startswith("raftdiff: ")
    return line


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path, model):
    """Writes a run.yaml with a tiny run; gives its path."""

    def write(**changes) -> Path:
        plain = {
            "name": "run",
            "output": str(tmp_path / "runs"),
            "rounds": 1,
            "model": {"path": str(model)},
            "adapter": {"rank": 2},
            "prompts": {"source": ["a red circle", "a blue square"]},
            "rewards": [{"name": "jpeg"}],
            "sampling": {"samples_per_prompt": 2, "num_inference_steps": 2, "guidance_scale": 1.0},
            "training": {"steps": 2, "batch_size": 2},
            "evaluation": {"seeds_per_prompt": 1},
            "tracker": "none",
        }
        for name, value in changes.items():
            plain[name] = plain.get(name, {}) | value if isinstance(value, dict) else value
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(plain), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model) -> Path:
    """The folder of a run that `raftdiff train` made."""
    folder = tmp_path_factory.mktemp("finished")
    config = {
        "model": {"path": str(model)},
        "output": str(folder),
        "rounds": 1,
        "adapter": {"rank": 2},
        "prompts": {"source": ["a red circle", "a blue square"]},
        "rewards": [{"name": "jpeg"}],
        "sampling": {"samples_per_prompt": 2, "num_inference_steps": 2, "guidance_scale": 1.0},
        "training": {"steps": 2, "batch_size": 2},
        "evaluation": {"seeds_per_prompt": 1},
        "tracker": "none",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    result = call("train", folder / "run.yaml", "--name", "made")
    assert result.code == 0, result.err
    assert "report " in result.out and f"pipe.load_lora_weights('{folder / 'made' / 'lora'}')" in result.out
    return folder / "made"


# ------------------------------------------------------------------------------------------------ commands


def test_train_leaves_a_run_folder(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "report.html", "lora", "checkpoints", "samples", "scores"}


def test_resume_goes_on_with_more_rounds(write):
    path = write()
    assert call("train", path).code == 0
    folder = load_config(path).folder
    assert f"`raftdiff resume {folder}` goes on with it" in refused("train", path, code=1)
    result = call("resume", folder, "--rounds", 2)
    assert result.code == 0 and "resuming with rounds: 1 -> 2" in result.out
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_of_several_processes_the_main_one_alone_speaks_but_no_error_is_lost(write, monkeypatch):
    path = write()
    monkeypatch.setattr(cli, "LAUNCHER_S", 0)
    monkeypatch.setenv("RANK", "1")
    result = call("train", path)
    assert (result.code, result.out, result.err) == (0, "", "")
    result = call("train", path)
    assert result.code == 1 and result.out == ""
    assert result.err.startswith("raftdiff, process 1: ") and "holds a run already" in result.err
    monkeypatch.setenv("RANK", "0")
    assert refused("train", path, code=1) == result.err.replace(", process 1", "").strip()


def test_a_run_folder_that_was_moved_still_resumes(write, tmp_path):
    path = write()
    assert call("train", path).code == 0
    load_config(path).folder.rename(tmp_path / "elsewhere")
    assert call("resume", tmp_path / "elsewhere", "--rounds", 2).code == 0


def test_sample_and_score_make_pictures_and_their_scores(tmp_path, model, finished):
    images = tmp_path / "images"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n", encoding="utf-8")
    result = call(
        *("sample", "--model", model, "--lora", finished / "lora", "--prompts", prompts, "--seeds", 2),
        *("--steps", 2, "--guidance", 1, "--out", images),
    )
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["text"], row["seed"]) for row in rows] == [
        ("a red circle", 0),
        ("a red circle", 1),
        ("a blue square", 0),
        ("a blue square", 1),
    ]
    assert all((images / row["file_name"]).is_file() for row in rows) and (images / "grid.png").is_file()
    result = call("score", images, "--reward", "jpeg", "--reward", "shapes-oracle", "--option", "jpeg.quality=50")
    assert result.code == 0 and "4/4" in result.out
    lines = (images / "scores.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "file_name,text,jpeg,shapes-oracle" and len(lines) == 5


def test_a_lora_changes_the_pictures_and_a_seed_repeats_them(tmp_path, model, finished):
    def picture(name: str, *more: object) -> bytes:
        arguments = ("sample", "--model", model, "--prompts", "a red circle", "--seeds", 1, "--steps", 2, *more)
        assert call(*arguments, "--out", tmp_path / name).code == 0
        return (tmp_path / name / "00000.png").read_bytes()

    big = tmp_path / "big"
    big.mkdir()
    source = finished / "lora" / "pytorch_lora_weights.safetensors"
    save_file({name: 20 + 20 * tensor for name, tensor in load_file(source).items()}, big / source.name)
    assert picture("one") == picture("again") != picture("aligned", "--lora", big)


def test_evaluate_compares_the_lora_with_its_base_on_other_prompts(finished):
    before = (finished / "metrics.jsonl").read_bytes()
    result = call("evaluate", finished, "--prompts", "shapes:bare/3", "--seeds", 2, "--guidance", 1, 2)
    assert result.code == 0, result.err
    assert "jpeg" in result.out and "not trained on" not in result.out and "guidance scale 2" in result.out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_report_makes_the_page_again(finished):
    page = finished / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert call("report", finished).code == 0
    assert len(page.read_bytes()) == len(before)


def test_list_names_every_unit_and_preset():
    result = call("list")
    assert result.code == 0
    for name in ("clip", "aesthetic", "jpeg", "shapes-oracle", "raft", "image", "text", *presets()):
        assert name in result.out


def test_show_config_prints_what_reads_back_as_the_same_configuration(write):
    path = write()
    shown = call("show-config", path)
    assert shown.code == 0 and shown.err == ""
    assert parse_config(yaml.safe_load(shown.out), where="") == load_config(path)
    assert yaml.safe_load(call("show-config", "--preset", "demo").out)["name"] == "demo"
    assert parse_config(yaml.safe_load(call("show-config").out), where="") == RunConfig()


def test_settings_on_the_command_line_replace_those_of_the_file(write):
    shown = call("show-config", write(), "--rounds", 8, "--training.learning-rate", "3e-4", "--model.dtype", "bf16")
    config = parse_config(yaml.safe_load(shown.out), where="")
    assert (config.rounds, config.training.learning_rate, config.model.dtype) == (8, 3e-4, "bf16")
    assert config.training.steps == 2


def test_sections_that_the_file_does_not_have_are_set_on_the_command_line(write):
    writer = ("--prompts.writer.path", "shapes", "--prompts.writer.max-new-tokens=7")
    shown = call(
        "show-config", write(), "--data.path=mine", "--data.share", "0.5", *writer, "--evaluation.prompts", "a"
    )
    config = parse_config(yaml.safe_load(shown.out), where="")
    assert config.data is not None and (config.data.path, config.data.share) == ("mine", 0.5)
    assert config.prompts.writer is not None and config.prompts.writer.max_new_tokens == 7
    over = call("show-config", write(data={"path": "theirs"}), "--data.share", "0.5")
    assert yaml.safe_load(over.out)["data"] == {"path": "theirs", "share": 0.5}
    lacking = call("show-config", write(), "--data.share", "0.5")
    assert lacking.code == 2 and "--data.path" in lacking.err and lacking.out == ""


OPTIONS = {
    "demo": ["{image,text}", "--output", "--seed"],
    "train": ["run.yaml", "--preset", "--allow-code", "--rounds", "--training.learning-rate", "--adapter.rank"],
    "resume": ["folder", "--rounds", "--allow-code"],
    "show-config": [
        "run.yaml",
        "--preset",
        "--allow-code",
        "--sampling.samples-per-prompt",
        "--tracker",
        "--data.path",
    ],
    "sample": [
        "--model",
        "--lora",
        "--prompts",
        "--seeds",
        "--first-seed",
        "--steps",
        "--guidance",
        "--batch-size",
        "--modality",
        "--temperature",
        "--top-p",
        "--max-new-tokens",
        "--stop",
        "--best-of",
        "--reward",
        "--option",
        "--out",
    ],
    "score": ["path", "--reward", "--option"],
    "export": ["folder", "--format", "--dtype", "--merged", "--output", "--push-to-hub"],
    "evaluate": ["folder", "--prompts", "--seeds", "--guidance", "--allow-code"],
    "report": ["folder", "--allow-code"],
    "app": ["--runs", "--base", "--lora", "--reward", "--option", "--prompts", "--host", "--port", "--allow-host"],
    "list": ["rewards, judges, algorithms, policies and presets"],
    "shapes train": ["--work", "--out", "--stage", "--compile"],
    "shapes check": ["--stage", "--count"],
    "shapes texts": ["task", "--count", "--seed", "--clean", "--out"],
}


@pytest.mark.parametrize("command", OPTIONS)
def test_the_help_of_a_command_names_its_options(command):
    result = call(*command.split(), "--help")
    assert result.code == 0
    missing = [option for option in OPTIONS[command] if option not in result.out]
    assert not missing, result.out


def test_the_help_names_the_commands():
    result = call("--help")
    assert result.code == 0 and all(command.split()[0] in result.out for command in OPTIONS)


def test_help_explains_settings_in_the_words_of_the_configuration():
    text = " ".join(call("train", "--help").out.replace("│", " ").split())
    assert "candidates for each prompt in a round" in text


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": [{"name": "asthetic"}]}, "unknown reward 'asthetic'; did you mean 'aesthetic'?"),
        ({"rewards": [{"name": "jpeg", "options": {"qualty": 3}}]}, "jpeg has no option 'qualty'; did you mean"),
        ({"rewards": [{"name": "jpeg", "options": {"quality": 0}}]}, "quality of the JPEG reward is 0"),
        ({"algorithm": {"options": {"kepe": 1}}}, "raft has no option 'kepe'; did you mean 'keep'?"),
        ({"algorithm": {"options": {"selection": "locl"}}}, "selection is 'locl'; did you mean 'local'?"),
        ({"sampling": {"samples_per_prompt": 1}}, "samples_per_prompt"),
        ({"model": {"dtype": "fp16"}}, "fp16 needs a GPU"),
        ({"model": {"device": "gpu"}}, "model.device: 'gpu' cannot be used here ("),
        ({"model": {"device": "cuda:99"}}, "model.device: 'cuda:99' cannot be used here ("),
        ({"model": {"scheduler": "DDIMSchedulr"}}, "diffusers has no 'DDIMSchedulr'; did you mean 'DDIMScheduler'?"),
        ({"adapter": {"targets": ["to_x"]}}, "adapter.targets: no layer is called ['to_x']"),
        ({"prompts": {"source": "none.txt"}}, "there is no prompt file none.txt"),
        ({"roundz": 3}, "unknown key 'roundz'; did you mean 'rounds'?"),
    ],
)
def test_a_setting_that_cannot_be_run_is_one_line_and_exit_code_2(write, changes, message):
    assert message in refused("train", write(**changes))


def test_a_reward_from_a_module_needs_permission_at_each_launch(write):
    path = write(rewards=[{"name": "raftdiff.reward_models.jpeg:JpegReward"}])
    assert "--allow-code" in refused("train", path)
    result = call("train", path, "--allow-code")
    assert result.code == 0, result.err
    folder = load_config(path).folder
    assert "--allow-code" in refused("resume", folder)
    assert call("resume", folder, "--allow-code").code == 0


def test_a_folder_that_is_no_pipeline_is_refused(write, tmp_path):
    message = refused("train", write(model={"path": str(tmp_path)}), code=1)
    assert f"{tmp_path}: no model_index.json there; give the folder of a saved diffusers pipeline" in message


def test_a_pipeline_that_is_not_whole_is_refused_in_one_line(write, tmp_path, model):
    import shutil

    shutil.copytree(model, tmp_path / "part")
    (tmp_path / "part" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "cannot be loaded" in refused("train", write(model={"path": str(tmp_path / "part")}), code=1)


def test_a_lora_of_another_base_is_one_clear_line(tmp_path, model, finished):
    source = finished / "lora" / "pytorch_lora_weights.safetensors"
    other = {name: tensor.repeat(1, 2) if "lora_A" in name else tensor for name, tensor in load_file(source).items()}
    (tmp_path / "other").mkdir()
    save_file(other, tmp_path / "other" / source.name)
    arguments = ("sample", "--model", model, "--prompts", "a red circle", "--out", tmp_path / "images", "--lora")
    line = refused(*arguments, tmp_path / "other", code=1)
    assert "does not fit StableDiffusionPipeline" in line and "use the base that it was trained from" in line
    assert "there is no LoRA" in refused(*arguments, tmp_path / "nothing", code=1)
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt"),
        (b"\n \n", "holds no prompt"),
        (b"\x89PNG\r\n\x1a\n\0", "prompts.txt:1: "),
        (None, "no"),
    ],
)
def test_a_prompt_file_that_cannot_be_used_is_one_line(write, tmp_path, content, message):
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    assert message in refused("train", write(prompts={"source": str(tmp_path / "prompts.txt")}))
    assert message in refused("sample", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out")


def test_other_calls_that_cannot_be_done(tmp_path, write):
    assert "there is no preset 'dmo'; did you mean 'demo'?" in refused("train", "--preset", "dmo")
    assert "give a file or a --preset, not both" in refused("train", write(), "--preset", "demo")
    assert "no such file; `raftdiff show-config" in refused("train", tmp_path / "none.yaml")
    assert "is no run folder: it has no config.yaml" in refused("resume", tmp_path / "none")
    assert "is no run folder" in refused("evaluate", tmp_path)
    assert "metadata.jsonl: no such file" in refused("score", tmp_path, "--reward", "jpeg")
    assert "write REWARD.NAME=VALUE" in refused("score", tmp_path, "--reward", "jpeg", "--option", "quality=3")
    (tmp_path / "metadata.jsonl").write_text("", encoding="utf-8")
    assert "holds no example" in refused("score", tmp_path, "--reward", "jpeg")


@pytest.mark.parametrize(
    "arguments", [["trian"], [], ["demo", "--sed", "1"], ["list", "--all"], ["train", "--roundz", "8"]]
)
def test_a_command_or_option_that_does_not_exist_is_exit_code_2(arguments):
    result = call(*arguments)
    assert result.code == 2 and "Traceback" not in result.err
    assert result.err


def test_a_value_of_the_wrong_type_or_range_on_the_command_line_is_exit_code_2(write):
    path = write()
    for option, value in (("--rounds", "many"), ("--rounds", "0"), ("--training.learning-rate", "-1")):
        result = call("show-config", path, option, value)
        assert result.code == 2 and result.out == "" and "Traceback" not in result.err
        assert option.rpartition(".")[2].strip("-").replace("-", "_") in result.err.replace("-", "_")

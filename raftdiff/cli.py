"""`raftdiff ...`: every option's help comes from raftdiff/config.py or stands here, once."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.logging import RichHandler

from .config import (
    PRESETS,
    ModelConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
    dump_config,
    load_config,
    load_preset,
    parse_config,
    presets,
)
from .errors import ConfigError, DataError, RaftdiffError

if TYPE_CHECKING:
    from .rounds import Result

console = Console()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for what the user can mend in the call, 1 for other failures, and 128
    plus the signal after SIGTERM or Ctrl-C."""
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    if rest and not getattr(known, "takes_settings", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if known.run is not _doctor:  # which runs where a library cannot be imported
        quiet_libraries()
    from .interrupts import Interrupted

    try:
        known.run(known, rest)
    except RaftdiffError as error:
        Console(stderr=True).print(f"raftdiff: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return error.exit_code
    except Interrupted as interrupted:
        Console(stderr=True).print(f"raftdiff: {interrupted}; `raftdiff resume RUN_FOLDER` goes on", markup=False)
        return interrupted.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def quiet_libraries() -> None:
    """Keep what libraries say to their users out of the way of what raftdiff says to its own."""
    # Not on standard output, which `show-config > run.yaml` writes to a file.
    handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False)
    logging.basicConfig(level="WARNING", format="%(message)s", handlers=[handler])
    logging.getLogger("raftdiff").setLevel("INFO")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raftdiff", description="Align a text-to-image pipeline with a reward; out comes an ordinary LoRA."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, help: str, *, settings: bool = False) -> argparse.ArgumentParser:
        # tyro prints the help of commands that take settings, because it knows every one of them.
        sub = commands.add_parser(name, help=help, description=help, add_help=not settings)
        sub.set_defaults(run=run, takes_settings=settings)
        return sub

    def configuration(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--preset", help=f"start from a preset: {', '.join(presets())}")
        sub.add_argument("--allow-code", action="store_true", help="allow `module:Class` names in the configuration")
        sub.set_defaults(flags="[--allow-code]")

    def reward_options(sub: argparse.ArgumentParser, *, required: bool = False) -> None:
        sub.add_argument(
            "--reward", action="append", default=[], required=required, help="a registered reward; may be repeated"
        )
        sub.add_argument(
            "--option", action="append", default=[], metavar="REWARD.NAME=VALUE", help="such as clip.model=shapes"
        )

    demo = command("demo", _demo, "align the embedded model with aesthetic + CLIP, offline, in minutes")
    demo.add_argument("--output", default="runs", help="where the run folder is made (default: runs)")
    demo.add_argument("--seed", type=int, default=0, help="of the run (default: 0)")
    train = command("train", _train, "run a configuration: raftdiff train run.yaml --rounds 8", settings=True)
    configuration(train)
    resume = command("resume", _resume, "go on with an interrupted run")
    resume.add_argument("folder", type=Path, help="the run folder")
    resume.add_argument("--rounds", type=int, help="rounds in all, if there shall be more than before")
    resume.add_argument("--allow-code", action="store_true", help="allow `module:Class` names in the configuration")
    plan = command("plan", _plan, "say what a run will do and take: raftdiff plan run.yaml", settings=True)
    configuration(plan)
    plan.add_argument("--no-probe", action="store_true", help="count only: load no weights and measure nothing")
    plan.set_defaults(flags="[--no-probe] [--allow-code]")
    configuration(command("show-config", _show_config, "print a configuration with every default", settings=True))

    sample = command("sample", _sample, "draw images with a model, and a LoRA if you like")
    sample.add_argument("--model", default="shapes", help="`shapes`, a pipeline folder or a hub id (default: shapes)")
    sample.add_argument("--lora", help="a LoRA folder, such as runs/demo/lora")
    sample.add_argument("--prompts", required=True, help="a prompt, a prompt file, or a source such as shapes:bare/8")
    sample.add_argument("--seeds", type=int, default=4, help="images for each prompt (default: 4)")
    sample.add_argument("--first-seed", type=int, default=0, help="seeds count up from this one (default: 0)")
    sample.add_argument("--steps", type=int, default=25, help="denoising steps (default: 25)")
    sample.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's)")
    sample.add_argument("--batch-size", type=int, default=16, help="images denoised at once (default: 16)")
    sample.add_argument("--best-of", type=int, metavar="N", help="keep the best of N for each seed, by --reward")
    reward_options(sample)
    sample.add_argument("--out", type=Path, default=Path("images"), help="folder to write to (default: images)")

    score = command("score", _score, "score a folder of images with captions")
    score.add_argument("folder", type=Path, help="images with a metadata.jsonl (`file_name`, `text`)")
    reward_options(score, required=True)
    evaluate = command("evaluate", _evaluate, "compare a run's LoRA with its base on held-out prompts")
    evaluate.add_argument("folder", type=Path, help="the run folder")
    evaluate.add_argument("--prompts", help="other prompts than the run's held-out ones")
    evaluate.add_argument("--seeds", type=int, help="images for each prompt")
    evaluate.add_argument("--guidance", type=float, nargs="+", help="guidance scales")
    evaluate.add_argument("--allow-code", action="store_true", help="allow `module:Class` names in the configuration")
    report = command("report", _report, "make a run's report.html again")
    report.add_argument("folder", type=Path, help="the run folder")
    report.add_argument("--allow-code", action="store_true", help="allow `module:Class` names in the configuration")
    export = command("export", _export, "write a finished LoRA for ComfyUI, in another precision, or to the hub")
    export.add_argument("folder", type=Path, help="the run folder")
    export.add_argument(
        "--format", choices=["diffusers", "kohya"], default="diffusers", help="kohya: one file for ComfyUI and web UIs"
    )
    export.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="of its weights")
    export.add_argument("--output", type=Path, help="a file (kohya) or a new folder; in the run folder if absent")
    export.add_argument("--push-to-hub", metavar="USER/NAME", help="upload it, with its card, to the Hugging Face hub")
    export.add_argument("--private", action="store_true", help="make the repository private if it is new")
    compare = command("compare", _compare, "run several methods at an equal budget and compare what comes out")
    compare.add_argument("file", type=Path, help="what to compare (docs/compare.md)")
    compare.add_argument("--allow-code", action="store_true", help="allow `module:Class` names in the configuration")
    command("list", _list, "list rewards, algorithms, policies and presets")
    doctor = command("doctor", _doctor, "say what is installed, what this machine has, and what will not work")
    doctor.add_argument("--json", action="store_true", help="print it as JSON, for a bug report")

    shapes = commands.add_parser("shapes", help="the embedded world and its model").add_subparsers(
        dest="shapes_command", required=True, metavar="COMMAND"
    )
    build = shapes.add_parser("train", help="train the embedded model from nothing (hours on a CPU; resumable)")
    build.add_argument("--work", type=Path, default=Path("shapes-training"), help="training state (resumes from it)")
    build.add_argument("--out", type=Path, default=Path("shapes-weights"), help="where the weights go")
    build.add_argument("--stage", choices=["vae", "base", "clip", "aesthetic", "all"], default="all", help="one part")
    build.add_argument("--compile", action="store_true", help="torch.compile the UNet (needs a C++ compiler)")
    build.set_defaults(run=_shapes_train)
    gates = shapes.add_parser("check", help="measure what docs/embedded-model.md claims of the embedded model")
    gates.add_argument("--count", type=int, default=256, help="captions to sample (default: 256)")
    gates.set_defaults(run=_shapes_check)
    return parser


def _configured(known: argparse.Namespace, settings: Sequence[str]) -> RunConfig:
    """The file or preset, with the settings of the command line over it."""
    import tyro

    # The file comes first, so that it cannot be taken for the value of a setting that this parser does not know.
    file, settings = (settings[0], settings[1:]) if settings and not settings[0].startswith("-") else (None, settings)
    if file and known.preset:
        raise ConfigError("give a file or a --preset, not both")
    start = load_config(file) if file else load_preset(known.preset) if known.preset else RunConfig()
    import pydantic
    import yaml

    try:
        chosen = tyro.cli(
            RunConfig,
            prog=f"raftdiff {known.command} [run.yaml | --preset NAME] {known.flags}",
            description=f"Presets: {', '.join(presets())}.",
            args=list(settings),
            default=start,
        )
    except pydantic.ValidationError as error:
        raise ConfigError("command line: " + "; ".join(e["msg"] for e in error.errors())) from None
    # tyro builds nested settings one by one; the whole is validated again, with errors that name the key
    return parse_config(yaml.safe_load(dump_config(chosen)), where="command line")


def _run(config: RunConfig, *, allow_code: bool, resume: bool = False) -> Result:
    from .build import build
    from .display import Terminal
    from .report import terminal_table
    from .rounds import run_rounds

    with Terminal(console, config) as display:
        display.say(f"loading {config.model.path} and its rewards")
        result = run_rounds(build(config, allow_code=allow_code, display=display), resume=resume)
    trained = [reward.label or reward.name for reward in config.rewards if reward.weight]
    console.print()
    console.print(terminal_table(result.base, result.aligned, trained))
    console.print()
    console.print(result.verdict.message, highlight=False, markup=False)
    console.print(f"report  {result.report_path}", highlight=False, markup=False)
    console.print(f"LoRA    {result.lora_path}", highlight=False, markup=False)
    return result


def _demo(known: argparse.Namespace, settings: Sequence[str]) -> None:
    from .evaluation import LEAST_DIVERSITY

    preset = load_preset("demo")
    names = ["demo", *(f"demo-{i}" for i in range(2, 1000))]
    name = next(name for name in names if not (Path(known.output) / name).exists())
    config = preset.model_copy(update={"name": name, "output": known.output, "seed": known.seed})
    result = _run(config, allow_code=False)
    kept = result.aligned[0].metrics["diversity"].mean / result.base[0].metrics["diversity"].mean
    console.print(f"diversity is at {kept:.0%} of the base's; below {LEAST_DIVERSITY:.0%} it counts as collapsed")
    console.print(
        f'load it  pipe = DiffusionPipeline.from_pretrained("{_embedded_pipeline()}"); '
        f'pipe.load_lora_weights("{result.lora_path}")',
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _embedded_pipeline() -> Path:
    from .shapes import WEIGHTS

    return WEIGHTS / "pipeline"


def _train(known: argparse.Namespace, settings: Sequence[str]) -> None:
    config = _configured(known, settings)
    result = _run(config, allow_code=known.allow_code)
    console.print(f"load it  {result.load_line}", highlight=False, markup=False, soft_wrap=True)


def _resume(known: argparse.Namespace, settings: Sequence[str]) -> None:
    config = _run_config(known.folder)
    if known.rounds:
        config = config.model_copy(update={"rounds": known.rounds})
    _run(config, allow_code=known.allow_code, resume=True)


def _run_config(folder: Path) -> RunConfig:
    """The configuration of a run folder, which may have been moved since it was begun."""
    if not (folder / "config.yaml").is_file():
        raise DataError(f"{folder} is no run folder: it has no config.yaml")
    config = load_config(folder / "config.yaml")
    if folder.resolve() == config.folder.resolve():
        return config
    return config.model_copy(update={"output": str(folder.resolve().parent), "name": folder.resolve().name})


def _plan(known: argparse.Namespace, settings: Sequence[str]) -> None:
    from .plan import lines, plan, table

    config = _configured(known, settings)
    with console.status("counting" if known.no_probe else f"loading {config.model.path} and its rewards, then a probe"):
        planned = plan(config, probing=not known.no_probe, allow_code=known.allow_code)
    console.print(table(planned))
    console.print()
    for line in lines(planned):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _show_config(known: argparse.Namespace, settings: Sequence[str]) -> None:
    print(dump_config(_configured(known, settings)), end="")


def _prompts(source: str):
    from .prompts import load_prompts

    if source.startswith("shapes:") or Path(source).suffix or Path(source).exists():
        return load_prompts(source)
    return load_prompts([source])


def _rewards(known: argparse.Namespace) -> list[RewardConfig]:
    """The rewards that the command names, with their options."""
    import yaml

    options: dict[str, dict] = {name: {} for name in known.reward}
    for entry in known.option:
        key, equals, value = entry.partition("=")
        reward, dot, name = key.partition(".")
        if not equals or not dot or reward not in options:
            raise ConfigError(f"--option {entry!r}: write REWARD.NAME=VALUE for a --reward that is given")
        options[reward][name] = yaml.safe_load(value)
    return [RewardConfig(name=name, options=options[name]) for name in known.reward]


def _sample(known: argparse.Namespace, settings: Sequence[str]) -> None:
    import json

    from PIL import Image

    from . import best_of_n
    from .build import build_policy, build_reward, default_device
    from .pipelines.loading import load_lora, load_pipeline
    from .report import image_grid

    if known.best_of is not None:
        best_of_n.check_n(known.best_of)
        if not known.reward:
            raise ConfigError(f"--best-of {known.best_of} needs a --reward to rank by; `raftdiff list` names them")
    elif known.reward:
        raise ConfigError("--reward ranks candidates: give --best-of N too, or score pictures with `raftdiff score`")
    prompts = _prompts(known.prompts)
    rewards = [build_reward(config, device=default_device()) for config in _rewards(known)]
    pipeline = load_pipeline(ModelConfig(path=known.model), default_device())
    if known.lora:
        load_lora(pipeline, known.lora)
    config = RunConfig(
        sampling=SamplingConfig(
            num_inference_steps=known.steps, guidance_scale=known.guidance, batch_size=known.batch_size
        )
    )
    policy = build_policy(config, pipeline)
    known.out.mkdir(parents=True, exist_ok=True)
    if rewards:
        groups = best_of_n.draw(
            policy, prompts, rewards, n=known.best_of, seeds=known.seeds, first_seed=known.first_seed
        )
        found = best_of_n.best(groups)
        samples, records = [one.scored.sample for one in found], [one.record for one in found]
    else:
        rows = [(p, known.first_seed + k) for p in prompts for k in range(known.seeds)]
        samples = policy.sample([p for p, _ in rows], [seed for _, seed in rows])
        records = [{} for _ in samples]
    with (known.out / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for i, (sample, record) in enumerate(zip(samples, records, strict=True)):
            assert sample.image is not None
            name = f"{i:05d}.png"
            Image.fromarray(sample.image.permute(1, 2, 0).numpy()).save(known.out / name)
            row = {"file_name": name, "text": sample.prompt.text, "seed": sample.seed} | record
            file.write(json.dumps(row) + "\n")
    images = [s.image for s in samples if s.image is not None]
    image_grid(images, known.seeds, scale=max(1, 128 // images[0].shape[-1])).save(known.out / "grid.png")
    if rewards:
        console.print(best_of_n.table(found))
        console.print(best_of_n.summary(groups), highlight=False, markup=False, soft_wrap=True)
    console.print(f"{len(samples)} images in {known.out}, all on {known.out / 'grid.png'}", markup=False)


def _score(known: argparse.Namespace, settings: Sequence[str]) -> None:
    import csv
    import io

    from rich.table import Table

    from .build import build_reward, default_device
    from .checkpoint import write_file
    from .data import read_folder
    from .evaluation import paired_interval
    from .scoring import score_parts

    rewards = _rewards(known)
    samples, names = read_folder(known.folder)
    columns, table = {}, Table("reward", "mean", "95% interval", "scored", box=None, pad_edge=False)
    for config in rewards:
        name, reward = config.name, build_reward(config, device=default_device()).reward
        columns[name] = score_parts(samples, reward, max_failed=1.0).tolist()
        found = paired_interval(columns[name], [s.prompt.id for s in samples])
        scored = sum(value == value for value in columns[name])
        table.add_row(name, f"{found.mean:.4g}", f"{found.low:.4g} to {found.high:.4g}", f"{scored}/{len(samples)}")
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file_name", "text", *columns])
    for i, sample in enumerate(samples):
        values = ["" if column[i] != column[i] else column[i] for column in columns.values()]
        writer.writerow([names[i], sample.prompt.text, *values])
    write_file(known.folder / "scores.csv", text.getvalue().encode())
    console.print(table)
    console.print(f"each image's scores: {known.folder / 'scores.csv'}", markup=False)


def _evaluate(known: argparse.Namespace, settings: Sequence[str]) -> None:
    from .build import build
    from .display import Terminal
    from .report import terminal_table
    from .rounds import evaluate_run

    config = _run_config(known.folder)
    changes: dict = {"prompts": known.prompts, "seeds_per_prompt": known.seeds, "guidance_scales": known.guidance}
    evaluation = config.evaluation.model_copy(update={k: v for k, v in changes.items() if v is not None})
    config = config.model_copy(update={"evaluation": evaluation})
    with Terminal(console, config) as display:
        run = build(config, allow_code=known.allow_code, display=display)
        base, aligned = evaluate_run(run)
    console.print(terminal_table(base, aligned, [r.label or r.name for r in config.rewards if r.weight]))


def _report(known: argparse.Namespace, settings: Sequence[str]) -> None:
    from .build import build
    from .rounds import rewrite_report

    run = build(_run_config(known.folder), allow_code=known.allow_code)
    console.print(f"report  {rewrite_report(run)}", highlight=False, markup=False)


def _export(known: argparse.Namespace, settings: Sequence[str]) -> None:
    from .export import export_run, finished_lora, push_to_hub

    config = _run_config(known.folder)
    folder = path = finished_lora(config)
    if (known.format, known.dtype, known.output) != ("diffusers", "fp32", None):  # which the run itself has written
        path = export_run(config, format=known.format, dtype=known.dtype, output=known.output)
    console.print(f"LoRA    {path}", highlight=False, markup=False, soft_wrap=True)
    if known.push_to_hub:
        files = [path] if path.is_file() else []
        address = push_to_hub(folder if files else path, known.push_to_hub, private=known.private, files=files)
        console.print(f"pushed  {address}", highlight=False, markup=False, soft_wrap=True)


def _compare(known: argparse.Namespace, settings: Sequence[str]) -> None:
    from .build import build
    from .compare import compare, load_compare, table
    from .display import Terminal

    config = load_compare(known.file)
    outcomes = compare(
        config,
        partial(build, allow_code=known.allow_code),
        partial(Terminal, console),
    )
    console.print()
    console.print(table(outcomes))
    console.print(f"report  {config.folder / 'compare.html'}", highlight=False, markup=False)


def _list(known: argparse.Namespace, settings: Sequence[str]) -> None:
    from rich.table import Table

    from .registry import ALGORITHMS, POLICIES, REWARDS

    for title, registry in (("rewards", REWARDS), ("algorithms", ALGORITHMS), ("policies", POLICIES)):
        table = Table(box=None, pad_edge=False, show_header=False, title=title, title_justify="left")
        for name in registry.names():
            table.add_row(name, registry.describe(name))
        console.print(table)
        console.print()
    table = Table(box=None, pad_edge=False, show_header=False, title="presets", title_justify="left")
    for name in presets():
        first = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8").split("\n", 1)[0]
        table.add_row(name, first.removeprefix("# "))
    console.print(table)


def _doctor(known: argparse.Namespace, settings: Sequence[str]) -> None:
    from . import doctor

    facts = doctor.collect()
    found = doctor.findings(facts)
    if known.json:
        print(doctor.as_json(facts, found))
    else:
        console.print(doctor.table(facts))
        for finding in found:
            text = f"\n{finding.level}: {finding.what}\n  fix: {finding.fix}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
    if failed := sum(finding.level == "fail" for finding in found):
        raise RaftdiffError(f"{failed} of these will not work; apply the fixes above and run the doctor again")


def _shapes_train(known: argparse.Namespace, settings: Sequence[str]) -> None:
    from .pipelines.shapes_training import train

    train(known.work, known.out, stage=known.stage, compile=known.compile)


def _shapes_check(known: argparse.Namespace, settings: Sequence[str]) -> None:
    from .pipelines.shapes_gates import check

    if not check(count=known.count, console=console):
        raise DataError("the embedded model does not pass every gate (the lines marked FAIL)")


if __name__ == "__main__":
    sys.exit(main())

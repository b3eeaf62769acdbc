"""`raftdiff ...`: every option's help comes from raftdiff/config.py or stands here, once."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console
from rich.logging import RichHandler

from .config import (
    PRESETS,
    Combine,
    RewardConfig,
    RunConfig,
    Settings,
    dump_config,
    load_config,
    load_preset,
    parse_config,
    presets,
)
from .errors import ConfigError, DataError, MissingExtraError, RaftdiffError

if TYPE_CHECKING:
    from .rounds import Result
    from .types import Sample

console = Console()
LAUNCHER_S = 5.0  # within which a launcher ends the other processes after one has failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for what the user can mend in the call, 1 for other failures, and 128
    plus the signal after SIGTERM or Ctrl-C. Of several processes, the main one alone says what goes on."""
    rank = int(os.environ.get("RANK", "0"))  # torchrun and accelerate set it
    console.quiet = rank > 0
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    if rest and not getattr(known, "takes_settings", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if known.run is not _doctor:  # which runs where a library cannot be imported
        quiet_libraries()
    if rank:
        logging.getLogger("raftdiff").setLevel("ERROR")
        warnings.simplefilter("ignore")
    from .interrupts import Interrupted

    try:
        known.run(known, rest)
    except RaftdiffError as error:
        if rank:
            time.sleep(LAUNCHER_S)  # where the main process fails alike, this one does not live to say so too
        speaker = f"raftdiff, process {rank}" if rank else "raftdiff"
        Console(stderr=True).print(f"{speaker}: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return error.exit_code
    except Interrupted as interrupted:
        if not rank:
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
        prog="raftdiff",
        description="Align a text-to-image pipeline or a language model with a reward; out comes an ordinary LoRA.",
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

    demo = command("demo", _demo, "align an embedded model, offline, in minutes")
    demo.add_argument(
        "modality",
        nargs="?",
        choices=["image", "text"],
        default="image",
        help="image: with aesthetic + CLIP; text: at translation (default: image)",
    )
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

    sample = command("sample", _sample, "draw images, or write texts, with a model, and a LoRA if you like")
    sample.add_argument("--model", default="shapes", help="`shapes`, a model folder or a hub id (default: shapes)")
    sample.add_argument("--modality", choices=["image", "text"], default="image", help="what it makes (default: image)")
    sample.add_argument("--lora", help="a LoRA folder, such as runs/demo/lora")
    sample.add_argument("--prompts", required=True, help="a prompt, a prompt file, or a source such as shapes:bare/8")
    sample.add_argument("--seeds", type=int, default=4, help="samples for each prompt (default: 4)")
    sample.add_argument("--first-seed", type=int, default=0, help="seeds count up from this one (default: 0)")
    sample.add_argument("--steps", type=int, help="denoising steps of images (default: 25)")
    sample.add_argument("--guidance", type=float, help="guidance scale of images (default: the pipeline's)")
    sample.add_argument("--temperature", type=float, help="of texts (default: 1)")
    sample.add_argument("--top-p", type=float, help="nucleus that texts are drawn from (default: 1, everything)")
    sample.add_argument("--max-new-tokens", type=int, help="most tokens of a text (default: 64)")
    sample.add_argument("--stop", action="append", metavar="STRING", help="ends a text; may be repeated")
    sample.add_argument("--batch-size", type=int, default=16, help="samples made at once (default: 16)")
    sample.add_argument("--best-of", type=int, metavar="N", help="keep the best of N for each seed, by --reward")
    reward_options(sample)
    sample.add_argument("--out", type=Path, help="folder to write to (default: images, or texts)")

    score = command("score", _score, "score a folder of images with captions, or a file of texts with prompts")
    score.add_argument(
        "path",
        type=Path,
        help="a folder of images with a metadata.jsonl (`file_name`, `text`); a .jsonl or parquet file (`prompt`, "
        "`completion`)",
    )
    reward_options(score, required=True)
    evaluate = command("evaluate", _evaluate, "compare a run's LoRA with its base on held-out prompts")
    evaluate.add_argument("folder", type=Path, help="the run folder")
    evaluate.add_argument("--prompts", help="other prompts than the run's held-out ones")
    evaluate.add_argument("--seeds", type=int, help="samples for each prompt")
    evaluate.add_argument("--guidance", type=float, nargs="+", help="guidance scales")
    evaluate.add_argument("--allow-code", action="store_true", help="allow `module:Class` names in the configuration")
    report = command("report", _report, "make a run's report.html again")
    report.add_argument("folder", type=Path, help="the run folder")
    report.add_argument("--allow-code", action="store_true", help="allow `module:Class` names in the configuration")
    rescore = command("rescore", _rescore, "rank a run's stored samples by other weights, without generating anything")
    rescore.add_argument("folder", type=Path, help="the run folder")
    rescore.add_argument(
        "--weights",
        nargs="+",
        default=[],
        metavar="NAME=VALUE|FILE",
        help="of rewards; or a YAML file with them, such as preference/weights.yaml of a run (others stay)",
    )
    rescore.add_argument("--combine", choices=get_args(Combine), help="another way to combine them")
    rescore.add_argument(
        "--floor", action="append", default=[], metavar="NAME=VALUE", help="`base`, a number or `none`; may be repeated"
    )
    rescore.add_argument("--show", type=int, default=8, metavar="N", help="changed prompts to print (default: 8)")
    rescore.add_argument("--out", type=Path, metavar="FILE", help="write every sample to a CSV file")
    rescore.add_argument("--allow-code", action="store_true", help="allow `module:Class` names in the configuration")
    soup = command("soup", _soup, "mix the LoRAs of runs on single rewards, and evaluate the mixtures")
    soup.add_argument("folders", type=Path, nargs="+", help="run folders, each trained on its own reward")
    soup.add_argument("--grid", type=int, default=4, help="steps of the weights from 0 to 1 (default: 4)")
    soup.add_argument("--beside", type=Path, nargs="+", default=[], help="runs on several rewards, to compare with")
    soup.add_argument("--prompts", help="other prompts than the held-out ones of the first run")
    soup.add_argument("--seeds", type=int, help="samples for each prompt (default: as in the first run)")
    soup.add_argument("--out", type=Path, default=Path("runs/soup"), help="folder to write to (default: runs/soup)")
    soup.add_argument("--allow-code", action="store_true", help="allow `module:Class` names in the configurations")
    export = command("export", _export, "write a finished LoRA for ComfyUI, in another precision, or to the hub")
    export.add_argument("folder", type=Path, help="the run folder")
    export.add_argument(
        "--format", choices=["diffusers", "kohya"], default="diffusers", help="kohya: one file for ComfyUI and web UIs"
    )
    export.add_argument("--merged", action="store_true", help="the whole model with the LoRA folded into its weights")
    export.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="of its weights")
    export.add_argument("--output", type=Path, help="a file (kohya) or a new folder; in the run folder if absent")
    export.add_argument("--push-to-hub", metavar="USER/NAME", help="upload it, with its card, to the Hugging Face hub")
    export.add_argument("--private", action="store_true", help="make the repository private if it is new")
    compare = command("compare", _compare, "run several methods at an equal budget and compare what comes out")
    compare.add_argument("file", type=Path, help="what to compare (docs/compare.md)")
    compare.add_argument("--allow-code", action="store_true", help="allow `module:Class` names in the configuration")
    app = command("app", _app, "open the web app: compare models, vote on them blind, watch runs")
    app.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of runs and votes (default: runs)")
    app.add_argument(
        "--base",
        help="`shapes`, a pipeline folder or a hub id (default: the base of the first --lora's run, or shapes)",
    )
    app.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH",
        help="a run folder, a LoRA folder or a .safetensors file; may be repeated (default: the finished runs)",
    )
    reward_options(app)
    app.add_argument(
        "--prompts", help="prompts of the arena: a file or shapes:bare/8 (default: the run's held-out ones)"
    )
    app.add_argument("--host", default="127.0.0.1", help="address to listen on; others than this one need a login")
    app.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860 on)")
    app.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name the app is opened by; may be repeated"
    )
    feedback = command("feedback", _feedback, "have a judge compare a run's samples, principle by principle")
    feedback.add_argument("folder", type=Path, help="the run folder")
    feedback.add_argument(
        "--principles",
        nargs="+",
        required=True,
        help="sets (image, text, shapes), one of a set (image/detail), or files",
    )
    feedback.add_argument("--judge", required=True, help="a registered judge: endpoint, local, or oracle (simulated)")
    feedback.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the judge, such as model=NAME"
    )
    feedback.add_argument(
        "--pairs-per-prompt", type=int, default=4, help="pairs of each prompt in each round (default: 4)"
    )
    feedback.add_argument("--rounds", type=int, nargs="+", help="the rounds whose samples are compared (default: all)")
    feedback.add_argument("--name", default="labels", help="of these labels (default: labels)")
    feedback.add_argument("--seed", type=int, default=0, help="another one takes other pairs (default: 0)")
    preference = commands.add_parser(
        "preference", help="preference models from the labels of `raftdiff feedback`"
    ).add_subparsers(dest="preference_command", required=True, metavar="COMMAND")
    fit = preference.add_parser("train", help="train a preference model of each principle")
    fit.add_argument("folder", type=Path, help="the run folder")
    fit.add_argument("--name", default="labels", help="of the labels (default: labels)")
    fit.add_argument("--principles", nargs="+", default=[], metavar="NAME", help="of those with labels (default: all)")
    fit.add_argument(
        "--model", help="a CLIP for pictures (default: that of the reward clip), a language model for text"
    )
    fit.add_argument("--pretrained", help="weights of a CLIP that open_clip knows by name, such as openai")
    fit.add_argument("--hidden", type=int, default=64, help="width of the hidden layer on CLIP (default: 64)")
    fit.add_argument("--lora-rank", type=int, default=0, help="of a LoRA on the language model (default: all weights)")
    fit.add_argument("--epochs", type=int, help="over the labels (default: 30 for pictures, 1 for text)")
    fit.add_argument("--learning-rate", type=float, help="of AdamW (default: 1e-3 for pictures, 1e-4 for text)")
    fit.add_argument("--batch-size", type=int, help="pairs in a step (default: 64 for pictures, 16 for text)")
    fit.add_argument("--held-out", type=float, default=0.25, help="share of the prompts to measure on (default: 0.25)")
    fit.add_argument("--no-margins", action="store_true", help="leave out by how much the judge prefers one")
    fit.add_argument("--seed", type=int, default=0, help="of the split and of chance in training (default: 0)")
    fit.set_defaults(run=_preference_train)
    weights = preference.add_parser("weights", help="what each preference model weighs in overall preferences")
    weights.add_argument("folder", type=Path, help="the run folder")
    weights.add_argument("--name", default="labels", help="of the labels (default: labels)")
    weights.add_argument("--overall", default="overall", help="principle of the overall labels (default: overall)")
    weights.set_defaults(run=_preference_weights)
    command("list", _list, "list rewards, judges, algorithms, policies and presets")
    doctor = command("doctor", _doctor, "say what is installed, what this machine has, and what will not work")
    doctor.add_argument("--json", action="store_true", help="print it as JSON, for a bug report")

    shapes = commands.add_parser("shapes", help="the embedded world and its model").add_subparsers(
        dest="shapes_command", required=True, metavar="COMMAND"
    )
    build = shapes.add_parser("train", help="train the embedded model from nothing (hours on a CPU; resumable)")
    build.add_argument("--work", type=Path, default=Path("shapes-training"), help="training state (resumes from it)")
    build.add_argument("--out", type=Path, default=Path("shapes-weights"), help="where the weights go")
    build.add_argument(
        "--stage", choices=["vae", "base", "clip", "aesthetic", "text", "all"], default="all", help="one part"
    )
    build.add_argument("--compile", action="store_true", help="torch.compile the UNet (needs a C++ compiler)")
    build.set_defaults(run=_shapes_train)
    gates = shapes.add_parser("check", help="measure what docs/embedded-model.md claims of the embedded model")
    gates.add_argument("--stage", choices=["images", "text", "all"], default="all", help="one of the models")
    gates.add_argument("--count", type=int, default=256, help="prompts to sample (default: 256)")
    gates.set_defaults(run=_shapes_check)
    texts = shapes.add_parser("texts", help="write a corpus as the embedded language model is trained on: JSON lines")
    texts.add_argument("task", choices=["translation", "continuation", "caption"], metavar="task", help="%(choices)s")
    texts.add_argument("--count", type=int, default=1000, help="lines, with `prompt` and `completion` (default: 1000)")
    texts.add_argument("--seed", type=int, default=0, help="another one gives other texts (default: 0)")
    texts.add_argument("--clean", action="store_true", help="right translations, not the careless ones it learned from")
    texts.add_argument("--out", type=Path, required=True, help="the file to write")
    texts.set_defaults(run=_shapes_texts)
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
            default=_with_sections(start, settings),
            config=(tyro.conf.AvoidSubcommands,),
        )
    except pydantic.ValidationError as error:
        raise ConfigError("command line: " + "; ".join(e["msg"] for e in error.errors())) from None
    # tyro builds nested settings one by one; the whole is validated again, with errors that name the key
    return parse_config(yaml.safe_load(dump_config(chosen)), where="command line")


def _with_sections(given: Settings, settings: Sequence[str], place: str = "") -> Any:
    """`given` with those of its absent sections, such as `data`, that the command line sets something in, or all where
    it asks for help: tyro knows the settings of sections that are there. What a section needs is still missing."""
    import tyro

    found: dict[str, Any] = {}
    for name, field in type(given).model_fields.items():
        section, key = getattr(given, name), f"{place}{name}."
        if isinstance(section, Settings):
            found[name] = _with_sections(section, settings, key)
        kinds = [kind for kind in get_args(field.annotation) if isinstance(kind, type) and issubclass(kind, Settings)]
        wanted = any(s in ("-h", "--help") or s.replace("-", "_").startswith(f"__{key}") for s in settings)
        if section is None and kinds and wanted:
            needed = {name: tyro.MISSING for name, field in kinds[0].model_fields.items() if field.is_required()}
            found[name] = kinds[0].model_construct(None, **needed)
    return given.model_copy(update=found)


def _run(config: RunConfig, *, allow_code: bool, resume: bool = False) -> Result:
    from .build import build
    from .display import Terminal
    from .report import terminal_table
    from .rounds import run_rounds

    with Terminal(console, config) as display:
        display.say(f"loading {config.model.path} and its rewards")
        result = run_rounds(build(config, allow_code=allow_code, display=display), resume=resume)
    console.print()
    console.print(terminal_table(result.base, result.aligned, config.trained_rewards))
    console.print()
    console.print(result.verdict.message, highlight=False, markup=False)
    console.print(f"report  {result.report_path}", highlight=False, markup=False)
    console.print(f"LoRA    {result.lora_path}", highlight=False, markup=False)
    return result


def _demo(known: argparse.Namespace, settings: Sequence[str]) -> None:
    from .evaluation import LEAST_DIVERSITY
    from .shapes import WEIGHTS

    text = known.modality == "text"
    preset = load_preset("demo-text" if text else "demo")
    names = [preset.name, *(f"{preset.name}-{i}" for i in range(2, 1000))]
    name = next(name for name in names if not (Path(known.output) / name).exists())
    config = preset.model_copy(update={"name": name, "output": known.output, "seed": known.seed})
    result = _run(config, allow_code=False)
    kept = result.aligned[0].metrics["diversity"].mean / result.base[0].metrics["diversity"].mean
    console.print(f"diversity is at {kept:.0%} of the base's; below {LEAST_DIVERSITY:.0%} it counts as collapsed")
    if text:
        base = f'model = AutoModelForCausalLM.from_pretrained("{WEIGHTS / "text"}")'
    else:
        base = f'pipe = DiffusionPipeline.from_pretrained("{WEIGHTS / "pipeline"}")'
    console.print(f"load it  {base}; {result.load_line}", highlight=False, markup=False, soft_wrap=True)


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
    from .prompts import is_generated, load_prompts

    if is_generated(source) or Path(source).suffix or Path(source).exists():
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
    from . import best_of_n
    from .build import build_policy, build_reward, default_device, load_model
    from .pipelines.loading import load_lora

    if known.best_of is not None:
        best_of_n.check_n(known.best_of)
        if not known.reward:
            raise ConfigError(f"--best-of {known.best_of} needs a --reward to rank by; `raftdiff list` names them")
    elif known.reward:
        raise ConfigError("--reward ranks candidates: give --best-of N too, or score samples with `raftdiff score`")
    prompts = _prompts(known.prompts)
    rewards = [build_reward(config, device=default_device()) for config in _rewards(known)]
    config = _sampling_config(known)
    pipeline = load_model(config.model, default_device())
    if known.lora:
        load_lora(pipeline, known.lora)
    policy = build_policy(config, pipeline)
    policy.check_run(prompts)
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
    write = _write_texts if policy.modality == "text" else _write_images
    written = write(samples, records, known)
    if rewards:
        console.print(best_of_n.table(found))
        console.print(best_of_n.summary(groups), highlight=False, markup=False, soft_wrap=True)
    console.print(written, markup=False)


def _sampling_config(known: argparse.Namespace) -> RunConfig:
    """The settings that the command line gives, and no others."""
    sampling = {
        "num_inference_steps": known.steps,
        "guidance_scale": known.guidance,
        "temperature": known.temperature,
        "top_p": known.top_p,
        "max_new_tokens": known.max_new_tokens,
        "stop": known.stop,
        "batch_size": known.batch_size,
    }
    given = {name: value for name, value in sampling.items() if value is not None}
    model = {"path": known.model, "modality": known.modality}
    return parse_config({"model": model, "sampling": given}, where="command line")


def _write_images(samples: Sequence[Sample], records: Sequence[dict], known: argparse.Namespace) -> str:
    """Write each picture, what it was drawn for, and all of them in one; a line that says where they are."""
    import json

    from PIL import Image

    from .report import image_grid

    out, images = known.out or Path("images"), [s.image for s in samples if s.image is not None]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for i, (image, sample, record) in enumerate(zip(images, samples, records, strict=True)):
            name = f"{i:05d}.png"
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(out / name)
            row = {"file_name": name, "text": sample.prompt.text, "seed": sample.seed} | record
            file.write(json.dumps(row) + "\n")
    image_grid(images, known.seeds, scale=max(1, 128 // images[0].shape[-1])).save(out / "grid.png")
    return f"{len(samples)} images in {out}, all on {out / 'grid.png'}"


def _write_texts(samples: Sequence[Sample], records: Sequence[dict], known: argparse.Namespace) -> str:
    """Write the texts with their prompts as JSON lines; a line that says where they are."""
    import json

    from .checkpoint import write_file

    file = (known.out or Path("texts")) / "completions.jsonl"
    rows = [
        {"prompt": sample.prompt.text, "completion": sample.text, "seed": sample.seed} | record
        for sample, record in zip(samples, records, strict=True)
    ]
    write_file(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return f"{len(rows)} texts in {file}"


def _score(known: argparse.Namespace, settings: Sequence[str]) -> None:
    import csv
    import io

    from rich.table import Table

    from .build import build_reward, default_device
    from .checkpoint import write_file
    from .data import read_folder, read_texts
    from .evaluation import paired_interval
    from .scoring import score_parts

    rewards, path = _rewards(known), known.path
    if path.suffix in (".jsonl", ".parquet"):
        samples, file = read_texts(path), path.with_name(f"{path.stem}-scores.csv")
        heads, keys = ["prompt", "completion"], [[s.prompt.text, s.text] for s in samples]
    else:
        (samples, names), file = read_folder(path), path / "scores.csv"
        heads, keys = ["file_name", "text"], [[name, s.prompt.text] for name, s in zip(names, samples, strict=True)]
    columns, table = {}, Table("reward", "mean", "95% interval", "scored", box=None, pad_edge=False)
    for config in rewards:
        name, reward = config.name, build_reward(config, device=default_device()).reward
        columns[name] = score_parts(samples, reward, max_failed=1.0).tolist()
        found = paired_interval(columns[name], [s.prompt.id for s in samples])
        scored = sum(value == value for value in columns[name])
        table.add_row(name, f"{found.mean:.4g}", f"{found.low:.4g} to {found.high:.4g}", f"{scored}/{len(samples)}")
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*heads, *columns])
    for i, key in enumerate(keys):
        writer.writerow([*key, *("" if column[i] != column[i] else column[i] for column in columns.values())])
    write_file(file, text.getvalue().encode())
    console.print(table)
    console.print(f"the scores of each: {file}", markup=False)


def _evaluate(known: argparse.Namespace, settings: Sequence[str]) -> None:
    from .build import build
    from .display import Terminal
    from .report import terminal_table
    from .rounds import evaluate_run

    config = _run_config(known.folder)
    changes: dict = {"prompts": known.prompts, "seeds_per_prompt": known.seeds, "guidance_scales": known.guidance}
    evaluation = config.evaluation.model_copy(update={k: v for k, v in changes.items() if v is not None})
    config = parse_config(config.model_copy(update={"evaluation": evaluation}).model_dump(), where="command line")
    with Terminal(console, config) as display:
        run = build(config, allow_code=known.allow_code, display=display)
        base, aligned = evaluate_run(run)
    console.print(terminal_table(base, aligned, config.trained_rewards))


def _report(known: argparse.Namespace, settings: Sequence[str]) -> None:
    from .build import build
    from .rounds import rewrite_report

    run = build(_run_config(known.folder), allow_code=known.allow_code)
    console.print(f"report  {rewrite_report(run)}", highlight=False, markup=False)


def _rescore(known: argparse.Namespace, settings: Sequence[str]) -> None:
    from . import rescore

    config = _run_config(known.folder)
    weights, floors = rescore.read_weights(known.weights), rescore.read_floors(known.floor)
    new = rescore.changed(config, weights=weights, combine=known.combine, floors=floors)
    rounds = rescore.rescore(config, new, allow_code=known.allow_code)
    console.print(rescore.means_table(config, new, rounds))
    console.print()
    if known.show and any(r.new or r.gone for r in rounds):
        console.print(rescore.changes_table(rounds, known.show))
        console.print()
    console.print(rescore.summary(rounds), highlight=False, markup=False, soft_wrap=True)
    if known.out:
        rescore.write_selection(known.out, rounds)
        console.print(f"every sample in {known.out}", highlight=False, markup=False, soft_wrap=True)


def _soup(known: argparse.Namespace, settings: Sequence[str]) -> None:
    from . import soup

    configs, beside = ([_run_config(folder) for folder in folders] for folders in (known.folders, known.beside))
    with console.status("") as status:
        found = soup.mix(
            configs,
            beside=beside,
            parts=known.grid,
            prompts=known.prompts,
            seeds_per_prompt=known.seeds,
            allow_code=known.allow_code,
            tell=status.update,
        )
    console.print(soup.table(found))
    console.print(f"chart and table  {soup.write_soup(known.out, found)}", highlight=False, markup=False)


def _export(known: argparse.Namespace, settings: Sequence[str]) -> None:
    from .export import export_merged, export_run, finished_lora, push_to_hub

    config = _run_config(known.folder)
    folder = path = finished_lora(config)
    if known.merged:
        path = export_merged(config, dtype=known.dtype, output=known.output)
    elif (known.format, known.dtype, known.output) != ("diffusers", "fp32", None):  # which the run itself has written
        path = export_run(config, format=known.format, dtype=known.dtype, output=known.output)
    what = "model  " if known.merged else "LoRA   "
    console.print(f"{what} {path}", highlight=False, markup=False, soft_wrap=True)
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


def _app(known: argparse.Namespace, settings: Sequence[str]) -> None:
    try:
        from .app.server import AppConfig, serve
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"the app needs {error.name}; pip install 'raftdiff[app]'") from None

    config = AppConfig(
        runs=known.runs,
        base=known.base,
        loras=known.lora,
        rewards=_rewards(known),
        prompts=known.prompts,
        host=known.host,
        port=known.port,
        allow_hosts=known.allow_host,
    )
    serve(config, say=partial(console.print, highlight=False, markup=False, soft_wrap=True))


def _feedback(known: argparse.Namespace, settings: Sequence[str]) -> None:
    import inspect

    from .build import default_device
    from .feedback import label_run, tally_table
    from .principles import load_principles
    from .registry import JUDGES
    from .reward_models.judge import build_judge

    if known.pairs_per_prompt < 1:
        raise ConfigError(f"--pairs-per-prompt is {known.pairs_per_prompt}; it must be 1 or more")
    _run_config(known.folder)
    principles = load_principles(known.principles)
    options = _judge_options(known.option)
    takes_device = "device" in inspect.signature(JUDGES.load(known.judge)).parameters
    judge = build_judge(known.judge, ({"device": default_device()} if takes_device else {}) | options)
    with console.status("asking the judge") as status:
        tallies = label_run(
            known.folder,
            judge,
            principles,
            made_of=(known.judge, options),
            name=known.name,
            per_prompt=known.pairs_per_prompt,
            rounds=known.rounds,
            seed=known.seed,
            progress=lambda name, done, total: status.update(f"{name}: {done} of {total} pairs"),
        )
    console.print(tally_table(tallies))
    if usage := getattr(judge, "usage", None):
        console.print(", ".join(f"{name} {value:g}" for name, value in asdict(usage).items()), highlight=False)
    console.print(f"labels  {known.folder / 'feedback' / known.name}", highlight=False, markup=False)


def _judge_options(entries: Sequence[str]) -> dict:
    import yaml

    pairs = [entry.partition("=") for entry in entries]
    for entry, (name, equals, _) in zip(entries, pairs, strict=True):
        if not name or not equals:
            raise ConfigError(f"--option {entry!r}: write NAME=VALUE for an option of the judge")
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def _preference_train(known: argparse.Namespace, settings: Sequence[str]) -> None:
    from .build import default_device
    from .feedback import Choice, accuracy_table, train_models

    embedded = _run_config(known.folder).model.path == "shapes"
    fit = {name: getattr(known, name) for name in ("epochs", "learning_rate", "batch_size", "held_out", "seed")}
    choice = Choice(
        model=known.model or ("shapes" if embedded else None),
        pretrained=known.pretrained,
        hidden=known.hidden,
        lora_rank=known.lora_rank,
        fit={name: value for name, value in fit.items() if value is not None} | {"margins": not known.no_margins},
        device=default_device(),
    )
    with console.status("training preference models"):
        fitted = train_models(known.folder, choice, name=known.name, principles=known.principles)
    console.print(accuracy_table(fitted))
    console.print(f"models  {known.folder / 'preference'}", highlight=False, markup=False)


def _preference_weights(known: argparse.Namespace, settings: Sequence[str]) -> None:
    from .build import default_device
    from .feedback import weigh, weight_table

    found = weigh(known.folder, name=known.name, overall=known.overall, device=default_device())
    console.print(weight_table(found))
    console.print(f"weights {known.folder / 'preference' / 'weights.yaml'}", highlight=False, markup=False)


def _list(known: argparse.Namespace, settings: Sequence[str]) -> None:
    from rich.table import Table

    from .registry import ALGORITHMS, JUDGES, POLICIES, REWARDS

    titled = {"rewards": REWARDS, "judges": JUDGES, "algorithms": ALGORITHMS, "policies": POLICIES}
    for title, registry in titled.items():
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

    if not check(stage=known.stage, count=known.count, console=console):
        raise DataError("the embedded model does not pass every gate (the lines marked FAIL)")


def _shapes_texts(known: argparse.Namespace, settings: Sequence[str]) -> None:
    import json

    from .checkpoint import write_file
    from .shapes.texts import corpus

    if known.count < 1:
        raise ConfigError(f"--count is {known.count}; it must be 1 or more")
    texts = corpus(known.task, known.count, known.seed, careless=not known.clean)
    lines = (json.dumps(asdict(text), ensure_ascii=False) + "\n" for text in texts)
    write_file(known.out, "".join(lines).encode())
    console.print(f"{known.count} texts in {known.out}", highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main())

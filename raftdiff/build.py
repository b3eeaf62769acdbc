"""From a configuration to the objects of a run: the only place that knows everyone."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from .config import ModelConfig, RewardConfig, RunConfig, parse_config
from .data import count_rows
from .errors import ConfigError, MissingExtraError
from .prompts import load_prompts
from .protocols import Algorithm, Reward, Writer
from .registry import ALGORITHMS, POLICIES, REWARDS, checked_options
from .rounds import Display, Quiet, Result, Run, run_rounds
from .scoring import WeightedReward
from .sharding import shard, sharded
from .types import Example, Prompt, Sample

logger = logging.getLogger(__name__)


def align(
    pipeline: Any,
    prompts: str | Path | Sequence[str],
    reward: str | Callable | Reward | Mapping[str, float] = "clip",
    *,
    rounds: int = 4,
    prompts_per_round: int | None = None,
    held_out: str | Path | Sequence[str] | None = None,
    judge: Sequence[str | Callable | Reward] = (),
    tokenizer: Any = None,
    name: str = "align",
    resume: bool = False,
    display: Display | None = None,
    **settings: Any,
) -> Result:
    """Align a diffusers pipeline or a language model with a reward, in place: afterwards it carries the trained LoRA.
    That of an earlier call is taken off first; to go on from it, `pipeline.fuse_lora()` and
    `pipeline.unload_lora_weights()`.

        result = align(pipe, ["a red circle", ...], reward="clip", rounds=4)
        fresh_pipe.load_lora_weights(result.lora_path)

        result = align(model, ["Summarize: ...", ...], reward=lambda texts, prompts: [...], tokenizer=tokenizer)
        peft.PeftModel.from_pretrained(fresh_model, result.lora_path)

    Args:
        pipeline: any diffusers text-to-image pipeline, or causal language model of transformers, on its device.
        prompts: a list, a file, or a source such as `shapes:bare/24`.
        reward: a registered name, a callable `f(images, prompts) -> scores` over PIL images or texts, a Reward, or a
            mapping of registered names to weights.
        prompts_per_round: prompts in a round; all if absent.
        held_out: prompts for the evaluation; the training prompts, with other seeds, if absent.
        judge: rewards that are measured and never trained on.
        tokenizer: that of the language model.
        name: the run's folder inside `output` (`runs` if not set); `resume=True` goes on with it.
        settings: any other setting of a run by its section: `training={"learning_rate": 1e-4}`, `seed=1`.

    Raises:
        ConfigError: a setting that does not exist or does not fit.
    """
    objects: dict[str, Reward] = {}
    path = str(getattr(pipeline, "name_or_path", None) or type(pipeline).__name__)
    if tokenizer is not None:
        from .pipelines.llm import LanguageModel

        pipeline = LanguageModel(transformer=pipeline, tokenizer=tokenizer)
    elif hasattr(pipeline, "generate"):
        raise ConfigError(f"{type(pipeline).__name__} is a language model: give its tokenizer too, tokenizer=...")

    def configured(value: Any, weight: float) -> RewardConfig:
        if isinstance(value, str):
            return RewardConfig(name=value, weight=weight)
        made = as_reward(value)
        objects[made.name] = made
        return RewardConfig(name=made.name, weight=weight)

    weights = reward if isinstance(reward, Mapping) else None
    trained = [configured(n, w) for n, w in weights.items()] if weights else [configured(reward, 1.0)]
    plain = {
        "name": name,
        "rounds": rounds,
        "prompts": {"source": _source(prompts), "per_round": prompts_per_round},
        "rewards": [r.model_dump() for r in trained],
        "evaluation": {
            "prompts": None if held_out is None else _source(held_out),
            "rewards": [configured(value, 1.0).model_dump() for value in judge],
        }
        | settings.pop("evaluation", {}),
        "model": {"path": path, "modality": "image" if tokenizer is None else "text"} | settings.pop("model", {}),
    }
    config = parse_config(plain | settings, where="align()")
    from .pipelines.lora import take_off

    if take_off(pipeline):
        logger.info("the LoRA of an earlier run was taken off the pipeline: every run begins at the base model")
    run = build(config, pipeline=pipeline, rewards=objects, display=display)
    return run_rounds(run, resume=resume)


def _source(prompts: str | Path | Sequence[str]) -> str | list[str]:
    return str(prompts) if isinstance(prompts, str | Path) else list(prompts)


def as_reward(value: Any) -> Reward:
    """A Reward as it is, and a callable `f(images, prompts) -> scores` as one.

    Raises:
        ConfigError: anything else.
    """
    from .reward_models.function import FunctionReward

    if isinstance(value, Reward):
        return value
    if not callable(value):
        raise ConfigError(f"reward: {value!r} is neither a registered name, nor a callable, nor a Reward")
    return FunctionReward(value, name=getattr(value, "__name__", "function"))


def build(
    config: RunConfig,
    *,
    pipeline: Any = None,
    rewards: Mapping[str, Reward] | None = None,
    allow_code: bool = False,
    display: Display | None = None,
) -> Run:
    """Everything a run needs. What is cheap to check is checked before any weights load.

    Args:
        pipeline: a live pipeline to align in place of `config.model.path`.
        rewards: live rewards by name, in place of registered ones.
        allow_code: whether `module:Class` names may be imported.
    """
    live = rewards or {}
    algorithm = build_algorithm(config, allow_code=allow_code)
    wanted = [*config.rewards, *config.evaluation.rewards]
    for reward in wanted:
        if reward.name not in live:
            REWARDS.load(reward.name, allow_code=allow_code)
    prompts, held_out = build_prompts(config)
    display = display or Quiet()
    accelerator = build_accelerator(config)
    check_needs(algorithm, config.algorithm.name, POLICIES.load(config.model.modality))
    device = str(accelerator.device)
    embed = _embed(config, device)
    writer = build_writer(config, prompts, held_out, device=device)
    split = sharded(accelerator)
    place = "cpu" if split else device  # what does not fit on the device is split from the CPU
    pipeline = load_model(config.model, place) if pipeline is None else pipeline
    policy = build_policy(config, pipeline, needs=algorithm.needs)
    teacher = _teacher(config, policy, algorithm, place)
    policy.check_run([*prompts, *held_out], noise_level=algorithm.noise_level, teacher=teacher)
    if split:
        for made in filter(None, (policy, teacher)):
            shard(made, accelerator)
    make = partial(build_reward, device=device, live=live, allow_code=allow_code)
    return Run(
        config=config,
        policy=policy,
        algorithm=algorithm,
        rewards=[make(reward) for reward in config.rewards],
        watched=[make(reward) for reward in config.evaluation.rewards],
        embed=embed,
        prompts=prompts,
        held_out=held_out,
        data=_own_data(config, policy, algorithm, display),
        teacher=teacher,
        writer=writer,
        accelerator=accelerator,
        display=display,
        track=build_tracker(config, accelerator),
        load_line=policy.load_line(str(config.folder / "lora")),
    )


def _teacher(config: RunConfig, policy: Any, algorithm: Algorithm, place: str) -> Any:
    """What samples in the place of the policy, where the settings have it."""
    if config.algorithm.teacher is None:
        return None
    if not config.algorithm.is_served:
        model = config.model.model_copy(update={"path": config.algorithm.teacher, "revision": None, "variant": None})
        return build_policy(config, load_model(model, place))
    if {"log_prob", "log_prob_and_value"} & set(algorithm.needs):
        raise ConfigError(
            f"algorithm {config.algorithm.name} needs the log-probabilities of what was sampled, which a server does "
            "not give: leave out algorithm.teacher, or give a path"
        )
    from .pipelines.served import ServedModel

    return ServedModel(config, policy)


def build_prompts(config: RunConfig) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on and the held-out ones; the same twice where none are held out.

    Raises:
        ConfigError: all are held out.
        DataError: as `load_prompts`.
    """
    prompts = load_prompts(config.prompts.source)
    if not config.evaluation.prompts:
        return prompts, prompts
    held_out = load_prompts(config.evaluation.prompts)
    kept_out = {p.text for p in held_out}
    prompts = [p for p in prompts if p.text not in kept_out]
    if not prompts:
        raise ConfigError("every training prompt is also held out (evaluation.prompts): give other prompts to one")
    return prompts, held_out


def build_writer(
    config: RunConfig, openings: Sequence[Prompt], held_out: Sequence[Prompt], *, device: str
) -> Writer | None:
    """What writes each round's prompts, where the settings have it. Its weights are not loaded.

    Raises:
        WeightsError, ConfigError: it is no language model, its LoRA does not fit it, or an opening is too long.
    """
    if config.prompts.writer is None:
        return None
    from .writer import PromptWriter

    writer = PromptWriter(config.prompts.writer, held_out=held_out, seed=config.seed, device=device)
    writer.check(openings)
    return writer


def build_algorithm(config: RunConfig, *, allow_code: bool = False) -> Algorithm:
    """The configured algorithm, checked against the number of samples for each prompt."""
    kind = ALGORITHMS.load(config.algorithm.name, allow_code=allow_code)
    where, page = f"algorithm.options: {config.algorithm.name}", f"docs/{config.algorithm.name}.md"
    algorithm = kind(**checked_options(kind, config.algorithm.options, where, page=page))
    algorithm.validate(config)
    if not algorithm.samples and config.data is None:
        raise ConfigError(f"algorithm {config.algorithm.name} trains on your own data alone: set data.path")
    if not algorithm.samples and config.prompts.writer:
        raise ConfigError(f"algorithm {config.algorithm.name} draws no samples: leave out prompts.writer")
    return algorithm


def check_needs(algorithm: Algorithm, name: str, policy: type) -> None:
    """Raise ConfigError where a policy lacks what the algorithm needs of it."""
    lacking = [method for method in algorithm.needs if not hasattr(policy, method)]
    if lacking:
        raise ConfigError(f"algorithm {name} needs {' and '.join(lacking)}, which {policy.__name__} does not have")


def build_accelerator(config: RunConfig) -> Accelerator:
    """The processes and the device of this run.

    Raises:
        ConfigError: a device that is not there, or one for several processes; fp16 without a GPU.
    """
    device = config.model.device
    try:
        if device != "auto":
            torch.empty(0, device=device)
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # which is then what accelerate calls cuda
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch is built without CUDA
        reason = str(error).split("\n")[0]
        raise ConfigError(f"model.device: {device!r} cannot be used here ({reason}); set it to auto") from error
    accelerator = Accelerator(cpu=device == "cpu")
    if accelerator.num_processes > 1 and device not in ("auto", "cpu"):
        raise ConfigError(f"model.device: {device!r} is one device, and each process needs its own; set it to auto")
    if accelerator.device.type == "cpu" and "fp16" in (config.model.dtype, config.training.precision):
        raise ConfigError("fp16 needs a GPU and there is none: set model.dtype and training.precision to bf16 or fp32")
    return accelerator


def default_device() -> str:
    """The GPU where there is one."""
    return str(Accelerator().device)


def load_model(model: ModelConfig, device: str = "cpu") -> Any:
    """The pipeline, or language model with its tokenizer, that `model` names, on its device.

    Raises:
        WeightsError: it is missing, incomplete, or not in safetensors.
    """
    return POLICIES.load(model.modality).load(model, device)


def build_policy(config: RunConfig, pipeline: Any, *, needs: Sequence[str] = ()) -> Any:
    """What `load_model` gave as a policy, with the settings of the run and what its algorithm `needs`.

    Raises:
        ConfigError: a setting that does not fit the model.
    """
    return POLICIES.load(config.model.modality).from_config(config, pipeline, needs=needs)


def build_reward(
    reward: RewardConfig, *, device: str = "cpu", live: Mapping[str, Reward] | None = None, allow_code: bool = False
) -> WeightedReward:
    """A configured reward, under the name that reports give it.

    Raises:
        ConfigError: an unknown name or option.
    """
    made = (live or {}).get(reward.name)
    if made is None:
        kind = REWARDS.load(reward.name, allow_code=allow_code)
        options = ({"device": device} if "device" in inspect.signature(kind).parameters else {}) | reward.options
        made = kind(**checked_options(kind, options, f"rewards: {reward.name}", page="docs/rewards.md"))
    if made.name != reward.reported_name:
        made = _Renamed(made, reward.reported_name)
    return WeightedReward(reward=made, weight=reward.weight)


def _embed(config: RunConfig, device: str) -> Any:
    if config.evaluation.lpips is None:
        return None
    from .reward_models.lpips import Lpips

    return Lpips(config.evaluation.lpips, device=device)


class _Renamed:
    """A reward under another name."""

    def __init__(self, reward: Reward, name: str):
        self._reward, self.name = reward, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reward, name)


def _own_data(config: RunConfig, policy: Any, algorithm: Algorithm, display: Display) -> list[Example]:
    if config.data is None:
        return []
    rows: Iterator[Any] = policy.read_own(config.data.path, pairs=algorithm.pairs)
    display.stage(0, "own data", count_rows(config.data.path, pairs=algorithm.pairs))
    examples: list[Example] = []
    while batch := list(islice(rows, config.sampling.batch_size)):
        outputs = [(Prompt(text=text), output) for text, *of_prompt in batch for output in of_prompt]
        samples: list[Sample] = policy.encode_outputs(*zip(*outputs, strict=True))
        if not algorithm.scores_data:  # then the latents are enough, and the pixels of many would fill the memory
            samples = [dataclasses.replace(sample, image=None) for sample in samples]
        if algorithm.pairs:
            pairs = zip(samples[::2], samples[1::2], strict=True)
            examples += [Example(sample=chosen, rejected=other) for chosen, other in pairs]
        else:
            examples += [Example(sample=sample) for sample in samples]
        display.advance(len(batch))
    return examples


def build_tracker(config: RunConfig, accelerator: Accelerator) -> Callable[[int, Mapping[str, float]], None]:
    """A function that sends a round's curves to the configured tracker, from the main process alone."""
    if config.tracker == "none" or not accelerator.is_main_process:
        return lambda round, values: None
    if config.tracker == "wandb":
        try:
            import wandb
        except ImportError:
            raise MissingExtraError("tracker: wandb is not installed; pip install 'raftdiff[wandb]'") from None
        wandb_run = wandb.init(project="raftdiff", name=config.name, config=config.model_dump(mode="json"))
        return lambda round, values: wandb_run.log(dict(values), step=round)
    from torch.utils.tensorboard import SummaryWriter

    writers: list[SummaryWriter] = []

    def track(round: int, values: Mapping[str, float]) -> None:
        if not writers:  # the run folder is made by the run itself
            writers.append(SummaryWriter(str(config.folder / "tensorboard")))
        for name, value in values.items():
            writers[0].add_scalar(name, value, round)
        writers[0].flush()

    return track

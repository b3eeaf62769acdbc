"""What a run is, typed and frozen. YAML in, YAML out; each field is documented under it, and the command line and
docs/configuration.md read that text."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import ConfigError
from .registry import nearest

PRESETS = resources.files("raftdiff") / "presets"

Dtype = Literal["fp32", "bf16", "fp16"]
Timesteps = Literal["auto", "uniform", "logit-normal", "sampler"]
Combine = Literal[
    "sum",
    "standardized",
    "weighted-linear",
    "worst-case",
    "soft-max-min",
    "uncertainty-weighted",
    "lower-quantile",
    "max-median",
    "bernoulli-nash",
]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class ModelConfig(Settings):
    modality: Literal["image", "text"] = "image"
    """What the model makes: `image` for a pipeline of diffusers, `text` for a causal language model of transformers."""
    path: str = "shapes"
    """The model to align: `shapes` (the embedded one of this modality), a local folder that diffusers or transformers
    saved, or a hub id."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    variant: str | None = None
    """Images: file variant to load, such as `fp16`."""
    dtype: Dtype = "fp32"
    """Number format of the frozen weights; what is trained stays in fp32."""
    device: str = "auto"
    """`auto` takes the GPU of this process where there is one; or `cpu`, `cuda`, `cuda:1`, `mps`."""
    scheduler: str | None = None
    """Images: class name of a diffusers scheduler to sample with, built from the model's own scheduler
    configuration."""
    height: Positive | None = None
    """Height of the images in pixels; the pipeline's own default if absent."""
    width: Positive | None = None
    """Width of the images in pixels; the pipeline's own default if absent."""
    negative_prompt: str | None = None
    """Images: negative prompt, for sampling, training and evaluation alike."""
    call: dict[str, Any] = {}
    """Images: further arguments for the pipeline's `__call__`, such as `clip_skip: 2`."""
    chat_template: bool = True
    """Text: put each prompt into the tokenizer's chat template, as the turn of a user, where it has one."""
    attention: Literal["sdpa", "xformers", "flash"] = "sdpa"
    """Attention kernels: torch's own, xformers, or flash-attn; the last two need an NVIDIA GPU and a model that has a
    way for them (docs/memory.md)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time in training."""
    offload: Literal["none", "components"] = "none"
    """Images: `components` keeps all but the denoiser in main memory, layer by layer on the GPU only while they
    compute: text encoders when a prompt is seen for the first time, the VAE when pictures are decoded."""
    vae_slicing: bool = False
    """Images: decode a batch picture by picture: less memory, the same pictures."""
    vae_tiling: bool = False
    """Images: decode large pictures in tiles: less memory, slightly other pictures where tiles meet."""
    compile: bool = False
    """Images: compile the denoiser's blocks with torch.compile: faster after minutes of compiling. Needs a C++ compiler
    on the CPU, Triton on a GPU."""


class AdapterConfig(Settings):
    method: Literal["lora", "full"] = "lora"
    """Train a LoRA, or all weights of the denoiser."""
    rank: Positive = 16
    """LoRA rank."""
    alpha: float | None = None
    """LoRA alpha; the rank if absent, so that the scale is 1."""
    dropout: Share = 0.0
    """LoRA dropout."""
    targets: Literal["attention", "linear", "all"] | list[str] = "attention"
    """Layers that carry the LoRA: the attention projections; every linear layer; every linear and convolution layer;
    or a list of layer-name endings."""


class SamplingConfig(Settings):
    samples_per_prompt: Positive = 8
    """K: candidates for each prompt in a round."""
    batch_size: Positive = 8
    """Images denoised, or texts written, at once."""
    num_inference_steps: Positive = 25
    """Images: denoising steps."""
    trajectory_steps: Positive | None = None
    """Images: denoising steps of the trajectories that policy gradients learn from; `num_inference_steps` if absent.
    Fewer are enough to learn from (Flow-GRPO)."""
    guidance_scale: float | None = None
    """Images: classifier-free guidance while sampling; the pipeline's own default if absent, 1 for none."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Text: what the logits are divided by; below 1 the likelier tokens become likelier still."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Text: draw from the fewest most likely tokens that together have this probability; 1 for all."""
    max_new_tokens: Positive = 64
    """Text: most tokens of a completion."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Text: strings that end a completion, which then ends before them; the model's own end token always does."""


class TrainingConfig(Settings):
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate of AdamW."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW, or AdamW with moments of 8 bits (bitsandbytes): 2 bytes a trained parameter in place of 8."""
    epochs: Positive = 1
    """Passes over the round's training set; used where `steps` is absent."""
    steps: Positive | None = None
    """Optimiser steps in each round."""
    batch_size: Positive = 8
    """Samples in an optimiser step, over all processes."""
    micro_batch_size: Positive | None = None
    """Samples that go through the model at once in one process; the whole batch if absent."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate over the whole run, after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps of linear warm-up at the start of the run."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    """AdamW's weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moments."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient norm above which the gradient is scaled down."""
    precision: Dtype = "fp32"
    """Arithmetic of the forward pass in training."""
    guidance_scale: Annotated[float, Field(ge=1)] = 1.0
    """Images: guidance inside the training loss; 1 for none. With 1, training on guided samples moves guidance into the
    model, and sampling it with guidance applies that again; with the scale of sampling it does not, at the price of an
    extra pass and a noisier gradient. docs/raft.md has both measured."""
    caption_dropout: Share = 0.1
    """Images: share of training rows whose prompt is emptied, so that guidance keeps working."""
    snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """Images: Min-SNR weighting (arXiv 2303.09556) of the error of eps- and v-prediction models; 5 is usual."""
    error_space: Literal["prediction", "noise"] = "prediction"
    """Images: what the denoising error is measured in: the model's own prediction, or the noise that the prediction
    stands for, the `exact` weights of Diffusion-DPO for v-prediction and flow matching. For eps-prediction both are the
    same."""
    timesteps: Timesteps = "auto"
    """Images: distribution of training timesteps; flow-matching models are usually trained with logit-normal. `sampler`
    takes those that sampling visits, each as often: the plain error at others would undo the distillation of a model to
    a few steps. `auto` is `sampler` where the pipeline says that its model is distilled, and `uniform` otherwise;
    FLUX.1 schnell and Z-Image-Turbo do not say it: docs/models.md."""
    ema_decay: Share = 0.0
    """Decay of a moving average of the adapter that is sampled, evaluated and exported in place of the last
    iterate; 0 for none."""
    save_every_steps: Positive | None = None
    """Optimiser steps between checkpoints inside a round; at the end of each round there is always one."""


class RewardConfig(Settings):
    name: str
    """A registered reward (`raftdiff list`), or `module:Class` with --allow-code."""
    weight: float = 1.0
    """Weight in the combined reward; 0 scores and reports it without training on it."""
    options: dict[str, Any] = {}
    """Arguments of the reward, such as `model: ViT-L-14-quickgelu` for `clip`."""
    floor: Literal["base"] | float | None = None
    """Least value that a sample shall have: a number, or `base`, the base model's mean on the held-out prompts. Samples
    below it rank below all others. It may have weight 0; with a negative weight it is the largest value."""
    label: str | None = None
    """Name in reports; `name` if absent."""

    @property
    def reported_name(self) -> str:
        return self.label or self.name


class WriterConfig(Settings):
    path: str = "shapes"
    """The language model: `shapes` (the embedded one), a folder that transformers saved, or a hub id."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: Dtype = "fp32"
    """Number format of its weights."""
    lora: str | None = None
    """A LoRA in peft's format to put on it, such as `runs/prompt-writer/lora`."""
    chat_template: bool = True
    """Put each opening into the tokenizer's chat template, as the turn of a user, where it has one."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """What the logits are divided by."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the fewest most likely tokens that together have this probability; 1 for all."""
    max_new_tokens: Positive = 64
    """Most tokens of a prompt."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Strings that end a prompt, which then ends before them."""
    batch_size: Positive = 32
    """Prompts written at once."""


class PromptsConfig(Settings):
    source: str | list[str] = "shapes:bare/24"
    """A file (.txt, .jsonl, .csv, .parquet), a list of prompts, or those of the embedded world: captions
    `shapes:KIND/COUNT/SEED`, and for language models `shapes-text:TASK/COUNT/SEED`."""
    per_round: Positive | None = None
    """Prompts in a round; all if absent. Rounds walk through the list before any prompt comes again."""
    writer: WriterConfig | None = None
    """Images: a language model that writes a prompt from each of these, anew in each round (docs/prompt-writer.md);
    `evaluation.prompts` must be set."""


class DataConfig(Settings):
    path: str
    """Your own images with captions: a folder with metadata.jsonl (`file_name`, `text`) or a parquet file
    (`image`, `text`). For DPO, preferences: a parquet file like Pick-a-Pic's (`caption`, `jpg_0`, `jpg_1`, `label_0`)
    or a folder with metadata.jsonl (`chosen`, `rejected`, `text`). Your own texts: a .jsonl or parquet file (`prompt`,
    `completion`), for DPO (`prompt`, `chosen`, `rejected`). Any parquet may be a folder of such files."""
    share: Part = 0.25
    """Share of each round's training set that comes from there; algorithms that train on it alone (`sft`, offline
    `dpo`) take all of it, and ReST selects from it as from its own samples."""


class EvaluationConfig(Settings):
    every: Positive = 1
    """Rounds between evaluations; the base and the last round are always evaluated."""
    prompts: str | list[str] | None = None
    """Held-out prompts, as in `prompts.source`; they are taken out of the training prompts. If absent, the training
    prompts with seeds that training never sees."""
    seeds_per_prompt: Positive = 2
    """Samples for each held-out prompt, from the same seeds for every model."""
    rewards: list[RewardConfig] = []
    """Rewards that are measured and never trained on."""
    lpips: str | None = None
    """Images: the folder of the published weights of LPIPS, which then measures diversity in place of pixels
    (docs/rewards.md#diversity)."""
    guidance_scales: list[float] = []
    """Images: guidance scales to evaluate at; that of sampling if empty. The first is the one that decides which round
    is the best."""
    sentinel: Literal["warn", "stop", "rollback", "off"] = "warn"
    """What an evaluation does that finds the reward hacked (docs/reliability.md): `warn` says so; `stop` ends the run;
    `rollback` ends it and exports the round with the best held-out rewards. `off` also leaves the pictures' statistics
    unmeasured."""
    plateau_rounds: Positive | None = None
    """Stop after this many evaluations without a rise of the trained reward beyond its interval; 3 in the RAFT
    paper."""


class ServerConfig(Settings):
    model: str
    """The name under which the server knows the model."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; it need not be set."""
    concurrency: Positive = 8
    """Requests that are under way at once, of the `sampling.batch_size` of a batch."""
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds until a request that has no reply is sent again."""
    deadline_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds for a request with all its retries."""
    retries: Annotated[int, Field(ge=0)] = 6
    """How often a request is sent again after a rate limit, a server's fault or a broken connection."""
    backoff_s: Annotated[float, Field(gt=0)] = 0.5
    """Seconds before the first time, which double; a server's `Retry-After` counts more."""
    extra: dict[str, Any] = {}
    """Further fields of each request, such as `top_k: 50`."""


class AlgorithmConfig(Settings):
    name: str = "raft"
    """A registered algorithm (`raftdiff list`), or `module:Class` with --allow-code."""
    options: dict[str, Any] = {}
    """Options of the algorithm: the page of its name in docs/."""
    replay: Part = 0.0
    """Share of the training set drawn from what earlier rounds selected."""
    teacher: str | None = None
    """Sample with this model instead of the one that is trained: distillation. A path or hub id with the same prompt
    encoders and latent space, or tokens; for texts also the address of an OpenAI-compatible server, such as
    `http://localhost:8000/v1`."""
    server: ServerConfig | None = None
    """Text: how to ask the server at the address `teacher` (docs/text.md)."""

    @property
    def is_served(self) -> bool:
        """Whether the teacher is an address."""
        return (self.teacher or "").startswith(("http://", "https://"))


class RunConfig(Settings):
    """One run."""

    name: str = "run"
    """The run's folder inside `output`."""
    output: str = "runs"
    """Where run folders stand."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Every random number of the run follows from it."""
    rounds: Positive = 4
    """Rounds of sample, score, select, train."""
    budget: Positive | None = None
    """Denoiser passes (of a language model, tokens), evaluations apart, after which no further round begins."""
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    prompts: PromptsConfig = PromptsConfig()
    rewards: list[RewardConfig] = [RewardConfig(name="clip", options={"model": "shapes"})]
    """What is trained on: a weighted combination."""
    combine: Combine = "standardized"
    """How rewards are combined: `sum`, the weighted sum of raw values; `standardized`, that of values standardised over
    the round's samples; or one of the formulas of docs/multi-objective.md on values standardised over all samples so
    far."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    sampling: SamplingConfig = SamplingConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    data: DataConfig | None = None
    """Your own examples, mixed into each round's training set as an anchor."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where curves go besides metrics.jsonl and report.html."""
    max_failed: Share = 0.25
    """Share of a round's samples that may fail to be scored before the run stops."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if not re.fullmatch(r"[\w.-]+", self.name) or self.name in (".", ".."):
            raise ValueError(f"name: {self.name!r} is not a folder name; use letters, digits, '.', '_' and '-'")
        if not self.rewards or all(reward.weight == 0 for reward in self.rewards):
            raise ValueError("rewards: at least one reward needs a weight other than 0")
        labels = [reward.reported_name for reward in (*self.rewards, *self.evaluation.rewards)]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"rewards: two rewards are called {label!r}; give one of them a `label`")
        if any(reward.floor is not None for reward in self.evaluation.rewards):
            raise ValueError(
                "evaluation.rewards: a floor is for selection; set it under rewards, with weight 0 if need be"
            )
        if self.evaluation.sentinel == "rollback" and not self.evaluation.rewards:
            raise ValueError("evaluation.sentinel: rollback goes by held-out rewards; set evaluation.rewards, or stop")
        foreign = IMAGE_ONLY if self.model.modality == "text" else TEXT_ONLY
        if given := [key for key in foreign if _changed(self, key)]:
            raise ValueError(f"{', '.join(given)}: not for model.modality: {self.model.modality}; leave it out")
        if self.algorithm.is_served and self.model.modality == "image":
            raise ValueError("algorithm.teacher: a server's texts are for model.modality: text; give a path or hub id")
        if self.algorithm.is_served != bool(self.algorithm.server):
            raise ValueError(
                "algorithm.server: set it, with the name of the model, where algorithm.teacher is an address, and only "
                "there"
            )
        if self.prompts.writer and not self.evaluation.prompts:
            raise ValueError(
                "prompts.writer: every round has other prompts; set evaluation.prompts to those to evaluate on"
            )
        if self.data and self.algorithm.replay + self.data.share >= 1:
            raise ValueError("algorithm.replay and data.share must leave room for the round's own samples: below 1")
        if self.model.attention == "flash" and self.adapter.method == "full":
            raise ValueError("model.attention: flash computes in 16 bits, and adapter.method: full trains in fp32")
        if self.training.snr_gamma is not None and self.training.error_space == "noise":
            raise ValueError(
                "training.snr_gamma weighs every model's error as one of the noise already: leave out "
                "training.error_space"
            )
        if self.model.device == "cpu" and "fp16" in (self.model.dtype, self.training.precision):
            raise ValueError("fp16 needs a GPU: set model.dtype and training.precision to bf16 or fp32 for the CPU")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    @property
    def trained_rewards(self) -> list[str]:
        """What reports call the rewards that are trained on."""
        return [reward.reported_name for reward in self.rewards if reward.weight]


# Settings that only models of one modality know; for another they must stay at their defaults.
IMAGE_ONLY = (
    *("model.variant", "model.scheduler", "model.height", "model.width", "model.negative_prompt", "model.call"),
    *("model.offload", "model.vae_slicing", "model.vae_tiling", "model.compile"),
    *("sampling.num_inference_steps", "sampling.trajectory_steps", "sampling.guidance_scale"),
    *("training.guidance_scale", "training.caption_dropout", "training.snr_gamma", "training.error_space"),
    *("training.timesteps", "evaluation.lpips", "evaluation.guidance_scales", "prompts.writer"),
)
TEXT_ONLY = (
    "model.chat_template",
    "sampling.temperature",
    "sampling.top_p",
    "sampling.max_new_tokens",
    "sampling.stop",
)


def _changed(config: RunConfig, key: str) -> bool:
    section, name = key.split(".")
    settings = getattr(config, section)
    return getattr(settings, name) != type(settings).model_fields[name].default


def load_config(path: Path | str) -> RunConfig:
    """Read a YAML file.

    Raises:
        ConfigError: with file, key and the nearest known name.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `raftdiff show-config --preset demo > run.yaml` writes one") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(values).__name__}")
    return parse_config(values, where=str(path))


def parse_config(values: dict[str, Any], *, where: str) -> RunConfig:
    """Validate settings; `where` names their origin in errors."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {'; '.join(map(_line, error.errors()))}") from None


def _line(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        return f"unknown key {key!r}{nearest(location[-1], known)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, found {error['input']!r}" if key else message


def _known_keys(location: list[str]) -> list[str]:
    """The keys of the settings at a place such as `["evaluation", "rewards", "0"]`."""
    model: Any = RunConfig
    for part in location:
        if part in getattr(model, "model_fields", {}):
            model = _settings_in(model.model_fields[part].annotation)
    return list(model.model_fields)


def _settings_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next((found for a in getattr(annotation, "__args__", ()) if (found := _settings_in(a))), None)


def presets() -> list[str]:
    """Names of the shipped configurations."""
    return sorted(file.name.removesuffix(".yaml") for file in PRESETS.iterdir() if file.name.endswith(".yaml"))


def load_preset(name: str) -> RunConfig:
    """A shipped configuration.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in presets():
        raise ConfigError(f"there is no preset {name!r}{nearest(name, presets())} (there are {', '.join(presets())})")
    text = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")
    return parse_config(yaml.safe_load(text), where=f"preset {name}")


def dump_config(config: RunConfig) -> str:
    """The settings as YAML, every field with its value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# What a resumed run must have in common with the run it goes on from, and what it may still change of that. The base
# model was evaluated once, at the beginning: what that depends on is part of it.
IDENTITY = (
    "seed",
    "model",
    "adapter",
    "prompts",
    "rewards",
    "combine",
    "algorithm",
    "data",
    "sampling.num_inference_steps",
    "sampling.trajectory_steps",
    "sampling.guidance_scale",
    "sampling.temperature",
    "sampling.top_p",
    "sampling.max_new_tokens",
    "sampling.stop",
    "evaluation.prompts",
    "evaluation.seeds_per_prompt",
    "evaluation.rewards",
    "evaluation.lpips",
    "evaluation.guidance_scales",
    "training.optimizer",
)
FREE = (
    *(f"model.{n}" for n in ("device", "attention", "gradient_checkpointing", "offload", "vae_slicing", "compile")),
    "prompts.writer.batch_size",
    *(f"algorithm.server.{n}" for n in ServerConfig.model_fields if n not in ("model", "extra")),
)


def is_identity(key: str) -> bool:
    """Whether a run that resumes must not change this dotted key."""
    if key in FREE:
        return False
    return any(key == fixed or key.startswith(f"{fixed}.") for fixed in IDENTITY)


def difference(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted key to (old, new) of every setting that differs."""
    a, b = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict) and values:
        return {k: v for name, value in values.items() for k, v in _flat(value, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): values}

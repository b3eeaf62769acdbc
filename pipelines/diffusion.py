"""Any diffusers text-to-image pipeline as a policy, with no code per model family.

Every such pipeline encodes the prompt, then repeats two lines until the image is there:

    model_output = <whatever this family does>(latents, t, conditioning)
    latents = self.scheduler.step(model_output, t, latents)[0]

So the pipeline's own `__call__` is run for everything, with two of its parts watched:

* `encode_prompt` is **recorded**, a row for each prompt, and replayed from then on: no prompt is encoded twice,
  and no family's way of conditioning is needed;
* while sampling, the last `scheduler.step` gives x_0, in whatever layout the family denoises in: what training
  needs, with no VAE encode;
* while training, `_OneStep` stands in for the scheduler: one step, at timesteps of our choosing for each row, which
  hands back the model output with its graph. Timestep scaling, packed latents, learned variance, position ids and
  guidance embeddings stay the pipeline's business.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import cast_training_params, compute_snr
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from raftdiff.config import AdapterConfig
from raftdiff.errors import ConfigError, DataError, WeightsError
from raftdiff.types import Draw, Prompt, Sample

ADAPTER = "raftdiff"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
BLACK = 4  # an image none of whose pixels is brighter than this, of 255, is black
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DiffusionPolicy:
    """A diffusers text-to-image pipeline being aligned.

    Args:
        pipeline: any pipeline with `encode_prompt`, a `unet` or a `transformer`, and a `scheduler`.
        adapter: the LoRA to train, or full fine-tuning.
        num_inference_steps, guidance_scale, batch_size: of sampling. Guidance g means u + g (c - u) for the
            predictions c and u with and without the prompt, so that 1 is none; None is the pipeline's own default.
        call: further arguments for the pipeline's `__call__` (height, width, negative_prompt, ...), for sampling and
            training alike.
        training_guidance_scale: guidance inside the training error; 1 for none.
        caption_dropout: share of training rows whose prompt is emptied.
        snr_gamma: Min-SNR weighting of the error, arXiv 2303.09556, eq. 5 (eps and v prediction).
        timesteps: distribution of the training timesteps.
        precision: arithmetic of the forward pass in training.

    Raises:
        ConfigError: the pipeline is not text-to-image, or a setting does not fit it.
    """

    modality: Literal["image"] = "image"

    def __init__(
        self,
        pipeline: Any,
        adapter: AdapterConfig | None = None,
        *,
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
        batch_size: int = 8,
        call: Mapping[str, Any] | None = None,
        training_guidance_scale: float = 1.0,
        caption_dropout: float = 0.1,
        snr_gamma: float | None = None,
        timesteps: Literal["uniform", "logit-normal"] = "uniform",
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    ):
        name = next((n for n in ("unet", "transformer") if getattr(pipeline, n, None) is not None), None)
        if name is None or not hasattr(pipeline, "encode_prompt"):
            raise ConfigError(
                f"{type(pipeline).__name__} is not a text-to-image diffusion pipeline: "
                "raftdiff needs one with encode_prompt, a scheduler, and a unet or transformer"
            )
        self.pipeline = pipeline
        self.denoiser_name = name
        self.denoiser = getattr(pipeline, name)
        self.adapter = adapter or AdapterConfig()
        self.num_inference_steps = num_inference_steps
        self.batch_size = batch_size
        self.call = dict(call or {})
        self._guidance = _GuidanceArgument(pipeline)
        self.guidance_scale = float(self._guidance.default if guidance_scale is None else guidance_scale)
        self.training_guidance_scale = float(training_guidance_scale)
        self.caption_dropout = caption_dropout
        self.snr_gamma = snr_gamma
        self.timesteps = timesteps
        self.precision = DTYPES[precision]
        self.passes = 0
        self._prompts = _PromptRecord(inspect.signature(pipeline.encode_prompt))
        self._schedule = _NoiseSchedule(pipeline.scheduler)
        self._fingerprint = _fingerprint(self.denoiser)
        pipeline.set_progress_bar_config(disable=True)
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False).eval()
        self._base: dict[str, torch.Tensor] | None = None
        self._attach()
        self.denoiser.eval()
        self.denoiser.register_forward_pre_hook(self._count, with_kwargs=True)

    # -- what is trained ------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        if self.adapter.method == "full":
            self._base = {n: p.detach().clone() for n, p in self.denoiser.named_parameters()}
            self.denoiser.float().requires_grad_(True)
            return
        if not hasattr(self.pipeline, "save_lora_weights"):
            raise ConfigError(f"{type(self.pipeline).__name__} cannot load a LoRA; train with `adapter.method: full`")
        self._lora_config = LoraConfig(
            r=self.adapter.rank,
            lora_alpha=self.adapter.rank if self.adapter.alpha is None else self.adapter.alpha,
            lora_dropout=self.adapter.dropout,
            target_modules=lora_targets(self.denoiser, self.adapter.targets),
            init_lora_weights="gaussian",
        )
        with torch.random.fork_rng(devices=[]):  # the same LoRA initialisation in every process and every run
            torch.manual_seed(0)
            self.denoiser.add_adapter(self._lora_config, adapter_name=ADAPTER)
        cast_training_params(self.denoiser, dtype=torch.float32)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.denoiser.parameters() if p.requires_grad]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The base model: the LoRA switched off or, in full fine-tuning, the first weights put back."""
        if self._base is None:
            self.denoiser.disable_adapters()
            try:
                yield
            finally:
                self.denoiser.enable_adapters()
            return
        named = dict(self.denoiser.named_parameters())
        trained = {n: p.data for n, p in named.items()}
        try:
            for n, p in named.items():
                p.data = self._base[n].to(p)
            yield
        finally:
            for n, p in named.items():
                p.data = trained[n]

    def adapter_state(self) -> dict[str, torch.Tensor]:
        if self._base is not None:
            state = dict(self.denoiser.named_parameters())
        else:
            state = get_peft_model_state_dict(self.denoiser, adapter_name=ADAPTER)
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def load_adapter(self, state: Mapping[str, torch.Tensor]) -> None:
        own = self.adapter_state()
        unmatched = sorted(own.keys() ^ state.keys())
        if unmatched:
            raise WeightsError(
                f"the adapter does not fit this model: {len(own.keys() & state.keys())} of {len(own)} weights match, "
                f"{unmatched[0]!r} is only on one side; was it trained from another base or with other targets?"
            )
        for name, tensor in state.items():
            if tensor.shape != own[name].shape:
                raise WeightsError(
                    f"the adapter does not fit this model: {name} is {list(tensor.shape)} in the file and "
                    f"{list(own[name].shape)} in the model; was it trained with another rank or base?"
                )
        if self._base is not None:
            with torch.no_grad():
                for name, parameter in self.denoiser.named_parameters():
                    parameter.copy_(state[name])
        else:
            set_peft_model_state_dict(self.denoiser, dict(state), adapter_name=ADAPTER)

    def export(self, path: Path) -> None:
        """Write a LoRA that `pipeline.load_lora_weights(path)` loads; in full fine-tuning, the denoiser's folder."""
        path = Path(path)
        if self._base is not None:
            self.denoiser.save_pretrained(path / self.denoiser_name)
            return
        state = get_peft_model_state_dict(self.denoiser, adapter_name=ADAPTER)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        metadata = {k: sorted(v) if isinstance(v, set) else v for k, v in self._lora_config.to_dict().items()}
        self.pipeline.save_lora_weights(
            path,
            **{f"{self.denoiser_name}_lora_layers": state, f"{self.denoiser_name}_lora_adapter_metadata": metadata},
        )

    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def image_size(self) -> int:
        """Side of the square pictures, in pixels, that the pipeline makes by default."""
        size = getattr(self.denoiser.config, "sample_size", None) or self.pipeline.default_sample_size
        return int(size * self.pipeline.vae_scale_factor)

    # -- sampling -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], *, guidance_scale: float | None = None
    ) -> list[Sample]:
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        samples: list[Sample] = []
        for start in range(0, len(prompts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            samples += self._sample_batch(prompts[rows], seeds[rows], scale)
        return samples

    def _sample_batch(self, prompts, seeds, guidance_scale) -> list[Sample]:
        # Noise comes from CPU generators: the same seed is the same noise on every device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with self._recorded(), self._watched_scheduler() as last:
            output = self.pipeline(
                prompt=[p.text for p in prompts],
                num_inference_steps=self.num_inference_steps,
                generator=generators,
                output_type="pt",
                **self._arguments(len(prompts), guidance_scale),
            )
        latents = last["x0"].float().cpu()
        images = (output.images.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu()
        unsafe = getattr(output, "nsfw_content_detected", None) or [False] * len(prompts)
        return [
            Sample(
                id=f"{prompt.id}-{seed:016x}",
                prompt=prompt,
                seed=seed,
                image=images[i],
                latents=latents[i],
                flaw=_flaw(images[i], latents[i], bool(unsafe[i])),
            )
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]

    def _arguments(self, rows: int, guidance_scale: float) -> dict[str, Any]:
        """The configured call arguments; a negative prompt is wanted once for each row."""
        arguments = self._guidance.arguments(guidance_scale) | self.call
        negative = arguments.get("negative_prompt")
        if isinstance(negative, str):
            arguments["negative_prompt"] = [negative] * rows
        return arguments

    # -- training -------------------------------------------------------------------------------------------------

    def draw(self, samples: Sequence[Sample], generator: torch.Generator) -> Draw:
        noise = torch.stack([torch.randn(_latents(s).shape, generator=generator) for s in samples])
        return Draw(
            noise=noise,
            quantile_B=torch.rand(len(samples), generator=generator),
            dropped_B=torch.rand(len(samples), generator=generator) < self.caption_dropout,
        )

    def error(self, samples: Sequence[Sample], draw: Draw) -> torch.Tensor:
        """The weighted denoising error, mean over the latent dimensions, float32 [B] on the policy's device.

        eps- and v-prediction: w(t) |target - prediction|^2 at x_t = alpha_t x_0 + sigma_t eps, w = 1 or Min-SNR.
        Flow matching: |(eps - x_0) - prediction|^2 at x_t = (1 - t) x_0 + t eps.
        """
        device = self.denoiser.device
        x0 = torch.stack([_latents(s) for s in samples]).to(device)
        noise = draw.noise.to(device)
        t_B = self._schedule.timesteps(draw.quantile_B, self.timesteps).to(device)
        x_t, target = self._schedule.noised(x0, noise, t_B)
        # A negative prompt says what a picture should not be: dropped prompts are then empty, not negative.
        empty = "" if self.call.get("negative_prompt") else None
        texts = [empty if drop else s.prompt.text for s, drop in zip(samples, draw.dropped_B.tolist(), strict=True)]
        prediction = self.predict(x_t, t_B, texts)
        if self.training_guidance_scale > 1:
            with torch.no_grad():
                unconditional = self.predict(x_t, t_B, [None] * len(texts))
            # A row whose prompt was dropped trains the unconditional prediction itself.
            kept = (~draw.dropped_B).to(device).view(-1, *[1] * (x_t.dim() - 1))
            guided = unconditional + self.training_guidance_scale * (prediction - unconditional)
            prediction = torch.where(kept, guided, prediction)
        error_B = (prediction.float() - target).square().flatten(1).mean(1)
        return error_B * self._schedule.weight(t_B, self.snr_gamma)

    def predict(self, x_t: torch.Tensor, t_B: torch.Tensor, texts: Sequence[str | None]) -> torch.Tensor:
        """The model output without guidance at the timesteps `t_B`, one for each row, as the pipeline itself would
        hand it to its scheduler; carries gradients where they are enabled. The shape of `x_t`.

        A text that is None stands for what guidance leads away from: the negative prompt, or the pipeline's own
        idea of no prompt.
        """
        if self._prompts.negative_by_second_call:
            negative = self.call.get("negative_prompt") or ""
            texts = [negative if text is None else text for text in texts]
        autocast: AbstractContextManager[Any] = nullcontext()
        if self.precision != torch.float32:
            autocast = torch.autocast(x_t.device.type, self.precision)
        pipeline = self.pipeline
        stand_in = _OneStep(pipeline.scheduler, t_B)
        scheduler, pipeline.scheduler = pipeline.scheduler, stand_in
        self.denoiser.train(torch.is_grad_enabled())  # LoRA dropout
        try:
            with self._recorded(), autocast:
                inspect.unwrap(type(pipeline).__call__)(  # below the no_grad that pipelines wear
                    pipeline,
                    prompt=list(texts),
                    latents=x_t.to(self.denoiser.dtype),
                    num_inference_steps=1,
                    output_type="latent",
                    **self._arguments(len(texts), 1.0),
                )
        finally:
            self.denoiser.eval()
            pipeline.scheduler = scheduler
        assert stand_in.model_output is not None
        return stand_in.model_output

    @torch.no_grad()
    def encode_image(self, prompt: Prompt, image: torch.Tensor) -> Sample:
        """A user's own picture, uint8 [3, H, W], as a training sample: the mean of the VAE's posterior.

        Raises:
            ConfigError: this pipeline denoises packed latents, so an image's latents cannot be laid out by the VAE.
        """
        vae = self.pipeline.vae
        if getattr(vae.config, "latent_channels", None) != self.denoiser.config.in_channels:
            raise ConfigError(
                f"{type(self.pipeline).__name__} denoises packed latents; mixing in your own images is not possible"
            )
        pixels = image.to(vae.device, vae.dtype).div(127.5).sub(1)[None]
        latents = vae.encode(pixels).latent_dist.mean
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        latents = ((latents - shift) * vae.config.scaling_factor).float().cpu()[0]
        digest = hashlib.sha256(image.numpy().tobytes() + prompt.text.encode()).hexdigest()[:16]
        return Sample(id=f"data-{digest}", prompt=prompt, seed=0, image=image, latents=latents)

    # -- watching the pipeline ------------------------------------------------------------------------------------

    def _count(self, module, args, kwargs) -> None:
        rows = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        self.passes += len(rows)

    @contextmanager
    def _watched_scheduler(self) -> Iterator[dict[str, torch.Tensor]]:
        """While open, the latents that the latest `scheduler.step` gave are under `x0`."""
        last: dict[str, torch.Tensor] = {}
        scheduler = self.pipeline.scheduler
        step = scheduler.step

        @functools.wraps(step)  # pipelines read its signature to see whether it takes a generator
        def watched(*args, **kwargs):
            output = step(*args, **kwargs)
            last["x0"] = output[0] if isinstance(output, tuple) else output.prev_sample
            return output

        scheduler.step = watched
        try:
            yield last
        finally:
            del scheduler.step

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """While open, `encode_prompt` answers from the record."""
        self.pipeline.encode_prompt = functools.partial(
            self._prompts.replay, self.pipeline.encode_prompt, self.pipeline._execution_device
        )
        try:
            yield
        finally:
            del self.pipeline.encode_prompt


class _GuidanceArgument:
    """How the pipeline's `__call__` is told of guidance.

    Where there is a `true_cfg_scale`, `guidance_scale` is an input of a distilled model and is left alone, and
    guidance needs a negative prompt. Some pipelines compute c + s (c - u), so that 0 is no guidance, not 1.
    """

    def __init__(self, pipeline: Any):
        parameters = inspect.signature(type(pipeline).__call__).parameters
        self.name = "true_cfg_scale" if "true_cfg_scale" in parameters else "guidance_scale"
        pipeline._guidance_scale = 1.0
        self.none = 0.0 if getattr(pipeline, "do_classifier_free_guidance", False) else 1.0
        self.default = parameters[self.name].default + 1.0 - self.none

    def arguments(self, scale: float) -> dict[str, Any]:
        arguments: dict[str, Any] = {self.name: scale - 1.0 + self.none}
        if self.name == "true_cfg_scale" and scale > 1:
            arguments["negative_prompt"] = ""
        return arguments


class _PromptRecord:
    """What `encode_prompt` returned for each prompt, kept on the CPU.

    With guidance it returns the same values for the negative prompt as well; without, it leaves their places empty.
    So the two sides are told apart, recorded apart and put together again, whatever the family calls them. The
    negative side of all prompts is encoded once, beside the empty prompt.
    """

    def __init__(self, signature: inspect.Signature):
        self._signature = signature
        self._prompts: dict[tuple, tuple] = {}
        self._negatives: dict[tuple, tuple] = {}
        self._places: list[bool] = []
        """Which of the returned values are of the negative prompt; none are known at first."""
        self.negative_by_second_call = "do_classifier_free_guidance" not in signature.parameters
        """Whether the family encodes a negative prompt by a call of its own, as it does any prompt."""

    def replay(self, encode: Callable[..., Any], device: torch.device, /, *args, **kwargs) -> Any:
        """`encode(*args, **kwargs)`, row by row from the record; only what is new is encoded. A prompt that is None
        is given the values of its negative prompt."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        columns = {k: v for k, v in bound.arguments.items() if "prompt" in k and isinstance(v, list)}
        guided = bool(bound.arguments.get("do_classifier_free_guidance"))

        @torch.no_grad()
        def encode_with(**changed: Any) -> Any:
            arguments = inspect.BoundArguments(self._signature, OrderedDict(bound.arguments, **changed))
            return encode(*arguments.args, **arguments.kwargs)

        rows = [dict(zip(columns, texts, strict=True)) for texts in zip(*columns.values(), strict=True)]
        encodings = [self._row(encode_with, row, guided) for row in rows]
        if _ragged(encodings):  # of different lengths: only the pipeline knows how it pads them
            texts = [row.get("negative_prompt") or "" if row["prompt"] is None else row["prompt"] for row in rows]
            return encode_with(prompt=texts)
        stacked = _stack(encodings, device)
        return stacked if len(stacked) > 1 else stacked[0]

    def _row(self, encode: Callable[..., Any], row: dict[str, str | None], guided: bool) -> tuple:
        if row["prompt"] is None:
            negative = iter(self._negative(encode, row))
            return tuple(None if place else next(negative) for place in self._places)
        prompt = self._prompt(encode, row)
        if not guided:
            return prompt
        negative = iter(self._negative(encode, row))
        return tuple(next(negative) if place else value for value, place in zip(prompt, self._places, strict=True))

    def _prompt(self, encode: Callable[..., Any], row: dict[str, str | None]) -> tuple:
        key = tuple(row.items())
        if key not in self._prompts:
            self._prompts[key] = self._encode(encode, row, guided=False)
            self._places = [value is None or (isinstance(value, list) and not value) for value in self._prompts[key]]
        return self._prompts[key]

    def _negative(self, encode: Callable[..., Any], row: dict[str, str | None]) -> tuple:
        key = tuple((name, text) for name, text in row.items() if name.startswith("negative"))
        if key not in self._negatives:
            empty = {name: text if name.startswith("negative") else "" for name, text in row.items()}
            if not self._places:
                self._prompt(encode, empty)
            if not any(self._places):
                raise ConfigError(
                    "encode_prompt of this pipeline does not return the negative prompt's values apart; "
                    "set sampling.guidance_scale: 1"
                )
            both = list(zip(self._encode(encode, empty, guided=True), self._places, strict=True))
            self._prompts[tuple(empty.items())] = tuple(None if place else value for value, place in both)
            self._negatives[key] = tuple(value for value, place in both if place)
        return self._negatives[key]

    def _encode(self, encode: Callable[..., Any], row: dict[str, str | None], *, guided: bool) -> tuple:
        guidance = {} if self.negative_by_second_call else {"do_classifier_free_guidance": guided}
        values = encode(**{name: [text] for name, text in row.items()}, **guidance)
        return _moved(values if isinstance(values, tuple) else (values,), torch.device("cpu"))


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors, alone or in tuples and lists, on `device`."""
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, device) for item in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _ragged(rows: list[tuple]) -> bool:
    return any(len({v.shape for v in values if isinstance(v, torch.Tensor)}) > 1 for values in zip(*rows, strict=True))


def _stack(rows: list[tuple], device: torch.device) -> tuple:
    """Rows of encodings as one batch: what has a batch axis is concatenated, what has none is the same in all."""
    stacked: list[Any] = []
    for values in zip(*rows, strict=True):
        first = values[0]
        if isinstance(first, torch.Tensor) and first.dim() > 0 and first.shape[0] == 1:
            stacked.append(torch.cat(values))
        elif isinstance(first, list):
            stacked.append([item for value in values for item in value])
        else:
            stacked.append(first)
    return _moved(tuple(stacked), device)


class _OneStep:
    """A scheduler with one step, at a timestep for each row, that keeps the model output."""

    order = 1
    init_noise_sigma = 1.0
    num_inference_steps = 1

    def __init__(self, scheduler, t_B: torch.Tensor):
        self._scheduler, self._t_B, self.config = scheduler, t_B, scheduler.config
        self.model_output: torch.Tensor | None = None

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None, **_):
        self.timesteps = self._t_B[None]  # the pipeline's loop runs once, with a whole batch of timesteps
        self.sigmas = torch.ones(2)

    def set_begin_index(self, *_):
        pass

    def scale_model_input(self, sample, timestep=None):
        return sample

    def step(self, model_output, timestep, sample, **_):
        self.model_output = model_output
        return (sample,)

    def __getattr__(self, name):
        return getattr(self._scheduler, name)


class _NoiseSchedule:
    """x_t and the training target from x_0, by the noise schedule that the model was trained on."""

    def __init__(self, scheduler):
        config = scheduler.config
        self.steps = config.get("num_train_timesteps", 1000)
        self.prediction = config.get("prediction_type", "epsilon")
        self.flow = type(scheduler).__name__.startswith("FlowMatch") or self.prediction == "flow_prediction"
        if not self.flow:
            if self.prediction not in ("epsilon", "v_prediction", "sample"):
                raise ConfigError(f"{type(scheduler).__name__}: prediction type {self.prediction!r} cannot be trained")
            self.forward = DDPMScheduler.from_config(config)

    def timesteps(self, quantile_B: torch.Tensor, distribution: str) -> torch.Tensor:
        """Quantiles in [0, 1) to timesteps: whole ones for discrete schedules, in (0, steps) for flow matching."""
        if distribution == "logit-normal":  # arXiv 2403.03206, eq. 19, with mean 0 and deviation 1
            quantile_B = torch.sigmoid(torch.special.ndtri(quantile_B.double().clamp(1e-6, 1 - 1e-6))).float()
        if self.flow:
            return quantile_B.clamp(1e-3, 1.0) * self.steps
        return (quantile_B * self.steps).long().clamp(max=self.steps - 1)

    def noised(self, x0, noise, t_B) -> tuple[torch.Tensor, torch.Tensor]:
        if self.flow:
            t = (t_B / self.steps).view(-1, *[1] * (x0.dim() - 1))
            return (1 - t) * x0 + t * noise, noise - x0
        x_t = self.forward.add_noise(x0, noise, t_B)
        if self.prediction == "v_prediction":
            return x_t, self.forward.get_velocity(x0, noise, t_B)
        return x_t, noise if self.prediction == "epsilon" else x0

    def weight(self, t_B, snr_gamma: float | None) -> torch.Tensor | float:
        if snr_gamma is None or self.flow:
            return 1.0
        snr_B = compute_snr(self.forward, t_B).float()
        capped_B = snr_B.clamp(max=snr_gamma)
        return capped_B / {"epsilon": snr_B, "v_prediction": snr_B + 1, "sample": 1.0}[self.prediction]


def lora_targets(denoiser: torch.nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of the layers of `denoiser` that carry the LoRA.

    Raises:
        ConfigError: no layer has such a name.
    """
    if targets == "attention":
        endings = ATTENTION
    elif isinstance(targets, str):
        kinds = (torch.nn.Linear,) if targets == "linear" else (torch.nn.Linear, torch.nn.Conv2d)
        return [name for name, module in denoiser.named_modules() if isinstance(module, kinds)]
    else:
        endings = list(targets)
    found = [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        and any(name == ending or name.endswith(f".{ending}") for ending in endings)
    ]
    if not found:
        layers = sorted({n.rsplit(".", 1)[-1] for n, m in denoiser.named_modules() if isinstance(m, torch.nn.Linear)})
        raise ConfigError(f"adapter.targets: no layer is called {endings}; linear layers here: {', '.join(layers)}")
    return found


def _latents(sample: Sample) -> torch.Tensor:
    if sample.latents is None:
        raise DataError(f"sample {sample.id} has no latents to train on")
    return sample.latents


def _flaw(image: torch.Tensor, latents: torch.Tensor, unsafe: bool) -> str | None:
    if unsafe:
        return "blacked out by the safety checker"
    if not torch.isfinite(latents).all():
        return "latents that are not finite"
    if int(image.max()) <= BLACK:
        return "black image"
    return None


def _fingerprint(denoiser: torch.nn.Module) -> str:
    """A hash of every weight's name and shape and of some of its values: reading all of a large model is slow."""
    digest = hashlib.sha256()
    for name, parameter in denoiser.named_parameters():
        values = parameter.detach().flatten()[:: max(1, parameter.numel() // 16)][:16].float().cpu()
        digest.update(f"{name}{list(parameter.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]

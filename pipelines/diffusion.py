"""Any diffusers text-to-image pipeline as a policy, with no code per model family.

Every such pipeline encodes the prompt, then repeats two lines until the image is there:

    model_output = <whatever this family does>(latents, t, conditioning)
    latents = self.scheduler.step(model_output, t, latents)[0]

So the pipeline's own `__call__` is run for everything, with two of its parts watched:

* `encode_prompt` is **recorded**, a row for each prompt, and replayed from then on: no prompt is encoded twice,
  and no family's way of conditioning is needed;
* while sampling, the last `scheduler.step` gives x_0, in whatever layout the family denoises in: what training
  needs, with no VAE encode;
* while training, `OneStep` stands in for the scheduler: one step, at timesteps of our choosing for each row, which
  hands back the model output with its graph. Timestep scaling, packed latents, learned variance, position ids and
  guidance embeddings stay the pipeline's business.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from raftdiff.config import AdapterConfig
from raftdiff.errors import ConfigError, DataError, WeightsError
from raftdiff.types import Denoised, Draw, Prompt, Sample, Trajectory

from .loading import DTYPES
from .lora import lora_targets
from .replay import GuidanceArgument, OneStep, PromptRecord, TrajectoryRecorder
from .schedule import NoiseSchedule, gaussian_log_prob

ADAPTER = "raftdiff"
BLACK = 4  # an image none of whose pixels is brighter than this, of 255, is black


class DiffusionPolicy:
    """A diffusers text-to-image pipeline being aligned.

    Args:
        pipeline: any pipeline with `encode_prompt`, a `unet` or a `transformer`, and a `scheduler`.
        adapter: the LoRA to train, or full fine-tuning.
        trajectory_steps: denoising steps where trajectories are kept, if not `num_inference_steps`.
        num_inference_steps, guidance_scale, batch_size: of sampling. Guidance g means u + g (c - u) for the
            predictions c and u with and without the prompt, so that 1 is none; None is the pipeline's own default.
        call: further arguments for the pipeline's `__call__` (height, width, negative_prompt, ...), for sampling and
            training alike.
        training_guidance_scale: guidance inside the training error; 1 for none.
        caption_dropout: share of training rows whose prompt is emptied.
        snr_gamma: Min-SNR weighting of the error, arXiv 2303.09556, eq. 5 (eps and v prediction).
        error_space: whether the error is one of the prediction or of the noise that it stands for.
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
        trajectory_steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 8,
        call: Mapping[str, Any] | None = None,
        training_guidance_scale: float = 1.0,
        caption_dropout: float = 0.1,
        snr_gamma: float | None = None,
        error_space: Literal["prediction", "noise"] = "prediction",
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
        self.trajectory_steps = trajectory_steps or num_inference_steps
        self.batch_size = batch_size
        self.call = dict(call or {})
        self._guidance = GuidanceArgument(pipeline)
        self.guidance_scale = float(self._guidance.default if guidance_scale is None else guidance_scale)
        self.training_guidance_scale = float(training_guidance_scale)
        self.caption_dropout = caption_dropout
        self.snr_gamma = snr_gamma
        self.error_space = error_space
        self.timesteps = timesteps
        self.precision = DTYPES[precision]
        self.passes = 0
        self._prompts = PromptRecord(inspect.signature(pipeline.encode_prompt))
        self._schedule = NoiseSchedule(pipeline.scheduler)
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
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        guidance_scale: float | None = None,
        noise_level: float | None = None,
    ) -> list[Sample]:
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        samples: list[Sample] = []
        for start in range(0, len(prompts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            samples += self._sample_batch(prompts[rows], seeds[rows], scale, noise_level)
        return samples

    def _sample_batch(self, prompts, seeds, guidance_scale, noise_level) -> list[Sample]:
        # Noise comes from CPU generators: the same seed is the same noise on every device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        recorder = None
        if noise_level is not None:
            self.check_trajectories()
            recorder = TrajectoryRecorder(self._schedule, self.pipeline.scheduler, noise_level, generators)
        with self._recorded(), self._watched_scheduler(recorder) as last:
            output = self.pipeline(
                prompt=[p.text for p in prompts],
                num_inference_steps=self.num_inference_steps if recorder is None else self.trajectory_steps,
                generator=generators,
                output_type="pt",
                **self._arguments(len(prompts), guidance_scale),
            )
        latents = last["x0"].float().cpu()
        images = (output.images.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu()
        trajectories = [None] * len(prompts) if recorder is None else recorder.trajectories(guidance_scale)
        unsafe = getattr(output, "nsfw_content_detected", None) or [False] * len(prompts)
        return [
            Sample(
                id=f"{prompt.id}-{seed:016x}",
                prompt=prompt,
                seed=seed,
                image=images[i],
                latents=latents[i],
                trajectory=trajectories[i],
                flaw=_flaw(images[i], latents[i], bool(unsafe[i])),
            )
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]

    def check_trajectories(self) -> None:
        """Raise ConfigError unless the steps of the pipeline's scheduler can be made Gaussian."""
        wanted = FlowMatchEulerDiscreteScheduler if self._schedule.flow else (DDIMScheduler, DDPMScheduler)
        if not isinstance(self.pipeline.scheduler, wanted):
            name = "FlowMatchEulerDiscreteScheduler" if self._schedule.flow else "DDIMScheduler"
            raise ConfigError(
                f"{type(self.pipeline.scheduler).__name__} has no stochastic step with a known density, which policy "
                f"gradients need: set model.scheduler to {name}"
            )

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
        _, x_t, t_B, target = self._noised(samples, draw)
        prediction = self._prediction(samples, draw, x_t, t_B)
        error_B = (prediction.float() - target).square().flatten(1).mean(1)
        if self.error_space == "noise":
            error_B = error_B * self._schedule.noise_weight(t_B)
        return error_B * self._schedule.weight(t_B, self.snr_gamma)

    def denoised(self, samples: Sequence[Sample], draw: Draw) -> Denoised:
        """What the model takes the noised latents of `samples` for; guidance and dropped prompts as in `error`."""
        x0, x_t, t_B, _ = self._noised(samples, draw)
        prediction = self._prediction(samples, draw, x_t, t_B).float()
        return Denoised(x0=x0, predicted_x0=self._schedule.x0(prediction, x_t, t_B), prediction=prediction)

    def log_prob(self, samples: Sequence[Sample], steps: Sequence[int]) -> torch.Tensor:
        """Log-density of one step of each sample's trajectory, mean over the latent dimensions, float32 [B], with the
        guidance that it was sampled with, as u + g (c - u)."""
        device = self.denoiser.device
        walks = [_trajectory(s) for s in samples]
        x_t, after = (
            torch.stack([w.states[i + k] for w, i in zip(walks, steps, strict=True)]).to(device) for k in (0, 1)
        )
        t_B, next_B = (
            torch.stack([w.times[i + k] for w, i in zip(walks, steps, strict=True)]).to(device) for k in (0, 1)
        )
        if not self._schedule.flow:
            t_B, next_B = t_B.long(), next_B.long()
        prediction = self.predict(x_t, t_B, [s.prompt.text for s in samples])
        [scale] = {w.guidance_scale for w in walks}
        if scale > 1:
            unconditional = self.predict(x_t, t_B, [None] * len(samples))
            prediction = unconditional + scale * (prediction - unconditional)
        mean, deviation = self._schedule.step(prediction, x_t, t_B, next_B, walks[0].noise_level)
        return gaussian_log_prob(after, mean, deviation)

    def _noised(self, samples: Sequence[Sample], draw: Draw) -> tuple[torch.Tensor, ...]:
        """x_0, x_t, the timesteps [B], and what the model should predict."""
        device = self.denoiser.device
        x0 = torch.stack([_latents(s) for s in samples]).to(device)
        t_B = self._schedule.timesteps(draw.quantile_B, self.timesteps).to(device)
        x_t, target = self._schedule.noised(x0, draw.noise.to(device), t_B)
        return x0, x_t, t_B, target

    def _prediction(self, samples: Sequence[Sample], draw: Draw, x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        # A negative prompt says what a picture should not be: dropped prompts are then empty, not negative.
        empty = "" if self.call.get("negative_prompt") else None
        texts = [empty if drop else s.prompt.text for s, drop in zip(samples, draw.dropped_B.tolist(), strict=True)]
        prediction = self.predict(x_t, t_B, texts)
        if self.training_guidance_scale > 1:
            with torch.no_grad():
                unconditional = self.predict(x_t, t_B, [None] * len(texts))
            # A row whose prompt was dropped trains the unconditional prediction itself.
            kept = (~draw.dropped_B).to(x_t.device).view(-1, *[1] * (x_t.dim() - 1))
            guided = unconditional + self.training_guidance_scale * (prediction - unconditional)
            prediction = torch.where(kept, guided, prediction)
        return prediction

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
        stand_in = OneStep(pipeline.scheduler, t_B)
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
        self.passes += len(rows) * (3 if torch.is_grad_enabled() else 1)  # a backward pass costs about two forward

    @contextmanager
    def _watched_scheduler(self, recorder: TrajectoryRecorder | None) -> Iterator[dict[str, torch.Tensor]]:
        """While open, the latents that the latest `scheduler.step` gave are under `x0`; a recorder takes its steps."""
        last: dict[str, torch.Tensor] = {}
        scheduler = self.pipeline.scheduler
        step = scheduler.step

        @functools.wraps(step)  # pipelines read its signature to see whether it takes a generator
        def watched(*args, **kwargs):
            output = (recorder.step if recorder else step)(*args, **kwargs)
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


def _latents(sample: Sample) -> torch.Tensor:
    if sample.latents is None:
        raise DataError(f"sample {sample.id} has no latents to train on")
    return sample.latents


def _trajectory(sample: Sample) -> Trajectory:
    if sample.trajectory is None:
        raise DataError(f"sample {sample.id} has no trajectory; it was drawn without a noise level")
    return sample.trajectory


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

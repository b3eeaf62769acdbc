"""Any diffusers text-to-image pipeline as a policy, with no code per model family.

Every such pipeline encodes the prompt, then repeats two lines until the image is there:

    model_output = <whatever this family does>(latents, t, conditioning)
    latents = self.scheduler.step(model_output, t, latents)[0]

So the pipeline's own `__call__` is run for everything, with its parts watched:

* `encode_prompt` is **recorded**, a row for each prompt, and replayed from then on: no prompt is encoded twice,
  and no family's way of conditioning is needed;
* while sampling, the last `scheduler.step` gives x_0, in whatever layout the family denoises in: what training
  needs, with no VAE encode;
* while training, `OneStep` stands in for the scheduler: one step, at timesteps of our choosing for each row, from the
  noised latents that it finds in place of fresh noise, which hands back the model output with its graph. Timestep
  scaling, packed latents, learned variance, position ids and guidance embeddings stay the pipeline's business.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from raftdiff.batches import Batches
from raftdiff.config import AdapterConfig, Dtype, RunConfig, Timesteps
from raftdiff.data import load_pictures, load_preferences
from raftdiff.errors import ConfigError, DataError
from raftdiff.sharding import is_split
from raftdiff.types import Denoised, Draw, Prompt, Sample, Trajectory

from .loading import DTYPES, compile_denoiser, configure, load_pipeline
from .lora import Format, Lora, adapters_on, check_state, check_weights, fingerprint, load_line
from .replay import (
    GuidanceArgument,
    LatentLayout,
    Numbering,
    OneStep,
    PromptRecord,
    TrajectoryRecorder,
    by_length,
    decoding,
    on_device,
    planning,
)
from .schedule import NoiseSchedule, gaussian_log_prob

logger = logging.getLogger(__name__)

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
        timesteps: distribution of the training timesteps: over the whole schedule, or over those that sampling visits;
            `auto` is `sampler` for models distilled to a few steps and `uniform` for others.
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
        timesteps: Timesteps = "auto",
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
        if carried := adapters_on(self.denoiser):
            raise ConfigError(
                f"this {type(pipeline).__name__} already carries the LoRA {carried[0]!r}: to go on from it call "
                "pipe.fuse_lora() and then pipe.unload_lora_weights(), to begin without it the latter alone"
            )
        self.adapter = adapter or AdapterConfig()
        self.num_inference_steps = num_inference_steps
        self.trajectory_steps = trajectory_steps or num_inference_steps
        self.batch_size = batch_size
        self.call = dict(call or {})
        self._guidance = GuidanceArgument(pipeline)
        self.guidance_scale = float(self._guidance.default if guidance_scale is None else guidance_scale)
        self._guidance.arguments(self.guidance_scale)  # which refuses what the model does not know
        self.training_guidance_scale = float(training_guidance_scale)
        self.caption_dropout = caption_dropout
        self.snr_gamma = snr_gamma
        self.error_space = error_space
        self.precision = DTYPES[precision]
        self.passes = 0
        self.forget_prompts()
        self._schedule = NoiseSchedule(pipeline.scheduler)
        self.timesteps = self._training_timesteps() if timesteps == "auto" else timesteps
        self._visited: torch.Tensor | None = None
        self._layout: LatentLayout | None = None
        self._row_by_row = False
        self._guidance_is_linear = False
        self._fingerprint = fingerprint(self.denoiser)
        pipeline.set_progress_bar_config(disable=True)
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False).eval()
        self._base: dict[str, torch.Tensor] | None = None
        self._attach()
        self.denoiser.eval()

    load = staticmethod(load_pipeline)

    @classmethod
    def from_config(cls, config: RunConfig, pipeline: Any, *, needs: Sequence[str] = ()) -> DiffusionPolicy:
        """The policy of a run; what its algorithm `needs`, such a policy has at any rate.

        Raises:
            ConfigError: as `configure` and the constructor; a scheduler that the pipeline cannot sample with.
        """
        sampling, training, model = config.sampling, config.training, config.model
        call = dict(model.call)
        fixed = {"height": model.height, "width": model.width, "negative_prompt": model.negative_prompt}
        call |= {name: value for name, value in fixed.items() if value is not None}
        configure(pipeline, model)
        policy = cls(
            pipeline,
            config.adapter,
            num_inference_steps=sampling.num_inference_steps,
            trajectory_steps=sampling.trajectory_steps,
            guidance_scale=sampling.guidance_scale,
            batch_size=sampling.batch_size,
            call=call,
            training_guidance_scale=training.guidance_scale,
            caption_dropout=training.caption_dropout,
            snr_gamma=training.snr_gamma,
            error_space=training.error_space,
            timesteps=training.timesteps,
            precision=training.precision,
        )
        if model.scheduler:
            policy.check_scheduler()
        if model.compile:
            compile_denoiser(policy.denoiser)
        return policy

    def forget_prompts(self) -> None:
        """Drop the encodings of the prompts so far, for a user whose prompts do not come again."""
        self._prompts = PromptRecord(inspect.signature(self.pipeline.encode_prompt))

    def _training_timesteps(self) -> Timesteps:
        """Those of sampling where the pipeline says that its model was distilled to a few steps: by its configuration,
        or by a scheduler that begins at the very end of a schedule which leaves a little signal there, as only such
        models are sampled."""
        scheduler, schedule = self.pipeline.scheduler, self._schedule
        from_the_end = scheduler.config.get("timestep_spacing") == "trailing" and not schedule.flow
        distilled = (
            type(scheduler).__name__ in ("LCMScheduler", "TCDScheduler")
            or self.pipeline.config.get("is_distilled")
            or self.denoiser.config.get("time_cond_proj_dim")
            or (from_the_end and schedule.forward.alphas_cumprod[-1] > 1e-3)
        )
        if not distilled:
            return "uniform"
        logger.info(
            "%s is distilled to a few steps: it is trained at the timesteps of sampling alone "
            "(training.timesteps: sampler)",
            type(self.pipeline).__name__,
        )
        return "sampler"

    # -- what is trained ------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        if self.adapter.method == "full":
            self._base = {n: p.detach().clone() for n, p in self.denoiser.named_parameters()}
            self.denoiser.float().requires_grad_(True)
            return
        self._lora = Lora(self.pipeline, self.denoiser_name, self.adapter)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.denoiser.parameters() if p.requires_grad]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The base model: the LoRA switched off or, in full fine-tuning, the first weights put back."""
        if self._base is None:
            with self._lora.off():
                yield
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
        state = self._lora.state() if self._base is None else dict(self.denoiser.named_parameters())
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def load_adapter(self, state: Mapping[str, torch.Tensor]) -> None:
        check_state(self.adapter_state(), state)
        if self._base is not None:
            with torch.no_grad():
                for name, parameter in self.denoiser.named_parameters():
                    parameter.copy_(state[name])
        else:
            self._lora.load_state(state)

    def export(
        self,
        path: Path,
        metadata: Mapping[str, str] | None = None,
        *,
        format: Format = "diffusers",
        dtype: Dtype = "fp32",
    ) -> None:
        """Write what was trained, and load it again to see that it draws the same.

        Args:
            path: a folder, for the LoRA that `raftdiff.pipelines.lora.load_line` loads; in full fine-tuning, for the
                folder of the denoiser. In the format `kohya`, a file.
            metadata: goes into the header of the file, beside what tells its base.

        Raises:
            ConfigError: there is no such format for what was trained.
            WeightsError: what was written draws something else.
        """
        path = Path(path)
        if self._base is not None:
            if format != "diffusers":
                raise ConfigError(f"full fine-tuning leaves no LoRA, which the format {format} is for: use diffusers")
            self.denoiser.save_pretrained(path / self.denoiser_name)
            check_weights(self.denoiser, path / self.denoiser_name)
            return
        self._lora.save(path, metadata or {}, format=format, dtype=DTYPES[dtype])
        self._lora.check(path, self._drawn)

    def _drawn(self) -> torch.Tensor:
        """The latents of two pictures after two steps, from fixed seeds."""
        passes, steps = self.passes, self.num_inference_steps
        self.num_inference_steps = 2
        try:
            samples = self.sample([Prompt(text="")] * 2, [0, 1], guidance_scale=1.0)
        finally:
            self.passes, self.num_inference_steps = passes, steps  # which are of the run itself
        return torch.stack([_latents(sample) for sample in samples])

    def read_adapter(self, folder: Path) -> dict[str, torch.Tensor]:
        """The `adapter_state` that `export` wrote to a folder."""
        if self._base is not None:
            raise ConfigError("full fine-tuning leaves no LoRA to read")
        return self._lora.read(folder)

    def load_line(self, path: str) -> str:
        """The Python that puts what was exported to `path` on `pipe`."""
        if self._base is None:
            return load_line(self.pipeline, self.denoiser_name, path)
        kind, name = type(self.denoiser).__name__, self.denoiser_name
        return f"pipe.{name} = {kind}.from_pretrained({path!r}, subfolder={name!r})"

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes. Its own `device` and the pipeline's look for hooks in every module each time."""
        return next(self.denoiser.parameters()).device

    def fingerprint(self) -> str:
        return self._fingerprint

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
        batches = Batches(
            self.batch_size,
            "images at once (sampling.batch_size)",
            "set model.dtype: bf16, model.offload: components, model.vae_tiling or a smaller model.height and width",
            fixed=is_split(self.denoiser),
        )
        samples = batches.run(
            len(prompts), lambda rows: self._sample_batch(prompts[rows], seeds[rows], scale, noise_level)
        )
        self.batch_size = batches.size  # what fits is remembered
        return samples

    def _sample_batch(self, prompts, seeds, guidance_scale, noise_level) -> list[Sample]:
        return by_length(
            self.denoiser,
            lambda rows: self._sample_rows(
                [prompts[i] for i in rows], [seeds[i] for i in rows], guidance_scale, noise_level
            ),
            list(range(len(prompts))),
        )

    def _sample_rows(self, prompts, seeds, guidance_scale, noise_level) -> list[Sample]:
        # Noise comes from CPU generators: the same seed is the same noise on every device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        recorder = None
        if noise_level is not None:
            self.check_trajectories()
            recorder = TrajectoryRecorder(self._schedule, self.pipeline.scheduler, noise_level, generators)
        # Trajectories are made in the arithmetic of training: rounding alone could exceed the clip range of a ratio.
        arithmetic = self._denoising_in(self.precision if recorder else torch.float32)
        with self._recorded(), self._watched_scheduler(recorder) as last, arithmetic:
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
                flaw=flaw_of(images[i], latents[i], unsafe=bool(unsafe[i])),
            )
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]

    def check_run(
        self, prompts: Sequence[Prompt], *, noise_level: float | None = None, teacher: DiffusionPolicy | None = None
    ) -> None:
        """Raise ConfigError where the trajectories that a run needs cannot be had."""
        if noise_level is not None:
            self.check_trajectories()

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
        """Log-density of one step of each sample's trajectory, mean over the latent dimensions, float32 [B, 1], with
        the guidance that it was sampled with, as u + g (c - u)."""
        device = self.device
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
            self._check_guidance(scale, x_t, t_B, samples[0].prompt.text)
            unconditional = self.predict(x_t, t_B, [None] * len(samples))
            prediction = unconditional + scale * (prediction - unconditional)
        mean, deviation = self._schedule.step(prediction, x_t, t_B, next_B, walks[0].noise_level)
        return gaussian_log_prob(after, mean, deviation)[:, None]

    @property
    def log_prob_rounding(self) -> float:
        """How far by rounding alone the ratio of densities may be from 1 right after sampling. Rows are batched
        otherwise in training, and other batches have other kernels; on a GPU fp32 has the 10 bits of TF32."""
        kinds = {self.denoiser.dtype, self.precision} | (
            {torch.float16} if self.denoiser.device.type == "cuda" else set()
        )
        return max(1e-5, *(torch.finfo(kind).eps for kind in kinds))

    def _noised(self, samples: Sequence[Sample], draw: Draw) -> tuple[torch.Tensor, ...]:
        """x_0, x_t, the timesteps [B], and what the model should predict."""
        device = self.device
        x0 = torch.stack([_latents(s) for s in samples]).to(device)
        t_B = self._timesteps(draw.quantile_B).to(device)
        x_t, target = self._schedule.noised(x0, draw.noise.to(device), t_B)
        return x0, x_t, t_B, target

    def _timesteps(self, quantile_B: torch.Tensor) -> torch.Tensor:
        if self.timesteps != "sampler":
            return self._schedule.timesteps(quantile_B, self.timesteps)
        if self._visited is None:
            self._visited = self._plan()
        return self._schedule.visited(quantile_B, self._visited)

    @torch.no_grad()
    def _plan(self) -> torch.Tensor:
        """The timesteps that sampling visits, which in some families depend on the size of the pictures."""
        with self._recorded(), planning(self.pipeline) as scheduler:
            self.pipeline(
                prompt=[""],
                num_inference_steps=self.num_inference_steps,
                generator=torch.Generator(),  # torch's own is left as it is
                **self._arguments(1, 1.0),
            )
        return scheduler.timesteps.cpu()

    def check_scheduler(self) -> None:
        """Raise ConfigError where the pipeline does not know how to sample with its scheduler."""
        try:
            self._visited = self._plan()
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"model.scheduler: {type(self.pipeline).__name__} cannot sample with "
                f"{type(self.pipeline.scheduler).__name__} ({' '.join(str(error).split())[:200]}); leave it out"
            ) from error

    def _prediction(self, samples: Sequence[Sample], draw: Draw, x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        # A negative prompt says what a picture should not be: dropped prompts are then empty, not negative.
        empty = "" if self.call.get("negative_prompt") else None
        texts = [empty if drop else s.prompt.text for s, drop in zip(samples, draw.dropped_B.tolist(), strict=True)]
        prediction = self.predict(x_t, t_B, texts)
        if self.training_guidance_scale > 1:
            self._check_guidance(self.training_guidance_scale, x_t, t_B, samples[0].prompt.text)
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
        return torch.stack(
            by_length(
                self.denoiser,
                lambda rows: self._rows(x_t[rows], t_B[rows], [texts[i] for i in rows]),
                list(range(len(texts))),
            )
        )

    def _rows(self, x_t: torch.Tensor, t_B: torch.Tensor, texts: Sequence[str | None]) -> torch.Tensor:
        """The predictions for all rows at once or, where the pipeline makes a number of its timestep, one by one."""
        if not self._row_by_row:
            try:
                return self._one_step(x_t, t_B, texts, 1.0)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError, ValueError):
                if len(texts) == 1:
                    raise
        rows = [self._one_step(x_t[i : i + 1], t_B[i : i + 1], texts[i : i + 1], 1.0) for i in range(len(texts))]
        if not self._row_by_row:
            self._row_by_row = True
            logger.info("%s takes one timestep at a time: training goes row by row", type(self.pipeline).__name__)
        return torch.cat(rows)

    @functools.cached_property
    def _on_device(self) -> Any:
        return on_device(self.pipeline)

    def _one_step(
        self, x_t: torch.Tensor, t_B: torch.Tensor, texts: Sequence[str | None], guidance_scale: float
    ) -> torch.Tensor:
        """What the pipeline hands to its scheduler for one step from x_t."""
        autocast: AbstractContextManager[Any] = nullcontext()
        if self.precision != torch.float32:
            autocast = torch.autocast(x_t.device.type, self.precision)
        pipeline = self.pipeline
        call = functools.partial(
            inspect.unwrap(type(pipeline).__call__),  # below the no_grad that pipelines wear
            self._on_device,
            prompt=list(texts),
            num_inference_steps=1,
            generator=torch.Generator(self.device),  # torch's own is left as it is
            output_type="latent",
            **self._arguments(len(texts), guidance_scale),
        )
        stand_in = OneStep(pipeline.scheduler, t_B)
        scheduler, pipeline.scheduler = pipeline.scheduler, stand_in
        drops = torch.is_grad_enabled() and self.adapter.dropout > 0  # all that knows training from evaluation
        if drops:
            self.denoiser.train()
        try:
            with self._recorded(), self._starting_from(x_t.to(self.denoiser.dtype)) as latents, autocast:
                call(**latents)
        finally:
            if drops:
                self.denoiser.eval()
            pipeline.scheduler = scheduler
        assert stand_in.model_output is not None
        return stand_in.model_output

    @torch.no_grad()
    def _check_guidance(self, scale: float, x_t: torch.Tensor, t_B: torch.Tensor, text: str) -> None:
        """Raise ConfigError where the pipeline's own guidance is not u + g (c - u), on one row, the first time."""
        if self._guidance_is_linear:
            return
        passes, x_t, t_B = self.passes, x_t[:1], t_B[:1]
        prompted, unprompted = self.predict(x_t, t_B, [text]).float(), self.predict(x_t, t_B, [None]).float()
        expected = unprompted + scale * (prompted - unprompted)
        off = (self._one_step(x_t, t_B, [text], scale).float() - expected).norm() / expected.norm()
        self.passes = passes  # which count the work of the run itself
        exact = self.denoiser.dtype == self.precision == torch.float32
        if off > (0.01 if exact else 0.1):
            raise ConfigError(
                f"{type(self.pipeline).__name__} does more to its guided predictions than u + g (c - u): where it can, "
                "switch that off (model.call: {cfg_normalization: false}, {guidance_rescale: 0}), else set "
                "training.guidance_scale to 1, and sampling.guidance_scale as well for policy gradients"
            )
        self._guidance_is_linear = True

    def encode_outputs(self, prompts: Sequence[Prompt], images: Sequence[torch.Tensor]) -> list[Sample]:
        """A user's own pictures of one size, each uint8 [3, H, W], as training samples: the mean of the VAE's
        posterior, laid out as the family denoises it.

        Raises:
            ConfigError: the pipeline makes pictures of another size, or decodes its latents in a way of its own.
        """
        remedy = "set model.vae_tiling, or model.dtype: bf16"
        batches = Batches(self.batch_size, "pictures encoded at once (sampling.batch_size)", remedy)
        latents = batches.run(len(images), lambda rows: self._encoded(torch.stack(list(images[rows]))))
        return [
            Sample(id=_picture_id(prompt, image), prompt=prompt, seed=0, image=image, latents=x0)
            for prompt, image, x0 in zip(prompts, images, latents, strict=True)
        ]

    @torch.no_grad()
    def _encoded(self, images: torch.Tensor) -> list[torch.Tensor]:
        vae, layout = self.pipeline.vae, self._latent_layout()
        dtype = vae.dtype
        pixels = images.to(vae.device, layout.dtype).div(127.5).sub(1)
        if len(layout.decoded_shape) == 4:  # a VAE of videos
            pixels = pixels[:, :, None]
        if layout.dtype != dtype:  # some families decode, and so encode, in a finer precision than they keep
            vae.to(layout.dtype)
        encoded = vae.encode(pixels)
        if layout.dtype != dtype:
            vae.to(dtype)
        means = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
        if means.shape[1:] != layout.decoded_shape:
            raise ConfigError(
                f"a picture of {images.shape[-1]}x{images.shape[-2]} pixels is not of the size that this pipeline "
                "makes: set model.width and model.height"
            )
        return [layout.denoised(mean) for mean in means]

    def read_own(self, path: str | Path, *, pairs: bool) -> Iterator[tuple[Any, ...]]:
        """As `load_preferences`, or `load_pictures`, in the size that the pipeline makes."""
        height, width = self.picture_size
        return (load_preferences if pairs else load_pictures)(path, height=height, width=width)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width in pixels of the pictures that the pipeline makes."""
        vae = self.pipeline.vae
        latents = torch.zeros(1, *self._latent_layout().decoded_shape, device=vae.device, dtype=vae.dtype)
        with torch.no_grad():
            height, width = vae.decode(latents, return_dict=False)[0].shape[-2:]
        return height, width

    @torch.no_grad()
    def _latent_layout(self) -> LatentLayout:
        if self._layout is None:
            rows, passes = LatentLayout.ROWS, self.passes
            numbering = Numbering(self.pipeline.scheduler, torch.ones(1, device=self.pipeline._execution_device))
            with self._recorded(), decoding(self.pipeline, numbering) as given:
                self.pipeline(
                    prompt=[""] * rows,
                    num_inference_steps=1,
                    generator=torch.Generator(),  # torch's own is left as it is
                    **self._arguments(rows, 1.0),
                )
            self.passes = passes  # which count the work of the run itself
            self._layout = LatentLayout(numbering.shape, given[0])
        return self._layout

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
    def _starting_from(self, x_t: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
        """While open, the pipeline denoises `x_t` in place of the noise that it prepares: what it takes as `latents` is
        not in every family laid out as what it denoises. Gives the argument for those that prepare nothing."""
        prepare = getattr(self.pipeline, "prepare_latents", None)
        if prepare is None:
            yield {"latents": x_t}
            return

        def prepared(*args, **kwargs):
            latents = prepare(*args, **kwargs)
            return (x_t, *latents[1:]) if isinstance(latents, tuple) else x_t

        self.pipeline.prepare_latents = prepared
        try:
            yield {}
        finally:
            del self.pipeline.prepare_latents

    @contextmanager
    def _denoising_in(self, precision: torch.dtype) -> Iterator[None]:
        """While open, the denoiser's arithmetic is autocast to `precision`, and that of the other parts is not."""
        if precision == torch.float32:
            yield
            return
        forward = self.denoiser.forward

        @functools.wraps(forward)
        def cast_forward(*args, **kwargs):
            with torch.autocast(self.denoiser.device.type, precision):
                return forward(*args, **kwargs)

        self.denoiser.forward = cast_forward
        try:
            yield
        finally:
            del self.denoiser.forward

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """While open, `encode_prompt` answers from the record and the rows through the denoiser are counted."""
        counting = self.denoiser.register_forward_pre_hook(self._count, with_kwargs=True)
        self.pipeline.encode_prompt = functools.partial(self._prompts.replay, self.pipeline.encode_prompt, self.device)
        try:
            yield
        finally:
            del self.pipeline.encode_prompt
            counting.remove()


def _picture_id(prompt: Prompt, image: torch.Tensor) -> str:
    return f"data-{hashlib.sha256(image.numpy().tobytes() + prompt.text.encode()).hexdigest()[:16]}"


def _latents(sample: Sample) -> torch.Tensor:
    if sample.latents is None:
        raise DataError(f"sample {sample.id} has no latents to train on")
    return sample.latents


def _trajectory(sample: Sample) -> Trajectory:
    if sample.trajectory is None:
        raise DataError(f"sample {sample.id} has no trajectory; it was drawn without a noise level")
    return sample.trajectory


def flaw_of(image: torch.Tensor, latents: torch.Tensor | None = None, *, unsafe: bool) -> str | None:
    """Why a picture, uint8 [3, H, W], must not be scored or trained on; None where nothing is wrong with it."""
    if unsafe:
        return "blacked out by the safety checker"
    if latents is not None and not torch.isfinite(latents).all():
        return "latents that are not finite"
    if int(image.max()) <= BLACK:
        return "black image"
    return None

"""Training of the embedded model's parts from nothing: `raftdiff shapes train`.

Each stage is a function of its seed and step, keeps its state in one safetensors file that is replaced atomically,
and goes on from there when it is called again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from rich.console import Console
from safetensors.torch import load_file, save
from torch import nn

from raftdiff.checkpoint import load_optimizer_tensors, optimizer_tensors, write_file
from raftdiff.shapes.captions import Caption, corrupt, random_caption
from raftdiff.shapes.scenes import random_scene, render

from . import shapes

console = Console()
SAVE_EVERY_S = 60.0
LOG_EVERY = 100

# The captions that the base model is trained on are right in the first part of its training and careless in the
# second: each stated attribute is wrong with this probability. So it can draw, but does not always listen.
CAPTION_NOISE = 0.25
CLEAN_SHARE = 0.85
CAPTION_DROPOUT = 0.1
LATENT_NOISE = 0.2  # of a channel's deviation, added before decoding: the decoder learns to draw clean edges


def scenes(count: int, seed: int) -> tuple[list[Caption], torch.Tensor]:
    """`count` captions of the training mixture and their pictures, uint8 [count, 3, 32, 32]."""
    rng = np.random.default_rng(seed)
    captions = [random_caption(rng) for _ in range(count)]
    pixels = np.stack([render(random_scene(caption, rng), shapes.IMAGE_SIZE) for caption in captions])
    return captions, torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels to [-1, 1], in the memory layout that convolutions on a CPU prefer."""
    return pixels.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def fit(
    name: str,
    module: nn.Module,
    loss_at: Callable[[int, torch.Generator], torch.Tensor],
    *,
    folder: Path,
    steps: int,
    learning_rate: float,
    seed: int,
    decay_from: float = 0.4,
    ema_decay: float = 0.998,
) -> None:
    """Train `module` in place by AdamW with a cosine decay over the last part, and leave it with the weights'
    moving average. `loss_at(step, generator)` is the loss of one batch."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = EMAModel(parameters, decay=ema_decay, use_ema_warmup=True, inv_gamma=10.0, power=1.0)
    path = folder / f"{name}.state.safetensors"
    start = _load_state(path, parameters, optimizer, ema) if path.exists() else 0
    saved, began, running = time.monotonic(), time.monotonic(), 0.0
    for step in range(start, steps):
        progress = step / steps
        warm = min(1.0, (step + 1) / 200)
        decay = 0.5 * (1 + math.cos(math.pi * max(0.0, (progress - decay_from) / (1 - decay_from))))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm * (0.01 + 0.99 * decay)
        loss = loss_at(step, torch.Generator().manual_seed(seed * 1_000_003 + step))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(parameters)
        running += float(loss.detach())
        if (step + 1) % LOG_EVERY == 0:
            rate = (step + 1 - start) / (time.monotonic() - began)
            console.print(f"{name} {step + 1}/{steps} loss {running / LOG_EVERY:.4f} {rate:.2f} steps/s")
            running = 0.0
        if time.monotonic() - saved > SAVE_EVERY_S or step + 1 == steps:
            _save_state(path, step + 1, parameters, optimizer, ema)
            saved = time.monotonic()
    ema.copy_to(parameters)


def _save_state(path, step, parameters, optimizer, ema) -> None:
    tensors = {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()}
    tensors |= {"step": torch.tensor(step), "ema_step": torch.tensor(ema.optimization_step)}
    for i, p in enumerate(parameters):
        tensors[f"parameter.{i}"] = p.detach().contiguous()
        tensors[f"ema.{i}"] = ema.shadow_params[i].contiguous()
    write_file(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _load_state(path, parameters, optimizer, ema) -> int:
    tensors = load_file(path)
    ema.optimization_step = int(tensors["ema_step"])
    with torch.no_grad():
        for i, p in enumerate(parameters):
            p.copy_(tensors[f"parameter.{i}"])
            ema.shadow_params[i].copy_(tensors[f"ema.{i}"])
    of_optimizer = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
    load_optimizer_tensors(optimizer, of_optimizer)
    return int(tensors["step"])


def train_vae(folder: Path, *, steps: int = 1500, batch: int = 64, seed: int = 1, pool: int = 30_000):
    """L1 + 2 MSE + a light KL; at the end the latents are standardised inside the VAE, channel by channel."""
    torch.manual_seed(seed)
    vae = shapes.build_vae().to(memory_format=torch.channels_last)
    _, pixels = scenes(pool, seed)

    def loss_at(step, generator):
        x = to_model_range(pixels[torch.randint(len(pixels), (batch,), generator=generator)])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        spread = mean.detach().std(dim=(0, 2, 3), keepdim=True)
        z = z + LATENT_NOISE * spread * torch.randn(mean.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            y = vae.decode(z).sample
        y = y.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return (y - x).abs().mean() + 2 * (y - x).square().mean() + 2e-4 * kl

    fit("vae", vae, loss_at, folder=folder, steps=steps, learning_rate=2e-3, seed=seed)
    standardise(vae, encode(vae, pixels[:4000]))
    return vae


def train_decoder(folder: Path, vae, *, steps: int = 2000, batch: int = 64, seed: int = 5, pool: int = 20_000) -> None:
    """Go on with the decoder alone, in place: the latents stay what the base model learns, the edges get cleaner."""
    _, pixels = scenes(pool, seed)
    latents = encode(vae, pixels)
    trained = nn.ModuleList([vae.post_quant_conv, vae.decoder])
    vae.encoder.requires_grad_(False)

    def loss_at(step, generator):
        index = torch.randint(len(pixels), (batch,), generator=generator)
        z = latents[index] + LATENT_NOISE / 2 * torch.randn((batch, *latents.shape[1:]), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            y = vae.decode(z).sample
        difference = y.float() - to_model_range(pixels[index])
        return difference.abs().mean() + 2 * difference.square().mean()

    fit("decoder", trained, loss_at, folder=folder, steps=steps, learning_rate=1e-3, seed=seed, decay_from=0.0)


@torch.no_grad()
def encode(vae, pixels: torch.Tensor, batch: int = 256) -> torch.Tensor:
    """The means of the latents of uint8 pictures, float32 [N, 16, 8, 8]."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([vae.encode(to_model_range(p)).latent_dist.mean.float() for p in pixels.split(batch)])


@torch.no_grad()
def standardise(vae, latents: torch.Tensor) -> None:
    """Fold the mean and deviation of each latent channel into the 1x1 convolutions around the latent space, so
    that the latents have mean 0 and deviation 1 and `scaling_factor` is 1."""
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    n = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:n] /= std[:, None, None, None]
    quant.bias[:n] = (quant.bias[:n] - mean) / std
    quant.bias[n:] -= 2 * std.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]


def train_base(
    folder: Path,
    vae,
    *,
    steps: int = 5_500,
    batch: int = 64,
    seed: int = 2,
    pool: int = 60_000,
    compile: bool = False,
):
    """The UNet and the text encoder together, v-prediction on the VAE's latents; see CAPTION_NOISE."""
    torch.manual_seed(seed)
    pipeline = shapes.build_pipeline()
    unet = pipeline.unet.to(memory_format=torch.channels_last)
    noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    captions, pixels = scenes(pool, seed)
    latents = encode(vae, pixels).half()
    del pixels
    predict = torch.compile(unet) if compile else unet
    ids_of: dict[str, torch.Tensor] = {}

    def token_ids(texts):
        new = [t for t in set(texts) if t not in ids_of]
        if new:
            encoded = pipeline.tokenizer(
                new, padding="max_length", max_length=shapes.MAX_TOKENS, truncation=True, return_tensors="pt"
            ).input_ids
            ids_of.update(zip(new, encoded, strict=True))
        return torch.stack([ids_of[t] for t in texts])

    def loss_at(step, generator):
        index = torch.randint(len(captions), (batch,), generator=generator)
        rng = np.random.default_rng([seed, step])
        careless = CAPTION_NOISE if step >= CLEAN_SHARE * steps else 0.0
        texts = [
            "" if rng.random() < CAPTION_DROPOUT else str(corrupt(captions[i], careless, rng)) for i in index.tolist()
        ]
        x0 = latents[index].float()
        noise = torch.randn(x0.shape, generator=generator)
        # Timesteps stratified over the batch: the same distribution, less noise in the gradient.
        t = ((torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * 1000).long()
        x_t = noise_schedule.add_noise(x0, noise, t).contiguous(memory_format=torch.channels_last)
        target = noise_schedule.get_velocity(x0, noise, t)
        with torch.autocast("cpu", torch.bfloat16):
            states = pipeline.text_encoder(token_ids(texts)).last_hidden_state
            prediction = predict(x_t, t, states).sample
        return (prediction.float() - target).square().mean()

    both = nn.ModuleList([unet, pipeline.text_encoder])
    fit("base", both, loss_at, folder=folder, steps=steps, learning_rate=1.5e-3, seed=seed)
    return pipeline


def train(work: Path, out: Path, *, stage: str = "all", compile: bool = False) -> None:
    """Train the parts in order and write them to `out` as they ship: fp16 safetensors. What `work` holds of a stage
    is gone on with, so a stage that is done costs little."""
    from . import shapes_scorers, shapes_text

    work.mkdir(parents=True, exist_ok=True)
    if stage in ("vae", "base", "all"):
        vae = train_vae(work)
        train_decoder(work, vae)
        if stage != "vae":
            pipeline = train_base(work, vae, compile=compile)
            pipeline.vae = vae
            save_pipeline(pipeline, out / "pipeline")
    if stage in ("clip", "all"):
        shapes_scorers.save_clip(*shapes_scorers.train_clip(work), out / "clip")
    if stage in ("aesthetic", "all"):
        shapes_scorers.train_aesthetic(out / "aesthetic", out / "clip")
    if stage in ("text", "all"):
        shapes_text.save_text(*shapes_text.train_text(work), out / "text")


def save_pipeline(pipeline, folder: Path) -> None:
    """Write the pipeline's folder with float16 weights, which load as float32."""
    for part in (pipeline.vae, pipeline.unet, pipeline.text_encoder):
        part.to(memory_format=torch.contiguous_format)
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    load_as_float32(folder / "text_encoder" / "config.json")


def load_as_float32(path: Path) -> None:
    """Have transformers load a model as float32, which it would load as this configuration says it was saved."""
    config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
    write_file(path, (json.dumps(config, indent=2) + "\n").encode())

"""A finished LoRA for other programs, in another precision, and on the hub."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from huggingface_hub import HfApi

from .build import build_policy, default_device, load_model
from .card import CARD, HERE, PICTURE, provenance
from .checkpoint import MANIFEST, publish_folder, read_meta, sort_header, verify, write_file
from .config import Dtype, RunConfig
from .errors import ConfigError, StorageError, WeightsError

if TYPE_CHECKING:
    from .pipelines.lora import Format


def finished_lora(config: RunConfig) -> Path:
    """The LoRA folder of a finished run. Raises WeightsError where there is none, or it is damaged."""
    lora = config.folder / "lora"
    if reason := verify(lora):
        raise WeightsError(f"{lora} holds no finished LoRA: {reason}; `raftdiff resume {config.folder}` writes it")
    return lora


def export_run(
    config: RunConfig, *, format: Format = "diffusers", dtype: Dtype = "fp32", output: Path | None = None
) -> Path:
    """Write the LoRA of a finished run anew, checked against what it draws.

    Args:
        format: `diffusers`, a folder with its card, or `kohya`, one file for ComfyUI and the web UIs.
        dtype: number format of the weights.
        output: where to; in the run folder if absent.

    Raises:
        ConfigError: there is no such format for this family, or something else stands at `output`.
        WeightsError: there is no finished LoRA, or what was written draws something else.
    """
    lora = finished_lora(config)
    if config.adapter.method == "full":
        raise ConfigError(f"adapter.method: full leaves no LoRA to convert; {lora} holds the whole denoiser")
    if format == "kohya":
        target = output or config.folder / f"{config.name}-kohya.safetensors"
        if target.suffix != ".safetensors":
            raise ConfigError(f"--output {target}: the format kohya is one file; give a name that ends in .safetensors")
    else:
        target = output or config.folder / f"lora-{dtype}"
        if target.exists() and verify(target):
            raise ConfigError(f"--output {target}: something else stands there; give a new folder")
    policy = build_policy(config, load_model(config.model, default_device()))
    policy.load_adapter(policy.read_adapter(lora))
    if format == "kohya":
        with TemporaryDirectory() as scratch:
            file = Path(scratch) / target.name
            policy.export(file, provenance(config), format=format, dtype=dtype)
            sort_header(file)
            write_file(target, file.read_bytes())
        return target
    with publish_folder(target, meta=read_meta(lora)) as staging:
        policy.export(staging, provenance(config), dtype=dtype)
        for file in staging.glob("*.safetensors"):
            sort_header(file)
        for name in (CARD, PICTURE):
            if (lora / name).exists():
                shutil.copy(lora / name, staging)
    return target


def export_merged(config: RunConfig, *, dtype: Dtype = "fp32", output: Path | None = None) -> Path:
    """Write the whole model of a finished run with its LoRA folded into the weights: a folder that diffusers or
    transformers loads without peft.

    Args:
        dtype: number format of the weights.
        output: where to; in the run folder if absent.

    Raises:
        ConfigError: something else stands at `output`.
        WeightsError: there is no finished LoRA, or what was written holds other weights.
    """
    lora = finished_lora(config)
    if config.adapter.method == "full":
        raise ConfigError(f"adapter.method: full leaves no LoRA to fold in; {lora} holds the whole denoiser")
    target = output or config.folder / "merged"
    if target.exists() and verify(target):
        raise ConfigError(f"--output {target}: something else stands there; give a new folder")
    from .pipelines.loading import denoiser_of, load_lora

    model = config.model.model_copy(update={"dtype": dtype})
    pipeline = load_model(model)
    load_lora(pipeline, str(lora))
    with publish_folder(target, meta=read_meta(lora)) as staging:
        pipeline.save_pretrained(staging)
        written = load_model(model.model_copy(update={"path": str(staging), "revision": None, "variant": None}))
        merged, read = (denoiser_of(one).state_dict() for one in (pipeline, written))
        if merged.keys() != read.keys() or not all(torch.equal(merged[name], read[name]) for name in merged):
            raise WeightsError(f"{target}: what was written is not the merged model; nothing was published")
    return target


def push_to_hub(folder: Path, repo: str, *, private: bool = False, files: Sequence[Path] = ()) -> str:
    """Upload a LoRA's folder, and further files, to a repository of the hub; its address. It is made where it is not
    there yet. The token is that of the environment or of `hf auth login`.

    Raises:
        StorageError: the hub cannot be reached or refuses.
    """
    with TemporaryDirectory() as scratch:
        staging = Path(scratch)
        # The manifest vouches for the card as it lies here.
        shutil.copytree(folder, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        for file in files:
            shutil.copy(file, staging)
        card = staging / CARD
        if card.exists():
            card.write_text(card.read_text(encoding="utf-8").replace(HERE, repo), encoding="utf-8")
        api = HfApi()
        try:
            address = api.create_repo(repo, private=private or None, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=staging, commit_message="Upload a LoRA trained with raftdiff")
        except Exception as error:  # the hub, its client and the network each raise their own
            raise StorageError(
                f"cannot upload to {repo!r}: {' '.join(str(error).split())[:300]}; it takes a network, HF_HUB_OFFLINE "
                "unset, and `hf auth login` (or HF_TOKEN) with a token that may write there; then run the same command "
                f"again. The files are in {folder}"
            ) from error
    return str(address)

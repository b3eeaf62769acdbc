"""The LoRA of a denoiser: which layers carry it, and how it is attached, switched off, written and read again."""

from __future__ import annotations

import copy
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils import recurse_remove_peft_layers, set_adapter_layers
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import (
    SAFETENSORS_WEIGHTS_NAME,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from transformers.pytorch_utils import Conv1D

from raftdiff.config import AdapterConfig
from raftdiff.errors import ConfigError, WeightsError
from raftdiff.sharding import is_split

from .kohya import kohya_state

Format = Literal["diffusers", "kohya"]

ADAPTER = "raftdiff"
CHECK = "check"  # the adapter's name while what was written is read again
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
LINEAR = (torch.nn.Linear, Conv1D)  # the latter are those of GPT-2, with weights that lie the other way
PEFT_PREFIX = "base_model.model."  # of peft's own names
HEADER = "raftdiff."  # before our names in the header of a safetensors file
ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2}
"""How far two drawings of one model may be apart, of their length; in other formats 5e-2."""


def lora_targets(
    denoiser: torch.nn.Module, targets: str | Sequence[str], attention: Sequence[str] = ATTENTION
) -> list[str]:
    """Names of the layers of `denoiser` that carry the LoRA; `attention` are the endings of attention projections.

    Raises:
        ConfigError: no layer has such a name.
    """
    if targets == "attention":
        endings = list(attention)
    elif isinstance(targets, str):
        kinds = LINEAR if targets == "linear" else (*LINEAR, torch.nn.Conv2d)
        # The layer that gives a language model's logits may share its weights with the embeddings.
        last = getattr(denoiser, "get_output_embeddings", lambda: None)()
        return [name for name, module in denoiser.named_modules() if isinstance(module, kinds) and module is not last]
    else:
        endings = list(targets)
    found = [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, (*LINEAR, torch.nn.Conv2d))
        and any(name == ending or name.endswith(f".{ending}") for ending in endings)
    ]
    if not found:
        layers = sorted({n.rsplit(".", 1)[-1] for n, m in denoiser.named_modules() if isinstance(m, LINEAR)})
        raise ConfigError(f"adapter.targets: no layer is called {endings}; linear layers here: {', '.join(layers)}")
    return found


class Lora:
    """The LoRA on the denoiser of a pipeline, or on a language model.

    Pipelines that can load a LoRA themselves get theirs in the format of diffusers, others (PixArt, HunyuanDiT) and
    language models in that of peft. Each file says in its header which base it was trained from.
    """

    def __init__(
        self,
        pipeline: Any,
        name: str,
        adapter: AdapterConfig,
        *,
        attention: Sequence[str] = ATTENTION,
        task_type: str | None = None,
    ):
        """Attach a LoRA that changes nothing yet to the denoiser `pipeline.<name>`, whose attention projections have
        the endings `attention`; `task_type` is peft's."""
        self.pipeline, self.name = pipeline, name
        self.denoiser = getattr(pipeline, name)
        self.base = {"base_fingerprint": fingerprint(self.denoiser), "base_dtype": _name_of(self.denoiser.dtype)}
        targets = lora_targets(self.denoiser, adapter.targets, attention)
        self.config = LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.rank if adapter.alpha is None else adapter.alpha,
            lora_dropout=adapter.dropout,
            target_modules=targets,
            fan_in_fan_out=any(isinstance(self.denoiser.get_submodule(name), Conv1D) for name in targets),
            init_lora_weights="gaussian",
            task_type=task_type,
        )
        with torch.random.fork_rng(devices=[]):  # the same LoRA initialisation in every process and every run
            torch.manual_seed(0)
            if hasattr(self.denoiser, "add_adapter"):
                self.denoiser.add_adapter(self.config, adapter_name=ADAPTER)
            else:
                inject_adapter_in_model(self.config, self.denoiser, adapter_name=ADAPTER)
        cast_training_params(self.denoiser, dtype=torch.float32)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it the denoiser is as it was without the LoRA."""
        set_adapter_layers(self.denoiser, enabled=False)
        try:
            yield
        finally:
            set_adapter_layers(self.denoiser, enabled=True)

    def state(self) -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(self.denoiser, adapter_name=ADAPTER)

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        set_peft_model_state_dict(self.denoiser, dict(state), adapter_name=ADAPTER)

    # -- writing --------------------------------------------------------------------------------------------------

    def save(self, path: Path, metadata: Mapping[str, str], *, format: Format, dtype: torch.dtype) -> None:
        """Write to the folder `path` or, in the format `kohya`, to the file `path`; `metadata` goes into the header.

        Raises:
            ConfigError: there is no such format for this pipeline.
        """
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state().items()}
        header = {f"{HEADER}{key}": value for key, value in {**self.base, **metadata}.items()}
        if format == "kohya":
            renamed = kohya_state(type(self.pipeline).__name__, state, self.config.r, self.config.lora_alpha)
            _write(path, _cast(renamed, dtype), {"format": "pt", **header})
        elif hasattr(self.pipeline, "save_lora_weights"):
            self.pipeline.save_lora_weights(
                path,
                **{
                    f"{self.name}_lora_layers": _cast(state, dtype),
                    f"{self.name}_lora_adapter_metadata": self._plain_config().to_dict(),
                },
            )
            for file in weight_files(path):
                _write(file, load_file(file), read_header(file) | header)
        else:
            config = self._plain_config()
            config.base_model_name_or_path = metadata.get("base_model")
            config.save_pretrained(str(path))
            renamed = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in state.items()}
            _write(path / SAFETENSORS_WEIGHTS_NAME, _cast(renamed, dtype), {"format": "pt", **header})

    def _plain_config(self) -> LoraConfig:
        """The configuration with its target modules in order: a set has an order of chance."""
        plain = copy.copy(self.config)
        plain.target_modules = sorted(self.config.target_modules)
        return plain

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        """What `save` wrote to a folder, under the names of `state`."""
        return {
            name.removeprefix(f"{self.name}.").removeprefix(PEFT_PREFIX): tensor
            for file in weight_files(folder)
            for name, tensor in load_file(file).items()
        }

    # -- reading again --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check(self, path: Path, draw: Callable[[], torch.Tensor]) -> None:
        """Load what `save` wrote as its users will, beside the LoRA, compare the two, and take it off again.

        Args:
            draw: what the denoiser makes of fixed seeds. It is not called where the denoiser's weights are split over
                processes, which would all have to take part.

        Raises:
            WeightsError: they do not draw the same.
        """
        written = {tensor.dtype for file in weight_files(path) for tensor in load_file(file).values()}
        rounding = max(ROUNDING.get(dtype, 5e-2) for dtype in {self.denoiser.dtype, *written})
        with torch.compiler.set_stance("force_eager"):  # compiled layers would all be compiled anew
            trained = None if is_split(self.denoiser) else draw()
            with self._reloaded(path):
                for name, layer in _layers(self.denoiser):
                    if CHECK not in layer.r or not _apart(*map(layer.get_delta_weight, (CHECK, ADAPTER))) <= rounding:
                        raise _refusal(path, f"its {name} is another one")
                if trained is not None and not (apart := _apart(draw(), trained)) <= rounding:  # nor is it NaN
                    raise _refusal(path, f"its outputs are {apart:.1%} off")

    def _load(self, path: Path) -> None:
        read_adapter(self.pipeline, self.denoiser, path, CHECK)

    @contextmanager
    def _reloaded(self, path: Path) -> Iterator[None]:
        """While open, what was written to `path` is active in place of the LoRA."""
        trained = {name: p.requires_grad for name, p in self.denoiser.named_parameters()}
        try:
            try:
                with _quiet(), torch.random.fork_rng(devices=[]):
                    self._load(path)
            except Exception as error:  # diffusers, peft and safetensors each raise their own
                raise _refusal(path, " ".join(str(error).split())[:300]) from error
            yield
        finally:
            for _, layer in _layers(self.denoiser):
                layer.set_adapter(ADAPTER)
                layer.delete_adapter(CHECK)
            self.denoiser.peft_config.pop(CHECK, None)
            for name, parameter in self.denoiser.named_parameters():
                parameter.requires_grad_(trained[name])


def read_adapter(pipeline: Any, denoiser: torch.nn.Module, path: Path, name: str) -> None:
    """Put the LoRA at `path` on the denoiser of a pipeline as the adapter `name`, by the pipeline's own method or, for
    want of one, by peft's."""
    if hasattr(pipeline, "load_lora_weights"):
        file = weight_files(path)[0]
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name, use_safetensors=True)
    else:
        inject_adapter_in_model(PeftConfig.from_pretrained(str(path)), denoiser, name)
        set_peft_model_state_dict(denoiser, load_peft_weights(str(path), "cpu"), name)


def adapters_on(denoiser: torch.nn.Module) -> list[str]:
    """Names of the LoRAs that a denoiser carries."""
    return sorted({name for _, layer in _layers(denoiser) for name in layer.r})


def check_state(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """Raise WeightsError unless the tensors of `state` have the names and shapes of those that a model has."""
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


def take_off(pipeline: Any) -> bool:
    """Take the LoRA of an earlier policy off the pipeline; whether there was one. Others are left alone."""
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    if denoiser is None or adapters_on(denoiser) != [ADAPTER]:
        return False
    remove_adapters(denoiser)
    return True


def remove_adapters(denoiser: torch.nn.Module, *, merge: bool = False) -> None:
    """Take every LoRA off a denoiser; with `merge`, into its weights."""
    for _, layer in _layers(denoiser) if merge else ():
        layer.merge()
    recurse_remove_peft_layers(denoiser)
    for name in ("peft_config", "_hf_peft_config_loaded"):  # where diffusers looks for adapters
        vars(denoiser).pop(name, None)


def load_line(pipeline: Any, name: str, path: str) -> str:
    """The Python that puts the LoRA at `path` on `pipe`."""
    if hasattr(pipeline, "load_lora_weights"):
        return f"pipe.load_lora_weights({path!r})"
    return f"import peft; pipe.{name} = peft.PeftModel.from_pretrained(pipe.{name}, {path!r})"


def fingerprint(denoiser: torch.nn.Module, dtype: torch.dtype | None = None) -> str:
    """A hash of every weight's name and shape and of some of its values, rounded to `dtype` where it is given: reading
    all of a large model is slow. LoRAs that the denoiser carries do not count."""
    digest = hashlib.sha256()
    for name, parameter in denoiser.named_parameters():
        if "lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        values = parameter.detach().flatten()[:: max(1, parameter.numel() // 16)][:16].to(dtype).float().cpu()
        digest.update(f"{name}{list(parameter.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def base_differs(denoiser: torch.nn.Module, path: Path) -> bool:
    """Whether the LoRA at `path` says that it was trained from other weights than these. A base that is loaded in less
    than the precision of training, or a LoRA that does not say, cannot be told."""
    header = {key: value for file in weight_files(path) for key, value in read_header(file).items()}
    recorded, dtype = header.get(f"{HEADER}base_fingerprint"), header.get(f"{HEADER}base_dtype")
    if recorded is None or dtype is None or _name_of(denoiser.dtype) not in (dtype, "float32"):
        return False
    return fingerprint(denoiser, getattr(torch, dtype)) != recorded


def weight_files(path: Path) -> list[Path]:
    """The safetensors file at `path`, or those in the folder; none where there are none."""
    return [path] if path.suffix == ".safetensors" and path.is_file() else sorted(path.glob("*.safetensors"))


def read_header(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises WeightsError where it cannot be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} cannot be read as safetensors ({error}); export or download it again") from error


def check_weights(model: torch.nn.Module, folder: Path) -> None:
    """Raise WeightsError unless the safetensors files in `folder` hold the very weights of `model`."""
    weights, seen = model.state_dict(), 0
    for file in weight_files(folder):
        for name, tensor in load_file(file).items():
            seen += 1
            if not torch.equal(tensor, weights[name].cpu()):
                raise _refusal(folder, f"its {name} is another one")
    if seen != len(weights):
        raise _refusal(folder, f"it holds {seen} of {len(weights)} weights")


def _write(file: Path, state: dict[str, torch.Tensor], header: dict[str, str]) -> None:
    file.unlink(missing_ok=True)  # safetensors' own files are for the eyes of their owner alone
    file.write_bytes(save(state, header))


def _layers(denoiser: torch.nn.Module) -> list[tuple[str, LoraLayer]]:
    return [(name, module) for name, module in denoiser.named_modules() if isinstance(module, LoraLayer)]


def _cast(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor if name.endswith(".alpha") else tensor.to(dtype) for name, tensor in state.items()}


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    distance = (one.float() - other.float()).norm()
    return float(distance / other.float().norm()) if distance else 0.0


def _refusal(path: Path, reason: str) -> WeightsError:
    return WeightsError(
        f"the exported LoRA does not draw what the trained model draws ({path.name}: {reason}); nothing was published, "
        "and the checkpoints hold what was trained: update diffusers and peft, and run the same command again"
    )


def _name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _quiet() -> Iterator[None]:
    """While open, diffusers does not warn of text encoders that carry no LoRA, nor peft of a second adapter."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)

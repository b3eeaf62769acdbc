"""Published weights, from the hub or from a folder, loaded whole: a scorer with parts at random is an error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from transformers import AutoTokenizer

from raftdiff.config import Dtype
from raftdiff.errors import WeightsError
from raftdiff.registry import check_choice

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """Raises ConfigError where `dtype` is none of the settings' names."""
    check_choice("dtype of a reward's model", dtype, Dtype)
    return _DTYPES[dtype]


def is_hub_id(place: str) -> bool:
    """Whether it reads as `owner/name`, and no file or folder of this machine is called so."""
    return bool(_HUB_ID.fullmatch(place)) and not Path(place).exists()


def load_model(
    kind: Any, place: str, *, revision: str | None = None, device: str = "cpu", dtype: Dtype = "fp32"
) -> Any:
    """The model that a hub id or a local folder holds in the format of transformers: in eval mode, without gradients.

    Args:
        kind: a class with `from_pretrained`, such as `transformers.CLIPModel`.

    Raises:
        ConfigError: an unknown dtype.
        WeightsError: nothing there, or not all of the weights that the model has.
    """
    # Of what is missing or of another shape transformers would make random weights, and only log it.
    model, report = read(
        kind,
        place,
        revision=revision,
        dtype=torch_dtype(dtype),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    absent = sorted(report["missing_keys"]) + sorted(str(key[0]) for key in report["mismatched_keys"])
    if absent:
        raise WeightsError(
            f"{place} holds no whole {type(model).__name__}: {len(absent)} of its weights are absent or of another"
            f" shape ({', '.join(absent[:3])}); take a checkpoint that was trained as one"
        )
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(place: str, *, embeddings: int, revision: str | None = None, **arguments: Any) -> Any:
    """The tokenizer that a hub id or a local folder holds, for a model with so many token embeddings.

    Raises:
        WeightsError: there is none, or one for another model.
    """
    tokenizer = read(AutoTokenizer, place, revision=revision, **arguments)
    # Where the files of a tokenizer are missing, transformers gives one that knows a few special tokens.
    if not embeddings / 2 <= len(tokenizer) <= embeddings:
        raise WeightsError(
            f"the tokenizer of {place} knows {len(tokenizer)} tokens and the model {embeddings}: its files are missing"
            " or belong to another model"
        )
    return tokenizer


def read(kind: Any, place: str, **arguments: Any) -> Any:
    """`kind.from_pretrained`; whatever goes wrong is a WeightsError of one line that names the place."""
    if not (Path(place).is_dir() or is_hub_id(place)):
        raise WeightsError(f"no model at {place}: it is neither a folder nor a hub id (owner/name)")
    try:
        return kind.from_pretrained(place, **arguments)
    except Exception as error:  # transformers, the hub and safetensors each raise their own
        raise WeightsError(f"cannot load {kind.__name__} from {place}: {one_line(error)}") from error


def published_file(place: str | Path, name: str, revision: str | None = None) -> Path:
    """A file of weights: `place` itself, or the file `name` in the folder or hub repository `place`.

    Raises:
        WeightsError: there is no such file, or it cannot be fetched.
    """
    path = Path(place).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / name).is_file():
            return path / name
        raise WeightsError(f"the folder {path} has no {name}; download it there, or name the file itself")
    if not is_hub_id(str(place)):
        raise WeightsError(f"no weights at {place}: give the file {name}, a folder that holds it, or a hub id")
    try:
        return Path(hf_hub_download(str(place), name, revision=revision))
    except Exception as error:  # the hub's and the network's own
        raise WeightsError(f"cannot fetch {name} from {place}: {one_line(error)}") from error


def origin(place: str | Path, commit: str | None) -> str:
    """Where weights come from, for the records of a run: the hub id with the commit, or the place on this machine."""
    return f"{place}@{commit}" if commit else str(place)


def commit_of(file: Path) -> str | None:
    """The commit that a file of the hub's cache belongs to (`.../snapshots/COMMIT/NAME`)."""
    return file.parent.name if file.parent.parent.name == "snapshots" else None


def read_tensors(path: Path, what: str = "weights") -> Mapping[str, torch.Tensor]:
    """The tensors of a published file, `what` it is in error messages: of safetensors, or of a pickle, which is opened
    restricted to tensors.

    Raises:
        WeightsError: it is unreadable, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # what unpickling raises depends on the bytes
        raise WeightsError(f"cannot read the {what} {path}: {one_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(f"{path} holds no table of tensors")
    return state


def one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(error).__name__

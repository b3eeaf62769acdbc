"""How a run survives: files that appear whole or not at all, checkpoints that prove what they hold, one owner a run.

The publish protocol, for every file that a later run may read: stage beside the target on the same file system,
write, fsync the files, write the manifest last, fsync the folder, rename, fsync the parent; only then prune the old.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from .errors import ConfigError, ResumeError, RunLockedError, StorageError, WeightsError

MANIFEST = "manifest.json"
_STAGED = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
_CHECKPOINT = re.compile(r"round-(\d{4,})-step-(\d{5,})")
_RENAME_EXCHANGE = 2  # <linux/fs.h>
_AT_FDCWD = -100  # <fcntl.h>


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable: files renamed into it stay there through a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Publish one file: afterwards `path` holds `data` durably, and at no moment anything but the old or the new.

    Missing parent folders are made. Raises StorageError, with the old file untouched and nothing else left, when
    the system refuses any part of it.
    """
    staged = _staged(path)
    try:
        _make_folder(path.parent)
        with staged.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
        fsync_folder(path.parent)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise _refused(path, len(data), error) from error
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


@contextmanager
def publish_folder(target: Path, *, meta: Mapping[str, Any] | None = None, size: int | None = None) -> Iterator[Path]:
    """Publish a folder: yields an empty staging folder, which becomes `target` when the block ends without an error.

    A manifest with the size and SHA-256 of every file, and with `meta` (JSON values), is added; see `verify`. What
    stood at `target` before is replaced, in one step where the system can. `size` is the number of bytes that the
    block will write, where the caller knows it, for the message of the StorageError that a full disk raises; then,
    and after any other exception, `target` is as it was and the staging folder is gone.
    """
    staging = _staged(target)
    try:
        _make_folder(target.parent)
        staging.mkdir()
        yield staging
        _seal(staging, meta or {})
        if target.exists():
            _exchange(staging, target)
            shutil.rmtree(staging)
        else:
            os.rename(staging, target)
        fsync_folder(target.parent)
    except BaseException as error:
        written = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise _refused(target, max(size or 0, written), error) from error
        raise


def verify(folder: Path) -> str | None:
    """None if the folder holds all that its manifest says, unchanged to the bit; else why not, in one line.

    Files that the manifest does not name are ignored.
    """
    try:
        files = _read_manifest(folder)["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if _sha256(path) != expected["sha256"]:
                return f"{name} is damaged (its SHA-256 is not the manifest's)"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def sort_header(path: Path) -> None:
    """Put the metadata of a safetensors file in the order of its names: the library writes them in an order of
    chance, and the same adapter shall be the same bytes. For a file that is not published yet."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # as the format asks
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])


def read_meta(folder: Path) -> dict[str, Any]:
    """The `meta` that a published folder was given. Raises ResumeError where its manifest cannot be trusted."""
    try:
        return _read_manifest(folder)["meta"]
    except (OSError, ValueError) as error:
        raise ResumeError(f"{folder} was not published whole: {error}; delete it and make it again") from error


def clean_staging(folder: Path) -> None:
    """Remove what dead runs left half-written in `folder` and below. Only for the holder of the run's lock: the
    staged files of a live run look the same."""
    for path in list(folder.rglob(".*.tmp")):
        if _STAGED.fullmatch(path.name):
            _delete(path)


def remove(path: Path) -> None:
    """Remove a published file or folder, if it is there, so that a kill half-way leaves no part of it visible."""
    if not path.exists():
        return
    aside = _staged(path)
    os.rename(path, aside)
    _delete(aside)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint.

    Checkpoint(folder=Path("checkpoints/round-0003-step-00040"), round=3, step=40, meta={"adapter": "9f2c..."})
    """

    folder: Path
    round: int
    """Rounds that are complete."""
    step: int
    """Optimizer steps into the round after those; 0 at the end of a round."""
    meta: dict[str, Any]
    """As it was given to `save`, through JSON (tuples come back as lists)."""

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one part, on the CPU. Raises ResumeError if the checkpoint has no such part."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            parts = ", ".join(sorted(p.stem for p in self.folder.glob("*.safetensors")))
            raise ResumeError(f"{self.folder} has no part {name!r} (it has: {parts}); start the run in a new folder")
        return safetensors.torch.load(path.read_bytes())


class Checkpoints:
    """The checkpoints of one run, in `folder`: `round-0003-step-00000` is the state at the end of round 3, and
    `round-0003-step-00040` the state 40 optimizer steps into round 4."""

    def __init__(self, folder: Path, keep: int = 3) -> None:
        assert keep >= 1, keep
        self.folder = folder
        self.keep = keep

    def save(
        self,
        round: int,
        step: int,
        parts: Mapping[str, Mapping[str, torch.Tensor]],
        meta: Mapping[str, Any],
        keep_rounds: Collection[int] = (),
    ) -> Checkpoint:
        """Write each part as `<name>.safetensors`, publish the checkpoint, then prune the others.

        Kept are this one, the newest `keep` of those at the end of a round, and those at the end of `keep_rounds`.
        Checkpoints later than this one are of a course that the run has left by resuming from an earlier state:
        they go, so that the next resume does not pick them up. Raises StorageError, with every earlier checkpoint
        untouched, where the new one cannot be written.
        """
        files = {f"{name}.safetensors": safetensors.torch.save(_storable(tensors)) for name, tensors in parts.items()}
        folder = self.folder / f"round-{round:04d}-step-{step:05d}"
        with publish_folder(folder, meta=meta, size=sum(map(len, files.values()))) as staging:
            for name, data in files.items():
                (staging / name).write_bytes(data)
        self._prune((round, step), keep_rounds)
        return Checkpoint(folder=folder, round=round, step=step, meta=read_meta(folder))

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that verifies, or None, and a line on each newer one that does not."""
        skipped: list[str] = []
        for (round, step), folder in sorted(self._folders().items(), reverse=True):
            if (reason := verify(folder)) is None:
                return Checkpoint(folder=folder, round=round, step=step, meta=read_meta(folder)), skipped
            skipped.append(f"{folder} is skipped: {reason}")
        return None, skipped

    def load(self, round: int) -> Checkpoint:
        """The checkpoint at the end of `round`. Raises ResumeError if there is none, or it does not verify."""
        folders = self._folders()
        if (round, 0) not in folders:
            rounds = ", ".join(str(r) for r, step in sorted(folders) if step == 0) or "none"
            raise ResumeError(f"{self.folder} has no checkpoint of round {round}; it has those of rounds: {rounds}")
        folder = folders[round, 0]
        if (reason := verify(folder)) is not None:
            raise ResumeError(f"{folder} cannot be used: {reason}; choose another round")
        return Checkpoint(folder=folder, round=round, step=0, meta=read_meta(folder))

    def _folders(self) -> dict[tuple[int, int], Path]:
        """(round, step) of whatever is named like a checkpoint, verified or not."""
        if not self.folder.is_dir():
            return {}
        matches = [(_CHECKPOINT.fullmatch(path.name), path) for path in self.folder.iterdir() if path.is_dir()]
        return {(int(match[1]), int(match[2])): path for match, path in matches if match}

    def _prune(self, saved: tuple[int, int], keep_rounds: Collection[int]) -> None:
        folders = self._folders()
        ends = sorted(key for key in folders if key <= saved and key[1] == 0)
        kept = {saved, *ends[-self.keep :], *(key for key in ends if key[0] in keep_rounds)}
        for key in folders.keys() - kept:
            try:
                remove(folders[key])
            except OSError:  # the new checkpoint stands; the old one goes at the next save
                continue


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """A copy of an optimizer's state on the CPU: `exp_avg.0` is the `exp_avg` of its first parameter, in the order of
    its parameter groups; a Python number becomes a 0-d tensor named `step.0.number`.

    The settings in the parameter groups (learning rate, betas) are not part of it: they are the config's. Raises
    ConfigError for an optimizer that keeps anything but tensors and numbers.
    """
    tensors = {}
    for i, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{key}.{i}"] = value.detach().to("cpu", copy=True)
            elif isinstance(value, float):
                tensors[f"{key}.{i}.number"] = torch.tensor(value, dtype=torch.float64)
            elif isinstance(value, int):  # and bool, as torch.bool
                tensors[f"{key}.{i}.number"] = torch.tensor(value)
            else:
                raise ConfigError(
                    f"{type(optimizer).__name__} keeps {key!r} as a {type(value).__name__}, which a checkpoint cannot "
                    "hold; choose an optimizer whose state is tensors and numbers, such as AdamW"
                )
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, in place of the state there is; training goes on bit for bit.

    Raises WeightsError, and leaves the optimizer alone, if a tensor belongs to a parameter that it does not have.
    """
    parameters = _parameters(optimizer)
    on_cpu = {  # torch.optim leaves `step` on the CPU unless its kernel reads it there where the parameters are
        id(parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if not (group.get("capturable") or group.get("fused"))
    }
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        is_number = name.endswith(".number")
        key, _, index = name.removesuffix(".number").rpartition(".")
        if not index.isdecimal() or int(index) >= len(parameters):
            raise WeightsError(
                f"the optimizer state has {name!r}, but the model has {len(parameters)} trained parameters; "
                "it was saved for another adapter"
            )
        parameter = parameters[int(index)]
        of_parameter = state.setdefault(int(index), {})
        if is_number:
            of_parameter[key] = tensor.item()
        elif key == "step" and id(parameter) in on_cpu:
            of_parameter[key] = tensor.clone()
        elif tensor.shape == parameter.shape:
            # In the parameter's own strides: fused kernels walk the memory of both and would mix up the elements.
            of_parameter[key] = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
        else:
            of_parameter[key] = tensor.to(parameter.device, copy=True)
    optimizer.state.clear()
    for i, of_parameter in state.items():
        optimizer.state[parameters[i]] = of_parameter


class RunLock:
    """Held while a process writes to a run folder: `with RunLock(run_folder): ...`.

    It is the kernel's lock on `<run>/lock`, so it ends with the process however that dies; what the file says is for
    the message alone. Entering raises RunLockedError, which names the owner, while another process holds it.
    """

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / "lock"
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        assert self._descriptor is None
        try:
            _make_folder(self.path.parent)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(f"cannot open {self.path}: {error.strerror}; choose another run folder") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            }
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        except BlockingIOError as error:
            owner_text = _describe_owner(os.pread(descriptor, 4096, 0))
            os.close(descriptor)
            raise RunLockedError(
                f"{self.path.parent} is in use by {owner_text}; wait for it, stop it, or choose another run folder"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise StorageError(
                f"cannot lock {self.path}: {error.strerror}; choose a run folder on a disk that has locks and room"
            ) from error
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._descriptor is not None
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # closing alone would leave it to forked children
        os.close(self._descriptor)
        self._descriptor = None


def _describe_owner(data: bytes) -> str:
    try:
        owner = json.loads(data)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):  # it has the lock, but has not written its name yet
        return "another process"


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def _make_folder(path: Path) -> None:
    """`path.mkdir(parents=True, exist_ok=True)`, durable."""
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync_folder(path.parent)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _refused(path: Path, needed: int, error: Exception) -> StorageError:
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return StorageError(
        f"cannot write {path}: {reason}. It needs {needed} bytes, and {free} are free there; "
        "make room or choose another folder, then run the same command again"
    )


def _seal(staging: Path, meta: Mapping[str, Any]) -> None:
    """Make the files of a staging folder durable, then add the manifest that vouches for them."""
    files = {}
    for path in sorted(path for path in staging.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(staging).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    assert MANIFEST not in files
    with (staging / MANIFEST).open("xb") as file:
        file.write(_manifest(files, json.loads(json.dumps(dict(meta)))))
        file.flush()
        os.fsync(file.fileno())
    for folder in [*(path for path in staging.rglob("*") if path.is_dir()), staging]:
        fsync_folder(folder)


def _manifest(files: Mapping[str, Any], meta: Mapping[str, Any]) -> bytes:
    content = {"files": files, "meta": meta}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"sha256": digest}, sort_keys=True, indent=2).encode() + b"\n"


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Raises FileNotFoundError or ValueError unless the manifest is there, and the very bytes that were written."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{MANIFEST} is missing")
    data = path.read_bytes()
    try:
        manifest = json.loads(data)
        whole = _manifest(manifest["files"], manifest["meta"]) == data
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{MANIFEST} is damaged")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _exchange(first: Path, second: Path) -> None:
    """Swap two paths of one folder: in one step on Linux, elsewhere with a moment in which `second` is absent."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(first.absolute()), os.fsencode(second.absolute())
    if renameat2 is not None and renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return
    aside = _staged(second)
    os.rename(second, aside)
    try:
        os.rename(first, second)
    except OSError:
        os.rename(aside, second)
        raise
    os.rename(aside, first)


def _storable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As safetensors wants them: on the CPU, row-major."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]

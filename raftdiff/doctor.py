"""`raftdiff doctor`: what is installed, what the machine has, and which mixes of the two are known not to work.

`collect` gathers facts. Importing a broken package can end a process, so that is tried in another one, which is this
module run as a program. `findings` and `table` are functions of the facts alone.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.markup import escape
from rich.table import Table

# What is shown and imported: the distribution's name, and the module's.
PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "peft": "peft",
    "accelerate": "accelerate",
    "open-clip-torch": "open_clip",
    "xformers": "xformers",
    "flash-attn": "flash_attn",
    "bitsandbytes": "bitsandbytes",
    "gradio": "gradio",
    "wandb": "wandb",
}
PROBE_SECONDS = 300  # the first import after an installation compiles a lot
TOGETHER = "pip install --force-reinstall torch torchvision  (both from the same place, in one command)"


@dataclass(frozen=True, kw_only=True)
class Package:
    """An installed distribution.

    Package(version="0.29.2+cu132", requires=("torch>=2.14.0",))
    """

    version: str
    """With the local part (`+cpu`, `+cu132`) that torch and torchvision write into their version.py."""
    requires: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What there is on this machine. No value of an environment variable is among it, but for folders."""

    python: str
    system: str
    packages: Mapping[str, Package]
    """Every installed distribution by its normalized name."""
    probes: Mapping[str, Mapping[str, Any]]
    """What importing each of PACKAGES (and `huggingface_hub`) gave: `error` where it failed, else what the functions
    of PROBES return."""
    nvidia_gpus: tuple[str, ...] = ()
    """As the driver lists them, whatever torch sees; none where CUDA_VISIBLE_DEVICES hides all."""
    cores: int = 1
    memory_total: int | None = None
    """Bytes."""
    memory_free: int | None = None
    disk_free: Mapping[str, int]
    """Folder to bytes: of the model cache and of the working folder."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that will not work, in one line, and what to do about it."""

    level: Literal["fail", "note"]
    """A note concerns only what is optional."""
    what: str
    fix: str


# -- findings: functions of the facts ---------------------------------------------------------------------------------


def findings(facts: Facts) -> list[Finding]:
    """All that is known to be wrong with these facts; with no `fail` among it, raftdiff should run."""
    checks = (_requirements, _builds, _gpu_unused, _gpu_kernels, _imports, _xformers_extension)
    return [finding for check in checks for finding in check(facts)]


def _requirements(facts: Facts) -> Iterator[Finding]:
    """What raftdiff and the packages shown say of themselves that they need."""
    if "raftdiff" not in facts.packages:
        what = "raftdiff is not installed, so what it requires is not known"
        yield Finding(level="fail", what=what, fix="pip install -e .  (in the checkout)")
    for name in ("raftdiff", *PACKAGES):
        for requirement in _requires(facts, name):
            found = facts.packages.get(canonicalize_name(requirement.name))
            optional = found is not None and name == "raftdiff" and canonicalize_name(requirement.name) in PACKAGES
            if not _applies(requirement, optional=optional):
                continue
            if found is None:
                what, fix = "which is not installed", f"pip install '{requirement.name}{requirement.specifier}'"
            elif requirement.specifier.contains(found.version, prereleases=True):
                continue
            else:
                what, fix = f"and {found.version} is installed", _fix_mismatch(name, requirement)
            needed = f"{requirement.name}{requirement.specifier}"
            yield Finding(level="fail", what=f"{name} requires {needed}, {what}", fix=fix)


def _requires(facts: Facts, name: str) -> list[Requirement]:
    return [Requirement(line) for line in facts.packages[name].requires] if name in facts.packages else []


def _applies(requirement: Requirement, *, optional: bool = False) -> bool:
    """Whether the requirement holds on this system; an extra's holds where it is `optional`."""
    extras = ["", *_extras(requirement)] if optional else [""]
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)


def _extras(requirement: Requirement) -> list[str]:
    return re.findall(r'extra == "([^"]+)"', str(requirement.marker or ""))


def _fix_mismatch(name: str, requirement: Requirement) -> str:
    if {name, requirement.name} == {"torch", "torchvision"}:
        return TOGETHER
    if name == "xformers":
        return "pip uninstall xformers  (torch's own attention is the default), or install the one for this torch"
    return f"pip install --upgrade '{requirement.name}{requirement.specifier}'"


def _builds(facts: Facts) -> Iterator[Finding]:
    """torch and torchvision made for different devices, which pip does not notice."""
    builds = {name: _build(facts.packages[name]) for name in ("torch", "torchvision") if name in facts.packages}
    if len(builds) == 2 and all(builds.values()) and builds["torch"] != builds["torchvision"]:
        versions = " and ".join(f"{name} {facts.packages[name].version}" for name in builds)
        what = f"{versions} are built for different devices (`operator torchvision::nms does not exist`)"
        yield Finding(level="fail", what=what, fix=TOGETHER)


def _build(package: Package) -> str | None:
    """`cpu`, `cuda 13`, `rocm 6`, `xpu` by the local part of the version; None where it says nothing of the sort."""
    local = package.version.partition("+")[2]
    if match := re.match(r"cu(\d+)\d$", local):
        return f"cuda {match[1]}"
    if match := re.match(r"rocm(\d+)", local):
        return f"rocm {match[1]}"
    return local if local in ("cpu", "xpu") else None


def _gpu_unused(facts: Facts) -> Iterator[Finding]:
    torch = facts.probes.get("torch", {})
    if not facts.nvidia_gpus or "error" in torch or torch.get("gpus") or "torch" not in facts.packages:
        return
    gpu, version = facts.nvidia_gpus[0], facts.packages["torch"].version
    if torch.get("cuda") is None:
        what = f"this machine has a CUDA GPU ({gpu}), and torch {version} is built without CUDA"
        yield Finding(level="fail", what=what, fix=TOGETHER)
    else:
        what = f"this machine has a CUDA GPU ({gpu}), and torch {version} cannot use it"
        fix = f"update the NVIDIA driver to one for CUDA {torch['cuda']}, or install a torch for the driver's CUDA"
        yield Finding(level="fail", what=what, fix=fix)


def _gpu_kernels(facts: Facts) -> Iterator[Finding]:
    torch = facts.probes.get("torch", {})
    if torch.get("gpus") and "math" not in torch["attention"]:
        gpu, version = torch["gpus"][0], facts.packages["torch"].version
        what = f"torch {version} cannot compute on {gpu['name']} (compute capability {gpu['capability']})"
        yield Finding(level="fail", what=what, fix="install a torch whose build supports this GPU: pytorch.org")


def _imports(facts: Facts) -> Iterator[Finding]:
    """Packages that are installed and cannot be imported, together where it is for one cause."""
    failed: dict[str, list[str]] = {}
    for name, probe in facts.probes.items():
        if "error" in probe:
            failed.setdefault(probe["error"], []).append(name)
    needed = {canonicalize_name(r.name) for r in _requires(facts, "raftdiff") if _applies(r)}
    for error, names in failed.items():
        level: Literal["fail", "note"] = "fail" if needed & set(names) else "note"
        yield Finding(
            level=level, what=f"{', '.join(names)} cannot be imported: {error}", fix=_fix_import(names, error)
        )


def _fix_import(names: Sequence[str], error: str) -> str:
    if "torchvision" in error or "CUDA major versions" in error:
        return TOGETHER
    if missing := re.search(r"No module named '(\w+)", error):
        return f"pip install {missing[1]}"
    return f"pip install --force-reinstall {names[0]}"


def _xformers_extension(facts: Facts) -> Iterator[Finding]:
    if reason := facts.probes.get("xformers", {}).get("extension"):
        fix = "leave model.attention at sdpa and pip uninstall xformers, or install the one for this torch"
        yield Finding(level="note", what=f"xformers' C extension does not load: {reason}", fix=fix)


# -- facts ------------------------------------------------------------------------------------------------------------


def collect() -> Facts:
    """The facts of this machine and this Python. Takes as long as importing everything does."""
    packages = _packages()
    probes = _probe([*(name for name in PACKAGES if name in packages), "huggingface_hub"])
    cache = probes["huggingface_hub"].get("cache")
    total, free = _memory()
    return Facts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages=packages,
        probes=probes,
        nvidia_gpus=_nvidia_gpus(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_total=total,
        memory_free=free,
        disk_free={folder: _disk_free(Path(folder)) for folder in (cache, str(Path.cwd())) if folder},
    )


def _packages() -> dict[str, Package]:
    packages: dict[str, Package] = {}
    for distribution in metadata.distributions():
        name = canonicalize_name(distribution.metadata["Name"] or "")
        if name and name not in packages:  # the first on the path is the one that is imported
            packages[name] = Package(version=_version(name, distribution), requires=tuple(distribution.requires or ()))
    return packages


def _version(name: str, distribution: metadata.Distribution) -> str:
    if name in ("torch", "torchvision"):
        file = Path(str(distribution.locate_file(f"{name}/version.py")))
        if file.is_file() and (match := re.search(r"__version__ = '([^']+)'", file.read_text(encoding="utf-8"))):
            return match[1]
    return distribution.version


def _nvidia_gpus() -> tuple[str, ...]:
    program = shutil.which("nvidia-smi")
    if program is None or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return ()
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(done.stdout.split("\n")[:-1]) if done.returncode == 0 else ()


def _memory() -> tuple[int | None, int | None]:
    """Total and free bytes; free memory is known on Linux alone."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        return 1024 * kilobytes["MemTotal"], 1024 * kilobytes["MemAvailable"]
    except (OSError, KeyError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    except (OSError, ValueError):
        return None, None


def _disk_free(folder: Path) -> int:
    return shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free


# -- what is tried in another process ---------------------------------------------------------------------------------


def _probe(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Import `names` one after the other in another process; where one ends that process, go on in a new one."""
    found: dict[str, dict[str, Any]] = {}
    while missing := [name for name in names if name not in found]:
        command = [sys.executable, "-m", "raftdiff.doctor", *missing]
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=PROBE_SECONDS
            )
            output, ended = done.stdout, f"the process ended with code {done.returncode}"
        except subprocess.TimeoutExpired as late:
            output, ended = (late.stdout or b"").decode(), f"not done after {PROBE_SECONDS} s"
        results = [json.loads(line) for line in output.splitlines()]
        found |= dict(zip(missing, results, strict=False))
        if len(results) < len(missing):
            found[missing[len(results)]] = {"error": ended}
    return found


def _main(names: Sequence[str]) -> None:
    """Print one line of JSON for each name. What the packages print themselves goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        for name in names:
            try:
                module = importlib.import_module(PACKAGES.get(name, name))
                result = PROBES[name](module) if name in PROBES else {}
            except Exception as error:  # of anyone's code
                cause = _first_cause(error)
                result = {"error": " ".join(f"{type(cause).__name__}: {cause}".split())[:300]}
            print(json.dumps(result), file=out, flush=True)


def _first_cause(error: BaseException) -> BaseException:
    """Lazy packages hide it behind an error of their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _probe_torch(torch: Any) -> dict[str, Any]:
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        name = torch.cuda.get_device_name(index)
        gpus.append({"name": name, "free": free, "total": total, "capability": capability, "bf16": bf16})
    return {
        "cuda": torch.version.cuda or torch.version.hip,
        "gpus": gpus,
        "mps": torch.backends.mps.is_available(),
        "attention": _attention(torch, gpus),
    }


def _attention(torch: Any, gpus: Sequence[Mapping[str, Any]]) -> list[str]:
    """The back ends of torch's attention that compute something here, on the first GPU or the CPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    device, dtype = ("cuda", torch.bfloat16 if gpus[0]["bf16"] else torch.float16) if gpus else ("cpu", torch.float32)
    working = []
    for name, backend in backends.items():
        try:
            rows = torch.ones(1, 2, 64, 64, device=device, dtype=dtype)
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(rows, rows, rows).sum().item()
            working.append(name)
        except RuntimeError:  # torch has no back end for this device, or no kernel
            continue
    return working


def _probe_torchvision(torchvision: Any) -> dict[str, Any]:
    import torch

    torch.ops.torchvision.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    return {}


def _probe_xformers(xformers: Any) -> dict[str, Any]:
    from xformers import _cpp_lib

    reason = getattr(_cpp_lib, "_cpp_library_load_exception", None)
    return {"extension": None if reason is None else " ".join(str(reason).split("Please")[0].split())}


def _probe_hub(huggingface_hub: Any) -> dict[str, Any]:
    from huggingface_hub import constants

    return {"offline": bool(constants.HF_HUB_OFFLINE), "cache": str(constants.HF_HUB_CACHE)}


PROBES = {
    "torch": _probe_torch,
    "torchvision": _probe_torchvision,
    "xformers": _probe_xformers,
    "huggingface_hub": _probe_hub,
}


# -- what is shown ----------------------------------------------------------------------------------------------------


def as_json(facts: Facts, found: Sequence[Finding]) -> str:
    """The facts and findings for a bug report; of the packages, those that raftdiff or the table names."""
    named = {canonicalize_name(requirement.name) for requirement in _requires(facts, "raftdiff")}
    versions = {n: p.version for n, p in sorted(facts.packages.items()) if n in {"raftdiff", *PACKAGES} | named}
    content = asdict(facts) | {"packages": versions, "findings": [asdict(finding) for finding in found]}
    return json.dumps(content, indent=2)


def table(facts: Facts) -> Table:
    """The facts, a line each."""
    rows = Table(box=None, pad_edge=False, show_header=False)
    rows.add_row("Python", facts.python, facts.system)
    for name in ("raftdiff", *PACKAGES):
        if name in facts.packages:
            rows.add_row(name, facts.packages[name].version, _state(facts.probes.get(name, {})))
        else:
            rows.add_row(name, "absent", escape(_how_to_get(facts, name)))
    memory = " of ".join(_gigabytes(b) for b in (facts.memory_free, facts.memory_total) if b is not None)
    rows.add_row("CPU", f"{facts.cores} cores", f"memory {memory}" + (" free" if facts.memory_free else ""))
    torch = facts.probes.get("torch", {})
    for index, gpu in enumerate(torch.get("gpus", ())):
        bf16 = "bf16" if gpu["bf16"] else "no bf16: use fp16"
        free = f"{_gigabytes(gpu['free'])} of {_gigabytes(gpu['total'])} free"
        rows.add_row(f"GPU {index}", gpu["name"], f"{free}, compute capability {gpu['capability']}, {bf16}")
    if not torch.get("gpus"):
        rows.add_row("GPU", "mps" if torch.get("mps") else "none that torch can use", ", ".join(facts.nvidia_gpus))
    where = "torch's own, tried on the GPU" if torch.get("gpus") else "torch's own, tried on the CPU"
    rows.add_row("attention", ", ".join(torch.get("attention", ())) or "none works", where)
    hub = facts.probes.get("huggingface_hub", {})
    if "cache" in hub:
        rows.add_row("hub", "offline" if hub["offline"] else "online", f"cache {hub['cache']}")
    for folder, count in facts.disk_free.items():
        rows.add_row("disk", f"{_gigabytes(count)} free", folder)
    return rows


def _state(probe: Mapping[str, Any]) -> str:
    if "error" in probe:
        return "cannot be imported"
    if "extension" in probe:
        return "its C extension loads" if probe["extension"] is None else "its C extension does not load"
    return ""


def _how_to_get(facts: Facts, name: str) -> str:
    for requirement in _requires(facts, "raftdiff"):
        if canonicalize_name(requirement.name) == name:
            extras = _extras(requirement)
            return f"pip install 'raftdiff[{extras[0]}]'" if extras else f"pip install {name}"
    return "not needed"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


if __name__ == "__main__":
    _main(sys.argv[1:])

"""The doctor: from facts to findings, and that collecting facts survives what it looks at."""

from __future__ import annotations

import io
import json
import re
from importlib import metadata

import pytest
from rich.console import Console
from test_cli import call

from raftdiff.doctor import Facts, Package, _probe, findings, table

RAFTDIFF = Package(
    version="0.1.0",
    requires=(
        "torch>=2.10",
        "torchvision>=0.25",
        "numpy>=2.0",
        'xformers>=0.0.35; sys_platform == "linux" and extra == "xformers"',
        'gradio<7,>=6.20; extra == "app"',
        'tomli>=2; python_version < "3"',
    ),
)
GPU = {"name": "NVIDIA A100", "free": 79 * 10**9, "total": 80 * 10**9, "capability": "8.0", "bf16": True}
ON_CPU = {"cuda": "13.2", "gpus": [], "mps": False, "attention": ["flash", "math"]}
ON_GPU = {"cuda": "13.2", "gpus": [GPU], "mps": False, "attention": ["flash", "math"]}


def facts(*, torch="2.15.0+cu132", torchvision="0.29.2+cu132", probes=None, nvidia_gpus=(), **others) -> Facts:
    packages = {
        "raftdiff": RAFTDIFF,
        "torch": Package(version=torch),
        "torchvision": Package(version=torchvision, requires=("torch>=2.14.0",)),
        "numpy": Package(version="2.4.6"),
    }
    return Facts(
        python="3.11.7",
        system="Linux",
        packages={name: p for name, p in (packages | others).items() if p is not None},
        probes={"torch": ON_CPU} | (probes or {}),
        nvidia_gpus=nvidia_gpus,
        memory_total=16 * 10**9,
        memory_free=8 * 10**9,
        disk_free={"/home/me/.cache/huggingface/hub": 50 * 10**9},
    )


def only(facts: Facts) -> tuple[str, str, str]:
    (finding,) = findings(facts)
    return finding.level, finding.what, finding.fix


def test_a_machine_on_which_all_is_well_has_no_findings():
    assert findings(facts()) == []
    assert findings(facts(probes={"torch": ON_GPU}, nvidia_gpus=("NVIDIA A100",))) == []


def test_a_torch_for_the_cpu_beside_a_torchvision_for_cuda_is_found_by_their_builds():
    level, what, fix = only(facts(torch="2.15.0+cpu"))
    assert level == "fail"
    assert "torch 2.15.0+cpu and torchvision 0.29.2+cu132" in what and "torchvision::nms" in what
    assert fix.startswith("pip install --force-reinstall torch torchvision")


@pytest.mark.parametrize(
    ("torch", "torchvision", "wrong"),
    [
        ("2.15.0+cu126", "0.29.2+cu132", True),
        ("2.15.0+cu130", "0.29.2+cu132", False),  # minor versions of CUDA go together
        ("2.15.0+cpu", "0.29.2+cpu", False),
        ("2.15.0+rocm6.4", "0.29.2+cu132", True),
        ("2.15.0", "0.29.2+cu132", False),  # built by the user: nothing is known
        ("2.15.0a0+gitabc123", "0.29.2+cu132", False),
    ],
)
def test_builds_are_compared_by_device_and_major_version(torch, torchvision, wrong):
    assert bool(findings(facts(torch=torch, torchvision=torchvision))) == wrong


def test_packages_with_one_broken_cause_are_one_finding_with_its_fix():
    error = {"error": "RuntimeError: operator torchvision::nms does not exist"}
    level, what, fix = only(facts(probes={"torchvision": error, "open-clip-torch": error}))
    assert level == "fail"
    assert what == f"torchvision, open-clip-torch cannot be imported: {error['error']}"
    assert "torch torchvision" in fix


def test_what_only_an_extra_brings_does_not_fail_the_check():
    error = {"error": "ModuleNotFoundError: No module named 'anyio'"}
    level, what, fix = only(facts(gradio=Package(version="6.30"), probes={"gradio": error}))
    assert (level, fix) == ("note", "pip install anyio")
    assert "gradio cannot be imported" in what


def test_a_torch_that_torchvision_does_not_take_is_found_in_its_metadata():
    level, what, fix = only(facts(torch="2.13.0+cu130"))
    assert (level, what) == ("fail", "torchvision requires torch>=2.14.0, and 2.13.0+cu130 is installed")
    assert "torch torchvision" in fix


def test_an_xformers_for_another_torch_is_found_in_its_metadata():
    level, what, fix = only(facts(xformers=Package(version="0.0.40", requires=("torch==2.10.0",))))
    assert (level, what) == ("fail", "xformers requires torch==2.10.0, and 2.15.0+cu132 is installed")
    assert fix.startswith("pip uninstall xformers")


def test_the_lower_bounds_of_raftdiff_itself_are_checked():
    level, what, fix = only(facts(numpy=Package(version="1.26.4")))
    assert (level, what) == ("fail", "raftdiff requires numpy>=2.0, and 1.26.4 is installed")
    assert fix == "pip install --upgrade 'numpy>=2.0'"
    assert only(facts(numpy=None))[1:] == (
        "raftdiff requires numpy>=2.0, which is not installed",
        "pip install 'numpy>=2.0'",
    )


def test_an_extra_must_fit_where_it_is_installed_and_only_there():
    assert "raftdiff requires gradio<7,>=6.20, and 5.0 is installed" in only(facts(gradio=Package(version="5.0")))
    assert findings(facts(gradio=Package(version="6.30"))) == []


def test_a_gpu_that_torch_does_not_use_is_found():
    without = ON_CPU | {"cuda": None}
    builds = {"torch": "2.15.0+cpu", "torchvision": "0.29.2+cpu"}
    _, what, fix = only(facts(probes={"torch": without}, nvidia_gpus=("NVIDIA A100",), **builds))
    assert what == "this machine has a CUDA GPU (NVIDIA A100), and torch 2.15.0+cpu is built without CUDA"
    assert fix.startswith("pip install")
    level, what, fix = only(facts(nvidia_gpus=("NVIDIA A100",)))
    assert level == "fail" and "cannot use it" in what and "driver to one for CUDA 13.2" in fix


def test_a_gpu_for_which_torch_has_no_kernels_is_found():
    old = ON_GPU | {"gpus": [GPU | {"name": "Tesla K80", "capability": "3.7"}], "attention": []}
    assert "cannot compute on Tesla K80 (compute capability 3.7)" in only(facts(probes={"torch": old}))[1]


def test_an_xformers_whose_extension_does_not_load_is_a_note():
    probe = {"extension": "it was built for PyTorch 2.10"}
    level, what, _ = only(facts(xformers=Package(version="0.0.35"), probes={"xformers": probe}))
    assert (level, what) == ("note", "xformers' C extension does not load: it was built for PyTorch 2.10")


def test_a_package_that_ends_the_process_hides_none_of_the_others(tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("print('hello from flash_attn')")
    (tmp_path / "bitsandbytes.py").write_text("import os; os.abort()")
    (tmp_path / "gradio.py").write_text(
        "try:\n    1 / 0\nexcept ArithmeticError as e:\n    raise ImportError('x') from e"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert _probe(["flash-attn", "bitsandbytes", "gradio", "huggingface_hub"]) == {
        "flash-attn": {},
        "bitsandbytes": {"error": "the process ended with code -6"},
        "gradio": {"error": "ZeroDivisionError: division by zero"},
        "huggingface_hub": {"offline": True, "cache": _probe(["huggingface_hub"])["huggingface_hub"]["cache"]},
    }


def test_the_table_says_how_to_get_what_is_absent_and_what_the_gpu_has():
    shown = io.StringIO()
    Console(file=shown, width=160).print(table(facts(probes={"torch": ON_GPU})))
    lines = {line.split()[0]: " ".join(line.split()) for line in shown.getvalue().splitlines()}
    assert lines["gradio"] == "gradio absent pip install 'raftdiff[app]'"
    assert lines["wandb"] == "wandb absent not needed"  # by this raftdiff
    assert lines["GPU"] == "GPU 0 NVIDIA A100 79.0 GB of 80.0 GB free, compute capability 8.0, bf16"
    assert lines["disk"] == "disk 50.0 GB free /home/me/.cache/huggingface/hub"


def test_this_machine_passes_and_is_described_without_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_thisIsSecret")
    monkeypatch.setenv("WANDB_API_KEY", "thisIsSecretToo")
    said = call("doctor", "--json")
    assert (said.code, said.err) == (0, "")
    assert "Secret" not in said.out
    described = json.loads(said.out)
    assert described["packages"]["torch"].startswith(metadata.version("torch"))
    assert described["probes"]["torchvision"] == {}  # it is imported, and its operators are there
    assert "math" in described["probes"]["torch"]["attention"]
    assert [finding for finding in described["findings"] if finding["level"] == "fail"] == []


def test_the_command_fails_where_something_will_not_work_and_says_what_to_do(tmp_path, monkeypatch):
    error = "operator torchvision::nms does not exist"
    (tmp_path / "torchvision.py").write_text(f"raise RuntimeError({error!r})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = call("doctor")
    assert said.code == 1
    assert re.search(rf"fail: torchvision.* cannot be imported: RuntimeError: {error}\n  fix: pip install", said.out)
    assert said.err.startswith("raftdiff: 1 of these will not work")

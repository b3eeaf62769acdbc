"""Names resolve to units lazily, and an error about a name says what to write instead."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch

from raftdiff.errors import ConfigError, MissingExtraError
from raftdiff.registry import ALGORITHMS, POLICIES, REWARDS, Registry, checked_options, nearest


@pytest.fixture
def other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Another package as pip installs it: a module with units, and an entry point to one of them."""
    module = "package_with_a_reward"
    (tmp_path / f"{module}.py").write_text(
        'class Loudness:\n    """How loud a picture is.\n\n    More."""\n\nvalue = 3\n'
    )
    (tmp_path / f"{module}_broken.py").write_text("import a_package_that_nobody_has.part\n")
    info = tmp_path / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[raftdiff.rewards]\nloudness = {module}:Loudness\nclip = {module}:Loudness\nbroken = {module}_broken:Unit\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield module
    for name in (module, f"{module}_broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("registry", "name"),
    [(registry, name) for registry in (REWARDS, ALGORITHMS, POLICIES) for name in registry.names()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_registered_name_is_a_class_with_a_line_of_description(registry: Registry, name: str):
    assert registry.load(name).__name__[0].isupper()
    assert registry.describe(name)


def test_listing_the_names_imports_no_unit():
    code = (
        "import sys; from raftdiff.registry import *; print(REWARDS.names(), ALGORITHMS.names(), POLICIES.names());"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'shapes-oracle'" in done.stdout and "'raft'" in done.stdout and "'text'" in done.stdout


def test_an_unknown_name_is_refused_with_the_nearest_and_the_list():
    with pytest.raises(ConfigError, match=r"unknown reward 'asthetic'; did you mean 'aesthetic'\?.*clip.*jpeg"):
        REWARDS.load("asthetic")


def test_nearest_is_silent_where_nothing_is_near():
    assert nearest("zzz", ["clip", "jpeg"]) == ""


CPU = torch.device("cpu")


class Unit:
    def __init__(self, size: float, *, way: Literal["up", "down"] = "up", device: torch.device = CPU) -> None: ...


def test_options_from_a_file_have_the_types_of_their_parameters():
    options = {"size": "1e3", "way": "left", "device": "cpu"}
    read = checked_options(Unit, options, "the unit", page="docs/unit.md")
    assert read == {"size": 1000.0, "way": "left", "device": "cpu"}  # the latter two are for the unit to read


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"size": 1, "devise": 0}, "the unit has no option 'devise'; did you mean 'device'? (it has size, way"),
        ({}, "the unit needs the option 'size': docs/unit.md"),
        ({"size": "big"}, "the unit: option 'size': Input should be a valid number, unable to parse"),
    ],
)
def test_options_that_a_unit_does_not_take_are_refused_in_one_line(options: dict, line: str):
    with pytest.raises(ConfigError, match=re.escape(line)):
        checked_options(Unit, options, "the unit", page="docs/unit.md")


def test_code_needs_the_flag(other_package: str):
    with pytest.raises(ConfigError, match="--allow-code"):
        REWARDS.load(f"{other_package}:Loudness")
    assert other_package not in sys.modules
    assert REWARDS.load(f"{other_package}:Loudness", allow_code=True).__name__ == "Loudness"


def test_entry_points_of_other_packages_are_found_but_do_not_replace_built_in_names(other_package: str):
    assert "loudness" in REWARDS.names() and "loudness" not in ALGORITHMS.names()
    assert REWARDS.load("loudness").__module__ == other_package
    assert REWARDS.describe("loudness") == "How loud a picture is."
    assert REWARDS.names().count("clip") == 1
    assert Registry("reward", {"clip": "pathlib:Path"}, entry_point_group="raftdiff.rewards").load("clip") is Path


def test_a_missing_package_is_named_with_the_command_that_installs_it(other_package: str):
    with pytest.raises(MissingExtraError, match="needs the package.*pip install a-package-that-nobody-has"):
        REWARDS.load("broken")
    assert "pip install" in REWARDS.describe("broken")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module_at_all:Unit", "there is no module 'no_such_module_at_all'"),
        ("pathlib.nowhere:Unit", "there is no module 'pathlib.nowhere'"),
        ("pathlib:Pth", r"has no class 'Pth'; did you mean 'Path'\?"),
        ("pathlib:os", "has no class 'os'"),
        ("pathlib:", "not of the form package.module:Class"),
        ("../pathlib:Path", "not of the form package.module:Class"),
    ],
)
def test_code_that_does_not_exist_is_refused(name: str, words: str):
    with pytest.raises(ConfigError, match=words):
        REWARDS.load(name, allow_code=True)

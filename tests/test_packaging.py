"""What an installation holds: every package, every data file, every library that the code imports."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import raftdiff

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
FOLDERS = {"raftdiff": "raftdiff", **{f"raftdiff.{name}": name for name in ("pipelines", "reward_models", "app")}}

# Where a library is imported under another name than it is installed by.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "open_clip": "open-clip-torch"}


def package_folders() -> dict[str, Path]:
    """Every folder with Python files below the four top-level ones, by the name it is imported under."""
    found = {}
    for package, folder in FOLDERS.items():
        for parent in {path.parent for path in (ROOT / folder).rglob("*.py")}:
            found[".".join([package, *parent.relative_to(ROOT / folder).parts])] = parent
    return found


def data_files() -> set[Path]:
    return {
        path
        for folder in FOLDERS.values()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"} and not path.name.startswith(".")
    }


def packaged_data() -> set[Path]:
    folders = package_folders()
    return {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in folders[package].glob(pattern)
        if path.is_file() and not path.name.startswith(".")
    }


def requirements() -> dict[str, list[Requirement]]:
    """Dependencies by extra; "" is what every installation has."""
    groups = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    return {extra: [Requirement(line) for line in lines] for extra, lines in groups.items()}


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def imported_libraries(source: str) -> tuple[set[str], set[str]]:
    """The top-level names of other people's libraries imported in `source`: when it loads, and at any time."""
    tree = ast.parse(source)
    inside = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_type_checking(node)
        for child in ast.walk(node)
    }
    at_load, ever = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = {node.module.partition(".")[0]}
        else:
            continue
        names -= {"raftdiff", *sys.stdlib_module_names}
        ever |= names
        if node not in inside:
            at_load |= names
    return at_load, ever


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def distribution(library: str) -> str:
    return canonicalize_name(DISTRIBUTIONS.get(library, library))


def test_every_folder_of_code_is_a_listed_package_and_no_other():
    assert sorted(package_folders()) == sorted(SETUPTOOLS["packages"])
    assert [str(path) for path in package_folders().values() if not (path / "__init__.py").is_file()] == []


def test_every_data_file_is_packaged():
    assert sorted(map(str, data_files() - packaged_data())) == []


@pytest.mark.parametrize(
    "needed", ["raftdiff/py.typed", "raftdiff/shapes/weights", "raftdiff/presets", "raftdiff/templates"]
)
def test_what_runs_need_besides_code_is_packaged(needed):
    assert any(path.is_relative_to(ROOT / needed) for path in packaged_data()), f"nothing of {needed} is packaged"


def test_a_wheel_holds_the_whole_project_under_one_name(tmp_path):
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    command = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path in data_files() or path.suffix == ".py"
    }
    assert held == expected
    assert wheel.name.startswith(f"raftdiff-{raftdiff.__version__}-")


def test_pins_name_versions_and_no_addresses():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line)] == []
    assert len(pins()) == len(lines)


def test_what_every_installation_and_the_tests_need_is_pinned_within_its_bounds():
    pinned = pins()
    for requirement in (*requirements()[""], *requirements()["dev"]):
        name = canonicalize_name(requirement.name)
        if name == "setuptools":  # the build backend, which pip fetches apart from the constraints
            continue
        assert name in pinned, f"constraints.txt lacks {name}"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} refuses {name}=={pinned[name]}"


def test_every_library_that_the_code_imports_is_declared():
    declared = {canonicalize_name(r.name) for extra, group in requirements().items() if extra != "dev" for r in group}
    undeclared = {
        f"{path.relative_to(ROOT)} imports {library}"
        for folder in package_folders().values()
        for path in folder.glob("*.py")
        for library in imported_libraries(path.read_text())[1]
        if distribution(library) not in declared
    }
    assert sorted(undeclared) == []


def test_a_missing_extra_does_not_keep_the_engine_from_loading():
    always = {canonicalize_name(requirement.name) for requirement in requirements()[""]}
    at_load = {
        f"{path.relative_to(ROOT)} imports {library} at its top"
        for path in (ROOT / "raftdiff").glob("*.py")
        for library in imported_libraries(path.read_text())[0]
        if distribution(library) not in always
    }
    assert sorted(at_load) == []


def test_public_names_are_those_that_type_checkers_see():
    tree = ast.parse(Path(raftdiff.__file__).read_text())
    block = next(node for node in tree.body if _is_type_checking(node))
    seen = {
        (alias.asname, node.module)
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == set(raftdiff._MODULES.items())


@pytest.mark.parametrize("name", raftdiff.__all__)
def test_public_names_load(name):
    assert getattr(raftdiff, name) is not None
    assert name in dir(raftdiff)


def test_an_unknown_public_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'Rafft'"):
        raftdiff.Rafft  # noqa: B018

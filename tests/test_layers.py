"""Imports point downward only, by the table in docs/design.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the top down. What stands on one line may import each other, without cycles.
LAYERS = (
    {"app", "cli", "train"},
    {"compare"},
    {"build", "plan", "export", "best_of_n", "feedback", "pictures", "rescore", "soup", "writer"},
    {"rounds"},
    {"sampling", "scoring", "training", "evaluation", "store", "report", "card", "display"},
    {"algorithms", "pipelines", "reward_models"},
    {
        "selection",
        "losses",
        "prompts",
        "objectives",
        "picture_statistics",
        "config",
        "shapes",
        "data",
        "endpoint",
        "batches",
        "checkpoint",
        "ledger",
        "interrupts",
        "protocols",
        "sharding",
        "preferences",
        "principles",
    },
    {"registry"},
    {"types", "errors", "doctor"},
)
APART = {"algorithms", "pipelines", "reward_models"}  # these never import each other
ENGINE = set().union(*(layer for layer in LAYERS if layer & {"rounds", "sampling"}))  # knows rounds, not models
DEPTH = {unit: depth for depth, layer in enumerate(LAYERS) for unit in layer}
FACADE = "__init__"  # raftdiff/__init__.py only hands out names of other modules


def module_files() -> dict[str, Path]:
    """Every module by its name within the package: "rounds", "pipelines.shapes"."""
    found = {}
    for folder, prefix in (("raftdiff", ()), *((name, (name,)) for name in ("pipelines", "reward_models", "app"))):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = (*prefix, *path.relative_to(ROOT / folder).with_suffix("").parts)
            found[".".join(parts)] = path
    return found


def imports_of(module: str, source: str, known: set[str]) -> set[str]:
    """The modules of raftdiff that `source` names in import statements, wherever they stand in it."""
    package = ["raftdiff", *module.split(".")[:-1]]
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *(node.module.split(".") if node.module else [])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    found = set()
    for name in names:
        head, _, inside = name.partition(".")
        while head == "raftdiff" and inside:
            if inside in known or f"{inside}.__init__" in known:
                found.add(inside)
                break
            inside = inside.rpartition(".")[0]
    return found


FILES = module_files()
IMPORTS = {module: imports_of(module, path.read_text(), set(FILES)) for module, path in FILES.items()}


def unit(module: str) -> str:
    return module.partition(".")[0]


def refusal(importer: str, imported: str) -> str | None:
    """Why `importer` must not import `imported` (modules by their name within raftdiff), or None where it may."""
    above, below = unit(importer), unit(imported)
    if above == below:
        return None
    if DEPTH[below] < DEPTH[above]:
        return f"{above} stands below {below} and must not know of it"
    if {above, below} <= APART:
        return f"{above} and {below} must not know of each other"
    if above in ENGINE and below in APART | {"shapes"}:
        return f"{above} is part of the engine, which knows no algorithm, model or reward by name"
    return None


@pytest.mark.parametrize("module", sorted(FILES))
def test_every_module_has_a_place_in_the_table(module):
    assert module == FACADE or unit(module) in DEPTH, (
        f"{FILES[module].relative_to(ROOT)} has no layer: place it in LAYERS of {Path(__file__).name} "
        "and in the table of docs/design.md"
    )


@pytest.mark.parametrize("module", sorted(set(FILES) - {FACADE}))
def test_imports_point_downward(module):
    refused = [
        reason
        for imported in sorted(IMPORTS[module])
        if unit(imported) in DEPTH and unit(module) in DEPTH and (reason := refusal(module, imported))
    ]
    assert not refused, f"{FILES[module].relative_to(ROOT)}: {'; '.join(refused)}"


def test_units_do_not_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {}
    for module in set(FILES) - {FACADE}:
        graph.setdefault(unit(module), set()).update(
            unit(name) for name in IMPORTS[module] if unit(name) != unit(module)
        )
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_rules_refuse_what_they_should():
    assert refusal("types", "config") == "types stands below config and must not know of it"
    assert refusal("algorithms.raft", "pipelines.diffusion")
    assert refusal("rounds", "pipelines.diffusion")
    assert refusal("sampling", "shapes.captions")
    assert refusal("build", "pipelines.diffusion") is None
    assert refusal("training", "checkpoint") is None
    assert refusal("pipelines.shapes", "shapes.captions") is None


def test_every_form_of_import_is_seen():
    source = (
        "import torch, raftdiff.losses\n"
        "from raftdiff.shapes import captions\n"
        "from ..types import Sample\n"
        "def later():\n"
        "    from . import base\n"
        "    from .. import selection\n"
    )
    known = {"losses", "types", "selection", "shapes.__init__", "shapes.captions", "algorithms.base", "algorithms.raft"}
    assert imports_of("algorithms.raft", source, known) == {
        "losses",
        "types",
        "selection",
        "shapes.captions",
        "algorithms.base",
    }


def test_importing_the_package_imports_neither_torch_nor_any_library():
    code = (
        "import sys, raftdiff; "
        "print(*sorted({'torch', 'numpy', 'diffusers', 'pydantic', 'tyro', 'rich'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert loaded.split() == []

"""Imports point down the list of the house, and torch stays where it belongs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The order of docs/architecture.md: a module imports from those below it only, or from its own line.
HOUSE = [
    ["cli"],
    ["server", "reports", "experiment_report"],
    ["verification", "lock", "compare"],
    ["app"],
    ["api"],
    ["http"],
    ["access"],
    ["service"],
    ["reranking"],
    ["deployment"],
    ["routing"],
    ["fleet"],
    ["evidence"],
    ["backends"],
    ["engine"],
    ["golden"],
    ["vectors"],
    ["config"],
    ["telemetry"],
    ["types"],
    ["terminal"],
    ["files"],
    ["errors"],
]
FLOOR = {name: level for level, names in enumerate(HOUSE) for name in names}
MODULES = sorted((ROOT / "gateway").rglob("*.py"))
MAY_IMPORT_TORCH = "gateway/engine/"


def imports_of(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [
                f"{node.module}.{alias.name}" if node.module == "gateway" else str(node.module) for alias in node.names
            ]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    room = path.relative_to(ROOT / "gateway").parts[0].removesuffix(".py")
    if room in {"__init__", "__main__"}:
        return
    for name in imports_of(path):
        if name.startswith("gateway.") and (target := name.split(".")[1]) in FLOOR and target != room:
            assert FLOOR[target] >= FLOOR[room], f"{room} imports {name}, which is above it"


def test_every_module_has_its_place_in_the_house() -> None:
    rooms = {path.relative_to(ROOT / "gateway").parts[0].removesuffix(".py") for path in MODULES}
    assert rooms - {"__init__", "__main__"} == set(FLOOR)


def test_the_map_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    # The modules of a comparison are named by what they do, in their order.
    paths = [path for path in MODULES if path.stem != "__init__" and path.parent.name != "compare"]
    unnamed = {str(path.relative_to(ROOT)) for path in paths if not re.search(rf"\b{path.stem}\b", page)}
    assert not unnamed


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_engine_imports_torch(path: Path) -> None:
    if str(path.relative_to(ROOT)).startswith(MAY_IMPORT_TORCH):
        return
    heavy = {name.split(".")[0] for name in imports_of(path)} & {"torch", "transformers", "infinity_emb"}
    assert not heavy


@pytest.mark.parametrize(
    "module", ["gateway.cli", "gateway.app", "gateway.backends.infinity", "gateway.engine.scheduler"]
)
def test_importing_does_not_load_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

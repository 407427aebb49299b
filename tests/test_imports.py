"""Imports follow the layers, file by file, without cycles, and only some modules import torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The order of docs/architecture.md, from the top. A file belongs to the longest name that fits, and imports from its own
# layer or from those below it.
LAYERS = """
__main__
cli.main
cli.comparing
cli.embedding
cli.experimenting
cli.moving
cli.clustering
doctor
bulk
compare
cli
server
app
console
api
http
service
computing
observation
requests
deployment
access
capture
comparisons
routing
fleet
recent
outcomes
batches
experiments
cluster
cache
backends
engine
golden
ranges
similarity
vectors
config
telemetry
cli.console
types
tasks
precision
config.files
errors
"""
NAMES = LAYERS.split()
FILES = sorted((ROOT / "gateway").rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in FILES]
MAY_IMPORT_TORCH = "gateway/engine/"


def module_of(path: Path) -> str:
    """Return the dotted name of a file, without ``gateway``: ``engine.batcher``."""
    return ".".join(path.relative_to(ROOT / "gateway").with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES} - {"__init__"}


def imports_of(path: Path) -> set[str]:
    """Return the dotted names that a file imports, ``gateway.`` included; also those for a type checker only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name.removeprefix("gateway.") in MODULES else str(node.module))
    return found


def own_imports(path: Path) -> set[str]:
    """Return the modules of the gateway that a file imports, without ``gateway``."""
    return {name.removeprefix("gateway.") for name in imports_of(path) if name.startswith("gateway.")}


def layer_of(module: str) -> int:
    fitting = [name for name in NAMES if module == name or module.startswith(f"{name}.")]
    assert fitting, f"{module} is in no layer"
    return NAMES.index(max(fitting, key=len))


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_point_down(path: Path) -> None:
    module = module_of(path)
    if module == "__init__":
        return
    above = {name for name in own_imports(path) if layer_of(name) < layer_of(module)}
    assert not above, f"{module} imports a module above it"


def test_no_module_imports_itself_through_others() -> None:
    try:
        TopologicalSorter({module_of(path): own_imports(path) for path in FILES}).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from error


def test_every_layer_has_modules() -> None:
    assert {layer_of(module) for module in MODULES} == set(range(len(NAMES)))


def test_the_map_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    # The modules of a comparison, in the order of its steps.
    paths = [path for path in FILES if not path.stem.startswith("__") and path.parent.name != "compare"]
    unnamed = {str(path.relative_to(ROOT)) for path in paths if not re.search(rf"\b{path.stem}\b", page)}
    assert not unnamed


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_only_the_engine_imports_torch(path: Path) -> None:
    if str(path.relative_to(ROOT)).startswith(MAY_IMPORT_TORCH):
        return
    heavy = {name.split(".")[0] for name in imports_of(path)} & {"torch", "transformers", "infinity_emb"}
    assert not heavy


@pytest.mark.parametrize(
    "module", ["gateway.cli.main", "gateway.app", "gateway.backends.infinity", "gateway.engine.scheduler"]
)
def test_importing_does_not_load_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_planning_a_model_does_not_load_transformers_models() -> None:
    """They take longer to import than torch, and a compiled model that is kept on disk needs none of them."""
    slow = ("transformers.modeling_utils", "torch.distributed.tensor", "torch._dynamo")
    code = f"import gateway.engine.loading, sys; sys.exit(any(name in sys.modules for name in {slow}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_only_the_cluster_imports_ray(path: Path) -> None:
    if not str(path.relative_to(ROOT)).startswith("gateway/cluster/"):
        assert "ray" not in {name.split(".")[0] for name in imports_of(path)}


@pytest.mark.parametrize("module", ["gateway.cli.main", "gateway.server", "gateway.cluster.environment"])
def test_importing_does_not_load_ray(module: str) -> None:
    code = f"import {module}, sys; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_console_is_imported_only_where_it_is_switched_on() -> None:
    code = (
        "import gateway.app, sys; sys.exit(any(name.startswith(('gateway.console', 'jinja2')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

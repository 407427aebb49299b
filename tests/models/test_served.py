"""Every row of docs/models.md has a test, and describes the code's behavior."""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from gateway.engine.checkpoint.classes import MODEL_TYPES
from gateway.engine.model.runtimes.base import PACKED_MODEL_TYPES

ROWS: list[dict[str, Any]] = tomllib.loads(Path(__file__).with_name("served.toml").read_text())["models"]
IDS = [f"{row['example']}" for row in ROWS]
STATIC = ("model2vec", "static")
KEYS = {"family", "model_type", "example", "kind", "outputs", "max_tokens", "cuda", "license", "test"}


def parameter_ids(function: Callable[..., None]) -> Iterator[str]:
    """Return the ids that pytest gives the parameters of a test: those of its decorators, the lowest first."""
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    for values in product(*(mark.args[1] for mark in marks)):
        yield "-".join(str(part) for value in values for part in (value if isinstance(value, tuple) else (value,)))


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_a_row_is_held_by_a_test_that_exists(row: dict[str, Any]) -> None:
    file, _, name = row["test"].partition("::")
    name, _, parameters = name.partition("[")
    module = importlib.import_module(f"tests.models.{file.removesuffix('.py')}")

    function = getattr(module, name)

    assert not any(mark.name.startswith("skip") for mark in getattr(function, "pytestmark", []))
    assert parameters.removesuffix("]") in set(parameter_ids(function))


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_a_row_says_all_that_the_table_shows(row: dict[str, Any]) -> None:
    assert set(row) <= KEYS
    assert KEYS - set(row) <= {"max_tokens", "outputs"}
    assert row["kind"] in ("embed", "rerank")
    assert (row["kind"] == "embed") == ("outputs" in row)
    assert row["example"].count("/") == 1


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_a_row_names_the_runtime_that_the_code_takes_on_a_gpu(row: dict[str, Any]) -> None:
    if row["model_type"] in STATIC:  # no forward pass
        assert row["cuda"] == "table"
        return
    assert row["cuda"] == ("packed" if row["model_type"] in PACKED_MODEL_TYPES else "padded")


def test_every_model_type_that_is_served_has_a_row() -> None:
    assert set(MODEL_TYPES) - {row["model_type"] for row in ROWS} == set()


def test_no_example_is_listed_twice() -> None:
    assert len(set(IDS)) == len(IDS)

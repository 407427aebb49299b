"""The changes of aliases and experiments that a reload reports."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from gateway.config.registry import Alias, Experiment, ModelEntry, Registry
from gateway.routing.changes import changed_aliases, changed_experiments, moved_units

ARMS = ({"model": "one", "weight": 1}, {"name": "new", "model": "two", "weight": 0.5})


def registry(aliases: dict[str, tuple[str, str | None]] | None = None, *experiments: Experiment) -> Registry:
    return Registry(
        path=Path("models.yaml"),
        version=1,
        models=tuple(ModelEntry(id=name, source=f"./{name}") for name in ("one", "two")),
        aliases={name: Alias(name=name, model=model, task=task) for name, (model, task) in (aliases or {}).items()},
        experiments=experiments,
    )


def experiment(name: str = "e", **changes: Any) -> Experiment:
    fields = {"id": name, "kind": "cross_space", "unit": ("api_key",), "arms": ARMS, **changes}
    return Experiment.model_validate(fields)


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        (None, ("one", None), "none -> one"),
        (("one", None), None, "one -> none"),
        (("one", None), ("two", None), "one -> two"),
        (("one", None), ("one", "query"), "one -> one:query"),
        (("one", "query"), ("one", "passage"), "one:query -> one:passage"),
        (("one", "query"), ("one", "query"), None),
    ],
)
def test_an_alias_that_leads_elsewhere(
    before: tuple[str, str | None] | None, after: tuple[str, str | None] | None, change: str | None
) -> None:
    old, new = (registry({"kept": ("one", None)} | ({"x": alias} if alias else {})) for alias in (before, after))

    assert changed_aliases(old, new) == ({"x": change} if change else {})


def test_aliases_are_listed_in_the_order_of_the_files() -> None:
    old, new = registry({"b": ("one", None), "a": ("one", None)}), registry({"d": ("one", None), "c": ("one", None)})

    assert list(changed_aliases(old, new)) == ["b", "a", "d", "c"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"end": "2099-01-01"}, "changed; counts continue"),
        ({"exclude": ("me",)}, "changed; counts continue"),
        (
            {"salt": "other"},
            "one 1, new 0.5 -> one 1, new 0.5; counts start over; units that move: *one -> new 2*%*",
        ),
        (
            {"arms": (ARMS[0], {**ARMS[1], "weight": 3})},
            "one 1, new 0.5 -> one 1, new 3; counts start over; units that move: one -> new 4*%",
        ),
        (
            {"arms": (ARMS[0], {**ARMS[1], "task": "query"})},
            "one 1, new 0.5 -> one 1, new 0.5; counts start over; units that move: none",
        ),
        (
            {"arms": (ARMS[0], {"model": "two", "weight": 0.5})},
            "one 1, new 0.5 -> one 1, two 0.5; counts start over; units that move: *new -> two*%*",
        ),
    ],
)
def test_an_experiment_that_changes(changes: dict[str, Any], expected: str | None) -> None:
    old, new = (
        registry(None, experiment("kept"), experiment()),
        registry(None, experiment(**changes), experiment("kept")),
    )

    changes_told = changed_experiments(old, new)

    assert list(changes_told) == (["e"] if expected else [])
    assert expected is None or fnmatchcase(changes_told["e"], expected), changes_told


def test_ramping_by_percentages_moves_units_of_an_arm_whose_percentage_stays() -> None:
    """As docs/ab.md warns: write 80/10/10 -> 80/60/10 instead."""

    def weighing(*weights: float) -> Experiment:
        return experiment(
            arms=tuple({"model": "one", "name": n, "weight": w} for n, w in zip("abc", weights, strict=True))
        )

    before, by_percent, by_weight = weighing(80, 10, 10), weighing(50, 40, 10), weighing(80, 60, 10)

    assert moved_units(before, by_percent) == {
        "a -> b": pytest.approx(0.276, abs=0.015),
        "a -> c": pytest.approx(0.023, abs=0.006),
        "c -> b": pytest.approx(0.023, abs=0.006),
    }
    assert set(moved_units(before, by_weight)) == {"a -> b", "c -> b"}


def test_experiments_that_come_and_go() -> None:
    old, new = (
        registry(None, experiment("old"), experiment("kept")),
        registry(None, experiment("kept"), experiment("new")),
    )

    assert changed_experiments(old, new) == {"old": "removed", "new": "added"}

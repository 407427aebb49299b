"""Experiments, shadows and fallbacks in models.yaml: their values, and their problems with places."""

from __future__ import annotations

import textwrap
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from gateway.config.registry import Registry, load_registry
from gateway.errors import ConfigError

MODELS = """\
version: 1
models:
  - {id: one, source: ./one}
  - {id: two, source: ./two}
  - {id: three, source: ./three}
aliases:
  default: one
  named: {model: two, task: query}
"""
EXPERIMENT = """\
experiments:
  - id: exp
    kind: cross_space
    unit: {from: [header:X-Unit, body:user, api_key]}
    arms:
      - {model: one, weight: 90}
      - {model: two, weight: 10}
"""


def load(tmp_path: Path, text: str) -> Registry:
    path = tmp_path / "models.yaml"
    path.write_text(MODELS + textwrap.dedent(text), encoding="utf-8")
    return load_registry(path, {})


def problems_of(tmp_path: Path, text: str) -> list[str]:
    """Return the problems of a file as ``line:column key: message``; lines count from the end of ``MODELS``."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    first = MODELS.count("\n")
    return [f"{one.line - first}:{one.column} {one.key}: {one.message}" for one in caught.value.problems]


def test_a_full_experiment_is_read(tmp_path: Path) -> None:
    registry = load(
        tmp_path,
        """\
        experiments:
          - id: exp
            kind: cross_space
            unit: {from: [header:X-Unit, body:user, api_key]}
            salt: exp-2026-11
            start: 2026-11-01
            end: 2026-12-01T12:00:00+01:00
            force: header:X-Arm
            exclude: [ann, bob]
            arms:
              - {model: one, weight: 90}
              - {name: passages, model: two, task: passage, weight: 0.5}
        """,
    )

    exp = registry.experiment("exp")
    assert exp is not None
    assert exp.unit == ("header:x-unit", "body:user", "api_key")
    assert exp.start == datetime(2026, 11, 1, tzinfo=UTC)
    assert exp.end == datetime(2026, 12, 1, 12, tzinfo=timezone(timedelta(hours=1)))
    assert (exp.force, exp.exclude) == ("header:x-arm", ("ann", "bob"))
    assert [arm.label for arm in exp.arms] == ["one", "passages"]
    assert exp.control.model == "one"
    assert registry.experiment("other") is None


def test_units_may_be_a_list_as_well(tmp_path: Path) -> None:
    registry = load(tmp_path, EXPERIMENT.replace("{from: [header:X-Unit, body:user, api_key]}", "[api_key]"))

    assert registry.experiments[0].unit == ("api_key",)


def test_shadows_and_fallbacks_are_read(tmp_path: Path) -> None:
    registry = load(
        tmp_path,
        EXPERIMENT
        + "shadows:\n  - {of: exp, to: three, sample: 0.05, max_queue: 20}\n  - {of: default, to: two}\n"
        + "fallbacks:\n  one: [two, three]\n",
    )

    assert [(s.of, s.to, s.sample, s.max_queue) for s in registry.shadows] == [
        ("exp", "three", 0.05, 20),
        ("default", "two", 1.0, 200),
    ]
    assert registry.fallbacks == {"one": ("two", "three")}


E = "experiments[0]"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param(("id: exp", "id: one"), f"2:9 {E}.id: is the id of a model", id="id of a model"),
        pytest.param(("id: exp", "id: One"), f"2:9 {E}.id: is the id of a model", id="but for its case"),
        pytest.param(("id: exp", "id: named"), f"2:9 {E}.id: is an alias", id="alias"),
        pytest.param(("id: exp", "id: 'a:b'"), f"2:9 {E}.id: must be made of letters", id="bad name"),
        pytest.param(("kind: cross_space", "kind: cross"), f"3:11 {E}.kind: must be one of `same_space`", id="kind"),
        pytest.param(
            ("    kind: cross_space\n", ""), f"2:5 {E}.kind: is missing and required: `same_space`", id="no kind"
        ),
        pytest.param(
            ("header:X-Unit", "header:"), f"4:11 {E}.unit[0]: must be `model`, `header:NAME`, `body:user`", id="header"
        ),
        pytest.param(("body:user", "body:name"), f"4:11 {E}.unit[1]: must be `model`, `header:NAME`", id="body"),
        pytest.param(("{from:", "{form:"), f"4:11 {E}.unit: must have the one key `from`, got `form`", id="unit key"),
        pytest.param(
            ("    unit: {from: [header:X-Unit, body:user, api_key]}\n", ""),
            f"2:5 {E}.unit: is needed for `kind: cross_space`",
            id="no unit",
        ),
        pytest.param(
            ("cross_space", "cross_space\n    start: 2026-11-01T10:00:00"),
            f"4:12 {E}.start: must be a time with its zone, such as `2026-11-01T00:00:00Z`, or a date (midnight in UTC), "
            "got `2026-11-01T10:00:00` without a zone",
            id="no zone",
        ),
        pytest.param(("cross_space", "cross_space\n    end: soon"), f"4:10 {E}.end: must be a time with", id="no time"),
        pytest.param(("cross_space", "cross_space\n    end: 3"), f"4:10 {E}.end: must be a time with", id="number"),
        pytest.param(
            ("cross_space", "cross_space\n    start: 2026-11-02\n    end: 2026-11-02"),
            f"5:10 {E}.end: must be later than `start`",
            id="ends before it starts",
        ),
        pytest.param(
            ("cross_space", "cross_space\n    force: x-arm"), f"4:12 {E}.force: must be `header:NAME`", id="force"
        ),
        pytest.param(("      - {model: two, weight: 10}\n", ""), f"6:7 {E}.arms: must have at least two", id="one arm"),
        pytest.param(
            ("two, weight: 10", "one, weight: 10"), f"6:7 {E}.arms: has two arms called `one`; give", id="same arms"
        ),
        pytest.param(("90}", "0}"), None, id="a weight of 0 is fine"),
        pytest.param((EXPERIMENT[-60:], EXPERIMENT[-60:].replace("90", "0.5").replace("10", "0.5")), None, id="halves"),
        pytest.param(("weight: 90", "weight: -1"), f"6:30 {E}.arms[0].weight: must be at least 0", id="negative"),
        pytest.param(
            ("weight: 90", "weight: .inf"), f"6:30 {E}.arms[0].weight: must be a finite number", id="infinite"
        ),
        pytest.param(
            ("weight: 90", "weight: 1e308"), f"6:30 {E}.arms[0].weight: must be at most 1000000", id="a sum without end"
        ),
        pytest.param(("weight: 90", "wait: 90"), f"6:22 {E}.arms[0].wait: is not a known key; did you mean", id="key"),
        pytest.param(
            ("model: two", "model: deux"), f"7:17 {E}.arms[1].model: is not a model of this file", id="unknown"
        ),
        pytest.param(
            ("model: two", "model: default"), f"7:17 {E}.arms[1].model: must be a model id, but", id="alias arm"
        ),
        pytest.param(
            ("model: two", "model: 'two:query'"), f"7:17 {E}.arms[1].model: must be a model id alone", id="id:task"
        ),
        pytest.param(
            ("model: two", "model: 'deux:query'"),
            f"7:17 {E}.arms[1].model: is not a model of this file, got `deux:query`",
            id="task of no model",
        ),
    ],
)
def test_a_problem_of_an_experiment_is_reported_with_its_place(
    tmp_path: Path, change: tuple[str, str], problem: str | None
) -> None:
    text = EXPERIMENT.replace(*change)
    if problem is None:
        load(tmp_path, text)
        return

    problems = problems_of(tmp_path, text)

    assert any(one.startswith(problem) for one in problems), problems


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        pytest.param(
            EXPERIMENT.replace("90", "0").replace("10}", "0}"), f"6:7 {E}.arms: has no arm", id="all weights 0"
        ),
        pytest.param(
            EXPERIMENT + EXPERIMENT.partition("\n")[2], "8:9 experiments[1].id: must be unique", id="id twice"
        ),
        *(
            pytest.param(
                EXPERIMENT.replace("id: exp", f"id: team{path}"),
                f"2:9 {E}.id: must not end in `/assignment` or `/outcomes` or `/units`",
                id=f"an id that ends in {path}",
            )
            for path in ("/assignment", "/outcomes", "/units")
        ),
        pytest.param("shadows:\n  - {of: on, to: two}\n", "2:10 shadows[0].of: must be a model, alias or", id="of"),
        pytest.param(
            "shadows:\n  - {of: zzzz, to: two}\n",
            "2:10 shadows[0].of: must be a model, alias or experiment, got `zzzz`; names: `one`",
            id="of nothing like a name",
        ),
        pytest.param("shadows:\n  - {of: one, to: named}\n", "2:19 shadows[0].to: must be a model id", id="to"),
        pytest.param("shadows:\n  - {of: default, to: one}\n", "2:23 shadows[0].to: is the model that", id="itself"),
        pytest.param(
            "shadows:\n  - {of: one, to: two, sample: 0}\n", "2:32 shadows[0].sample: must be more", id="none"
        ),
        pytest.param(
            "shadows:\n  - {of: one, to: two, sample: 2}\n", "2:32 shadows[0].sample: must be at most", id="all"
        ),
        pytest.param("shadows:\n  - {of: one, to: two, max_queue: 0}\n", "2:35 shadows[0].max_queue: must", id="queue"),
        pytest.param("fallbacks:\n  four: [two]\n", "2:3 fallbacks.four: is not a model of this file", id="whose"),
        pytest.param("fallbacks:\n  one: [named]\n", "2:9 fallbacks.one[0]: must be a model id, but", id="not an id"),
        pytest.param("fallbacks:\n  one: [one]\n", "2:9 fallbacks.one[0]: is the model itself", id="own fallback"),
        pytest.param("fallbacks:\n  one: []\n", "2:8 fallbacks.one: must have at least one entry", id="empty"),
        pytest.param("fallbacks:\n  one: two\n", "2:8 fallbacks.one: must be a list", id="no list"),
    ],
)
def test_a_problem_elsewhere_is_reported_with_its_place(tmp_path: Path, text: str, problem: str) -> None:
    problems = problems_of(tmp_path, text)

    assert any(one.startswith(problem) for one in problems), problems


def test_an_alias_cannot_name_an_experiment(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(MODELS + "  chained: exp\n" + EXPERIMENT, encoding="utf-8")

    with pytest.raises(ConfigError, match=r"aliases\.chained: must be a model id, but `exp` is an experiment"):
        load_registry(path, {})


def test_an_experiment_cannot_be_called_as_the_source_of_a_model(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    hub = MODELS.replace("source: ./one", f"source: owner/one, revision: {'a' * 40}")
    path.write_text(hub + EXPERIMENT.replace("id: exp", "id: Owner/One"), encoding="utf-8")

    with pytest.raises(ConfigError, match=r"experiments\[0\]\.id: is the source of `one`, which answers to it already"):
        load_registry(path, {})


def test_every_conflict_is_reported_once_all_entries_are_valid(tmp_path: Path) -> None:
    text = EXPERIMENT.replace("model: two", "model: deux") + "shadows:\n  - {of: unknown, to: nothing}\n"

    assert len(problems_of(tmp_path, text.replace("kind: cross_space", "kind: x"))) == 1
    assert len(problems_of(tmp_path, text)) == 3

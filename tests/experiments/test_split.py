"""Assignments: a salted hash that splits by the weights, agrees everywhere, and moves no unit without need."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from gateway.config.registry import Experiment
from gateway.errors import BadInput
from gateway.experiments.split import Split, UnitSource, read_unit

NOW = datetime(2026, 11, 23, tzinfo=UTC)
UNITS = [f"user-{i}" for i in range(20_000)]
# A p-value below this once in ten thousand honest tries; the hashes are fixed, so that the outcome is as well.
ALPHA = 1e-4


def make_split(weights: Mapping[str, float], **fields: object) -> Split:
    """Return a split between arms of these names and weights."""
    content = {
        "id": "exp",
        "kind": "cross_space",
        "unit": ("header:x-unit", "body:user", "api_key"),
        "arms": tuple({"model": name, "weight": weight} for name, weight in weights.items()),
        **fields,
    }
    return Split(Experiment.model_validate(content))


def asking(**values: str) -> UnitSource:
    """Return the lookup of a request's values: ``unit`` for the header, ``user``, ``key``, ``force``."""
    names = {"header:x-unit": "unit", "body:user": "user", "api_key": "key", "header:x-arm": "force"}
    return lambda source: values.get(names[source])


def arms_of(split: Split, units: list[str] = UNITS) -> list[str]:
    return [split.arm_of(unit).label for unit in units]


# ------------------------------------------------------------------------------------------------------ the split


@pytest.mark.parametrize("weights", [{"a": 90, "b": 10}, {"a": 1, "b": 1, "c": 1}, {"a": 0.7, "b": 0.25, "c": 0.05}])
@pytest.mark.parametrize("salt", ["one", "two", "2026-11"])
def test_20000_units_are_split_by_the_weights(weights: dict[str, float], salt: str) -> None:
    """By a chi-square test of the counts against the weights."""
    counts = Counter(arms_of(make_split(weights, salt=salt)))

    expected = [len(UNITS) * weight / sum(weights.values()) for weight in weights.values()]
    assert chisquare([counts[arm] for arm in weights], expected).pvalue > ALPHA


def test_two_salts_are_independent() -> None:
    """A unit's arm in one experiment reveals nothing about its arm in another."""
    first, second = (arms_of(make_split({"a": 1, "b": 1, "c": 2}, salt=salt)) for salt in ("one", "two"))

    pairs = Counter(zip(first, second, strict=True))
    assert chi2_contingency([[pairs[a, b] for b in "abc"] for a in "abc"]).pvalue > ALPHA


def test_one_salt_splits_two_experiments_alike() -> None:
    one, other = make_split({"a": 1, "b": 1}, salt="same"), make_split({"a": 1, "b": 1}, salt="same", id="other")

    assert arms_of(one, UNITS[:500]) == arms_of(other, UNITS[:500])


def test_the_salt_is_the_id_by_default() -> None:
    assert arms_of(make_split({"a": 1, "b": 1}), UNITS[:500]) == arms_of(
        make_split({"a": 1, "b": 1}, id="renamed", salt="exp"), UNITS[:500]
    )


def test_an_arm_of_weight_0_gets_no_unit_and_a_lone_weight_gets_all() -> None:
    assert set(arms_of(make_split({"a": 0, "b": 1}))) == {"b"}
    assert set(arms_of(make_split({"a": 1, "b": 0, "c": 0}))) == {"a"}


def test_the_order_of_the_arms_does_not_matter() -> None:
    assert arms_of(make_split({"a": 3, "b": 2, "c": 1})) == arms_of(make_split({"c": 1, "a": 3, "b": 2}))


# ----------------------------------------------------------------------------------------------------- ramping


@pytest.mark.parametrize("steps", [[0, 1, 5, 10, 25, 50, 90, 100]])
def test_ramping_an_arm_up_moves_no_unit_out_of_it(steps: list[int]) -> None:
    before: set[str] = set()
    for percent in steps:
        arms = arms_of(make_split({"control": 100 - percent, "new": percent}, salt="ramp"))
        inside = {unit for unit, arm in zip(UNITS, arms, strict=True) if arm == "new"}
        assert before <= inside
        assert len(inside) == pytest.approx(len(UNITS) * percent / 100, abs=4 * (len(UNITS) * 0.25) ** 0.5)
        before = inside


@given(
    weights=st.lists(st.integers(0, 100), min_size=2, max_size=5).filter(any),
    data=st.data(),
    units=st.lists(st.text(max_size=20), min_size=1, max_size=50),
)
def test_raising_one_weight_moves_units_into_that_arm_alone(
    weights: list[int], data: st.DataObject, units: list[str]
) -> None:
    """For any other arms: none of their units moves between them."""
    names = [f"arm{i}" for i in range(len(weights))]
    raised = data.draw(st.sampled_from(names))
    more = {name: weight + (name == raised) * 17 for name, weight in zip(names, weights, strict=True)}
    before, after = make_split(dict(zip(names, weights, strict=True))), make_split(more)

    for unit in units:
        old, new = before.arm_of(unit).label, after.arm_of(unit).label
        assert new in (old, raised)


def test_a_new_arm_takes_units_from_the_others_and_moves_none_between_them() -> None:
    before, after = arms_of(make_split({"a": 1, "b": 1})), arms_of(make_split({"a": 1, "b": 1, "c": 1}))

    assert all(new in (old, "c") for old, new in zip(before, after, strict=True))


# ------------------------------------------------------------------------------------------------- everywhere alike


def test_another_process_agrees() -> None:
    """Nothing depends on Python's own hashes, which differ from process to process."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from test_split import *;"
        "print(' '.join(arms_of(make_split({'a': 3, 'b': 2, 'c': 1}, salt='s'), UNITS[:2000])))"
    )

    printed = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True, check=True
    ).stdout.split()

    assert printed == arms_of(make_split({"a": 3, "b": 2, "c": 1}, salt="s"), UNITS[:2000])


def test_assignments_do_not_change_with_releases() -> None:
    """These units' arms were written down once: another hash would move every unit of every running experiment."""
    split = make_split({"control": 80, "new": 20}, salt="search-exp-2026-11")

    assert [split.arm_of(f"user-{i}").label for i in range(12)] == PINNED
    assert split.generation == PINNED_GENERATION


PINNED = [
    "control",
    "control",
    "control",
    "new",
    "control",
    "control",
    "control",
    "control",
    "control",
    "new",
    "control",
    "control",
]
PINNED_GENERATION = "f357800998c9"


# --------------------------------------------------------------------------------------------------------- the unit


@pytest.mark.parametrize(
    ("values", "unit"),
    [
        pytest.param({"unit": "u1", "user": "u2", "key": "u3"}, "u1", id="header first"),
        pytest.param({"user": "u2", "key": "u3"}, "u2", id="then user"),
        pytest.param({"key": "u3"}, "u3", id="then the key"),
    ],
)
def test_the_first_source_that_is_there_gives_the_unit(values: dict[str, str], unit: str) -> None:
    split = make_split({"a": 1, "b": 1})

    assignment = split.assign(asking(**values), NOW)

    assert assignment.reason == "unit"
    assert assignment.arm is split.arm_of(unit)


@pytest.mark.parametrize(
    ("value", "unit"),
    [
        ("ann", "ann"),
        (b"ann", "ann"),
        (" ann\t", "ann"),
        ("\u00a0ann\u2003", "ann"),
        ("Jose\u0301", "Jos\u00e9"),  # NFD, as macOS writes it
        ("Jose\u0301".encode(), "Jos\u00e9"),
        ("Jos\u00e9".encode(), "Jos\u00e9"),
        ("Jos\u00e9".encode("latin-1"), "Jos\u00e9"),  # not UTF-8
        ("a b", "a b"),
        ("", None),
        (b" \t", None),
        ("\u3000", None),
        (None, None),
    ],
)
def test_a_unit_has_one_spelling(value: str | bytes | None, unit: str | None) -> None:
    assert read_unit(value) == unit


def test_a_blank_source_is_passed_over() -> None:
    assignment = make_split({"a": 1, "b": 1}).assign(asking(unit=" ", user="u2"), NOW)

    assert assignment.source == "body:user"
    assert assignment.unit == make_split({"a": 1, "b": 1}).assign(asking(user="u2"), NOW).unit


def test_an_assignment_has_the_share_of_its_arm() -> None:
    split = make_split({"a": 3, "b": 1})

    assert {(a.arm.label, a.share) for a in (split.assign(asking(user=unit), NOW) for unit in UNITS[:50])} == {
        ("a", 0.75),
        ("b", 0.25),
    }


@pytest.mark.parametrize("spelling", ["Jos\u00e9", " Jose\u0301 "])
def test_an_excluded_unit_may_be_spelled_in_any_way(spelling: str) -> None:
    split = make_split({"control": 0, "b": 1}, exclude=(spelling,))

    assert split.assign(asking(user="Jose\u0301"), NOW).reason == "excluded"


def test_a_unit_is_kept_as_a_salted_hash() -> None:
    one = make_split({"a": 1, "b": 1}, salt="one").assign(asking(user="ann@example.com"), NOW)
    other = make_split({"a": 1, "b": 1}, salt="two").assign(asking(user="ann@example.com"), NOW)

    assert one.unit is not None
    assert len(one.unit) == 16
    assert int(one.unit, 16) >= 0
    assert one.unit != other.unit


def test_without_a_unit_a_cross_space_experiment_answers_with_the_control_arm() -> None:
    split = make_split({"control": 0, "b": 1})

    assignment = split.assign(asking(), NOW)

    assert (assignment.arm.label, assignment.reason, assignment.unit) == ("control", "no_unit", None)
    assert not assignment.is_counted


def test_without_a_unit_a_same_space_experiment_splits_at_random() -> None:
    split = make_split({"a": 1, "b": 1}, kind="same_space")

    assignments = [split.assign(asking(), NOW) for _ in range(200)]

    assert {one.arm.label for one in assignments} == {"a", "b"}
    assert {one.reason for one in assignments} == {"random"}
    assert all(one.is_counted and one.unit is None for one in assignments)


def test_an_excluded_unit_gets_the_control_arm_and_is_not_counted() -> None:
    split = make_split({"control": 0, "b": 1}, exclude=("staff",))

    assignment = split.assign(asking(user="staff"), NOW)

    assert (assignment.arm.label, assignment.reason) == ("control", "excluded")
    assert not assignment.is_counted
    assert split.assign(asking(user="staf"), NOW).arm.label == "b"


@pytest.mark.parametrize(
    ("hour", "reason"),
    [(9, "not_started"), (10, "unit"), (11, "unit"), (12, "ended"), (13, "ended")],
)
def test_before_the_start_and_from_the_end_on_the_control_arm_answers(hour: int, reason: str) -> None:
    split = make_split({"control": 0, "b": 1}, start="2026-11-23T10:00:00Z", end="2026-11-23T13:00:00+01:00")

    assignment = split.assign(asking(user="u"), NOW.replace(hour=hour))

    assert assignment.reason == reason
    assert assignment.arm.label == ("b" if reason == "unit" else "control")


# -------------------------------------------------------------------------------------------------------- by force


def test_a_tester_can_always_force_an_arm() -> None:
    split = make_split({"control": 1, "b": 0}, force="header:x-arm", end="2020-01-01", exclude=("me",))

    assignment = split.assign(asking(force="b", user="me"), NOW)

    assert (assignment.arm.label, assignment.reason, assignment.unit) == ("b", "forced", None)
    assert not assignment.is_counted


def test_an_unknown_arm_cannot_be_forced() -> None:
    split = make_split({"control": 1, "b": 0}, force="header:x-arm")

    with pytest.raises(BadInput, match="`x-arm` requests arm 'c' of experiment 'exp'; its arms: control, b"):
        split.assign(asking(force="c"), NOW)


def test_no_header_forces_anything_unless_the_registry_says_so() -> None:
    assert make_split({"control": 1, "b": 0}).assign(asking(force="b", user="u"), NOW).arm.label == "control"


# ----------------------------------------------------------------------------------------------------- generations


@pytest.mark.parametrize(
    "changed",
    [
        {"salt": "other"},
        {"arms": ({"model": "a", "weight": 2}, {"model": "b", "weight": 1})},
        {"arms": ({"model": "a", "weight": 1}, {"model": "b", "weight": 1, "task": "query"})},
        {"arms": ({"model": "a", "weight": 1}, {"model": "b", "weight": 1, "name": "c"})},
    ],
)
def test_other_weights_salts_and_arms_are_another_generation(changed: dict[str, object]) -> None:
    """Counts under other weights must not be tested against these."""
    assert make_split({"a": 1, "b": 1}, salt="s").generation != make_split({"a": 1, "b": 1}, **changed).generation


def test_dates_exclusions_and_sources_are_not() -> None:
    one = make_split({"a": 1, "b": 1})
    other = make_split({"a": 1, "b": 1}, end="2027-01-01", exclude=("x",), unit=("api_key",))

    assert one.generation == other.generation

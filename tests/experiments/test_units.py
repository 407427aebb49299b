"""Units are counted exactly and in little memory, latencies to 2 %."""

from __future__ import annotations

import math
import random
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.experiments import units as units_module
from gateway.experiments.units import LatencyHistogram, UnitSet, UnitSums

UNITS = st.integers(0, 2**64 - 1)


@given(st.lists(UNITS | st.integers(0, 20) | st.sampled_from([2**54, 2**54 - 1, 2**64 - 1])))
def test_a_unit_set_is_a_set(units: list[int]) -> None:
    expected: set[int] = set()
    found = UnitSet()

    for unit in units:
        assert found.add(unit) is (unit not in expected)
        expected.add(unit)
        assert len(found) == len(expected)


@given(st.lists(st.tuples(st.booleans(), UNITS | st.integers(0, 5))))
def test_units_can_be_removed_again(steps: list[tuple[bool, int]]) -> None:
    expected: set[int] = set()
    found = UnitSet()

    for is_added, unit in steps:
        assert (unit in found) is (unit in expected)
        if is_added:
            found.add(unit)
            expected.add(unit)
        else:
            assert found.discard(unit) is (unit in expected)
            expected.discard(unit)
        assert len(found) == len(expected)


@given(st.lists(st.tuples(UNITS | st.integers(0, 5), st.integers(-9, 9), st.booleans())))
def test_each_unit_has_its_sums(steps: list[tuple[int, int, bool]]) -> None:
    expected: dict[int, list[float]] = {}
    found = UnitSums(2)

    for unit, number, may_grow in steps:
        if may_grow or unit in expected:
            sums = expected.setdefault(unit, [0.0, 0.0])
            sums[0], sums[1] = sums[0] + number, sums[1] + 2 * number
        assert found.add(unit, [number, 2 * number], may_grow=may_grow) == expected.get(unit, [0.0])[0]

    assert len(found) == len(expected)
    assert found.columns().shape == (2, len(expected))
    assert sorted(map(list, found.columns().T)) == sorted(expected.values())


def test_a_unit_set_of_many_units() -> None:
    rng = random.Random(1)
    units = [rng.getrandbits(64) for _ in range(50_000)]
    found = UnitSet()

    assert sum(found.add(unit) for unit in units) == len(set(units)) == len(found)
    assert not any(found.add(unit) for unit in units)


def test_many_units_take_about_ten_bytes_each() -> None:
    rng = random.Random(2)
    units = UnitSet()
    tracemalloc.start()
    try:
        for _ in range(100_000):
            units.add(rng.getrandbits(64))
        num_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert num_bytes / len(units) < 12
    assert 10 * units_module.MAX_UNITS <= 80_000_000  # so a full set takes the bytes in its comment


def test_a_unit_is_added_to_many_as_quickly_as_to_few() -> None:
    """In one array for all of them, each would move half of the others."""
    rng = random.Random(3)
    found = UnitSet()

    def seconds_for(number: int) -> float:
        units = [rng.getrandbits(64) for _ in range(number)]
        started = time.process_time()
        for unit in units:
            found.add(unit)
        return time.process_time() - started

    among_few = seconds_for(20_000)
    seconds_for(360_000)
    assert seconds_for(20_000) < 5 * among_few


@given(
    st.lists(st.floats(1e-4, 600.0), min_size=1),
    st.sampled_from([0.0, 0.01, 0.5, 0.95, 0.99, 1.0]),
)
def test_a_quantile_is_two_percent_off_at_most(seconds: list[float], share: float) -> None:
    histogram = LatencyHistogram()
    for one in seconds:
        histogram.observe(one)

    true = sorted(seconds)[max(1, math.ceil(share * len(seconds))) - 1]

    assert histogram.quantile(share) == pytest.approx(true, rel=0.02)
    assert len(histogram) == len(seconds)


def test_no_latencies_have_no_quantile() -> None:
    assert LatencyHistogram().quantile(0.5) is None


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e-4])
def test_latencies_below_the_buckets_are_reported_as_the_lowest_bound(seconds: float) -> None:
    histogram = LatencyHistogram()
    histogram.observe(seconds)

    assert histogram.quantile(0.5) == 1e-4


def test_latencies_beyond_the_buckets_count_as_the_longest() -> None:
    histogram = LatencyHistogram()
    histogram.observe(1e6)

    assert histogram.quantile(0.5) == pytest.approx(907, rel=0.02)


def test_a_set_that_is_full_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client can make up as many units as it likes."""
    monkeypatch.setattr(units_module, "MAX_UNITS", 3)
    full = UnitSet()

    assert [full.add(number << 50) for number in (1, 2, 3, 4, 2)] == [True, True, True, False, False]
    assert len(full) == 3


@pytest.mark.parametrize(
    ("cut_s", "share", "is_least"),
    [
        pytest.param(30.0, 0.5, False, id="the median would be the same"),
        pytest.param(30.0, 0.95, False, id="the last that finished"),
        pytest.param(30.0, 0.96, True, id="one that was cut"),
        pytest.param(0.001, 0.05, True, id="cut early"),
        pytest.param(0.001, 0.95, True, id="all would be longer"),
    ],
)
def test_a_quantile_shows_if_cut_latencies_would_make_it_longer(cut_s: float, share: float, is_least: bool) -> None:
    latencies = LatencyHistogram()
    for i in range(95):
        latencies.observe(1.0 + i / 10)
    for _ in range(5):
        latencies.observe(cut_s, is_cut=True)

    assert latencies.is_least(share) is is_least
    assert len(latencies) == 100


def test_without_latencies_nothing_was_cut() -> None:
    assert not LatencyHistogram().is_least(0.5)

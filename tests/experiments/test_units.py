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
from gateway.experiments.units import LatencyHistogram, UnitSet

UNITS = st.integers(0, 2**64 - 1)


@given(st.lists(UNITS | st.integers(0, 20) | st.sampled_from([2**54, 2**54 - 1, 2**64 - 1])))
def test_a_unit_set_is_a_set(units: list[int]) -> None:
    expected: set[int] = set()
    found = UnitSet()

    for unit in units:
        assert found.add(unit) is (unit not in expected)
        expected.add(unit)
        assert len(found) == len(expected)


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
    assert 10 * units_module.MAX_UNITS <= 80_000_000  # so a full set takes what its comment says


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

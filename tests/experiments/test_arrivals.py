"""Units over time: counts by hour and day, within limits, and their drawing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from gateway.config.registry import Arm, Experiment
from gateway.console.arrivals import MAX_BARS, view_arrivals
from gateway.experiments.arrivals import MAX_HOURS, Arrivals
from gateway.experiments.exposures import Exposure
from gateway.experiments.report import UnitsOverTime
from gateway.experiments.stats import ExperimentStats

BEGIN = datetime(2026, 11, 1, tzinfo=UTC)
EXPERIMENT = Experiment(
    id="exp",
    kind="cross_space",
    unit=("body:user",),
    arms=(Arm(model="one", weight=60), Arm(model="two", weight=40)),
)


def make_stats(number: int, *, hours_apart: float = 1.0) -> ExperimentStats:
    """Return the stats of units of which two of five are in the second arm."""
    stats = ExperimentStats(None)
    for index in range(number):
        time = (BEGIN + timedelta(hours=hours_apart * index)).isoformat(timespec="milliseconds")
        arm = "two" if index % 5 in (1, 3) else "one"
        exposure = Exposure(time, "exp", "gen", arm, f"{index:016x}", arm, None)
        stats.add([exposure, exposure])  # a log may have a unit twice
    return stats


def units(number: int, step: str = "hour", **options: float) -> UnitsOverTime:
    return make_stats(number, **options).units_over_time(EXPERIMENT, "gen", step)  # type: ignore[arg-type]


def test_units_are_counted_once_by_hour_and_by_day() -> None:
    by_hour, by_day = units(50, hours_apart=0.5), units(50, "day", hours_apart=0.5)
    assert [row.units for row in by_hour.data[:3]] == [[1, 1], [1, 1], [2, 0]]
    assert by_hour.data[1].time == "2026-11-01T01:00:00+00:00"
    assert [(row.time[:10], sum(row.units)) for row in by_day.data] == [("2026-11-01", 48), ("2026-11-02", 2)]
    assert (by_hour.arms, by_hour.expected) == (["one", "two"], [0.6, 0.4])
    assert units(0).data == []


def test_only_the_last_hours_are_kept_and_strange_times_do_no_harm() -> None:
    arrivals = Arrivals()
    for hour in range(MAX_HOURS + 10):
        arrivals.add((BEGIN + timedelta(hours=hour)).isoformat(), "one")
    arrivals.add(BEGIN.isoformat(), "one")  # older than all that are kept
    assert len(arrivals.by("hour")) == MAX_HOURS
    assert min(arrivals.by("hour")) == BEGIN + timedelta(hours=10)
    strange = Arrivals()
    for time in ("", "yesterday", "2026-13-45T99", BEGIN.isoformat()):
        strange.add(time, "one")
    assert list(strange.by("hour")) == list(strange.by("day")) == [BEGIN]


def test_the_drawing_has_the_share_so_far_the_expected_share_and_the_new_units() -> None:
    view = view_arrivals(units(50))
    assert view is not None
    [line] = view.lines
    heights = [float(point.split(",")[1]) for point in line.points.split()]
    assert len(heights) == len(view.bars) == 50
    assert (line.index, heights[-1]) == (1, pytest.approx(float(line.expected), abs=0.01))
    assert heights[1] < heights[-1] < heights[0]  # after one unit 0 %, after two 50 %, in the end 40 %
    assert all(0 <= height <= 40 for height in heights)
    assert view.text == "two has 40.0 % of the units, 40.0 % by the weights"


def test_long_times_are_cut_and_short_ones_not_drawn() -> None:
    view = view_arrivals(units(MAX_BARS + 40))
    assert view is not None
    assert len(view.bars) == MAX_BARS
    assert view_arrivals(units(1)) is None
    assert view_arrivals(units(0)) is None

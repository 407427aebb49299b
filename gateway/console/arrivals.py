"""The drawing of an experiment's units over time: the number of new units, and the share of each arm so far. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from gateway.console.charts import Scale
from gateway.console.words import number, percent, read_time
from gateway.experiments.report import UnitsOverTime

MAX_BARS: Final = 60
_LEAST_REACH: Final = 0.05
_WIDTH, _HEIGHT = 100.0, 40.0


@dataclass(frozen=True, slots=True)
class Bar:
    """The units of an hour or a day."""

    start: str
    width: str
    top: str
    height: str
    title: str


@dataclass(frozen=True, slots=True)
class Line:
    """The share of an arm so far, in a box of 100 by 40.

    Attributes:
        index: the index of the arm in the experiment.
        expected: the height of the share that the weights give to it.
    """

    index: int
    points: str
    expected: str


@dataclass(frozen=True, slots=True)
class ArrivalsView:
    """The drawing, and the same in words.

    Attributes:
        low, high: the shares at the bottom and the top of the lines.
    """

    bars: Sequence[Bar]
    lines: Sequence[Line]
    step: str
    first: str
    last: str
    low: float
    high: float
    text: str


def view_arrivals(units: UnitsOverTime) -> ArrivalsView | None:
    """Return the drawing of the last hours or days; ``None`` with fewer than two of them."""
    totals = [sum(row.units) for row in units.data]
    if len(totals) < 2:
        return None
    so_far = list(accumulate(totals))
    arms = range(1, len(units.arms))  # the first arm has the rest
    shares = {
        arm: [
            part / whole for part, whole in zip(accumulate(row.units[arm] for row in units.data), so_far, strict=True)
        ]
        for arm in arms
    }
    rows, totals = units.data[-MAX_BARS:], totals[-MAX_BARS:]
    ends = [share for arm in arms for share in (*shares[arm][-MAX_BARS:], units.expected[arm])]
    low, high = max(0.0, min(ends) - _LEAST_REACH), min(1.0, max(ends) + _LEAST_REACH)
    across, up = Scale(0.0, float(len(rows))), Scale(0.0, float(max(totals)))
    bars = [
        Bar(
            across.at(place + 0.1),
            across.length(place + 0.1, place + 0.9),
            f"{100 - float(up.at(total)[:-1]):.2f}%",
            up.at(total),
            f"{read_time(row.time):%Y-%m-%d %H:%M} UTC: {number(total)} new units",
        )
        for place, (row, total) in enumerate(zip(rows, totals, strict=True))
    ]
    lines = [
        Line(arm, _points(shares[arm][-MAX_BARS:], low, high), _height(units.expected[arm], low, high)) for arm in arms
    ]
    description = ", ".join(
        f"{units.arms[arm]} has {percent(shares[arm][-1], 1)} of the units, {percent(units.expected[arm], 1)} by the weights"
        for arm in arms
    )
    return ArrivalsView(bars, lines, units.step, rows[0].time, rows[-1].time, low, high, description)


def _points(shares: Sequence[float], low: float, high: float) -> str:
    step = _WIDTH / len(shares)
    return " ".join(f"{step * (place + 0.5):.2f},{_height(share, low, high)}" for place, share in enumerate(shares))


def _height(share: float, low: float, high: float) -> str:
    return f"{_HEIGHT * (high - share) / (high - low):.2f}"

"""The geometry of drawings. Pure functions turn numbers into lengths and classes: a strict CSP allows no styles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SPARK_WIDTH, SPARK_HEIGHT = 60, 20
NUM_SHADES = 10


def sparkline(values: Sequence[float]) -> str:
    """Return the points of a polyline in a box of 60 by 20; empty if all values are 0."""
    top = max(values, default=0)
    if top <= 0 or len(values) < 2:
        return ""
    step = SPARK_WIDTH / (len(values) - 1)
    room = SPARK_HEIGHT - 2
    return " ".join(f"{i * step:.1f},{1 + room * (1 - value / top):.1f}" for i, value in enumerate(values))


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps numbers to percentages of a width."""

    low: float
    high: float

    def at(self, value: float) -> str:
        """Return the position of a number, limited to the ends."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return f"{100 * min(1.0, max(0.0, share)):.2f}%"

    def length(self, low: float, high: float) -> str:
        """Return the length between two numbers, both limited to the ends."""
        return f"{float(self.at(high)[:-1]) - float(self.at(low)[:-1]):.2f}%"

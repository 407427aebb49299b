"""The common parts of the plots: the color and shape of each arm, and the data of a plot on a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from gateway.compare.canvas import SYMBOLS, Mark
from gateway.compare.results import Comparison, Estimate

# Okabe and Ito's palette, faint colors last, with gray instead of black, which is invisible on a dark page.
COLORS = ("#808080", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot.

    Attributes:
        caption: an explanation of how to read the plot.
        arm: the arm that is drawn; empty if several are.
        legend: the arms that are drawn, if there are several.
        is_wide: whether the plot takes the whole width.
    """

    id: str
    title: str
    caption: str
    svg: Markup
    arm: str = ""
    legend: Sequence[str] = ()
    is_wide: bool = False


def marks(comparison: Comparison) -> Mapping[str, Mark]:
    """Return the mark of each arm. The baseline is gray."""
    return {
        arm.name: Mark(COLORS[number % len(COLORS)], SYMBOLS[number % len(SYMBOLS)])
        for number, arm in enumerate(comparison.arms)
    }


def bounds(estimate: Estimate) -> tuple[float, float]:
    """Return the ends of an interval; both are the mean if there is no interval."""
    if estimate.low is None or estimate.high is None:
        return estimate.mean, estimate.mean
    return estimate.low, estimate.high


def short(value: float) -> str:
    """Return the number at a tick without superfluous zeros."""
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}") if abs(value) < 1_000 else f"{value:,.0f}"

"""The common parts of the plots: the color and shape of each arm, and the settings for plotly.js.

No plot has a theme: the page's styles color text and lines, for a light, a dark and a printed page.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.compare.results import Comparison, Estimate

Json = dict[str, object]

# Okabe and Ito's palette, the faint ones last; gray in place of its black, which a dark page would swallow.
COLORS = ("#808080", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down")


@dataclass(frozen=True, slots=True)
class Mark:
    """The color and shape of an arm in all plots."""

    color: str
    symbol: str


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot, or the reason why it was left out.

    Attributes:
        caption: how to read it.
        label: a description of the plot, for screen readers.
        arm: the arm that is drawn; empty if several are.
        legend: the arms that are drawn, if several are.
        spec: ``data`` and ``layout`` of plotly.js; ``None`` if it was left out, and ``caption`` says why.
        is_wide: whether the plot takes the whole width.
    """

    id: str
    title: str
    caption: str
    label: str = ""
    arm: str = ""
    legend: Sequence[str] = ()
    spec: Json | None = None
    is_wide: bool = False


def marks(comparison: Comparison) -> Mapping[str, Mark]:
    """Return the mark of each arm. The baseline is gray."""
    return {
        arm.name: Mark(COLORS[number % len(COLORS)], SYMBOLS[number % len(SYMBOLS)])
        for number, arm in enumerate(comparison.arms)
    }


def make_layout(*, height: int, left: int, x: Json, y: Json, bottom: int = 32) -> Json:
    """Return the layout of a plot; ``x`` and ``y`` are the settings of its axes, with ``title`` as a plain string."""
    return {
        "height": height,
        "margin": {"l": left, "r": 16, "t": 12, "b": bottom},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "hoverlabel": {"align": "left", "font": {"family": "system-ui, sans-serif", "size": 13}},
        "hovermode": "closest",
        "showlegend": False,
        "xaxis": _axis(x, standoff=8),
        "yaxis": _axis(y, standoff=4),
    }


def _axis(own: Json, standoff: int) -> Json:
    axis: Json = {"fixedrange": True, "ticks": "", "automargin": False} | own
    return axis | {"title": {"text": own.get("title", ""), "font": {"size": 13}, "standoff": standoff}}


def error_bar(estimates: Sequence[Estimate]) -> Json:
    return {
        "type": "data",
        "symmetric": False,
        "array": [
            (estimate.mean if estimate.high is None else estimate.high) - estimate.mean for estimate in estimates
        ],
        "arrayminus": [
            estimate.mean - (estimate.mean if estimate.low is None else estimate.low) for estimate in estimates
        ],
        "thickness": 1.5,
        "width": 0,
    }


def marker(mark: Mark) -> Json:
    # A triangle has less area than the other shapes of the same width.
    return {"color": mark.color, "symbol": mark.symbol, "size": 11 if "triangle" in mark.symbol else 9}


def plain(text: str) -> str:
    """Escape tags and entities, which plotly.js would interpret."""
    return html.escape(text, quote=False)

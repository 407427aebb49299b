"""What the plots of the page have in common: how an arm is drawn, and what plotly.js is told.

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
    """How an arm is drawn, everywhere: told apart by its shape as well as by its color."""

    color: str
    symbol: str


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot, or the reason why there is none.

    Attributes:
        caption: how to read it.
        label: what it shows, for those who do not see it.
        arm: the one that it is about; empty where several are drawn.
        legend: those who are drawn, where it is about several.
        spec: ``data`` and ``layout`` of plotly.js; ``None`` if it was left out, and ``caption`` says why.
        is_wide: it takes the whole width.
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
    """Return how each arm is drawn. The baseline is gray: it is what the others are seen against."""
    return {
        arm.name: Mark(COLORS[number % len(COLORS)], SYMBOLS[number % len(SYMBOLS)])
        for number, arm in enumerate(comparison.arms)
    }


def make_layout(*, height: int, left: int, x: Json, y: Json, bottom: int = 32) -> Json:
    """Lay a plot out; ``x`` and ``y`` are what its axes have of their own, ``title`` as a plain string."""
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
        "array": [estimate.high - estimate.mean for estimate in estimates],
        "arrayminus": [estimate.mean - estimate.low for estimate in estimates],
        "thickness": 1.5,
        "width": 0,
    }


def marker(mark: Mark) -> Json:
    # A triangle has less of an area than what else is as wide.
    return {"color": mark.color, "symbol": mark.symbol, "size": 11 if "triangle" in mark.symbol else 9}


def plain(text: str) -> str:
    """Escape what plotly.js would take for a tag or an entity."""
    return html.escape(text, quote=False)

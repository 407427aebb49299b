"""The figure of `bench.simulate`: p99 against load, one panel for each number of replicas, as SVG for both themes."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence

from bench.queueing import Policy

_WIDTH, _HEIGHT = 176, 190
_LEFT, _TOP, _GAP, _BOTTOM = 60, 54, 12, 46
_COLORS: Mapping[str, str] = {"random": "#cd5c2e", "two": "#4484ce", "least": "#2f8f5b"}
_STYLE = """\
<style>
  text { font: 12px system-ui, sans-serif; fill: #1c2330 } .tick { font-size: 11px; fill: #4a5568 }
  .grid { stroke: #d5dae2; stroke-width: 1 } polyline { fill: none; stroke-width: 2.2 }
  @media (prefers-color-scheme: dark) { text { fill: #e8ecf3 } .tick { fill: #b3bdcc } .grid { stroke: #3a4252 } }
</style>"""


def draw(
    found: Mapping[tuple[int, Policy], Sequence[float]], loads: Sequence[float], names: Mapping[Policy, str]
) -> str:
    """Return the figure.

    Args:
        found: p99 in ms by the number of replicas and the policy, for each load.
        names: of the policies, in the legend.
    """
    sizes = list(dict.fromkeys(replicas for replicas, _ in found))
    values = [value for series in found.values() for value in series]
    low, high = 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values)))
    high = min(tick for tick in _ticks(low, high) if tick >= max(values))
    first, last = min(loads) - 0.05, max(loads) + 0.05
    width = _LEFT + len(sizes) * (_WIDTH + _GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_TOP + _HEIGHT + _BOTTOM}" role="img">',
        "<title>p99 against load, for 1 to 1,000 replicas and three ways to choose one</title>",
        _STYLE,
        *_legend(names),
        f'<text x="{_LEFT}" y="{_TOP + _HEIGHT + 38}">load, as a share of what full batches allow</text>',
    ]

    def height(value: float) -> float:
        return _TOP + _HEIGHT * (1 - math.log(value / low) / math.log(high / low))

    lines += [
        f'<text class="tick" x="{_LEFT - 6}" y="{height(tick) + 4:.1f}" text-anchor="end">{tick:,.0f} ms</text>'
        for tick in _ticks(low, high)
    ]
    for number, replicas in enumerate(sizes):
        left = _LEFT + number * (_WIDTH + _GAP)
        lines += [f'<path class="grid" d="M{left} {height(tick):.1f}h{_WIDTH}"/>' for tick in _ticks(low, high)]
        title = f"{replicas:,} replica{'s' if replicas > 1 else ''}"
        lines.append(f'<text x="{left}" y="{_TOP - 8}">{title}</text>')
        places = [left + _WIDTH * (load - first) / (last - first) for load in loads]
        for load, place in zip(loads, places, strict=True):
            label = f"{load:.0%}"
            lines.append(
                f'<text class="tick" x="{place:.1f}" y="{_TOP + _HEIGHT + 16}" text-anchor="middle">{label}</text>'
            )
        for (size, policy), series in found.items():
            if size == replicas:
                points = " ".join(f"{x:.1f},{height(y):.1f}" for x, y in zip(places, series, strict=True))
                lines.append(f'<polyline stroke="{_COLORS[policy]}" points="{points}"/>')
    return "\n".join([*lines, "</svg>\n"])


def _legend(names: Mapping[Policy, str]) -> Iterable[str]:
    for number, (policy, name) in enumerate(names.items()):
        left = _LEFT + 160 * number
        yield f'<path stroke="{_COLORS[policy]}" stroke-width="2.2" d="M{left} 16h22"/>'
        yield f'<text x="{left + 28}" y="20">{html.escape(name)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**decade for decade in decades for step in (1, 2, 5) if low <= step * 10.0**decade <= high]

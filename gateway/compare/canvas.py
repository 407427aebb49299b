"""Drawings as SVG that fits any width: x is in percent of the width, y in pixels, and text keeps its size.

Drawings have no theme. The page's styles color text and lines by their class, for a light, dark or printed page.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

_NICE = (1, 2, 5, 10)


@dataclass(frozen=True, slots=True)
class Mark:
    """The color and shape of an arm in all plots."""

    color: str
    symbol: str


_SHAPES = {
    "circle": '<circle r="4.5"/>',
    "square": '<rect x="-4" y="-4" width="8" height="8"/>',
    "diamond": '<path d="M0-5.5 5.5 0 0 5.5-5.5 0z"/>',
    "triangle-up": '<path d="M0-5 5.5 4.5h-11z"/>',
    "triangle-down": '<path d="M0 5-5.5-4.5h11z"/>',
}
SYMBOLS = tuple(_SHAPES)


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps numbers to shares of a length."""

    low: float
    high: float
    is_log: bool = False

    def share(self, value: float) -> float:
        """Return the relative position of a number: 0 for the low end, 1 for the high end."""
        low, high, at = (math.log(number) if self.is_log else number for number in (self.low, self.high, value))
        return (at - low) / (high - low) if high > low else 0.5

    def percent(self, value: float) -> str:
        """Return the position of a number on the x axis."""
        return f"{100 * self.share(value):.2f}%"

    def ticks(self, number: int) -> list[float]:
        """Return about ``number`` round numbers between the ends."""
        return self._log_ticks(number) if self.is_log else self._even_ticks(number)

    def _even_ticks(self, number: int) -> list[float]:
        rough = (self.high - self.low) / max(1, number)
        if rough <= 0:
            return [self.low]
        size = 10 ** math.floor(math.log10(rough))
        step = next(nice * size for nice in _NICE if nice * size >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [place * step for place in range(first, last + 1)]

    def _log_ticks(self, number: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found = [nice * 10.0**decade for decade in decades for nice in _NICE[:3]]
        inside = [tick for tick in found if self.low <= tick * (1 + 1e-9) and tick <= self.high * (1 + 1e-9)]
        whole = [tick for tick in inside if math.isclose(math.log10(tick) % 1, 0, abs_tol=1e-9)]
        return inside if len(inside) <= number or len(whole) < 2 else whole


class Canvas:
    """Collects the elements of one drawing."""

    def __init__(self, height: int) -> None:
        self.height = height
        self._parts: list[str] = []

    def line(self, x: tuple[str, str], y: tuple[float, float], kind: str = "grid") -> None:
        """Draw a line from one point to another."""
        self._parts.append(f'<line class="{kind}" x1="{x[0]}" y1="{_px(y[0])}" x2="{x[1]}" y2="{_px(y[1])}"/>')

    def colored_line(self, x: tuple[str, str], y: tuple[float, float], color: str, title: str = "") -> None:
        """Draw a line in the color of an arm."""
        ends = f'x1="{x[0]}" y1="{_px(y[0])}" x2="{x[1]}" y2="{_px(y[1])}"'
        self._parts.append(f'<line class="bar" stroke="{color}" {ends}>{_title(title)}</line>')

    def text(self, x: str, y: float, content: str, anchor: str = "middle", kind: str = "tick") -> None:
        """Write a line of text."""
        self._parts.append(
            f'<text class="{kind}" x="{x}" y="{_px(y)}" text-anchor="{anchor}">{html.escape(content, quote=False)}</text>'
        )

    def point(self, x: str, y: float, mark: Mark, title: str) -> None:
        """Draw the mark of an arm, with a title that appears on hover."""
        shape = _SHAPES[mark.symbol]
        self._parts.append(
            f'<svg class="point" x="{x}" y="{_px(y)}" overflow="visible" fill="{mark.color}">{_title(title)}{shape}</svg>'
        )

    def box(self, x: str, width: str, y: tuple[float, float], color: str, title: str = "") -> None:
        """Draw a bar between two heights."""
        top, height = _px(min(y)), _px(abs(y[1] - y[0]))
        self._parts.append(
            f'<rect x="{x}" width="{width}" y="{top}" height="{height}" fill="{color}">{_title(title)}</rect>'
        )

    def curve(
        self, points: Sequence[Sequence[tuple[float, float]]], color: str, dash: str = "", title: str = ""
    ) -> None:
        """Draw a line through points, with x as a share of the width; the parts are not connected."""
        path = "".join("M" + "L".join(f"{1000 * x:.1f} {_px(y)}" for x, y in part) for part in points if len(part) > 1)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(
            f'<svg viewBox="0 0 1000 {self.height}" width="100%" height="{self.height}" preserveAspectRatio="none">'
            f'<path class="curve" d="{path}" stroke="{color}"{dashes}>{_title(title)}</path></svg>'
        )

    def x_axis(self, scale: Scale, ticks: Sequence[tuple[float, str]], title: str) -> None:
        """Draw vertical lines with their numbers below the drawing, and the title of the axis."""
        for value, label in ticks:
            at = scale.percent(value)
            self.line((at, at), (0, self.height))
            self.text(at, self.height + 17, label)
        if title:
            self.text("50%", self.height + 38, title, kind="axis")

    def y_axis(self, scale: Scale, ticks: Sequence[tuple[float, str]], title: str) -> None:
        """Draw horizontal lines with their numbers to the left of the drawing, and the title of the axis above it."""
        for value, label in ticks:
            at = self.y(scale, value)
            self.line(("0%", "100%"), (at, at))
            self.text("-8", at + 4, label, "end")
        if title:
            self.text("0%", -8, title, "start", kind="axis")

    def y(self, scale: Scale, value: float) -> float:
        """Return the height of a number; large ones are at the top."""
        return self.height * (1 - scale.share(value))

    def svg(self, label: str) -> Markup:
        """Return the drawing.

        Args:
            label: a description of the drawing for screen readers.
        """
        return Markup(  # noqa: S704  every text in it is escaped
            f'<svg class="drawing" role="img" aria-label="{html.escape(label)}" width="100%" height="{self.height}">'
            f"{''.join(self._parts)}</svg>"
        )


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _title(text: str) -> str:
    return f"<title>{html.escape(text, quote=False)}</title>" if text else ""

"""Scales end in round numbers, and drawings escape their texts."""

from __future__ import annotations

import pytest

from gateway.compare.canvas import SYMBOLS, Canvas, Mark, Scale


@pytest.mark.parametrize(
    ("scale", "number", "ticks"),
    [
        (Scale(0, 1), 5, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (Scale(-0.23, 0.11), 4, [-0.2, -0.1, 0, 0.1]),
        (Scale(0, 37), 6, [0, 10, 20, 30]),
        (Scale(3, 3), 4, [3]),
        (Scale(2, 60, is_log=True), 6, [2, 5, 10, 20, 50]),
        (Scale(0.5, 2e6, is_log=True), 6, [1, 10, 100, 1e3, 1e4, 1e5, 1e6]),
        (Scale(0.15, 0.19, is_log=True), 6, []),
    ],
)
def test_ticks_are_round(scale: Scale, number: int, ticks: list[float]) -> None:
    assert scale.ticks(number) == pytest.approx(ticks)


def test_places_of_numbers() -> None:
    assert Scale(0, 4).percent(1) == "25.00%"
    assert Scale(1, 100, is_log=True).percent(10) == "50.00%"
    assert Scale(2, 2).percent(2) == "50.00%"
    assert Canvas(200).y(Scale(0, 4), 1) == 150


def test_text_is_escaped() -> None:
    canvas = Canvas(10)
    canvas.text("5%", 1, "<b>&")
    canvas.point("5%", 1, Mark("#000", "circle"), "a < b")
    canvas.curve([[(0.0, 1.0), (1.0, 2.0)], [(0.5, 1.0)]], "#000", title="<i>")
    drawing = canvas.svg('"><script>')
    assert "&lt;b&gt;&amp;</text>" in drawing
    assert "<title>a &lt; b</title>" in drawing
    assert "<title>&lt;i&gt;</title>" in drawing
    assert 'aria-label="&quot;&gt;&lt;script&gt;"' in drawing
    assert 'd="M0.0 1L1000.0 2"' in drawing, "a point by itself is not a line"


def test_every_symbol_is_drawn_differently() -> None:
    drawn = set()
    for symbol in SYMBOLS:
        canvas = Canvas(10)
        canvas.point("5%", 1, Mark("#000", symbol), "")
        drawn.add(canvas.svg(""))
    assert len(drawn) == len(SYMBOLS) == 5

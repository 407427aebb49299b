"""Tables and goals in Markdown, and their place in the documentation."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from bench.processes import ROOT

PAGE = ROOT / "docs" / "performance.md"

Unit: TypeAlias = Literal["x", "%", "ms", ""]
_SCALES = {"%": 100.0, "x": 1.0, "ms": 1.0}


@dataclass(frozen=True, slots=True)
class Goal:
    """A goal, and the measured value.

    Attributes:
        sense: whether the measured value must be ``>=`` or ``<=`` the target.
        unit: ``x`` for a ratio, ``%`` for a share of one, ``ms``, or nothing for a count.
        note: what else must be said.
        is_sound: ``False`` when something else failed that the number does not show.
    """

    name: str
    sense: Literal[">=", "<="]
    target: float
    unit: Unit
    measured: float
    note: str = ""
    is_sound: bool = True

    @property
    def is_met(self) -> bool:
        """Whether the goal is reached; ``False`` if it could not be measured."""
        is_reached = self.measured >= self.target if self.sense == ">=" else self.measured <= self.target
        return self.is_sound and is_reached


def goals_table(goals: Sequence[Goal]) -> str:
    """Return the goals, each with its target, the measured value, and whether that is enough."""
    return table(
        ("goal", "target", "measured", "met"),
        [
            (
                goal.name,
                f"{goal.sense} {_with_unit(goal.target, goal.unit)}",
                _with_unit(goal.measured, goal.unit) + (f" ({goal.note})" if goal.note else ""),
                "yes" if goal.is_met else "**no**",
            )
            for goal in goals
        ],
    )


def _with_unit(value: float, unit: Unit) -> str:
    if not unit:
        return f"{value:,g}"
    return f"{number(value * _SCALES[unit])}{'' if unit == 'x' else ' '}{unit}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Return a number with three significant digits and commas between thousands; `n/a` if it was not measured."""
    if math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "∞"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def note(message: str) -> None:
    """Print the time and the step that a measurement has reached, to standard error."""
    print(f"{time.strftime('%H:%M:%S')}  {message}", file=sys.stderr)


def read_section(section: str, page: Path = PAGE) -> str:
    """Return the text that :func:`update_page` replaces."""
    begin, end = f"<!-- {section} -->", f"<!-- end of {section} -->"
    return page.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0].strip()


def update_page(section: str, markdown: str, page: Path = PAGE) -> None:
    """Replace the text between ``<!-- section -->`` and ``<!-- end of section -->``.

    Raises:
        ValueError: the page has no such section.
    """
    begin, end = f"<!-- {section} -->", f"<!-- end of {section} -->"
    text, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}",
        lambda _match: f"{begin}\n{markdown.strip()}\n{end}",
        page.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(f"{page}: has {count} sections {begin}")
    page.write_text(text, encoding="utf-8")

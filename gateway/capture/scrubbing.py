"""Functions for ``scrub``, which remove sensitive parts from a text, or return ``None`` to drop it."""

from __future__ import annotations

import re

# Each pattern takes linear time, even in text without blanks such as Chinese, because it blocks the interpreter.
_MASKS = (
    (re.compile(r"\b[a-z][a-z0-9+.-]{0,30}://\S+", re.IGNORECASE), "[link]"),
    (re.compile(r"(?<![^\s@<>(),;:])[^\s@<>(),;:]++@[^\s@<>(),;:]+\.\w+"), "[email]"),
    # Numbers of phones, cards and accounts: groups of digits, five or more in total. Years and prices stay.
    (re.compile(r"\+?\d(?:[\s().\-/]{0,2}\d){4,}"), "[number]"),
)


def mask(text: str) -> str:
    """Replace links, email addresses, and numbers of five digits or more."""
    for pattern, label in _MASKS:
        text = pattern.sub(label, text)
    return text

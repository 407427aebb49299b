"""Functions for ``scrub``: they take a text and return it without what must not be kept, or ``None`` to drop it."""

from __future__ import annotations

import re

# Each takes time in proportion to the text, which is Chinese perhaps, without a blank: the interpreter waits for them.
_MASKS = (
    (re.compile(r"\b[a-z][a-z0-9+.-]{0,30}://\S+", re.IGNORECASE), "[link]"),
    (re.compile(r"(?<![^\s@<>(),;:])[^\s@<>(),;:]++@[^\s@<>(),;:]+\.\w+"), "[email]"),
    # Of phones, cards, accounts: digits in groups, five or more in all. A year or a price stays.
    (re.compile(r"\+?\d(?:[\s().\-/]{0,2}\d){4,}"), "[number]"),
)


def mask(text: str) -> str:
    """Replace links, email addresses, and numbers of five digits or more."""
    for pattern, label in _MASKS:
        text = pattern.sub(label, text)
    return text

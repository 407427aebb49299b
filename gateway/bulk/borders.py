# ruff: noqa: RUF001, RUF002  the full stops of many scripts look like others
"""Find the places to cut a text: between paragraphs and sentences, else between words, else between characters.

The rules are short on purpose. A cut at an abbreviation does a chunk little harm, and no library knows the
abbreviations of all languages: the maintained ones cover a few languages, or need a model.

A sentence ends at a line break; after ``.``, ``!``, ``?`` or ``…`` and closing quotes, if white space follows; and after the
full stops of scripts that are written without it (``。``, ``！``, ``？``) or have another one (Devanagari ``।``, Arabic
``؟`` and ``۔``, Armenian ``։``, Ethiopic ``።``, Khmer ``។``, Burmese ``။``). No sentence ends before a small letter, after a
single letter (``J. Doe``), or after a number at the beginning of a line (``3. Fish``). Thai and Lao have spaces between
phrases, which are borders of words here.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right

_CLOSERS = "[\"'”’»›)\\]）」』】》〉]*+"
# Each pattern scans a run of marks once, for any length.
_ENDS = re.compile(rf"\n\s*+|(?<![.!?…])[.!?…]++{_CLOSERS}(?=\s)|[。！？｡]++{_CLOSERS}|[।॥؟۔։።፧፨។៕။]++{_CLOSERS}")
# Matches the text before a full stop that ends no sentence: a single letter, or a number that begins a line.
_NO_END = re.compile(r"(?:^|[\s(])[^\W\d_]$|(?:^|\n)[ \t]*\d+$")
_JOINERS = "\u200d\ufe0e\ufe0f"
# A chunk may end early at a border of sentences, or of words, if it fills at least this fraction of its room.
_FILL_BY_SENTENCES, _FILL_BY_WORDS = 0.25, 0.5


class Borders:
    """The places in a text where it may be cut."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._sentences = [end.end() for end in _ENDS.finditer(text) if self._is_end(end)]

    def _is_end(self, end: re.Match[str]) -> bool:
        mark = end.group()
        if mark[0] == "\n" or mark[0] not in ".!?…":
            return True
        after = self._text[end.end() : end.end() + 20].lstrip()
        if after[:1].islower():
            return False
        return mark != "." or _NO_END.search(self._text, max(0, end.start() - 12), end.start()) is None

    def last(self, start: int, stop: int, beyond: int = -1) -> int:
        """Return the best place to end a chunk that begins at ``start`` and may reach to ``stop``.

        Args:
            beyond: the end of the previous chunk; this chunk must end after it.
        """
        least = max(beyond, start + int((stop - start) * _FILL_BY_SENTENCES)) + 1
        place = bisect_right(self._sentences, stop) - 1
        if place >= 0 and self._sentences[place] >= least:
            return self._sentences[place]
        least = max(beyond, start + int((stop - start) * _FILL_BY_WORDS)) + 1
        for cut in range(stop, least - 1, -1):
            if self._is_between_words(cut):
                return cut
        for cut in range(stop, max(start, beyond, stop - 16), -1):
            if self._is_between_characters(cut):
                return cut
        return stop

    def first(self, start: int, stop: int) -> int:
        """Return the best place to begin an overlap, at or after ``start`` and before ``stop``."""
        place = bisect_left(self._sentences, start)
        if place < len(self._sentences) and self._sentences[place] < stop:
            return self._sentences[place]
        for cut in range(start, stop):
            if self._is_between_words(cut):
                return cut
        return start if self._is_between_characters(start) else stop

    def _is_between_words(self, cut: int) -> bool:
        text = self._text
        return cut in (0, len(text)) or text[cut].isspace() or text[cut - 1].isspace()

    def _is_between_characters(self, cut: int) -> bool:
        """Return whether a cut at this place leaves accents and emojis whole."""
        text = self._text
        if cut in (0, len(text)):
            return True
        return not unicodedata.combining(text[cut]) and text[cut] not in _JOINERS and text[cut - 1] != "\u200d"

"""Shorten runs that give few tokens: megabytes of blanks, of one letter, or of characters that the tokenizer drops.

WordPiece turns a word of more than 100 characters into one unknown token, Unigram turns neighboring unknown characters
into one, and both treat a run of blanks as one blank. Reading eight megabytes of such characters takes the tokenizer
seconds and gives three tokens. Here such runs are cut to the length from which they no longer change the tokens, at about
20 ns per character.

The tokenizer's own normalizer and pre-tokenizer classify each character. Other tokenizers, such as byte-level BPE, make a
token of every few characters, so there is nothing to shorten.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection, Iterator
from enum import IntEnum

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

# The number of characters that are read at once: a few milliseconds.
CHUNK_CHARS = 1 << 18
# A run below this length is kept, because cutting it gains nothing.
_SHORT_RUN = 8
_LONG_MARKS = 64
# The number of new characters that may be classified at once; the rest temporarily counts as OTHER.
_MAX_NEW_CHARS = 2000

Codes = npt.NDArray[np.uint32]


class _Kind(IntEnum):
    """How a tokenizer treats a character."""

    UNKNOWN = 0
    """Not classified yet."""
    OTHER = 1
    """Never cut, because it is a token by itself or part of a known word."""
    BLANK = 2
    """Separates words; a run of them acts as one."""
    DROPPED = 3
    """Dropped by the tokenizer."""
    FUSED = 4
    """A long run of these is one unknown token."""
    MARK = 5
    """Changes the letter before it, or else acts like FUSED."""


class LongRuns:
    """Knows which runs of characters can be cut without changing a tokenizer's tokens. Safe to use from several threads."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._normalizer = tokenizer.normalizer
        self._pre_tokenizer = tokenizer.pre_tokenizer
        self._strips_accents = False
        self._alphabet: Collection[str] | None = None
        # Characters with which an added token may begin, because it would be recognized inside a run.
        added = tokenizer.get_added_tokens_decoder().values()
        self._firsts = {first for token in added for first in self._normalize(token.content[:1]) + token.content[:1]}
        self._longest_fused = self._read_kind(tokenizer)
        self._kinds: npt.NDArray[np.uint8] | None = None  # of every code point; made when it is first needed

    def _read_kind(self, tokenizer: FastTokenizer) -> int | None:
        """Return the longest run of FUSED characters that may still give other tokens; ``None`` for an unknown tokenizer."""
        splitters = _types(self._pre_tokenizer, "pretokenizers")
        model = tokenizer.model
        if isinstance(model, models.WordPiece) and splitters == ["BertPreTokenizer"]:
            self._strips_accents = self._normalize("e\u0301") == "e"
            return int(model.max_input_chars_per_word)
        fuses = isinstance(model, models.Unigram) and set(splitters) <= {"Metaspace", "WhitespaceSplit"} and splitters
        if fuses and len({len(tokenizer.encode("\ue000" * n, add_special_tokens=False)) for n in (3, 30)}) == 1:
            self._alphabet = {char for piece in tokenizer.get_vocab(with_added_tokens=False) for char in piece}
            return _SHORT_RUN
        return None

    @property
    def are_known(self) -> bool:
        return self._longest_fused is not None

    def shortened(self, text: str) -> str:
        """Return a text, of at most :data:`CHUNK_CHARS`, with its long runs cut."""
        if self._longest_fused is None:
            return text
        codes: Codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        kinds = self._classify(codes)
        # After the first cut, the tokenizer drops at most every second character, which the other cuts allow for.
        codes, kinds = _cut(codes, kinds, {_Kind.DROPPED}, 1)
        codes, kinds = _cut(codes, kinds, {_Kind.BLANK, _Kind.DROPPED}, _SHORT_RUN)
        codes, kinds = _cut(codes, kinds, {_Kind.FUSED, _Kind.DROPPED}, 2 * self._longest_fused + 3)
        if (kinds == _Kind.MARK).any():
            codes = _thin_out(codes, kinds == _Kind.MARK)
        return codes.tobytes().decode("utf-32-le", "surrogatepass")

    def _classify(self, codes: Codes) -> npt.NDArray[np.uint8]:
        if self._kinds is None:
            self._kinds = np.zeros(0x110000, np.uint8)
        kinds = self._kinds[codes]
        if (kinds == _Kind.UNKNOWN).any():
            for code in np.unique(codes[kinds == _Kind.UNKNOWN])[:_MAX_NEW_CHARS]:
                self._kinds[code] = self._kind_of(chr(code))
            kinds = self._kinds[codes]
        return kinds

    def _kind_of(self, char: str) -> _Kind:
        normal = self._normalize(char)
        if self._firsts.intersection(char + normal) or "\ud800" <= char <= "\udfff":
            return _Kind.OTHER
        if "\u1160" <= char <= "\u11ff" and self._alphabet is not None:
            return _Kind.OTHER  # part of a Korean syllable that may be known as a whole
        is_mark = unicodedata.category(char)[0] == "M"
        once, often = self._words(f"a{char}b"), self._words(f"a{char * 40}b")
        if once == often == self._words("ab") and (not is_mark or self._strips_accents):
            return _Kind.DROPPED
        if once == often == self._words("a b") == self._words("a" + f"{char} " * 20 + "b"):
            return _Kind.BLANK
        is_one_word = len(once) == len(often) == 1 and len(often[0]) >= 42
        is_fused = is_one_word and (self._alphabet is None or not set(normal).intersection(self._alphabet))
        if is_fused and is_mark and self._alphabet is not None:
            return _Kind.MARK
        return _Kind.FUSED if is_fused else _Kind.OTHER

    def _normalize(self, text: str) -> str:
        return text if self._normalizer is None else str(self._normalizer.normalize_str(text))

    def _words(self, text: str) -> list[str]:
        return [word for word, _place in self._pre_tokenizer.pre_tokenize_str(self._normalize(text))]


def chunks(length: int, *, is_from_end: bool) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) of each chunk of a text, from its start or from its end."""
    starts = range(0, length, CHUNK_CHARS)
    for start in reversed(starts) if is_from_end else starts:
        yield start, min(length, start + CHUNK_CHARS)


def _types(component: object, parts: str) -> list[str]:
    """Return the types of a tokenizer's component, or of its parts if it is a sequence."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())  # type: ignore[arg-type]
    return [part["type"] for part in state.get(parts, [state])]


def _cut(
    codes: Codes, kinds: npt.NDArray[np.uint8], wanted: Collection[_Kind], longest: int
) -> tuple[Codes, npt.NDArray[np.uint8]]:
    """Keep the first ``longest`` characters of each run of characters of the given kinds."""
    is_wanted = np.array([kind in wanted for kind in _Kind])[kinds]
    starts, ends = _runs(is_wanted)
    is_long = ends - starts > longest
    if not is_long.any():
        return codes, kinds
    drops = np.zeros(len(codes) + 1, np.int8)
    drops[starts[is_long] + longest] = 1
    drops[ends[is_long]] = -1
    is_kept = np.cumsum(drops[:-1], dtype=np.int8) == 0
    return codes[is_kept], kinds[is_kept]


def _thin_out(codes: Codes, is_mark: npt.NDArray[np.bool_]) -> Codes:
    """Keep the first marks of each long run, and the first two of each mark, because a letter may join with them."""
    starts, ends = _runs(is_mark)
    is_kept = np.ones(len(codes), bool)
    for start, end in zip(starts, ends, strict=True):
        if end - start <= _LONG_MARKS:
            continue
        rest = slice(start + _SHORT_RUN, end)
        order = np.argsort(codes[rest], kind="stable")
        is_first = np.diff(codes[rest][order], prepend=0) != 0
        is_kept[rest] = False
        is_kept[rest.start + order[is_first | np.roll(is_first, 1)]] = True
    return codes[is_kept]


def _runs(is_wanted: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return where the runs of wanted characters begin and end."""
    edges = np.flatnonzero(np.diff(is_wanted, prepend=False, append=False))
    return edges[::2], edges[1::2]

"""Cut long texts into chunks that fit the model, by its own tokens, and between sentences where possible."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from gateway.bulk.borders import Borders
from gateway.bulk.rows import BadRow, BulkError, Json, Row, RowId
from gateway.types import ModelInfo, Token, Vocabulary

# Longer texts are tokenized in parts, so that a million token objects never exist at the same time.
_WINDOW_CHARACTERS = 20_000
_CALL_CHARACTERS = 50_000
_CALL_TEXTS = 64
_LEAST_TOKENS = 8
# After this number of attempts, each further attempt has less room, so that the loop ends.
_FEW_CUTS = 3
_INK = re.compile(r"\S")
_Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ModelTokens:
    """A model's tokenizer. Its functions are called in the thread that reads the source, and may block.

    Attributes:
        split: returns the tokens of each text, without special tokens.
        count: returns each text's number of tokens as embedded: with special tokens and the task's instruction.
        max_tokens: the maximum number of tokens that the model reads.
        can_chunk_late: whether the model can embed the chunks of a document together.
    """

    split: Callable[[Sequence[str]], Sequence[Sequence[Token]]]
    count: Callable[[Sequence[str]], Sequence[int]]
    max_tokens: int
    can_chunk_late: bool = False

    @classmethod
    def of(cls, vocabulary: Vocabulary, info: ModelInfo, task: str | None) -> ModelTokens:
        """Return the tokenizer of a model.

        Args:
            task: the task that the texts are embedded for.
        """
        instruction = info.instruction if task is None else info.tasks[task]

        def count(texts: Sequence[str]) -> list[int]:
            rows = vocabulary.split([instruction + text for text in texts], add_special_tokens=True)
            return [len(row) for row in rows]

        split = partial(vocabulary.split, add_special_tokens=False)
        return cls(split, count, info.max_tokens, can_chunk_late=info.can_chunk_late)


@dataclass(frozen=True, slots=True)
class Chunking:
    """The rules for cutting texts.

    Attributes:
        tokens: the maximum number of tokens in a chunk, including special tokens, instruction and title.
        overlap: the maximum number of tokens that a chunk shares with the previous chunk.
        is_late: whether chunks are embedded together with as much of their document as the model reads.
        repeats_title: whether each chunk begins with the title, rather than only the first.
    """

    tokens: int
    overlap: int = 0
    is_late: bool = False
    repeats_title: bool = False

    def check(self, model: ModelTokens, name: str) -> None:
        """Check that the model can embed such chunks.

        Raises:
            BulkError: the model cannot embed such chunks, or the options contradict each other.
        """
        num_others = model.count([""])[0]
        least = num_others + _LEAST_TOKENS
        if self.tokens < least:
            raise BulkError(
                f"--chunk {self.tokens}: {name} adds {num_others} tokens to each text, so a chunk needs at least {least}"
            )
        if self.tokens > model.max_tokens:
            raise BulkError(f"--chunk {self.tokens}: {name} reads {model.max_tokens} tokens at most")
        if self.overlap > (self.tokens - num_others) // 2:
            raise BulkError(
                f"--overlap {self.overlap}: it must be at most half of a chunk's own tokens, "
                f"{(self.tokens - num_others) // 2}"
            )
        if not self.is_late:
            return
        if self.overlap or self.repeats_title:
            raise BulkError("--late embeds a document once, so it cannot be combined with --overlap or --repeat-title")
        if not model.can_chunk_late:
            raise BulkError(f"--late: {name} cannot embed chunks together: it needs the mean over token states")


@dataclass(frozen=True, slots=True)
class Chunk(Row):
    """A part of a row's text, with the id ``ID#0``, ``ID#1`` and so on.

    Attributes:
        document: the id of the row.
        window: chunks of a document with the same number are embedded together; ``None`` for a chunk that is embedded
            alone.
    """

    document: RowId = ""
    window: int | None = None


class Chunker:
    """Cuts rows into chunks.

    Args:
        model: the tokenizer that measures chunks.
    """

    def __init__(self, chunking: Chunking, model: ModelTokens) -> None:
        self._chunking = chunking
        self._model = model

    def expand(self, row: Row) -> Iterator[Row | BadRow]:
        """Yield the chunks of a row. Each is a slice of its text; its payload has the start and end, in characters."""
        title, text = row.text[: row.num_title], row.text[row.num_title :]
        [num_title_tokens] = self._model.count([title])
        if 2 * num_title_tokens > self._chunking.tokens:  # a title this long is cut like the text
            title, text = "", row.text
        num_before = row.num_title - len(title)
        spans = self._fitting(title, text)
        if spans is None:
            problem = (
                f"its text cannot be cut into chunks of {self._chunking.tokens} tokens: single characters have more "
                "tokens than that"
            )
            yield BadRow(row.place, problem, row.position, row.id)
            return
        texts = [self._with_title(title, number, text[start:stop]) for number, (start, stop) in enumerate(spans)]
        windows = self._windows(texts) if self._chunking.is_late else [None] * len(texts)
        for number, ((start, stop), whole, window) in enumerate(zip(spans, texts, windows, strict=True)):
            ends = {"chunk_start": max(0, start - num_before), "chunk_stop": max(0, stop - num_before)}
            where: dict[str, Json] = {"chunk": number, "chunk_of": row.id, **ends}
            yield Chunk(
                f"{row.id}#{number}",
                whole,
                {**row.payload, **where},
                row.place,
                row.position,
                len(whole) - (stop - start),
                row.text_names,
                row.id,
                window,
            )

    def _with_title(self, title: str, number: int, text: str) -> str:
        return title + text if self._chunking.repeats_title or number == 0 else text

    # ---------------------------------------------------------------------------------------------------- where to cut

    def _fitting(self, title: str, text: str) -> list[tuple[int, int]] | None:
        """Return the ends of the chunks; ``None`` if the text cannot be cut.

        A slice may have more tokens alone than within the text. So each slice is counted as it will be embedded; if a
        slice has too many tokens, the text is cut again with less room.
        """
        limit = self._chunking.tokens
        plain, titled = self._model.count(["", title])
        starts, stops = self._places(text)
        borders = Borders(text)
        size, first = limit - (titled if self._chunking.repeats_title else plain), limit - titled
        num_cuts = 0
        while min(size, first) > 0:
            spans = list(_cut(text, starts, stops, borders, first, size, min(self._chunking.overlap, size // 2)))
            counts = self._count([self._with_title(title, i, text[a:b]) for i, (a, b) in enumerate(spans)])
            excess = max(counts) - limit
            if excess <= 0:
                return spans
            num_cuts += 1
            less = excess if num_cuts < _FEW_CUTS else excess + size // 8 + 1
            size, first = size - less, first - less
        return None

    def _count(self, texts: Sequence[str]) -> list[int]:
        counts: list[int] = []
        for some in _calls(texts):
            counts += self._model.count(some)
        return counts

    def _places(self, text: str) -> tuple[_Places, _Places]:
        """Return the start and end of each token in characters, leaving out tokens that cover no characters."""
        firsts, windows = [], []
        for first, window in _windows(text):
            firsts.append(first)
            windows.append(window)
        parts: list[_Places] = []
        place = 0
        for some in _calls(windows):
            for tokens in self._model.split(some):
                ends = [
                    (token.start, token.stop) for token in tokens if token.start is not None and token.stop is not None
                ]
                parts.append(np.array(ends, np.int64).reshape(-1, 2) + firsts[place])
                place += 1
        places = np.concatenate(parts) if parts else np.zeros((0, 2), np.int64)
        places = places[places[:, 1] > places[:, 0]]
        return np.maximum.accumulate(places[:, 0]), np.maximum.accumulate(places[:, 1])

    def _windows(self, texts: Sequence[str]) -> list[int | None]:
        """Group the chunks that are embedded together: as many of a document as the model reads at once."""
        room = self._model.max_tokens - self._model.count([""])[0]
        windows: list[int | None] = []
        number = num_tokens = 0
        for some in _calls(texts):
            for tokens in self._model.split(some):
                if windows and num_tokens + len(tokens) > room:
                    number, num_tokens = number + 1, 0
                num_tokens += len(tokens)
                windows.append(number)
        return windows


def _cut(
    text: str, starts: _Places, stops: _Places, borders: Borders, first: int, size: int, overlap: int
) -> Iterator[tuple[int, int]]:
    """Yield the ends of chunks without the white space around them.

    Args:
        starts, stops: the first character of each token, and the character after its last.
        first, size: the number of tokens in the first chunk, and in the others.
        overlap: the maximum number of tokens that a chunk shares with the previous chunk.
    """
    end = len(text.rstrip())
    starts = starts[: int(np.searchsorted(starts, end))]
    begin = token = before = 0
    room, has_chunk = first, False
    while token < len(starts):
        last = token + room
        if last >= len(starts):
            stop = end
        else:
            # Several tokens can make one character.
            stop = min(int(stops[last - 1]), int(starts[last]))
            stop = borders.last(begin, stop if stop > max(begin, before) else int(stops[last - 1]), before)
        if (span := _trimmed(text, begin, stop)) is not None:
            yield span
            has_chunk = True
        after = int(np.searchsorted(starts, stop))
        ink = _INK.search(text, stop)
        token, begin, before, room = max(after, token + 1), stop, ink.start() if ink else stop, size
        if stop >= end:
            break
        if overlap and token < len(starts):
            earliest = int(np.searchsorted(starts, span[0] if span else stop, side="right"))
            again = max(after - overlap, earliest)
            if again < after and (start := borders.first(int(starts[again]), stop)) < stop:
                token, begin = int(np.searchsorted(starts, start)), start
    if not has_chunk and (span := _trimmed(text, 0, len(text))) is not None:
        yield span


def _trimmed(text: str, start: int, stop: int) -> tuple[int, int] | None:
    part = text[start:stop]
    kept = part.strip()
    if not kept:
        return None
    start += len(part) - len(part.lstrip())
    return start, start + len(kept)


def _windows(text: str) -> Iterator[tuple[int, str]]:
    """Yield parts of a text, each with its offset, cut at white space where possible."""
    start = 0
    while start < len(text):
        stop = start + _WINDOW_CHARACTERS
        if stop < len(text):
            space = max(text.rfind(" ", start + 1, stop), text.rfind("\n", start + 1, stop))
            stop = space if space > start else stop
        yield start, text[start:stop]
        start = stop


def _calls(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield groups of texts, each for one call."""
    first = num_characters = 0
    for i, text in enumerate(texts):
        num_characters += len(text)
        if i > first and (num_characters > _CALL_CHARACTERS or i - first == _CALL_TEXTS):
            yield texts[first:i]
            first, num_characters = i, len(text)
    if first < len(texts):
        yield texts[first:]

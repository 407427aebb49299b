"""Turn texts into token ids: instruction, true counts, truncation.

Reading is done in steps, so that texts of several callers can take turns: each method named ``read_…`` is a generator
that yields the number of characters of its next step, and returns its result. :func:`at_once` runs all steps.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias, TypeVar

from tokenizers import Tokenizer as FastTokenizer

from gateway.engine.model.items import Tokens
from gateway.engine.model.long_runs import LongRuns, chunks
from gateway.errors import BadInput, ContextLengthExceeded
from gateway.types import Token, Truncate

T = TypeVar("T")
S = TypeVar("S", bound=Sized)
Steps: TypeAlias = Generator[int, None, T]
"""Reads texts step by step: yields the characters of the next step, returns the result."""

# A window of this many characters for each token of the limit holds enough tokens of almost any text.
_WINDOW_CHARS_PER_TOKEN = 16
# Half of it exceeds the longest word that WordPiece splits (100 letters; a longer word is one unknown token).
_MIN_WINDOW_CHARS = 1024
# Limits of one step: the number of texts, and of their characters together. A step takes about 20 ms at most.
_STEP_TEXTS = 64
_STEP_CHARS = 16_000
# Texts of at most this many characters together are read in the calling thread. MiniLM reads a sentence in 25 us,
# and it takes several times as long to wake up another thread and to get the interpreter lock back.
SHORT_CHARS = 512
# The tokens of a vocabulary that are tried as a text, if it has no "a".
_NUM_TRIED = 1_000


def at_once(steps: Steps[T]) -> T:
    """Run all steps, one after the other."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def slices(texts: Sequence[S]) -> Iterator[tuple[int, Sequence[S]]]:
    """Cut texts into runs for one step each, with the index of the first text; a long text is a run by itself."""
    first = num_chars = 0
    for i, text in enumerate(texts):
        num_chars += len(text)
        if i > first and (num_chars > _STEP_CHARS or i - first == _STEP_TEXTS):
            yield first, texts[first:i]
            first, num_chars = i, len(text)
    if texts:
        yield first, texts[first:]


@dataclass(frozen=True, slots=True)
class Prefixed:
    """An instruction and a text as one text; they are not concatenated, because the text may have megabytes."""

    instruction: str
    text: str

    def __len__(self) -> int:
        return len(self.instruction) + len(self.text)

    def part(self, start: int, stop: int) -> str:
        """Return the characters from ``start`` to before ``stop``."""
        before = len(self.instruction)
        return self.instruction[start:stop] + self.text[max(0, start - before) : max(0, stop - before)]


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of the beginning or the end of a text, or of all of it."""

    ids: list[int]
    is_whole: bool = True


class Tokenizer:
    """A model's tokenizer with its length limit. Safe to use from several threads.

    Args:
        tokenizer: the checkpoint's tokenizer; its own truncation and padding are turned off.
        max_tokens: the longest result, special tokens included.
        has_template: the model's template puts special tokens around each text; if not, a text may have no tokens.

    Attributes:
        has_segments: the model needs the position where the second text of a pair begins.
        largest_id: the largest id of a token.
    """

    has_segments = False

    def __init__(self, tokenizer: FastTokenizer, max_tokens: int, *, has_template: bool = True) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._long_runs = LongRuns(tokenizer)
        self.max_tokens = max_tokens
        self._window_chars = max(max_tokens * _WINDOW_CHARS_PER_TOKEN, _MIN_WINDOW_CHARS)
        # The model's template puts special tokens before and after every text: [CLS] text [SEP].
        self._has_template = has_template
        template = tokenizer.encode(sample_text(tokenizer), add_special_tokens=has_template)
        content = template.special_tokens_mask.index(0) if 0 in template.special_tokens_mask else 0
        num_content = template.special_tokens_mask.count(0)
        self._head = template.ids[:content]
        self._tail = template.ids[content + num_content :]
        # A template has its own ids, which may differ from the vocabulary's.
        self.largest_id = max([*tokenizer.get_vocab(with_added_tokens=True).values(), *template.ids], default=-1)

    def room(self, instruction: str) -> int:
        """Return how many tokens of a text are read after ``instruction``; 0 or less if there is no room."""
        return self.max_tokens - len(self._head_ids(Prefixed(instruction, ""))) - len(self._tail)

    def sample_ids(self) -> list[int]:
        """Return the token ids of a sentence, special tokens included, as realistic test input."""
        ids: list[int] = self._tokenizer.encode("The quick brown fox jumps over the lazy dog, again and again.").ids
        return ids

    def split(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[Token]]:
        """Return all tokens of each text, with their positions; see :class:`gateway.types.Vocabulary`."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [
            [
                Token(id_, name, is_special=True, start=None, stop=None)
                if is_special
                else Token(id_, text[start:stop] or name, is_special=False, start=start, stop=stop)
                for id_, name, is_special, (start, stop) in zip(
                    encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True
                )
            ]
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def join(self, rows: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]:
        """Return the text of each row of token ids; see :class:`gateway.types.Vocabulary`."""
        texts: list[str] = self._tokenizer.decode_batch(
            [list(row) for row in rows], skip_special_tokens=skip_special_tokens
        )
        return texts

    def tokenize(
        self, texts: Sequence[str], instruction: str, truncate: Truncate, first_index: int = 0
    ) -> list[Tokens]:
        """Tokenize texts in one call; :meth:`read` lists the errors."""
        return at_once(self.read(texts, instruction, truncate, first_index))

    def read(
        self,
        texts: Sequence[str],
        instruction: str,
        truncate: Truncate,
        first_index: int = 0,
        name: str = "input",
        max_text_tokens: int | None = None,
    ) -> Steps[list[Tokens]]:
        """Tokenize texts with ``instruction`` put before each.

        Args:
            first_index: index of the first text in its request, for the error message.
            name: name of the texts, for the error message.
            max_text_tokens: limit of each text, without special tokens and the instruction; longer texts are always cut.

        Raises:
            ContextLengthExceeded: a text is too long, and ``truncate`` asks to refuse such texts.
            BadInput: a text has no tokens, special tokens included, so it has no vector.
        """
        prefixed = [Prefixed(instruction, text) for text in texts]
        rows = yield from self._rows(prefixed, truncate)
        for i, row in enumerate(rows, first_index):
            if not row.ids and self._has_template:
                raise BadInput(
                    f"{name}[{i}] has no tokens, so it has no vector: this model adds no special tokens to a text. Leave it "
                    "out, or choose a task that has an instruction.",
                    param="input",
                )
        limit = self.max_tokens
        if max_text_tokens is not None:
            num_others = len(self._head_ids(Prefixed(instruction, ""))) + len(self._tail)
            limit = min(limit, num_others + max_text_tokens)
        if truncate is Truncate.REFUSE and limit < self.max_tokens:  # a text that is always cut is never too long
            truncate = Truncate.END
        return [
            Tokens(row.ids)
            if len(row.ids) <= limit
            else self._cut(row, prefixed[i], truncate, f"{name}[{first_index + i}]", limit)
            for i, row in enumerate(rows)
        ]

    def read_chunks(self, chunks: Sequence[str], instruction: str) -> Steps[Tokens]:
        """Tokenize the chunks of one document for late chunking (Günther et al., arXiv:2409.04701).

        The tokens of the chunks follow the instruction, between the model's special tokens. The first chunk's span includes
        the tokens before it, and the last chunk's span those after it, so pooling over all chunks gives the document's own
        vector. Reading stops at the chunk that exceeds the limit.

        Raises:
            ContextLengthExceeded: together the chunks exceed the model's limit, and no chunk may be cut.
            BadInput: a chunk has no tokens, so it has no mean.
        """
        ids = list(self._head)
        spans = []
        start = 0
        is_whole = True
        for first, some in slices([Prefixed("", chunk) for chunk in chunks]):
            rows = yield from self._rows(some, Truncate.END, has_special=False)
            for i, row in enumerate(rows, first):
                if not row.ids:
                    raise BadInput(f"input[{i}] has no tokens; late_chunking needs some in each chunk", param="input")
                own = row
                if i == 0 and instruction:  # as for a plain text: the instruction and the chunk may share a token
                    prefixed = [Prefixed(instruction, chunks[0])]
                    [own] = yield from self._rows(prefixed, Truncate.END, has_special=False)
                ids += own.ids
                is_whole = is_whole and own.is_whole
                spans.append((start, len(ids)))
                start = len(ids)
            num_tokens = len(ids) + len(self._tail)
            if num_tokens > self.max_tokens:
                is_whole = is_whole and first + len(some) == len(chunks)
                raise ContextLengthExceeded(
                    f"This model's maximum context length is {self.max_tokens} tokens, however the chunks have "
                    f"{'' if is_whole else 'at least '}{num_tokens} tokens together, and late_chunking cannot cut any of "
                    "them away.",
                    param="input",
                )
        spans[-1] = (spans[-1][0], len(ids) + len(self._tail))
        return Tokens([*ids, *self._tail], spans=tuple(spans))

    def _rows(
        self, texts: Sequence[Prefixed], truncate: Truncate, *, has_special: bool | None = None
    ) -> Steps[list[Row]]:
        """Return the token ids of each text; of a long text, only enough to cut the result from them.

        Args:
            has_special: put the model's special tokens around each text; ``None`` to do so if it has a template.
        """
        has_special = self._has_template if has_special is None else has_special
        window = self._window_chars
        num_chars = sum(min(len(text), window) for text in texts)
        yield num_chars
        short = [text.part(0, window) for text in texts if len(text) <= window]
        if num_chars <= SHORT_CHARS:
            encodings = iter([self._tokenizer.encode(text, add_special_tokens=has_special) for text in short])
        else:
            encodings = iter(self._tokenizer.encode_batch_fast(short, add_special_tokens=has_special))
        rows = []
        for text in texts:
            if len(text) <= window:
                rows.append(Row(next(encodings).ids))
            else:
                rows.append((yield from self._read_enough(text, truncate, has_special)))
        return rows

    def _read_enough(self, text: Prefixed, truncate: Truncate, has_special: bool) -> Steps[Row]:
        """Tokenize enough of a text that the kept tokens equal those of the whole text.

        So a text that is far too long costs no more than its kept part. A window ends at white space if there is any,
        because no usual tokenizer joins tokens across it. It holds at least twice the limit of tokens, so the cut affects
        only tokens that are dropped. If the first window holds too few tokens, runs that make few tokens are shortened,
        chunk by chunk, until a longer window holds enough.
        """
        is_from_end = truncate is Truncate.START
        window = self._window_chars
        ids = self._encode(_window(text, window, is_from_end), has_special)
        if len(ids) > 2 * self.max_tokens:
            return Row(ids, is_whole=False)
        kept: list[str] = []
        num_kept = 0
        for start, stop in chunks(len(text), is_from_end=is_from_end):
            yield min(len(text), stop - start)
            kept.append(self._long_runs.shortened(text.part(start, stop)))
            num_kept += len(kept[-1])
            while num_kept > 4 * window:
                window *= 4
                yield window
                whole = Prefixed("", "".join(reversed(kept) if is_from_end else kept))
                ids = self._encode(_window(whole, window, is_from_end), has_special)
                if len(ids) > 2 * self.max_tokens:
                    return Row(ids, is_whole=False)
        yield num_kept
        return Row(self._encode("".join(reversed(kept) if is_from_end else kept), has_special))

    def _encode(self, text: str, has_special: bool) -> list[int]:
        # `encode` holds the interpreter lock, and so blocks the event loop; `encode_batch_fast` does not. The text is long.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=has_special)[0].ids
        return ids

    def _cut(self, row: Row, text: Prefixed, truncate: Truncate, name: str, limit: int) -> Tokens:
        ids, room = row.ids, limit - len(self._tail)
        if truncate is Truncate.END:
            return Tokens([*ids[:room], *self._tail], is_truncated=True)
        if truncate is Truncate.START:
            head = self._head_ids(text)[:room]
            return Tokens([*head, *ids[len(ids) - (limit - len(head)) :]], is_truncated=True)
        raise ContextLengthExceeded(
            f"This model's maximum context length is {self.max_tokens} tokens, however {name} has "
            f"{'' if row.is_whole else 'at least '}{len(ids)} tokens. Shorten it, or leave out truncate: false.",
            param="input" if name.startswith("input") else None,
        )

    def _head_ids(self, text: Prefixed) -> list[int]:
        """Return the leading tokens that stay when a text loses its start: the instruction belongs to the task."""
        before = len(text.instruction)
        if not before:
            return self._head
        part = text.part(0, before + self._window_chars)
        [encoding] = self._tokenizer.encode_batch([part], add_special_tokens=self._has_template)
        kept = sum(1 for start, end in encoding.offsets if start < end <= before)
        ids: list[int] = encoding.ids[: len(self._head) + kept]
        return ids


def _window(text: Prefixed, size: int, is_from_end: bool) -> str:
    """Return the first or last ``size`` characters of a text, cut at white space if the half next to the cut has any."""
    if is_from_end:
        part = text.part(len(text) - size, len(text))
        start = part.find(" ", 0, size - size // 2)
        return part[max(0, start) :]
    part = text.part(0, size)
    end = part.rfind(" ", size // 2, size)
    return part[: end if end >= 0 else size]


def sample_text(tokenizer: FastTokenizer) -> str:
    """Return a text that has tokens: without them, the template's tokens before and after a text look alike."""
    texts = (text for text in _samples(tokenizer) if tokenizer.encode(text, add_special_tokens=False).ids)
    return next(texts, "a")


def _samples(tokenizer: FastTokenizer) -> Iterator[str]:
    yield "a"
    for id_ in islice(sorted(tokenizer.get_vocab().values(), reverse=True), _NUM_TRIED):
        yield tokenizer.decode([id_])

"""Turn pairs of a query and a text into token ids for a cross-encoder."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer as FastTokenizer

from gateway.engine.model.items import Tokens
from gateway.engine.model.tokenizer import Prefixed, Row, Steps, Tokenizer, sample_text
from gateway.errors import ContextLengthExceeded
from gateway.types import Truncate


class PairTokenizer(Tokenizer):
    """A cross-encoder's tokenizer: ``[CLS] query [SEP] text [SEP]``, or another form, by the checkpoint's template.

    Args:
        has_segments: the model takes segment ids, like BERT; they apply if the template marks the tokens of the text.

    Raises:
        ValueError: the template for pairs has a form that is not supported.
    """

    def __init__(self, tokenizer: FastTokenizer, max_tokens: int, *, has_segments: bool) -> None:
        super().__init__(tokenizer, max_tokens)
        sample = sample_text(tokenizer)
        template = tokenizer.encode(sample, sample)
        self.largest_id = max([self.largest_id, *template.ids])
        owners, types = template.sequence_ids, template.type_ids
        contents = [owner for owner in owners if owner is not None]
        if set(contents) != {0, 1} or contents != sorted(contents):
            raise ValueError("its template puts no query before a text")
        first, second = owners.index(0), owners.index(1)
        first_end, second_end = first + contents.count(0), second + contents.count(1)
        self._before = template.ids[:first]
        self._between = template.ids[first_end:second]
        self._after = template.ids[second_end:]
        self._room = max_tokens - len(self._before) - len(self._between) - len(self._after)
        if self._room < 1:
            raise ValueError(
                f"the special tokens of a pair take all {max_tokens} tokens of the limit and leave none for a text"
            )
        # The offset of the second segment from the end of the query: after the tokens between, or before one of them.
        self._segment_offset: int | None = None
        if has_segments and any(types):
            if types != sorted(types) or set(types) != {0, 1} or not first_end <= types.index(1) <= second:
                raise ValueError("its template marks other tokens than those of the text")
            self._segment_offset = types.index(1) - first_end
        self.has_segments = self._segment_offset is not None

    def read_query(self, query: str) -> Steps[Row]:
        """Tokenize the query, which all pairs share."""
        [row] = yield from self._rows([Prefixed("", query)], Truncate.END, has_special=False)
        return row

    def read_pairs(
        self,
        query: Row,
        texts: Sequence[str],
        truncate: Truncate,
        *,
        first_index: int = 0,
        max_text_tokens: int | None = None,
    ) -> Steps[list[Tokens]]:
        """Tokenize each text after the query.

        A pair that is too long is cut "longest first", as tokenizers does for sentence-transformers' ``CrossEncoder``: the
        longer of the two loses its end until both have the same length, and then both do. If ``truncate`` asks for it, the
        text loses its start instead.

        Args:
            first_index: index of the first text in its request, for the error message.
            max_text_tokens: limit of each text, even if there is more room.

        Raises:
            ContextLengthExceeded: a pair is too long, and ``truncate`` says to refuse.
        """
        rows = yield from self._rows([Prefixed("", text) for text in texts], truncate, has_special=False)
        return [
            self._cut_pair(query, row, truncate, max_text_tokens, f"the query and text {i}")
            for i, row in enumerate(rows, first_index)
        ]

    def read_each(
        self, firsts: Sequence[str], texts: Sequence[str], truncate: Truncate, *, first_index: int
    ) -> Steps[list[Tokens]]:
        """Tokenize each text after the first text of its pair; see :meth:`read_pairs`.

        Raises:
            ContextLengthExceeded: a pair is too long, and ``truncate`` says to refuse.
        """
        first_rows = yield from self._rows([Prefixed("", text) for text in firsts], Truncate.END, has_special=False)
        rows = yield from self._rows([Prefixed("", text) for text in texts], truncate, has_special=False)
        return [
            self._cut_pair(before, row, truncate, None, f"the two texts of input[{i}]")
            for i, (before, row) in enumerate(zip(first_rows, rows, strict=True), first_index)
        ]

    def _cut_pair(self, query: Row, text: Row, truncate: Truncate, max_text_tokens: int | None, what: str) -> Tokens:
        wanted = _keep(text.ids, max_text_tokens, truncate)
        kept_query, kept = query.ids, wanted
        if len(query.ids) + len(wanted) > self._room:
            if truncate is Truncate.REFUSE:
                raise self._too_long(query, text, len(wanted), what)
            num_query, num_text = _longest_first(len(query.ids), len(wanted), self._room)
            kept_query, kept = query.ids[:num_query], _keep(wanted, num_text, truncate)
        is_cut = len(kept_query) < len(query.ids) or len(kept) < len(text.ids)
        return self._pair(kept_query, kept, is_cut)

    def _pair(self, query: list[int], text: list[int], is_cut: bool) -> Tokens:
        ids = [*self._before, *query, *self._between, *text, *self._after]
        second = None if self._segment_offset is None else len(self._before) + len(query) + self._segment_offset
        return Tokens(ids, is_truncated=is_cut, second=second)

    def _too_long(self, query: Row, text: Row, num_text_tokens: int, what: str) -> ContextLengthExceeded:
        num_tokens = self.max_tokens - self._room + len(query.ids) + num_text_tokens
        # Of a text that is cut in any case, only the remaining tokens count.
        is_exact = query.is_whole and (text.is_whole or num_text_tokens < len(text.ids))
        return ContextLengthExceeded(
            f"This model's maximum context length is {self.max_tokens} tokens, however {what} have "
            f"{'' if is_exact else 'at least '}{num_tokens} tokens together. Shorten one of them, or leave out "
            "truncate: false."
        )


def _longest_first(num_query: int, num_text: int, room: int) -> tuple[int, int]:
    """Return the numbers of tokens of a query and of a text to keep, if together they exceed ``room``.

    The rule comes from tokenizers (truncate_encodings in its file truncation.rs).
    """
    shorter = min(num_query, num_text)
    if 2 * shorter > room:
        half, rest = room // 2, room - room // 2
        return (half, rest) if num_query <= num_text else (rest, half)
    return (shorter, room - shorter) if num_query <= num_text else (room - shorter, shorter)


def _keep(ids: list[int], num: int | None, truncate: Truncate) -> list[int]:
    """Return at most ``num`` tokens of a text: the last ones if its start is cut, else the first ones."""
    if num is None or len(ids) <= num:
        return ids
    return ids[len(ids) - num :] if truncate is Truncate.START else ids[:num]

"""Turn pairs of a query and a text into token ids for an LLM reranker, which reads them as one text, by a template."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer as FastTokenizer

from gateway.engine.checkpoint.pair_template import PairTemplate
from gateway.engine.model.items import Tokens
from gateway.engine.model.tokenizer import Prefixed, Row, Steps, Tokenizer
from gateway.errors import ContextLengthExceeded
from gateway.types import Truncate


class ChatPairTokenizer(Tokenizer):
    """The tokenizer of an LLM reranker.

    A pair that is too long loses the tokens before the template's end, as in sentence-transformers and the code on Qwen's
    model cards. The end asks the question whose answer is the score.

    Raises:
        ValueError: the template's end does not begin with a special token, or leaves no room for a text.
    """

    def __init__(self, tokenizer: FastTokenizer, max_tokens: int, template: PairTemplate) -> None:
        super().__init__(tokenizer, max_tokens)
        self._template = template
        self._tail = self._encode(template.after, has_special=False)
        self._num_fixed = len(self._encode(template.before + template.between, has_special=False)) + len(self._tail)
        for text in ("a", "a\n", "a <", ""):  # otherwise the end of a text could join the template's first token
            start = self._encode(template.before + text, has_special=False)
            if start + self._tail != self._encode(template.before + text + template.after, has_special=False):
                raise ValueError("the template's end does not begin with a special token")
        if self._num_fixed >= max_tokens:
            raise ValueError(
                f"the template alone takes all {max_tokens} tokens of the limit and leaves none for a text"
            )

    def read_query(self, query: str) -> Steps[str]:
        """Return the query unchanged: it is tokenized with each text, because both may share a token with the template."""
        yield 0
        return query

    def read_pairs(
        self,
        query: str,
        texts: Sequence[str],
        truncate: Truncate,
        *,
        first_index: int = 0,
        max_text_tokens: int | None = None,
    ) -> Steps[list[Tokens]]:
        """Tokenize each text with the query and the template around them.

        Args:
            first_index: index of the first text in its request, for the error message.
            max_text_tokens: limit of each text, even if there is more room.

        Raises:
            ContextLengthExceeded: a pair is too long, and ``truncate`` asks to refuse such pairs.
        """
        prefixed = [Prefixed(self._template.before + query + self._template.between, text) for text in texts]
        rows = yield from self._rows(prefixed, truncate, has_special=False)
        return [
            self._finished(row, pair, truncate, max_text_tokens, index)
            for index, (row, pair) in enumerate(zip(rows, prefixed, strict=True), first_index)
        ]

    def _finished(
        self, row: Row, pair: Prefixed, truncate: Truncate, max_text_tokens: int | None, index: int
    ) -> Tokens:
        ids, is_cut = row.ids, False
        if max_text_tokens is not None:
            head = len(self._head_ids(pair))
            is_cut = len(ids) - head > max_text_tokens
            if is_cut and truncate is Truncate.START:
                ids = [*ids[:head], *ids[len(ids) - max_text_tokens :]]
            elif is_cut:
                ids = ids[: head + max_text_tokens]
        whole = [*ids, *self._tail]
        if len(whole) <= self.max_tokens:
            return Tokens(whole, is_truncated=is_cut)
        if truncate is Truncate.REFUSE:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.max_tokens} tokens, however the query and text {index} have "
                f"{'' if row.is_whole else 'at least '}{len(whole)} tokens together, with the template around them. Shorten "
                "one of them, or leave out truncate: false."
            )
        return self._cut(Row(whole, row.is_whole), pair, truncate, f"input[{index}]", self.max_tokens)

    def _head_ids(self, text: Prefixed) -> list[int]:
        """Return the tokens of the template and the query."""
        before = len(text.instruction)
        [encoding] = self._tokenizer.encode_batch([text.part(0, before + self._window_chars)], add_special_tokens=False)
        ids: list[int] = encoding.ids[: sum(1 for start, end in encoding.offsets if start < end <= before)]
        return ids

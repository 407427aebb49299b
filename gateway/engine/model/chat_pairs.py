"""Turn texts, or pairs of a query and a text, into token ids for a model that reads them in a chat template."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer as FastTokenizer

from gateway.engine.checkpoint.pair_template import PairTemplate
from gateway.engine.checkpoint.text_template import TextTemplate
from gateway.engine.model.items import Tokens
from gateway.engine.model.tokenizer import Prefixed, Row, Steps, Tokenizer
from gateway.errors import ContextLengthExceeded, LoadError
from gateway.types import Truncate

_PAIR = "the query and text {} have {} together, with the template around them. Shorten one of them"


class _Templated(Tokenizer):
    """A tokenizer with a template around each text, which ends with the same tokens after each.

    A text that is too long loses the tokens before the template's end, as in sentence-transformers. The last token may make
    the vector or the score.

    Raises:
        ValueError: the template's end does not begin with a special token, or leaves no room for a text.
    """

    def __init__(self, tokenizer: FastTokenizer, max_tokens: int, before: str, after: str) -> None:
        super().__init__(tokenizer, max_tokens, has_template=False)
        self._tail = self._encode(after, has_special=False)
        self._num_fixed = len(self._encode(before, has_special=False)) + len(self._tail)
        for text in ("a", "a\n", "a <", ""):  # otherwise the end of a text could join the template's first token
            start = self._encode(before + text, has_special=False)
            if start + self._tail != self._encode(before + text + after, has_special=False):
                raise ValueError("the template's end does not begin with a special token")
        if self._num_fixed >= max_tokens:
            raise ValueError(
                f"the template alone takes all {max_tokens} tokens of the limit and leaves none for a text"
            )

    def _finished(
        self, row: Row, text: Prefixed, truncate: Truncate, max_text_tokens: int | None, name: str, described: str
    ) -> Tokens:
        """Return the tokens of a text and the template's end, cut to the limit.

        Args:
            name: name of the text, for the error message.
            described: what is too long, with a place for the number of tokens, and what to do.
        """
        ids, is_cut = row.ids, False
        if max_text_tokens is not None:
            head = len(self._head_ids(text))
            is_cut = len(ids) - head > max_text_tokens
            if is_cut and truncate is Truncate.START:
                ids = [*ids[:head], *ids[len(ids) - max_text_tokens :]]
            elif is_cut:
                ids = ids[: head + max_text_tokens]
        whole = [*ids, *self._tail]
        if len(whole) <= self.max_tokens:
            return Tokens(whole, is_truncated=is_cut)
        if truncate is Truncate.REFUSE:
            count = f"{'' if row.is_whole else 'at least '}{len(whole)} tokens"
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.max_tokens} tokens, however {described.format(count)}, or "
                "leave out truncate: false."
            )
        return self._cut(Row(whole, row.is_whole), text, truncate, name, self.max_tokens)

    def _head_ids(self, text: Prefixed) -> list[int]:
        """Return the tokens before the text."""
        before = len(text.instruction)
        [encoding] = self._tokenizer.encode_batch([text.part(0, before + self._window_chars)], add_special_tokens=False)
        ids: list[int] = encoding.ids[: sum(1 for start, end in encoding.offsets if start < end <= before)]
        return ids


class ChatTextTokenizer(_Templated):
    """The tokenizer of an embedder whose texts are put into a chat template.

    Raises:
        ValueError: as in its base class.
        LoadError: the template changes the given texts, or refuses a message.
    """

    def __init__(self, tokenizer: FastTokenizer, max_tokens: int, template: TextTemplate) -> None:
        before, self._after = template.around("")
        super().__init__(tokenizer, max_tokens, before, self._after)
        self._template = template
        self._before = {"": before}

    def room(self, instruction: str) -> int:
        return self.max_tokens - len(self._head_ids(Prefixed(self._text_before(instruction), ""))) - len(self._tail)

    def read(
        self,
        texts: Sequence[str],
        instruction: str,
        truncate: Truncate,
        first_index: int = 0,
        name: str = "input",
        max_text_tokens: int | None = None,
    ) -> Steps[list[Tokens]]:
        before = self._text_before(instruction)
        prefixed = [Prefixed(before, text) for text in texts]
        rows = yield from self._rows(prefixed, truncate, has_special=False)
        names = [f"{name}[{index}]" for index in range(first_index, first_index + len(texts))]
        return [
            self._finished(
                row,
                text,
                truncate,
                max_text_tokens,
                place,
                f"{place} has {{}}, with the template around it. Shorten it",
            )
            for row, text, place in zip(rows, prefixed, names, strict=True)
        ]

    def _text_before(self, instruction: str) -> str:
        """Return the text before a text with an instruction.

        Raises:
            LoadError: the template has no place for it.
        """
        if instruction not in self._before:
            before, after = self._template.around(instruction)
            if after != self._after:
                raise LoadError(f"{self._template.folder}: its chat template puts the prompt after the text")
            self._before[instruction] = before
        return self._before[instruction]


class ChatPairTokenizer(_Templated):
    """The tokenizer of an LLM reranker, which reads a query and a text as one text.

    The end of the template asks the question whose answer is the score.

    Raises:
        ValueError: as in its base class.
    """

    def __init__(self, tokenizer: FastTokenizer, max_tokens: int, template: PairTemplate) -> None:
        super().__init__(tokenizer, max_tokens, template.before + template.between, template.after)
        self._template = template

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
            self._finished(row, pair, truncate, max_text_tokens, f"input[{index}]", _PAIR.format(index, "{}"))
            for index, (row, pair) in enumerate(zip(rows, prefixed, strict=True), first_index)
        ]

"""Turn texts into token ids: instruction, true counts, truncation."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer as FastTokenizer

from gateway.embedding import Token, Truncate
from gateway.engine.items import Tokens
from gateway.errors import BadInput, ContextLengthExceeded

# A window of this many characters for each token of the limit holds enough tokens of almost any text.
_WINDOW_CHARS_PER_TOKEN = 16
# Half of it is longer than the longest word that WordPiece takes apart (100 letters; longer ones are one unknown token).
_MIN_WINDOW_CHARS = 1024


class Tokenizer:
    """A model's tokenizer with its length limit. Safe to use from several threads.

    Args:
        tokenizer: the checkpoint's tokenizer; its own truncation and padding are switched off.
        max_tokens: the longest result, special tokens included.

    Attributes:
        has_segments: the model is to be told where the second text of a pair begins.
    """

    has_segments = False

    def __init__(self, tokenizer: FastTokenizer, max_tokens: int) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._window_chars = max(max_tokens * _WINDOW_CHARS_PER_TOKEN, _MIN_WINDOW_CHARS)
        # The model's template puts special tokens before and after every text: [CLS] text [SEP].
        template = tokenizer.encode("a")
        content = template.special_tokens_mask.index(0) if 0 in template.special_tokens_mask else 0
        num_content = template.special_tokens_mask.count(0)
        self._head = template.ids[:content]
        self._tail = template.ids[content + num_content :]

    def sample_ids(self) -> list[int]:
        """Return the token ids of a sentence, special tokens included: something real to try a model on."""
        ids: list[int] = self._tokenizer.encode("The quick brown fox jumps over the lazy dog, again and again.").ids
        return ids

    def split(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[Token]]:
        """Return all tokens of each text, with their places; see :class:`gateway.embedding.Vocabulary`."""
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
        """Return the text of each row of token ids; see :class:`gateway.embedding.Vocabulary`."""
        texts: list[str] = self._tokenizer.decode_batch(
            [list(row) for row in rows], skip_special_tokens=skip_special_tokens
        )
        return texts

    def tokenise(
        self, texts: Sequence[str], instruction: str, truncate: Truncate, first_index: int = 0
    ) -> list[Tokens]:
        """Tokenise texts with ``instruction`` put before each.

        ``first_index`` is the place of the first text in its request, for the error message.

        Raises:
            ContextLengthExceeded: a text is too long, and ``truncate`` says to refuse.
        """
        prefixed = [instruction + text for text in texts] if instruction else texts
        rows = self._rows(prefixed, truncate)
        return [
            Tokens(ids)
            if len(ids) <= self.max_tokens
            else self._cut(ids, prefixed[i], instruction, truncate, first_index + i)
            for i, ids in enumerate(rows)
        ]

    def tokenise_chunks(self, chunks: Sequence[str], instruction: str) -> Tokens:
        """Tokenise the chunks of one document for late chunking (Günther et al., arXiv:2409.04701).

        The chunks' own tokens stand one behind the other between the model's special tokens, after the instruction. The
        first chunk's span takes in what stands before it, the last one's what stands behind it: pooled over all
        chunks, the document's own vector comes out.

        Raises:
            ContextLengthExceeded: together they are longer than the model takes; a chunk cannot be cut away.
            BadInput: a chunk has no tokens, so there is nothing to take the mean of.
        """
        own = [piece.ids for piece in self._tokenizer.encode_batch_fast(list(chunks), add_special_tokens=False)]
        if [] in own:
            raise BadInput(
                f"input[{own.index([])}] has no tokens; late_chunking needs some in each chunk", param="input"
            )
        if instruction:  # with its text, as it is before a text that is no chunk: the two may share a token
            [own[0]] = [
                piece.ids
                for piece in self._tokenizer.encode_batch_fast([instruction + chunks[0]], add_special_tokens=False)
            ]
        ids = list(self._head)
        spans = []
        first = 0
        for piece in own:
            ids += piece
            spans.append((first, len(ids)))
            first = len(ids)
        spans[-1] = (spans[-1][0], len(ids) + len(self._tail))
        if len(ids) + len(self._tail) > self.max_tokens:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.max_tokens} tokens, however the chunks have "
                f"{len(ids) + len(self._tail)} tokens together, and late_chunking cannot cut any of them away.",
                param="input",
            )
        return Tokens([*ids, *self._tail], spans=tuple(spans))

    def _rows(self, texts: Sequence[str], truncate: Truncate, *, has_special: bool = True) -> list[list[int]]:
        """Return the token ids of each text, of a long one only so many that what is kept can be cut from them.

        Args:
            has_special: put the model's special tokens around each text.
        """
        short = [text for text in texts if len(text) <= self._window_chars]
        encodings = iter(self._tokenizer.encode_batch_fast(short, add_special_tokens=has_special))
        return [
            next(encodings).ids if len(text) <= self._window_chars else self._encode_enough(text, truncate, has_special)
            for text in texts
        ]

    def _encode_enough(self, text: str, truncate: Truncate, has_special: bool) -> list[int]:
        """Tokenise so much of a text that the tokens that will be kept are those of the whole text.

        The cost of a text that is far too long stays that of what is kept. The window ends at white space where there
        is any, as no usual tokenizer joins across it, and holds at least twice the limit, so that what the cut does to
        the tokens next to it does not reach the ones that are kept.
        """
        window = self._window_chars
        while window < len(text):
            if truncate is Truncate.START:
                start = text.find(" ", len(text) - window, len(text) - window // 2)
                part = text[start if start >= 0 else len(text) - window :]
            else:
                end = text.rfind(" ", window // 2, window)
                part = text[: end if end >= 0 else window]
            ids = self._encode(part, has_special)
            if len(ids) > 2 * self.max_tokens:
                return ids
            window *= 4
        return self._encode(text, has_special)

    def _encode(self, text: str, has_special: bool) -> list[int]:
        # `encode` holds the interpreter lock, and the event loop with it, for as long as it takes; the batch does not.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=has_special)[0].ids
        return ids

    def _cut(self, ids: list[int], text: str, instruction: str, truncate: Truncate, index: int) -> Tokens:
        room = self.max_tokens - len(self._tail)
        if truncate is Truncate.END:
            return Tokens([*ids[:room], *self._tail], is_truncated=True)
        if truncate is Truncate.START:
            head = self._head_ids(text, instruction)[:room]
            return Tokens([*head, *ids[len(ids) - (self.max_tokens - len(head)) :]], is_truncated=True)
        raise ContextLengthExceeded(
            f"This model's maximum context length is {self.max_tokens} tokens, however input[{index}] has "
            f"{'at least ' if len(text) > self._window_chars else ''}{len(ids)} tokens. "
            "Shorten it, or leave out truncate: false.",
            param="input",
        )

    def _head_ids(self, text: str, instruction: str) -> list[int]:
        """Return the tokens that stay when the text loses its first ones: the instruction belongs to the task."""
        if not instruction:
            return self._head
        [encoding] = self._tokenizer.encode_batch([text[: len(instruction) + self._window_chars]])
        kept = sum(1 for start, end in encoding.offsets if start < end <= len(instruction))
        ids: list[int] = encoding.ids[: len(self._head) + kept]
        return ids

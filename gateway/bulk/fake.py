"""An embedder without a model, whose vectors can be checked by eye, for tests and benchmarks of the code around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gateway.bulk.chunking import ModelTokens
from gateway.bulk.embedder import TextRefused, TextVectors
from gateway.bulk.rows import SpaceNote
from gateway.types import SparseVector, Token


class FakeEmbedder:
    """Embeds a text as ``[characters, 1, 0, 0, …]``; a token is a character.

    With sparse weights, each text has 0.5 for token 3. A multi-vector has a vector ``[1, 0]`` for each of the first three
    characters. A text that begins with ``refuse`` is refused, and one of more than 100 characters is cut.

    Args:
        on_call: called first with the texts of each call; an exception that it raises becomes the embedder's.
    """

    def __init__(
        self,
        dimensions: int = 8,
        *,
        space: str = "fake@0123456789ab",
        outputs: Sequence[str] = ("dense",),
        on_call: Callable[[Sequence[str]], None] = lambda _texts: None,
    ) -> None:
        self.note = SpaceNote(
            space=space,
            model=space.partition("@")[0],
            task=None,
            dimensions=dimensions if "dense" in outputs else 0,
            is_normalized=False,
            token_width=2 if "multivector" in outputs else 0,
            has_sparse="sparse" in outputs,
        )
        self.max_texts = 64
        self.max_characters = 100_000
        self.num_calls = 4
        self.block_texts = 256
        self._on_call = on_call

    async def tokens(self) -> ModelTokens:
        def split(texts: Sequence[str]) -> list[list[Token]]:
            return [
                [Token(ord(c), c, is_special=False, start=i, stop=i + 1) for i, c in enumerate(text)] for text in texts
            ]

        return ModelTokens(split, lambda texts: [2 + len(text) for text in texts], 100, can_chunk_late=True)

    async def embed(self, texts: Sequence[str], *, is_late: bool = False) -> TextVectors:
        self._on_call(texts)
        if is_late and sum(map(len, texts)) > 98:
            raise TextRefused("the chunks are longer than the model reads")
        if any(text.startswith("refuse") for text in texts):
            raise TextRefused("the model refuses a text that begins with `refuse`")
        lengths = [min(100, len(text)) for text in texts]
        dense = None
        if self.note.dimensions:
            dense = np.zeros((len(texts), self.note.dimensions), np.float32)
            dense[:, 0] = lengths
            dense[:, 1] = 1
        weights = SparseVector(np.array([3]), np.array([0.5], np.float32))
        return TextVectors(
            dense,
            sum(lengths),
            sum(len(text) > 100 for text in texts),
            [weights] * len(texts) if self.note.has_sparse else None,
            [np.tile(np.array([[1, 0]], np.float32), (min(3, n), 1)) for n in lengths]
            if self.note.token_width
            else None,
        )

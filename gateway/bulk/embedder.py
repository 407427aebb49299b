"""The protocol of embedders, which turn texts into vectors for a job, and the code that passes rows to an embedder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from gateway.bulk.blocks import Expand
from gateway.bulk.chunking import Chunk, Chunker, ModelTokens
from gateway.bulk.model_spec import ModelSpec
from gateway.bulk.rows import BadRow, BulkError, EmbeddedRows, Row, RowId, SpaceNote
from gateway.errors import GatewayError
from gateway.types import MultiVector, SparseVector, Vectors


class TextRefused(GatewayError):
    """At least one text cannot be embedded: it is too long, for example. The others can be embedded without it."""


@dataclass(frozen=True, slots=True)
class TextVectors:
    """The vectors of texts, in their order.

    Attributes:
        dense: ``(n, dimensions)`` float32; ``None`` without dense vectors.
        num_tokens: the tokens of all texts together, after truncation.
        num_truncated: the number of texts that were cut.
    """

    dense: Vectors | None
    num_tokens: int
    num_truncated: int
    sparse: Sequence[SparseVector] | None = None
    multivectors: Sequence[MultiVector] | None = None


class Embedder(Protocol):
    """Embeds texts with one model, for one task, into one space. Used on one event loop.

    Attributes:
        note: describes the space of the vectors.
        max_texts, max_characters: the limits of one call; a text with more characters gets a call to itself.
        num_calls: the number of concurrent calls that keep the embedder busy.
        block_texts: the number of texts to sort by length at once.
    """

    note: SpaceNote
    max_texts: int
    max_characters: int
    num_calls: int
    block_texts: int

    async def embed(self, texts: Sequence[str], *, is_late: bool = False) -> TextVectors:
        """Embed texts.

        Args:
            is_late: the texts are consecutive chunks of one document, which is embedded as a whole.

        Raises:
            TextRefused: one of the texts cannot be embedded.
            BulkError: the model cannot be used, or stopped working.
        """

    async def tokens(self) -> ModelTokens:
        """Return the model's tokenizer.

        Raises:
            BulkError: the tokenizer is not available here.
        """


@dataclass(frozen=True, slots=True)
class EmbeddedBlock:
    """Rows with their vectors, and rows that could not be embedded.

    Attributes:
        refused: rows that the model rejected, one for each item. The other rows of these items are left out.
    """

    embedded: EmbeddedRows
    num_tokens: int
    num_truncated: int
    refused: Sequence[BadRow] = ()


@dataclass(slots=True)
class _Gathered:
    """Collects the vectors of a block by the index of their row, in the order in which they arrive."""

    dense: Vectors | None = None
    sparse: dict[int, SparseVector] = field(default_factory=dict)
    multivectors: dict[int, MultiVector] = field(default_factory=dict)
    refused: dict[int, BadRow] = field(default_factory=dict)
    num_tokens: int = 0
    num_truncated: int = 0

    def add(self, places: Sequence[int], vectors: TextVectors, num_rows: int) -> None:
        self.num_tokens += vectors.num_tokens
        self.num_truncated += vectors.num_truncated
        if vectors.dense is not None:
            if self.dense is None:
                self.dense = np.empty((num_rows, vectors.dense.shape[1]), np.float32)
            self.dense[list(places)] = vectors.dense
        self.sparse.update(zip(places, vectors.sparse or (), strict=False))
        self.multivectors.update(zip(places, vectors.multivectors or (), strict=False))

    def block(self, rows: Sequence[Row], note: SpaceNote) -> EmbeddedBlock:
        """Return the rows of the items that have all of their vectors, and the first refused row of each other item."""
        refused: dict[str, BadRow] = {}
        for place in sorted(self.refused):
            refused.setdefault(rows[place].place, self.refused[place])
        kept = [place for place, row in enumerate(rows) if row.place not in refused]
        dense = self.dense
        if dense is not None and len(kept) < len(rows):
            dense = dense[kept]
        elif dense is None and note.dimensions:
            dense = np.empty((0, note.dimensions), np.float32)  # no row was embedded
        return EmbeddedBlock(
            EmbeddedRows(
                [rows[place] for place in kept],
                dense,
                [self.sparse[place] for place in kept] if note.has_sparse else None,
                [self.multivectors[place] for place in kept] if note.token_width else None,
            ),
            self.num_tokens,
            self.num_truncated,
            list(refused.values()),
        )


class BlockEmbedder:
    """Embeds blocks of rows in calls of bounded size, sorted by length so that texts of similar length share a call.

    Args:
        on_rows: called with the number of newly finished rows.
    """

    def __init__(self, embedder: Embedder, on_rows: Callable[[int], None] = lambda _number: None) -> None:
        self._embedder = embedder
        self._on_rows = on_rows
        self._calls = asyncio.Semaphore(embedder.num_calls)

    async def embed(self, rows: Sequence[Row]) -> EmbeddedBlock:
        """Embed rows. Rows that the model rejects are returned separately, without the other rows of their items.

        Raises:
            BulkError: the model cannot be used.
        """
        gathered = _Gathered()
        windows = _windows(rows)
        runs = self._cut(rows) if windows is None else windows
        is_late = windows is not None
        calls = [asyncio.create_task(self._call(rows, places, gathered, is_late=is_late)) for places in runs]
        try:
            await asyncio.gather(*calls)
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        return gathered.block(rows, self._embedder.note)

    def _cut(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        """Yield the indexes of rows that share a call, the longest texts first, so that oversized texts fail early."""
        places: list[int] = []
        num_characters = 0
        for place in sorted(range(len(rows)), key=lambda place: -len(rows[place].text)):
            length = len(rows[place].text)
            is_full = len(places) == self._embedder.max_texts
            if places and (is_full or num_characters + length > self._embedder.max_characters):
                yield places
                places, num_characters = [], 0
            places.append(place)
            num_characters += length
        if places:
            yield places

    async def _call(
        self, rows: Sequence[Row], places: Sequence[int], gathered: _Gathered, *, is_late: bool = False
    ) -> None:
        try:
            async with self._calls:
                vectors = await self._embedder.embed([rows[place].text for place in places], is_late=is_late)
        except TextRefused as error:
            if len(places) == 1 or is_late:  # chunks have different vectors alone than together
                for place in places:
                    row = rows[place]
                    gathered.refused[place] = BadRow(row.place, str(error), row.position, row.id)
                self._on_rows(len(places))
                return
            middle = len(places) // 2
            await self._call(rows, places[:middle], gathered)
            await self._call(rows, places[middle:], gathered)
            return
        if vectors.dense is not None and len(vectors.dense) != len(places):
            raise BulkError(f"the model returned {len(vectors.dense)} vectors for {len(places)} texts")
        gathered.add(places, vectors, len(rows))
        self._on_rows(len(places))


def _windows(rows: Sequence[Row]) -> list[list[int]] | None:
    """Return the indexes of chunks that are embedded together; ``None`` if each text is embedded alone."""
    windows: dict[tuple[RowId, int], list[int]] = {}
    for place, row in enumerate(rows):
        if not isinstance(row, Chunk) or row.window is None:
            return None
        windows.setdefault((row.document, row.window), []).append(place)
    return list(windows.values()) or None


async def chunker(embedder: Embedder, spec: ModelSpec) -> Expand | None:
    """Return the function that cuts the texts of a job into chunks; ``None`` if they are embedded whole.

    Raises:
        BulkError: the model's tokenizer is not available, or the model cannot embed such chunks.
    """
    if spec.chunking is None:
        return None
    tokens = await embedder.tokens()
    await asyncio.to_thread(spec.chunking.check, tokens, spec.name)
    return Chunker(spec.chunking, tokens).expand

"""The values that pass from a source through the embedder to a sink, and the protocols of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from gateway.errors import StartError
from gateway.types import MultiVector, SparseVector, Vectors

Json: TypeAlias = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None

RowId: TypeAlias = int | str
"""The id of a row, as its source has it."""

Position: TypeAlias = Json
"""Where reading goes on after a row. Only the source that made it understands it."""


class BulkError(StartError):
    """A job cannot run, or cannot go on: its source, its sink, its model or the gateway does not allow it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One item of a source.

    Attributes:
        text: to embed; never empty.
        payload: its other fields, without the id and the text, which a sink stores with the vector.
        place: of the row, for messages: ``docs.jsonl:17``, or ``id 5 of qdrant://localhost/docs``.
        position: where reading goes on after this row.
        num_title: characters at the beginning of the text that are the title.
    """

    id: RowId
    text: str
    payload: Mapping[str, Json]
    place: str
    position: Position
    num_title: int = 0


@dataclass(frozen=True, slots=True)
class BadRow:
    """An item that cannot be embedded, and why. It is skipped or stops the job, as the user has it.

    Attributes:
        id: if it is known.
        problem: what is wrong, the limit, and the value.
    """

    place: str
    problem: str
    position: Position
    id: RowId | None = None


@dataclass(frozen=True, slots=True)
class SpaceNote:
    """The vectors of a job, as a store remembers them; compared with its own note before the first write.

    Attributes:
        space: of the vectors, ``<model id>@<12 hex>``.
        model: id of the model.
        task: that the texts were embedded for; ``None`` for a model without tasks.
        dimensions: of the dense vectors; 0 without dense vectors.
        is_normalized: the dense vectors have L2 norm 1, so that a dot product is their cosine.
        token_width: of the multi-vectors; 0 without them.
        has_sparse: the rows have sparse weights.
    """

    space: str
    model: str
    task: str | None
    dimensions: int
    is_normalized: bool
    token_width: int = 0
    has_sparse: bool = False


@dataclass(frozen=True, slots=True)
class EmbeddedRows:
    """Rows and their vectors, in the same order.

    Attributes:
        dense: ``(n, dimensions)`` float32; ``None`` without dense vectors.
        sparse: the weights of each row, if the job has them.
        multivectors: ``(t, token_width)`` of each row, if the job has them.
    """

    rows: Sequence[Row]
    dense: Vectors | None
    sparse: Sequence[SparseVector] | None = None
    multivectors: Sequence[MultiVector] | None = None


class Source(Protocol):
    """Something that has texts, in an order that stays the same. Used from one thread at a time."""

    @property
    def name(self) -> str:
        """The source in messages and in the manifest, without passwords."""

    @property
    def has_unique_ids(self) -> bool:
        """No two rows can have the same id, so the job need not look for duplicates."""

    @property
    def text_field(self) -> str:
        """The field that has the text, as a path such as ``meta.text``: under this name it is stored again."""

    def fingerprint(self) -> str:
        """Return a hash of the files' content, or the identity of a collection: a job goes on only if it is the same.

        Raises:
            BulkError: the source cannot be read.
        """

    def count(self) -> int | None:
        """Return how many rows there are, roughly; ``None`` if only reading them tells."""

    def read(self, after: Position | None = None) -> Iterator[Row | BadRow]:
        """Yield the rows after a position, or all of them, with flat memory.

        Raises:
            BulkError: the source has gone away, or is no source of this kind.
        """

    def close(self) -> None:
        """Close connections and files."""


class Sink(Protocol):
    """Something that keeps vectors. Used from one thread at a time."""

    @property
    def name(self) -> str:
        """The sink in messages and in the manifest, without passwords."""

    def is_empty(self) -> bool:
        """Return whether it holds nothing, or does not exist. Asked before `open`.

        Raises:
            BulkError: it cannot be reached.
        """

    def open(self, note: SpaceNote) -> None:
        """Make the sink if it does not exist, and check that it may take vectors of this space.

        Raises:
            BulkError: it holds another space or another width, or cannot be reached.
        """

    def write(self, shard: int, batch: EmbeddedRows) -> None:
        """Keep a shard durably, all of it or nothing visible. The same shard again replaces what it has written before.

        Args:
            shard: its number, from 0; each number has the same rows whenever the job goes on.

        Raises:
            BulkError: it cannot be kept.
        """

    def close(self) -> None:
        """Close connections and files."""

"""The values that pass from a source through the embedder to a sink, and the protocols of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import GeneratorType
from typing import Protocol, TypeAlias, runtime_checkable

from gateway.errors import StartError
from gateway.types import MultiVector, SparseVector, Vectors

Json: TypeAlias = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None

RowId: TypeAlias = int | str
"""The id of a row in its source."""

Position: TypeAlias = Json
"""The point from which reading continues. Only the source that made a position can interpret it."""


class BulkError(StartError):
    """A job cannot run or cannot continue, because of its source, its sink, its model or the gateway."""


@dataclass(frozen=True, slots=True)
class Row:
    """One item of a source.

    Attributes:
        text: the text to embed; never empty.
        payload: the other fields, without id and text, which a sink stores with the vector.
        place: the row's place for messages: ``docs.jsonl:17``, or ``id 5 of qdrant://localhost/docs``.
        position: where reading continues after this row.
        num_title: the length of the title at the beginning of the text, in characters.
        text_names: the names on the path of the text, if one of them contains a dot itself.
    """

    id: RowId
    text: str
    payload: Mapping[str, Json]
    place: str
    position: Position
    num_title: int = 0
    text_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BadRow:
    """An item that cannot be embedded, and the reason. It is skipped or stops the job, as the user chose.

    Attributes:
        id: the item's id, if known.
        problem: the problem, the limit, and the value.
    """

    place: str
    problem: str
    position: Position
    id: RowId | None = None


class RowsRefused(BulkError):
    """A sink cannot store some rows of a shard, as it found out while it wrote. The shard must be written without them.

    An item whose row is refused is written without its other rows too, so the sink must not keep those.

    Args:
        rows: these rows, at least one.
    """

    def __init__(self, rows: Sequence[BadRow]) -> None:
        skips = "With --on-error skip, the job leaves such rows out and lists them in a file"
        super().__init__(f"{rows[0].place}: {rows[0].problem}. {skips}")
        self.rows = rows


@contextmanager
def closing_readings(*readings: Iterator[object]) -> Iterator[None]:
    """Close generators at the end of the context.

    They hold connections and files. After an error, its traceback would keep them open, and the garbage collector would
    close them later, from any thread.
    """
    try:
        yield
    finally:
        for reading in readings:
            if isinstance(reading, GeneratorType) and not reading.gi_running:
                reading.close()


@dataclass(frozen=True, slots=True)
class SpaceNote:
    """A description of a job's vectors. Stores keep it as a note, which is compared before the first write.

    Attributes:
        space: the space of the vectors, ``<model id>@<12 hex>``.
        model: the id of the model.
        task: the task that the texts were embedded for; ``None`` for a model without tasks.
        dimensions: the size of the dense vectors; 0 without dense vectors.
        is_normalized: the dense vectors have L2 norm 1, so that a dot product is their cosine.
        token_width: the width of the multi-vectors; 0 without multi-vectors.
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
        sparse: the sparse weights of each row, if requested.
        multivectors: ``(t, token_width)`` float32 for each row, if requested.
    """

    rows: Sequence[Row]
    dense: Vectors | None
    sparse: Sequence[SparseVector] | None = None
    multivectors: Sequence[MultiVector] | None = None

    def only(self, indexes: Sequence[int]) -> EmbeddedRows:
        """Return the rows at these indexes."""
        return EmbeddedRows(
            [self.rows[index] for index in indexes],
            None if self.dense is None else self.dense[list(indexes)],
            None if self.sparse is None else [self.sparse[index] for index in indexes],
            None if self.multivectors is None else [self.multivectors[index] for index in indexes],
        )


def without_items(batch: EmbeddedRows, refused: Iterable[BadRow]) -> EmbeddedRows:
    """Return the rows without those of the refused rows' items: an item is stored whole, or not at all."""
    places = {row.place for row in refused}
    return batch.only([index for index, row in enumerate(batch.rows) if row.place not in places])


def ids_of_parted(rows: Sequence[Row], refused: Iterable[BadRow]) -> list[RowId]:
    """Return the ids of the refused rows' items that have several rows: some of these may be in the sink already.

    An item of one row is left out: if the sink has an earlier version, that is still whole.
    """
    places = {row.place for row in refused}
    of_items = [row for row in rows if row.place in places]
    sizes = Counter(row.place for row in of_items)
    return [row.id for row in of_items if sizes[row.place] > 1]


class Source(Protocol):
    """A provider of texts in a stable order. Used from one thread at a time."""

    @property
    def name(self) -> str:
        """The name of the source in messages and in the manifest, without passwords."""

    @property
    def has_unique_ids(self) -> bool:
        """No two rows can have the same id, so the job need not look for duplicates."""

    @property
    def text_field(self) -> str:
        """The path of the field with the text, such as ``meta.text``. Sinks store the text under the same name."""

    def fingerprint(self) -> str:
        """Return a hash of the files' content, or a collection's identity. A job continues only if it is unchanged.

        Raises:
            BulkError: the source cannot be read.
        """

    def count(self) -> int | None:
        """Return the approximate number of rows; ``None`` if it is unknown before they are read."""

    def read(self, after: Position | None = None) -> Iterator[Row | BadRow]:
        """Yield the rows after a position, or all rows, in constant memory.

        Raises:
            BulkError: the source has gone away, or is of another kind.
        """

    def close(self) -> None:
        """Close connections and files."""


class Sink(Protocol):
    """A destination that stores vectors. Used from one thread at a time."""

    @property
    def name(self) -> str:
        """The name of the sink in messages and in the manifest, without passwords."""

    def open(self, note: SpaceNote) -> None:
        """Create the sink if it does not exist, and check that it can take vectors of this space.

        Raises:
            BulkError: it has vectors of another space or width, or cannot be reached.
        """

    def write(self, shard: int, batch: EmbeddedRows) -> None:
        """Store a shard durably and atomically. Writing the same shard again replaces its earlier content.

        Args:
            shard: the shard's number, from 0. A number always has the same rows, also when the job continues later.

        Raises:
            RowsRefused: some rows cannot be stored, and the others can. Of an item with several rows, either all are in
            the sink or none.
            BulkError: the shard cannot be stored.
        """

    def close(self) -> None:
        """Close connections and files."""


@runtime_checkable
class CountedSink(Protocol):
    """A sink in a store, whose rows other programs may delete."""

    def count(self) -> int:
        """Return the number of rows, also those of other programs; 0 if the sink does not exist. Works before `Sink.open`.

        Raises:
            BulkError: the sink cannot be reached.
        """


@runtime_checkable
class RowValidator(Protocol):
    """A sink that cannot store every row. Such rows are bad rows, which the job skips or stops at before it embeds them."""

    def problem(self, row: Row) -> str:
        """Return the reason why a row cannot be stored; empty if it can. Called in another thread than the other methods."""


@runtime_checkable
class Composed(Protocol):
    """A source or sink that knows the names of all collections whose items it shows.

    Attributes:
        collections: its own name in one spelling, and those of the other collections.
    """

    collections: Sequence[str]

"""Rows, vectors and notes for the tests of stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np

from gateway.bulk.fields import FieldNames
from gateway.bulk.places import open_store, read_place
from gateway.bulk.rows import BadRow, CountedSink, EmbeddedRows, Json, Row, RowId, SpaceNote
from gateway.bulk.stores.protocol import SinkOptions, Store
from gateway.types import SparseVector

WIDTH = 4
TOKEN_WIDTH = 3
NOTE = SpaceNote("tiny@0123456789ab", "tiny", "passage", WIDTH, is_normalized=True)
HYBRID = replace(NOTE, has_sparse=True, token_width=TOKEN_WIDTH)


def vector_of(text: str, width: int = WIDTH) -> np.ndarray:
    """Return a vector of norm 1 that depends only on the text."""
    seed = int.from_bytes(text.encode()[-7:] + b"\x01")
    vector = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    return vector / np.linalg.norm(vector)


def row(row_id: RowId, text: str, payload: Mapping[str, Json] | None = None) -> Row:
    return Row(row_id, text, payload or {}, f"id {row_id}", None)


def embedded(rows: Sequence[Row], note: SpaceNote = NOTE) -> EmbeddedRows:
    """Return rows with the outputs of a note."""
    return EmbeddedRows(
        rows,
        np.stack([vector_of(row.text, note.dimensions) for row in rows]) if note.dimensions else None,
        [
            SparseVector(np.array([1, 5 + len(row.text) % 3]), np.array([0.5, len(row.text)], np.float32)) for row in rows
        ] if note.has_sparse else None,
        [
            np.stack([vector_of(f"{row.text}{n}", note.token_width) for n in range(1 + len(row.text) % 4)]) for row in rows
        ] if note.token_width else None,
    )  # fmt: skip


def open_url(url: str) -> tuple[Store, str]:
    """Return the store of a URL, and the collection."""
    place = read_place(url)
    assert place is not None
    return open_store(place), place.collection


def name_of(url: str) -> str:
    """Return the collection of a URL."""
    place = read_place(url)
    assert place is not None
    return place.collection


def count(url: str) -> int:
    """Return the number of rows, as a sink says it."""
    store, collection = open_url(url)
    with closing(store), closing(store.sink(collection, SinkOptions())) as sink:
        assert isinstance(sink, CountedSink)
        return sink.count()


def write(
    url: str, rows: Sequence[Row], note: SpaceNote = NOTE, options: SinkOptions | None = None, shard: int = 0
) -> None:
    """Open a sink, write one shard and close it."""
    store, collection = open_url(url)
    sink = store.sink(collection, options or SinkOptions())
    store.close()
    try:
        sink.open(note)
        if rows:
            sink.write(shard, embedded(rows, note))
    finally:
        sink.close()


def read(url: str, fields: FieldNames | None = None, after: Json = None) -> list[Row | BadRow]:
    """Return all rows of a source."""
    store, collection = open_url(url)
    source = store.source(collection, fields or FieldNames())
    store.close()
    try:
        return list(source.read(after))
    finally:
        source.close()


def by_id(url: str, fields: FieldNames | None = None) -> dict[RowId, tuple[str, dict[str, Json]]]:
    """Return the text and payload of all rows of a source."""
    found = read(url, fields)
    assert all(isinstance(row, Row) for row in found), found
    ids = {row.id: (row.text, dict(row.payload)) for row in found if isinstance(row, Row)}
    assert len(ids) == len(found), "an id twice"
    return ids

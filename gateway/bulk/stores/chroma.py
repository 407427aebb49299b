"""Chroma, as a server or a folder: a source and a sink."""

from __future__ import annotations

from gateway.bulk.fields import FieldNames
from gateway.bulk.rows import BulkError
from gateway.bulk.stores.chroma_connection import Connection
from gateway.bulk.stores.chroma_sink import ChromaSink
from gateway.bulk.stores.chroma_source import ChromaSource
from gateway.bulk.stores.protocol import Place, Since, SinkOptions


def open_store(place: Place) -> ChromaStore:
    """Return a server or a folder, whose sources and sinks open it."""
    return ChromaStore(place)


class ChromaStore:
    """Chroma as a store with collections."""

    def __init__(self, place: Place) -> None:
        self._place = place

    @property
    def name(self) -> str:
        """The store's URL, without secrets."""
        return self._place.store

    def source(self, collection: str, names: FieldNames, since: Since | None = None) -> ChromaSource:
        """Return the items of a collection as rows.

        Raises:
            BulkError: ``since`` was given, or the store cannot be reached.
        """
        if since is not None:
            raise BulkError("chroma cannot list the items changed since a given time")
        return ChromaSource(Connection(self._place, is_source=True), collection, names)

    def sink(self, collection: str, options: SinkOptions) -> ChromaSink:
        """Return a sink for a collection.

        Raises:
            BulkError: the store cannot be reached, or does not support these options.
        """
        if options.vector is not None or options.updates or options.like is not None:
            raise BulkError("chroma stores one unnamed vector per item")
        return ChromaSink(Connection(self._place, is_source=False), collection, options)

    def close(self) -> None:
        """Do nothing: sources and sinks have their own connections."""

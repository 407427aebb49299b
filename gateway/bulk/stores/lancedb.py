"""LanceDB, as a folder or a bucket: a source and a sink."""

from __future__ import annotations

from pathlib import Path

import lancedb

from gateway.bulk.fields import FieldNames
from gateway.bulk.rows import BulkError
from gateway.bulk.stores.lancedb_sink import LanceSink
from gateway.bulk.stores.lancedb_source import LanceSource
from gateway.bulk.stores.lancedb_tables import plain_errors
from gateway.bulk.stores.protocol import Place, Since, SinkOptions


def open_store(place: Place) -> LanceStore:
    """Return a folder or a bucket, whose sources and sinks open it."""
    return LanceStore(place)


class LanceStore:
    """LanceDB as a store with tables."""

    def __init__(self, place: Place) -> None:
        self._place = place

    @property
    def name(self) -> str:
        """The store's URL."""
        return self._place.store

    def source(self, collection: str, names: FieldNames, since: Since | None = None) -> LanceSource:
        """Return the rows of a table.

        Raises:
            BulkError: ``since`` was given, or the folder does not exist.
        """
        if since is not None:
            raise BulkError("lancedb cannot list the rows changed since a given time")
        if "://" not in self._place.location and not Path(self._place.location).is_dir():
            raise BulkError(f"there is no folder {self._place.location}")
        return LanceSource(self._connect(), self._place, collection, names)

    def sink(self, collection: str, options: SinkOptions) -> LanceSink:
        """Return a sink for a table.

        Raises:
            BulkError: the store does not support these options.
        """
        if options.vector is not None or options.updates or options.like is not None or options.adopts:
            raise BulkError("lancedb stores the vectors of a job in a table that the job creates")
        return LanceSink(self._connect(), self._place.named(collection), collection, options)

    def _connect(self) -> lancedb.DBConnection:
        with plain_errors(self._place.store):
            return lancedb.connect(self._place.location)

    def close(self) -> None:
        """Do nothing: a folder has no connection."""

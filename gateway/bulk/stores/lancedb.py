"""LanceDB, a folder or a bucket: a source and a sink."""

from __future__ import annotations

import lancedb

from gateway.bulk.fields import FieldNames
from gateway.bulk.rows import BulkError
from gateway.bulk.stores.lancedb_sink import LanceSink
from gateway.bulk.stores.lancedb_source import LanceSource
from gateway.bulk.stores.protocol import Keeping, Place, Since


def open_store(place: Place) -> LanceStore:
    """Open a folder or a bucket; a folder that does not exist is made.

    Raises:
        BulkError: it cannot be opened.
    """
    try:
        return LanceStore(place, lancedb.connect(place.location))
    except (ValueError, OSError, RuntimeError) as error:
        raise BulkError(f"{place.store} cannot be opened: {error}") from error


class LanceStore:
    """LanceDB as a store with tables."""

    def __init__(self, place: Place, database: lancedb.DBConnection) -> None:
        self._place = place
        self._database = database

    @property
    def name(self) -> str:
        """The store's URL."""
        return self._place.store

    def source(self, collection: str, names: FieldNames, since: Since | None = None) -> LanceSource:
        """Return the rows of a table.

        Raises:
            BulkError: a point of time was given.
        """
        if since is not None:
            raise BulkError("lancedb cannot list rows since a point of time")
        return LanceSource(self._database, self._place, collection, names)

    def sink(self, collection: str, keeping: Keeping) -> LanceSink:
        """Return a sink for a table.

        Raises:
            BulkError: the store cannot keep rows this way.
        """
        if keeping.vector is not None or keeping.updates or keeping.like is not None or keeping.adopts:
            raise BulkError("lancedb keeps the vectors of a job in a table that the job makes")
        return LanceSink(self._database, self._place.named(collection), collection, keeping)

    def close(self) -> None:
        """Do nothing: a folder has no connection."""

"""The points of a Qdrant collection as rows, in the order of their ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Final, cast

from qdrant_client import QdrantClient, models

from gateway.bulk.fields import FieldNames, Fields
from gateway.bulk.rows import BadRow, BulkError, Json, Position, Row, RowId
from gateway.bulk.stores.protocol import Since
from gateway.bulk.stores.qdrant_connection import Connection
from gateway.bulk.stores.qdrant_points import PointId, point_id, row_id_of
from gateway.bulk.stores.reading import SAMPLE, ItemSource

_PAGE: Final = 256
"""Points per request: small enough for texts of whole documents, large enough that requests cost little."""
_IDS_PAGE: Final = 5_000
"""Points per request, without texts."""


class QdrantSource(ItemSource):
    """Reads the points of a collection, without their vectors.

    A position is the id of a point. Points that are added after it while a job reads are read too. Points that are
    added before it are not; `gateway move` finds them in its second pass. Deleted points are left out.
    """

    def __init__(self, connection: Connection, collection: str, names: FieldNames, since: Since | None) -> None:
        super().__init__(connection.place.named(collection), names)
        self._connection = connection
        self._collection = collection
        self._since = since

    def _sample(self) -> Sequence[Mapping[str, Json]]:
        self._connection.read_info(self._collection)
        points, _ = self._scroll(None, SAMPLE)
        return [row_id_of(*_parts(point))[1] for point in points]

    def fingerprint(self) -> str:
        """Return the collection and the fields that are read; its points may change while a job runs.

        Raises:
            BulkError: the collection does not exist or cannot be read.
        """
        since = f" since {self._since.field} {self._since.moment}" if self._since else ""
        return f"{self.name} {self.fields}{since}"

    def count(self) -> int | None:
        """Return Qdrant's estimate of the number of points."""
        answer = self._connection.call(
            lambda client: client.count(self._collection, count_filter=self._filter, exact=False), self._collection
        )
        return answer.count

    def read(self, after: Position | None = None) -> Iterator[Row | BadRow]:
        """Yield the points after a position, or all points, page by page.

        Raises:
            BulkError: the collection does not exist or cannot be read.
        """
        if after is not None and (isinstance(after, bool) or not isinstance(after, int | str)):
            raise BulkError(f"{after!r} is not a position in {self.name}")
        for point, payload in self.read_payloads(after):
            yield self._row_of(point, payload)

    def read_payloads(
        self, after: PointId | None = None, fields: list[str] | None = None, vector: str | None = None
    ) -> Iterator[tuple[PointId, dict[str, Json]]]:
        """Yield the points after an id, or all points, with their payloads.

        Args:
            fields: the needed fields of the payloads; ``None`` for all.
            vector: yield only points that have a vector of this name.

        Raises:
            BulkError: the collection does not exist or cannot be read.
        """
        self._connection.read_info(self._collection)
        offset = after
        while True:
            points, following = self._scroll(offset, _PAGE if fields is None else _IDS_PAGE, fields, vector)
            for point in points:
                # Qdrant starts with the point at the offset itself.
                if point.id != after:
                    yield _parts(point)
            if following is None:
                return
            offset = following

    def read_ids(self, ids: Sequence[RowId], fields: Fields) -> Iterator[Row | BadRow]:
        """Yield the existing points of these rows.

        Args:
            fields: those that make a row; these points may lack them.

        Raises:
            BulkError: the collection does not exist or cannot be read.
        """
        for start in range(0, len(ids), _PAGE):
            retrieve = partial(self._retrieve, [point_id(row_id) for row_id in ids[start : start + _PAGE]])
            for point in self._connection.call(retrieve, self._collection):
                number, payload = _parts(point)
                row_id, rest = row_id_of(number, payload)
                yield fields.row(rest, f"id {row_id} of {self.name}", number, row_id)

    def close(self) -> None:
        """Close the connection, if it has no other users."""
        self._connection.close()

    @property
    def _filter(self) -> models.Filter | None:
        if self._since is None:
            return None
        moment = self._since.moment
        later = models.DatetimeRange(gt=moment) if isinstance(moment, datetime) else models.Range(gt=moment)
        return models.Filter(must=[models.FieldCondition(key=self._since.field, range=later)])

    def _scroll(
        self, offset: PointId | None, limit: int, fields: list[str] | None = None, vector: str | None = None
    ) -> tuple[list[models.Record], PointId | None]:
        having = None if vector is None else models.Filter(must=[models.HasVectorCondition(has_vector=vector)])
        points, following = self._connection.call(
            lambda client: client.scroll(
                self._collection,
                scroll_filter=having or self._filter,
                limit=limit,
                offset=offset,
                with_payload=True if fields is None else fields,
                with_vectors=False,
            ),
            self._collection,
        )
        return points, cast("PointId | None", following)

    def _retrieve(self, ids: list[PointId], client: QdrantClient) -> list[models.Record]:
        return client.retrieve(self._collection, ids, with_payload=True)

    def _row_of(self, point: PointId, payload: dict[str, Json]) -> Row | BadRow:
        return self._row(*row_id_of(point, payload), point)


def _parts(point: models.Record) -> tuple[PointId, dict[str, Json]]:
    point_id = point.id if isinstance(point.id, int | str) else str(point.id)
    return point_id, cast("dict[str, Json]", point.payload or {})

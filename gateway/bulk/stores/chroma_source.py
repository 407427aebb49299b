"""The items of a Chroma collection as rows, in the order in which they were added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Final, NamedTuple, cast

from chromadb.api.models.Collection import Collection
from chromadb.api.types import Include

from gateway.bulk.fields import FieldNames, Fields
from gateway.bulk.rows import BadRow, BulkError, Json, Position, Row
from gateway.bulk.stores.chroma_connection import Connection
from gateway.bulk.stores.chroma_items import DOCUMENT, row_id_of
from gateway.bulk.stores.payloads import to_json
from gateway.bulk.stores.reading import SAMPLE, ItemSource, fields_of

_PAGE: Final = 256
_INCLUDE: Final = cast(Include, ["metadatas", "documents"])


class _Item(NamedTuple):
    """An item, and its index in the collection's order, from 0."""

    offset: int
    id: str
    record: dict[str, Json]


class ChromaSource(ItemSource):
    """Reads the items of a collection, without their vectors.

    Chroma can only skip a number of items, so a position is a number of items and the id of the item there. If earlier
    items were deleted, the item is found nearer to the beginning. Items that are added while a job reads come last and
    are read too.
    """

    def __init__(self, connection: Connection, collection: str, names: FieldNames) -> None:
        super().__init__(connection.place.named(collection), names)
        self._connection = connection
        self._collection = collection

    def _sample(self) -> Sequence[Mapping[str, Json]]:
        return [row_id_of(item.id, item.record)[1] for item in self._page(0, SAMPLE)]

    @cached_property
    def fields(self) -> Fields:
        """The fields that make a row; Chroma's own field for the text is called ``document``.

        Raises:
            BulkError: the first items lack the fields.
        """
        records = self._sample()
        names = self._names
        if names.text is None and any(record[DOCUMENT] is not None for record in records):
            names = FieldNames(names.id, DOCUMENT, names.title, names.payload)
        return fields_of(names, records, self.name)

    @cached_property
    def _items(self) -> Collection:
        return self._connection.get(self._collection)

    def fingerprint(self) -> str:
        """Return Chroma's id of the collection, and the fields that are read.

        Raises:
            BulkError: the collection does not exist or cannot be read.
        """
        return f"{self.name} {self._items.id} {self.fields}"

    def count(self) -> int | None:
        """Return the number of items."""
        return self._connection.call(self._items.count, self.name)

    def read(self, after: Position | None = None) -> Iterator[Row | BadRow]:
        """Yield the items after a position, or all items, page by page.

        Raises:
            BulkError: the collection does not exist or cannot be read, or the item at the position was deleted.
        """
        last = None if after is None else self._find(after)
        while True:
            # Each page begins with the last item of the previous page. If another item is there, items were deleted.
            start = 0 if last is None else last.offset
            page = self._page(start, _PAGE)
            if last is not None:
                if not page or page[0].id != last.id:
                    last = self._find([last.offset, last.id])
                    continue
                page = page[1:]
            if not page:
                return
            for item in page:
                yield self._row(*row_id_of(item.id, item.record), [item.offset, item.id])
            last = page[-1]

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _find(self, position: Position) -> _Item:
        """Return the item at a position, which deletions may have moved toward the beginning."""
        match position:
            case [int() as offset, str() as item_id]:
                pass
            case _:
                raise BulkError(f"{position!r} is not a position in {self.name}")
        end = offset + 1
        while end > 0:
            start = max(0, end - _PAGE)
            for item in self._page(start, end - start):
                if item.id == item_id:
                    return item
            end = start
        raise BulkError(
            f"the item {item_id!r} of {self.name} was deleted while the job was reading, so the job cannot find its "
            "place again. Start over with an empty sink while no program deletes items"
        )

    def _page(self, offset: int, limit: int) -> list[_Item]:
        found = self._connection.call(partial(self._items.get, limit=limit, offset=offset, include=_INCLUDE), self.name)
        documents, metadatas = found["documents"] or [], found["metadatas"] or []
        items = []
        for index, item_id in enumerate(found["ids"]):
            metadata = cast("dict[str, Json]", to_json(metadatas[index] or {}))
            items.append(_Item(offset + index, item_id, {**metadata, DOCUMENT: documents[index]}))
        return items

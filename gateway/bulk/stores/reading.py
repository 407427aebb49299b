"""Shared code of several stores' sources: the fields of items, filtering by time, and reading in the order of ids."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Final, Protocol, TypeAlias

from gateway.bulk.fields import TEXT_FIELDS, FieldNames, Fields, get, resolve_fields
from gateway.bulk.rows import BadRow, BulkError, Json, Position, Row, RowId
from gateway.bulk.stores.protocol import Mark, Moment, Since

SAMPLE: Final = 64
"""The number of items that are inspected to find the fields."""
_CLOCK_MARGIN: Final = timedelta(hours=1)
_WESTERNMOST: Final = timedelta(hours=12)
"""The time zone in which a local time is latest."""

Item: TypeAlias = tuple[RowId, dict[str, Json]]
"""The id and the payload of an item."""


class ReadPage(Protocol):
    """Returns the next items after an id, in ascending order of the ids."""

    def __call__(self, after: RowId | None, limit: int = ..., /) -> list[Item]: ...


class ItemSource(ABC):
    """A source of items that have an id in their store and a payload: the fields of a row, and rows by them.

    Args:
        name: the name of the collection in messages, without secrets.
    """

    def __init__(self, name: str, names: FieldNames) -> None:
        self.name = name
        self._names = names

    @abstractmethod
    def _sample(self) -> Sequence[Mapping[str, Json]]:
        """Return the payloads of the first ``SAMPLE`` items."""

    @cached_property
    def fields(self) -> Fields:
        """The fields that make a row.

        Raises:
            BulkError: the first items lack the fields.
        """
        return fields_of(self._names, self._sample(), self.name)

    @property
    def has_unique_ids(self) -> bool:
        """The store's own ids are unique; a field that the user chose as the id may not be."""
        return self._names.id is None

    @property
    def text_field(self) -> str:
        """The payload field with the text.

        Raises:
            BulkError: the first items lack the field.
        """
        return self.fields.text

    def _row(self, row_id: RowId, payload: Mapping[str, Json], position: Position) -> Row | BadRow:
        place = f"id {row_id} of {self.name}"
        return self.fields.row(payload, place, position, row_id if self._names.id is None else None)


class KeysetSource(ItemSource):
    """The items of a store that returns them in ascending order of their ids. A position is the id of the last item.

    Args:
        name: the name of the collection in messages.
        identity: an identity of the collection that another collection of the same name does not share.
        count: returns the number of items.
        close: closes the connection.
        behind: the names of the collections whose items it shows, which may include its own.
    """

    def __init__(
        self,
        name: str,
        identity: object,
        names: FieldNames,
        since: Since | None,
        *,
        read_page: ReadPage,
        count: Callable[[], int],
        close: Callable[[], None],
        behind: Sequence[str] = (),
    ) -> None:
        super().__init__(name, names)
        self.collections = [name, *behind]
        self._identity = identity
        self._since = since
        self._read_page = read_page
        self.count = count
        self.close = close

    def _sample(self) -> Sequence[Mapping[str, Json]]:
        return [payload for _id, payload in self._read_page(None, SAMPLE)]

    def fingerprint(self) -> str:
        """Return the collection's identity, and the fields that are read."""
        since = f" since {self._since.field} {self._since.moment}" if self._since else ""
        return f"{self.name} {self._identity} {self.fields}{since}"

    def read(self, after: Position | None = None) -> Iterator[Row | BadRow]:
        """Yield the items after a position, or all items, page by page.

        Raises:
            BulkError: the position is not one of this store, or the collection cannot be read.
        """
        if after is not None and (isinstance(after, bool) or not isinstance(after, int | str)):
            raise BulkError(f"{after!r} is not a position in {self.name}")
        last = after
        while page := self._read_page(last):
            for row_id, payload in page:
                last = row_id
                if self._since is None or is_later(payload, self._since):
                    yield self._row(row_id, payload, row_id)


def is_later(payload: Mapping[str, Json], since: Since) -> bool:
    """Return whether a field is later than ``since``; values that cannot be compared count as later, to miss nothing."""
    value = get(payload, since.field)
    moment: Moment | None = None
    if isinstance(value, int | float):
        moment = value
    elif isinstance(value, str):
        with suppress(ValueError, OverflowError):
            moment = datetime.fromisoformat(value)
            if moment.tzinfo is None:  # of any time zone; a date without a time says too little
                moment = (moment + _WESTERNMOST).replace(tzinfo=UTC) if ":" in value else None
    try:
        return moment is None or moment > since.moment  # type: ignore[operator]
    except TypeError:
        return True


def clock_mark(field: str) -> Mark:
    """Return the present moment for items that have the time of their last change in a field.

    It is an hour early, because clocks differ, and a write may happen long after the application read its clock.
    """
    return json.dumps({"field": field, "moment": (datetime.now(UTC) - _CLOCK_MARGIN).isoformat()})


def since_mark(mark: Mark) -> Since:
    """Return the condition of a mark of `clock_mark`."""
    content = json.loads(mark)
    return Since(content["field"], datetime.fromisoformat(content["moment"]))


def fields_named(names: FieldNames) -> Fields:
    """Return the fields that make a row by their names alone, for items some of which lack them."""
    return Fields(names.id, names.text or TEXT_FIELDS[0], names.title, names.payload)


def fields_of(names: FieldNames, payloads: Sequence[Mapping[str, Json]], place: str) -> Fields:
    """Return the fields that make a row from items that have ids in their store.

    Args:
        payloads: the payloads of the first items.

    Raises:
        BulkError: the payloads lack the fields.
    """
    if not payloads:
        return fields_named(names)
    fields = resolve_fields(names, payloads, place)
    # A field with this name is part of the payload, unless the user chose it as the id.
    return fields if names.id is not None else replace(fields, id=None)

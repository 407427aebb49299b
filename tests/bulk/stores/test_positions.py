"""A position that another store has written is refused: starting over would write every item twice."""

from __future__ import annotations

import pytest

from gateway.bulk.fields import FieldNames
from gateway.bulk.rows import BulkError, Json, Row, RowId
from gateway.bulk.stores.reading import Item, KeysetSource

ITEMS: list[Item] = [(i, {"text": f"text {i}"}) for i in range(5)]


def read_page(after: RowId | None, limit: int = 2) -> list[Item]:
    return [item for item in ITEMS if after is None or int(item[0]) > int(after)][:limit]


@pytest.fixture
def source() -> KeysetSource:
    return KeysetSource(
        "postgres/items", 1, FieldNames(), None, read_page=read_page, count=lambda: 5, close=lambda: None
    )


@pytest.mark.parametrize("position", [[1, 2], True, 1.5, {"id": 1}])
def test_a_position_of_another_store_is_refused(source: KeysetSource, position: Json) -> None:
    with pytest.raises(BulkError, match="is not a position in postgres/items"):
        next(source.read(position))


@pytest.mark.parametrize(("after", "num_items"), [(None, 5), (0, 4), (3, 1), (4, 0)])
def test_items_are_read_from_a_position_on(source: KeysetSource, after: Json, num_items: int) -> None:
    rows = list(source.read(after))

    assert len(rows) == num_items
    assert all(isinstance(row, Row) for row in rows)

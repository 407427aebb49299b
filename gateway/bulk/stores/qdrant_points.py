"""Qdrant's ids and payloads. Pure.

Qdrant's ids are unsigned 64-bit integers and UUIDs. Rows with such ids keep them. All other ids are mapped to UUIDs
that depend only on the id, and the payload keeps the original id in the field ``gateway_id``.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from typing import Final, TypeAlias

from gateway.bulk.rows import Json, Row, RowId
from gateway.bulk.stores.payloads import large_integer_problem, with_text
from gateway.config.wording import cut

PointId: TypeAlias = int | str
"""An unsigned integer, or a UUID in its usual spelling."""

ORIGINAL_ID: Final = "gateway_id"
"""The payload field for a row's original id, if Qdrant does not allow that id."""

_NAMESPACE: Final = uuid.UUID("5b0e6f0c-9d0b-5f3c-8c2e-3d1f6a7b9e42")
_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
_MAX_INTEGER: Final = 2**64 - 1


def point_id(row_id: RowId) -> PointId:
    """Return the id of a row's point; different rows have different ids."""
    if isinstance(row_id, int):
        # 5 and "5" are different ids.
        return row_id if 0 <= row_id <= _MAX_INTEGER else str(uuid.uuid5(_NAMESPACE, f"int:{row_id}"))
    return row_id.lower() if _UUID.fullmatch(row_id) else str(uuid.uuid5(_NAMESPACE, f"str:{row_id}"))


def row_id_of(point: PointId, payload: Mapping[str, Json]) -> tuple[RowId, dict[str, Json]]:
    """Return the original id of a point's row, and the payload without it."""
    rest = dict(payload)
    original = rest.get(ORIGINAL_ID)
    if isinstance(original, str | int) and not isinstance(original, bool) and point_id(original) == point:
        del rest[ORIGINAL_ID]
        return original, rest
    return point, rest


def problem_of(row: Row) -> str:
    """Return the reason why Qdrant cannot store a row; empty if it can."""
    if ORIGINAL_ID not in row.payload or point_id(row.id) == row.id:
        return large_integer_problem(row, row.payload, "Qdrant")
    return (
        f"it has a field `{ORIGINAL_ID}`, a name reserved for ids that Qdrant does not allow, such as "
        f"{cut(repr(row.id))}: rename the field"
    )


def payload_of(row: Row, text_field: str | None) -> dict[str, Json]:
    """Return the payload of a row's point.

    Args:
        text_field: the field for the text; ``None`` to leave out the text.
    """
    payload = dict(row.payload) if text_field is None else with_text(row, text_field)
    if point_id(row.id) != row.id:
        payload[ORIGINAL_ID] = row.id
    return payload


def sort_key(point: PointId) -> tuple[int, int | str]:
    """Return a point's sort key in the order in which Qdrant lists points: integers, then UUIDs."""
    return (0, point) if isinstance(point, int) else (1, uuid.UUID(point).int)

"""Chroma's ids and metadata. Pure.

Chroma's ids are strings, and its metadata has no nested objects. A row's numeric id becomes its digits, and the
metadata keeps the number in the field ``gateway_id``. Objects and mixed lists are stored as JSON text; fields without a
value are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final, TypeAlias

from gateway.bulk.rows import Json, Row, RowId
from gateway.config.wording import quote

Value: TypeAlias = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]

ORIGINAL_ID: Final = "gateway_id"
_RESERVED: Final = ("$", "#", "chroma:document")
DOCUMENT: Final = "document"
"""Chroma's own field for the text of an item."""

_INT64: Final = range(-(2**63), 2**63)


def problem_of(payload: Mapping[str, Json]) -> str:
    """Return the reason why Chroma cannot store the fields of a row; empty if it can."""
    if ORIGINAL_ID in payload:
        return f"it has a field `{ORIGINAL_ID}`, a name reserved for numeric ids in Chroma: rename the field"
    if "" in payload:
        return "it has a field with an empty name, which Chroma rejects: leave it out with --payload"
    if name := next((name for name in payload if name.startswith(_RESERVED)), ""):
        return f"it has a field {quote(name)}, a name that Chroma reserves: rename it, or leave it out with --payload"
    return ""


def metadata_of(row: Row) -> dict[str, Value]:
    """Return the metadata of a row's item, whose document is the row's text."""
    metadata: dict[str, Value] = {}
    for name, value in row.payload.items():
        if (kept := _value(value)) is not None:
            metadata[name] = kept
    if isinstance(row.id, int):
        metadata[ORIGINAL_ID] = row.id if row.id in _INT64 else str(row.id)
    return metadata


def _value(value: Json) -> Value | None:
    match value:
        case None | bool() | float() | str():
            return value
        case int():
            return value if value in _INT64 else str(value)
        case list() if (
            value
            and len({type(item) for item in value}) == 1
            and isinstance(value[0], bool | int | float | str)
            and all(not isinstance(item, int) or item in _INT64 for item in value)
        ):
            return value
    return json.dumps(value, ensure_ascii=False)


def row_id_of(item: str, metadata: Mapping[str, Json]) -> tuple[RowId, dict[str, Json]]:
    """Return the original id of an item's row, and the metadata without it."""
    rest = dict(metadata)
    original = rest.get(ORIGINAL_ID)
    if isinstance(original, int | str) and not isinstance(original, bool) and str(original) == item:
        del rest[ORIGINAL_ID]
        return int(original), rest
    return item, rest

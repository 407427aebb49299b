"""The fields of a store's items, and the items that changed after a point of time, for stores that cannot select them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime

from gateway.bulk.fields import TEXT_FIELDS, FieldNames, Fields, get, resolve_fields
from gateway.bulk.rows import Json
from gateway.bulk.stores.protocol import Moment, Since


def is_later(payload: Mapping[str, Json], since: Since) -> bool:
    """Return whether a field is later than a moment; one that cannot be compared counts as later, so nothing is missed."""
    value = get(payload, since.field)
    moment: Moment | None = None
    if isinstance(value, int | float):
        moment = value
    elif isinstance(value, str):
        with suppress(ValueError):
            moment = datetime.fromisoformat(value)
    try:
        return moment is None or moment > since.moment  # type: ignore[operator]
    except TypeError:
        return True


def fields_of(names: FieldNames, payloads: Sequence[Mapping[str, Json]], place: str) -> Fields:
    """Return the fields that make a row of items that have ids of their store.

    Args:
        payloads: of the first items.

    Raises:
        BulkError: the payloads do not have them.
    """
    if not payloads:
        return Fields(names.id, names.text or TEXT_FIELDS[0], names.title, names.payload)
    fields = resolve_fields(names, payloads, place)
    # A field of this name is payload, unless the user wants it as the id.
    return fields if names.id is not None else replace(fields, id=None)

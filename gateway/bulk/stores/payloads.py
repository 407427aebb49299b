"""Find an item's text in its payload, put it back, and hash a payload. Pure.

A path such as ``metadata.body`` names a field inside another. A name with a dot in it is always such a path.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, time
from typing import Final

from gateway.bulk.rows import BadRow, BulkError, Json, Position, Row, RowId
from gateway.bulk.stores.protocol import Fields
from gateway.config.wording import did_you_mean, quote

USUAL_TEXT_FIELDS: Final = ("text", "page_content", "document", "content", "chunk", "body", "data")
"""As frameworks name it: LangChain ``page_content``, Mem0 ``data``, FastEmbed and Chroma ``document``."""

_MAX_SHOWN_FIELDS: Final = 12


def find(payload: Mapping[str, Json], path: str) -> tuple[bool, Json]:
    """Return whether a payload has a field, and its value."""
    value: Json = payload
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return False, None
        value = value[name]
    return True, value


def without(payload: Mapping[str, Json], path: str) -> dict[str, Json]:
    """Return a payload without a field. Fields around it stay, even if they are empty then."""
    name, dot, rest = path.partition(".")
    copy = dict(payload)
    if not dot:
        copy.pop(name, None)
    elif isinstance(inner := copy.get(name), Mapping):
        copy[name] = without(inner, rest)
    return copy


def with_field(payload: Mapping[str, Json], path: str, value: Json) -> dict[str, Json]:
    """Return a payload with a field set, and with the fields around it.

    Raises:
        BulkError: a field around it is not an object.
    """
    name, dot, rest = path.partition(".")
    copy = dict(payload)
    if not dot:
        copy[name] = value
        return copy
    inner = copy.get(name, {})
    if not isinstance(inner, Mapping):
        raise BulkError(f"the text cannot be kept as {quote(path)}: {quote(name)} of the item is not an object")
    copy[name] = with_field(inner, rest, value)
    return copy


def only(payload: Mapping[str, Json], paths: Iterable[str]) -> dict[str, Json]:
    """Return only these fields of a payload."""
    kept: dict[str, Json] = {}
    for path in paths:
        exists, value = find(payload, path)
        if exists:
            kept = with_field(kept, path, value)
    return kept


def list_fields(payloads: Iterable[Mapping[str, Json]]) -> list[str]:
    """Return the paths of all fields with their first appearance first, objects by the fields in them."""
    paths: dict[str, None] = {}
    for payload in payloads:
        for path in _paths(payload, ""):
            paths[path] = None
    return list(paths)


def _paths(payload: Mapping[str, Json], before: str) -> Iterator[str]:
    for name, value in payload.items():
        if isinstance(value, Mapping) and value and before.count(".") < 3:
            yield from _paths(value, f"{before}{name}.")
        else:
            yield f"{before}{name}"


def describe_fields(payloads: Iterable[Mapping[str, Json]]) -> str:
    """Return the fields of payloads for a message, with the first ones if they are many."""
    paths = list_fields(payloads)
    shown = ", ".join(quote(path) for path in paths[:_MAX_SHOWN_FIELDS])
    more = len(paths) - _MAX_SHOWN_FIELDS
    return (shown + (f" and {more} more" if more > 0 else "")) or "no fields"


def choose_text_field(fields: Fields, payloads: Sequence[Mapping[str, Json]], where: str) -> str:
    """Return the field with the text: the one that the user named, or the one of the usual names that items have.

    Args:
        payloads: of some items.

    Raises:
        BulkError: the items have no field with a usual name, or several.
    """
    if fields.text is not None:
        return fields.text
    usual = [name for name in USUAL_TEXT_FIELDS if any(isinstance(payload.get(name), str) for payload in payloads)]
    if len(usual) == 1 or not payloads:
        return usual[0] if usual else USUAL_TEXT_FIELDS[0]
    problem = (
        "several of their fields could be the text" if usual else "none of their fields has a usual name of a text"
    )
    raise BulkError(
        f"which field is the text of the items of {where}? {problem}; they have {describe_fields(payloads)}. "
        "Name it with --text"
    )


def row_of(
    row_id: RowId,
    payload: Mapping[str, Json],
    text_field: str,
    kept: Sequence[str] | None,
    place: str,
    position: Position,
) -> Row | BadRow:
    """Return the row of an item, or why it cannot be embedded.

    Args:
        kept: fields of the payload to keep; ``None`` for all.
    """
    exists, text = find(payload, text_field)
    if not exists:
        hint = did_you_mean(text_field, list_fields([payload])) or ";"
        problem = f"it has no field {quote(text_field)}{hint} it has {describe_fields([payload])}"
    elif not isinstance(text, str):
        problem = f"its field {quote(text_field)} is {_kind_of(text)}, not a text"
    elif not text.strip():
        problem = f"its field {quote(text_field)} is empty"
    else:
        rest = without(payload, text_field)
        return Row(row_id, text, rest if kept is None else only(rest, kept), place, position)
    return BadRow(place, problem, position, row_id)


def _kind_of(value: Json) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case Mapping():
            return "an object"
        case _:
            return "a list"


def digest(payload: Mapping[str, Json]) -> bytes:
    """Return a 16-byte hash of a payload, regardless of the order of its fields."""
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def to_json(value: object) -> Json:
    """Return a value of a store as JSON has it: dates by ISO 8601, bytes in base64, others as their text.

    A number that is not finite becomes ``None``, since JSON has none.
    """
    converted: Json
    match value:
        case None | bool() | int() | str():
            converted = value
        case float():
            converted = value if math.isfinite(value) else None
        case datetime() | date() | time():
            converted = value.isoformat()
        case bytes() | bytearray() | memoryview():
            converted = base64.b64encode(value).decode()
        case Mapping():
            converted = {str(name): to_json(inner) for name, inner in value.items()}
        case list() | tuple() | set() | frozenset():
            converted = [to_json(inner) for inner in value]
        case _:
            converted = str(value)
    return converted

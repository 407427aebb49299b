"""Shared code of all stores for items: the kind of their ids, the text in their payload, JSON, and hashes. Pure."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time

from gateway.bulk.rows import BulkError, Json, Row
from gateway.config.wording import cut, quote


class KindOfIds:
    """The kind of ids that a store keeps in one collection: whole numbers or texts.

    The collection decides, and if it does not exist yet, the first row of the job.
    """

    def __init__(self) -> None:
        self.are_counted: bool | None = None

    def problem(self, row: Row, place: str) -> str:
        """Return the reason why a row's id is of the other kind; empty if it is not.

        Args:
            place: the collection, for messages.
        """
        is_counted = isinstance(row.id, int)
        if self.are_counted in (None, is_counted):
            return ""
        kinds = "an integer", "text"
        mine, theirs = kinds if is_counted else kinds[::-1]
        return (
            f"its id {cut(repr(row.id))} is {mine}, but the ids of {place} are {_PLURAL[theirs]}: use one kind of ids"
        )

    def add(self, row: Row) -> None:
        """Let a row that can be stored decide the kind, if no row has."""
        if self.are_counted is None:
            self.are_counted = isinstance(row.id, int)


_PLURAL = {"an integer": "integers", "text": "texts"}


def with_text(row: Row, path: str) -> dict[str, Json]:
    """Return a row's payload with its text, creating the objects around it: ``metadata.body`` is a nested field.

    If the row's source has a field that is itself called ``metadata.body``, so has the payload.

    Raises:
        BulkError: a field on the path is not an object.
    """
    is_own = ".".join(row.text_names) == path
    return _with_field(row.payload, row.text_names if is_own else path.split("."), row.text, path)


def _with_field(payload: Mapping[str, Json], names: Sequence[str], value: Json, path: str) -> dict[str, Json]:
    name, *rest = names
    copy = dict(payload)
    if not rest:
        copy[name] = value
        return copy
    inner = copy.get(name, {})
    if not isinstance(inner, Mapping):
        raise BulkError(f"the text cannot be stored as {quote(path)}: the item's {quote(name)} is not an object")
    copy[name] = _with_field(inner, rest, value, path)
    return copy


def digest(payload: Mapping[str, Json]) -> bytes:
    """Return a 16-byte hash of a payload, regardless of the order of its fields."""
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def to_json(value: object) -> Json:
    """Convert a store's value to JSON: dates to ISO 8601, bytes to base64, other types to text.

    Numbers that are not finite become ``None``, because JSON does not have them.
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


def has_nul(value: Json) -> bool:
    """Return whether a text in a value has the character U+0000, which some stores cannot keep."""
    match value:
        case str():
            return "\0" in value
        case Mapping():
            return any("\0" in name or has_nul(inner) for name, inner in value.items())
        case list() | tuple():
            return any(map(has_nul, value))
    return False


def large_integer_problem(row: Row, payload: Mapping[str, Json], store: str) -> str:
    """Return the reason why a store that rounds integers of more than 64 bits cannot keep a row; empty if it can."""
    if has_large_integer(row.id):
        return f"its id {row.id} has more than 64 bits, which {store} cannot store: make it a text"
    if name := next((name for name, value in payload.items() if has_large_integer(value)), ""):
        return (
            f"its field {quote(name)} has an integer of more than 64 bits, which {store} cannot store: make it a text"
        )
    return ""


def has_large_integer(value: Json) -> bool:
    """Return whether a value has an integer of more than 64 bits, which some stores cannot keep."""
    match value:
        case int():
            return not -(2**63) <= value < 2**64
        case Mapping():
            return any(map(has_large_integer, value.values()))
        case list() | tuple():
            return any(map(has_large_integer, value))
    return False

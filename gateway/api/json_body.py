"""Read a request's body: JSON with any content type, and the fields that every dialect has.

Unknown fields are ignored; `null` means absent, and so does an empty string in an optional field. Clients that are built
from forms and templates send `"true"`, `"512"` and `512.0`: a value that can mean only one thing is accepted. Any other
value is a 400, with one message for all fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any, Self, TypeAlias, TypeVar

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from gateway.errors import BadInput, EmptyInput
from gateway.http.parameters import read_parameter
from gateway.types import Truncate

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
T = TypeVar("T", bool, int, str)

SMALL_BYTES = 64 * 1024
"""A body of at most this size is parsed within a millisecond, with any content."""

_BOM = b"\xef\xbb\xbf"
# UTF-32's marks come first, because they begin with those of UTF-16.
_OTHER_BOMS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}

# The parser blocks the interpreter until it is done: 20 ms for 16 MB of text, 40 ms if that is nothing but escapes, 400 ms
# for 8 million numbers. With these limits it takes at most 30 ms.
_MAX_VALUES = 500_000
_MAX_CONTAINERS = 50_000
_MAX_KEYS = 50_000
_MAX_BACKSLASHES = 3_000_000
_PIECE_BYTES = 128 * 1024

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_HIGH, _LOW = rb"\\u[dD][89abAB][0-9a-fA-F]{2}", rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_LONE_SURROGATE = re.compile(rb"%b(?!%b)|(?<!%b)%b" % (_HIGH, _LOW, _HIGH, _LOW))
_ESCAPE_BYTES = 6
_MAX_LONE_SURROGATES = 100_000
_SHOWN_CHARS = 40
# How much of a content type is parsed.
_MAX_CONTENT_TYPE = 1_000


def parse_object(body: bytes | bytearray, charset: str | None = None, rows: str | None = None) -> dict[str, Json]:
    """Parse a body that must hold a JSON object.

    Args:
        charset: the content type's, for the error message: JSON is always read as UTF-8.
        rows: the key that a bare list is read under; ``None`` where a list is not accepted.

    Raises:
        BadInput: the body is empty, not UTF-8, not JSON, not an object, or has more parts than any request needs.
    """
    if not body:
        raise BadInput("the request body is empty; send a JSON object")
    body = body.removeprefix(_BOM)
    if len(body) > SMALL_BYTES:
        _check_structure(body)
    content = _parse(body, charset)
    if rows is not None and isinstance(content, list):
        content = {rows: content}
    if not isinstance(content, dict):
        raise BadInput(f"the request body must be a JSON object, got {describe(content)}")
    return content


def _parse(body: bytes | bytearray, charset: str | None) -> Json:
    reason = ""
    try:
        content: Json = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        reason = str(error)  # the error contains the whole body
    if not reason:
        return content
    _check_encoding(body, charset)
    # orjson rejects a lone surrogate such as "\ud83d", which JavaScript and many other clients send when they cut a
    # text in the middle of an emoji.
    if _SURROGATE.search(body):
        repaired = _without_lone_surrogates(body)
        try:
            content = orjson.loads(repaired)
        except orjson.JSONDecodeError as error:
            reason = str(error)
        else:
            return content
    if "depth limit" in reason:
        raise BadInput("the request body is nested too deep")
    raise BadInput(f"the request body is not valid JSON: {reason}")


def _check_structure(body: bytes | bytearray) -> None:
    """Reject a body with very many parts, because parsing it would block all other requests.

    Raises:
        BadInput: the body exceeds a limit, which the message names.
    """
    num_backslashes = sum(body.count(b"\\", first, first + _PIECE_BYTES) for first in range(0, len(body), _PIECE_BYTES))
    if num_backslashes > _MAX_BACKSLASHES:
        raise BadInput(_too_many(_MAX_BACKSLASHES, "backslashes") + r", or characters as UTF-8 instead of \u escapes")
    num_values = num_containers = num_keys = 0
    for piece in _outside_strings(body):
        num_containers += piece.count(b"[") + piece.count(b"{")
        num_keys += piece.count(b":")
        num_values += piece.count(b",")
        for num, most, what in (
            (num_values, _MAX_VALUES, "values"),
            (num_containers, _MAX_CONTAINERS, "lists and objects"),
            (num_keys, _MAX_KEYS, "keys"),
        ):
            if num > most:
                raise BadInput(_too_many(most, what))


def _too_many(most: int, what: str) -> str:
    return f"the request body has more than {most} {what}, which is the limit: send fewer inputs in a request"


def _outside_strings(body: bytes | bytearray) -> Iterator[bytes | bytearray]:
    """Yield the parts of a JSON text outside its strings, piece by piece: other threads can run in between."""
    in_string = False
    first = 0
    while first < len(body):
        piece = body[first : first + _PIECE_BYTES]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2 and first + len(piece) < len(body):  # an escape is cut in two
            piece = piece[:-1] or body[first : first + 2]
        first += len(piece)
        if b"\\" in piece:
            piece = piece.replace(rb"\\", b"").replace(rb"\"", b"")
        parts = piece.split(b'"')
        yield b" ".join(parts[in_string::2])
        in_string ^= len(parts) % 2 == 0


def _check_encoding(body: bytes | bytearray, charset: str | None) -> None:
    """Reject a body that is not JSON because it is not UTF-8.

    Raises:
        BadInput: always; the message names the likely encoding.
    """
    says = f"; its content type says {charset}" if charset and charset.lower() not in {"utf-8", "utf8"} else ""
    encoding = next((name for bom, name in _OTHER_BOMS.items() if body.startswith(bom)), None)
    if encoding is None and 0 in body[:4] and body[:4].strip(b"\0"):
        encoding = "UTF-16 or UTF-32"
    if encoding is not None:
        raise BadInput(f"the request body is in {encoding}{says}: send it in UTF-8")
    place = None
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        place = error.start
    if place is not None:
        raise BadInput(
            f"the request body is not valid UTF-8: byte {place} is {body[place]:#04x}{says}. Send it in UTF-8"
        )


def _without_lone_surrogates(body: bytes | bytearray) -> bytearray:
    """Return a JSON text with U+FFFD instead of lone surrogates, which no tokenizer accepts.

    Raises:
        BadInput: the text has too many of them.
    """
    # Spelled as \u005c, an escaped backslash cannot be mistaken for the beginning of an escape.
    repaired = bytearray(body.replace(rb"\\", rb"\u005c"))
    num_found = 0
    for first in range(0, len(repaired), _PIECE_BYTES):
        end = first + _PIECE_BYTES
        # Whether an escape at the end of a piece is a lone surrogate depends on the escape after it.
        for surrogate in _LONE_SURROGATE.finditer(repaired, first, end + 2 * _ESCAPE_BYTES):
            if surrogate.start() < end:
                num_found += 1
                repaired[surrogate.start() : surrogate.end()] = rb"\ufffd"
        if num_found > _MAX_LONE_SURROGATES:
            raise BadInput(
                f"the request body has more than {_MAX_LONE_SURROGATES} lone surrogates, which is the limit: its texts have "
                "been cut in the middle of characters"
            )
    return repaired


def charset_of(content_type: str) -> str | None:
    """Return the charset that a content type names, if it names one."""
    charset = read_parameter(content_type, "charset", _MAX_CONTENT_TYPE)
    return None if charset is None else charset[:_SHOWN_CHARS]


def integral(value: Json) -> Json:
    """Read 512.0 as 512: JSON has one kind of number, and some clients write all of them with a point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def describe(value: Json) -> str:
    """Describe a JSON value, for an error message; long ones are cut."""
    match value:
        case str():
            text = f"the string {value[:_SHOWN_CHARS] + '…' if len(value) > _SHOWN_CHARS else value!r}"
            text += f" of {len(value)} characters" if len(value) > _SHOWN_CHARS else ""
        case bool() | None:
            text = {None: "null", True: "true", False: "false"}[value]
        case int() | float():
            text = f"the number {str(value)[:_SHOWN_CHARS]}"
        case list():
            text = f"a list of {len(value)}" if value else "an empty list"
        case dict():
            keys = ", ".join(repr(key[:_SHOWN_CHARS]) for key in islice(value, 3))
            text = f"an object with {keys}" if value else "an empty object"
    return text


# -------------------------------------------------------------------------------------------------------- fields

# Infinity's own client sends the second one without a model.
NO_MODEL = ("", "default/not-specified")
"""Names that mean "no model named"."""

MAX_USER_CHARS = 1_000
_MAX_NAME_CHARS = 10_000
_FLAGS = {"true": True, "1": True, "false": False, "0": False}
_WHOLE_NUMBER = re.compile(r"[+-]?\d{1,18}(\.0*)?", re.ASCII)
_NUMBER = re.compile(r"[+-]?\d{1,15}(\.\d{0,15})?", re.ASCII)
# The words of Cohere, NVIDIA, Jina and TEI. ``True`` does not say where a text is cut.
_TRUNCATIONS = {
    True: None,
    False: Truncate.REFUSE,
    "end": Truncate.END,
    "right": Truncate.END,
    "start": Truncate.START,
    "left": Truncate.START,
    "none": Truncate.REFUSE,
}


def _flag(value: Json) -> Json:
    if isinstance(value, str):
        return _FLAGS.get(value.strip().lower(), value)
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else value


def whole_number(value: Json) -> Json:
    """Read "512" and 512.0 as 512, and any other value as it is."""
    if isinstance(value, str) and _WHOLE_NUMBER.fullmatch(text := value.strip()):
        return int(text.partition(".")[0])
    return integral(value)


def number(value: Json) -> Json:
    """Read "0.5" as 0.5, and any other value as it is."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) else value


def _lower(value: Json) -> Json:
    return value.strip().lower() if isinstance(value, str) else value


def _truncation(value: Json) -> Json:
    known = _lower(_flag(value))
    return _TRUNCATIONS.get(known, value) if isinstance(known, str | bool) else value


def _direction(value: Json) -> Json:
    known = _truncation(value) if isinstance(value, str) else value
    return known if known in (Truncate.START, Truncate.END) else value


Name: TypeAlias = Annotated[str, AfterValidator(lambda name: name[:_MAX_NAME_CHARS])]
"""A name, such as a task's. An overlong name is cut, because looking it up would block the event loop."""

ModelName: TypeAlias = Annotated[Name, AfterValidator(lambda name: None if name in NO_MODEL else name)]
"""The name of a model; values that mean "no model named" become ``None``."""


def _short(value: Json) -> Json:
    if isinstance(value, str) and len(value) > MAX_USER_CHARS:
        raise ValueError
    return value


User: TypeAlias = Annotated[Any, AfterValidator(_short)]
"""The end user of a request, of any type; only strings and numbers have a meaning."""

Flag: TypeAlias = Annotated[bool, BeforeValidator(_flag)]
"""A boolean, also written as ``"True"``, ``"0"`` or ``1``."""

PositiveInteger: TypeAlias = Annotated[int, Field(ge=1), BeforeValidator(whole_number)]
"""A whole number from 1, also written as ``"512"`` or ``512.0``."""

Number: TypeAlias = Annotated[float, BeforeValidator(number)]
"""A number, also written as ``"0.5"``."""

IN_ANY_CASE = BeforeValidator(_lower)
"""Marks a field with a list of lower-case values, which are accepted in any case."""

TRUNCATION = "true, false, `END`, `START`, `NONE`, `right` or `left`"
Truncation: TypeAlias = Annotated[
    Truncate | None,
    BeforeValidator(_truncation),
    WithJsonSchema(
        {"anyOf": [{"type": "boolean"}, {"enum": ["NONE", "END", "START", "left", "right"]}, {"type": "null"}]}
    ),
]
"""How to treat a text that is too long, in the terms of any API; ``None`` for plain ``true``."""

Texts: TypeAlias = Annotated[list[str], Field(fail_fast=True)]
"""A list of strings. Validation ends at the first wrong item: of a million, each would be an error with a message."""

DIRECTION = "`Left` or `Right`"
Direction: TypeAlias = Annotated[
    Truncate | None,
    BeforeValidator(_direction),
    WithJsonSchema({"anyOf": [{"enum": ["Left", "Right", "left", "right"]}, {"type": "null"}]}),
]
"""Which end of a text that is too long is dropped, in TEI's words."""


class RequestBody(BaseModel):
    """A request's body. The ``title`` of each field describes its values, for the error message."""

    model_config = ConfigDict(extra="ignore", strict=True)

    @classmethod
    def parse(cls, content: dict[str, Json]) -> Self:
        """Validate a parsed body.

        Raises:
            BadInput: a field is missing or has a value that is not accepted; names the first such field.
        """
        present = {name: value for name, value in content.items() if not cls._is_absent(name, value)}
        try:
            return cls.model_validate(present)
        except ValidationError as error:
            field = str(error.errors(include_url=False)[0]["loc"][0])
        if field not in present:
            raise BadInput(f"`{field}` is required", param=field)
        raise BadInput(
            f"`{field}` must be {cls.model_fields[field].title}, got {describe(present[field])}", param=field
        )

    @classmethod
    def _is_absent(cls, name: str, value: Json) -> bool:
        if value is None:
            return True
        return value == "" and (field := cls.model_fields.get(name)) is not None and not field.is_required()


def wanted_truncation(truncate: Truncate | None, direction: Truncate | None) -> Truncate:
    """Combine the fields on texts that are too long: whether to cut them, and at which end.

    Raises:
        BadInput: the fields name different ends.
    """
    if truncate is Truncate.REFUSE or direction is None:
        return truncate or Truncate.END
    if truncate not in (None, direction):
        raise BadInput(
            "`truncate` and `truncation_direction` name different ends of a text: leave one out",
            param="truncation_direction",
        )
    return direction


def resolve_synonyms(**synonyms: T | None) -> T | None:
    """Return the value of a field with several names; a request should use one of them.

    Raises:
        BadInput: two of them differ, so the request is ambiguous.
    """
    values = {name: value for name, value in synonyms.items() if value is not None}
    if len(set(values.values())) > 1:
        shown = " and ".join(f"`{name}` says {describe(value)}" for name, value in values.items())
        raise BadInput(f"{shown}: they mean the same, leave one out", param=next(iter(values)))
    return next(iter(values.values()), None)


def as_list(texts: str | list[str]) -> list[str]:
    """Return the texts; a single one becomes a list of one."""
    return [texts] if isinstance(texts, str) else texts


def check_batch(num_items: int, limit: int, field: str) -> None:
    """Reject a batch that is empty or too large, with TEI's messages.

    Raises:
        EmptyInput: it has no items.
        BadInput: it has more than ``limit``.
    """
    if num_items == 0:
        raise EmptyInput(f"`{field}` cannot be empty: send at least one", param=field)
    if num_items > limit:
        raise BadInput(
            f"batch size {num_items} > maximum allowed batch size {limit}: send several requests", param=field
        )

"""Read a request body as JSON, whatever its content type says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import TypeAlias

import orjson

from gateway.errors import BadInput

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

SMALL_BYTES = 64 * 1024
"""A body of no more than this is read in a millisecond, whatever is in it."""

_BOM = b"\xef\xbb\xbf"
# Of UTF-32, which begin like those of UTF-16, and UTF-16.
_OTHER_BOMS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}

# The parser holds the interpreter until it is done: 16 MB of text cost 20 ms, 8 million numbers 400. These cost 30 at most.
_MAX_VALUES = 500_000
_MAX_CONTAINERS = 50_000
_MAX_KEYS = 50_000
_PIECE_BYTES = 128 * 1024

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_HIGH, _LOW = rb"\\u[dD][89abAB][0-9a-fA-F]{2}", rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_LONE_SURROGATE = re.compile(rb"%b(?!%b)|(?<!%b)%b" % (_HIGH, _LOW, _HIGH, _LOW))
_ESCAPE_BYTES = 6
_MAX_LONE_SURROGATES = 100_000
_SHOWN_CHARS = 40


def parse_object(body: bytes | bytearray, charset: str | None = None) -> dict[str, Json]:
    """Parse a body that must hold a JSON object.

    Args:
        charset: what the content type says, for the error message: JSON is read as UTF-8.

    Raises:
        BadInput: it is empty, not UTF-8, not JSON, not an object, or of more parts than a request needs.
    """
    if not body:
        raise BadInput("the request body is empty; send a JSON object")
    body = body.removeprefix(_BOM)
    if len(body) > SMALL_BYTES:
        _check_structure(body)
    content = _parse(body, charset)
    if not isinstance(content, dict):
        raise BadInput(f"the request body must be a JSON object, got {describe(content)}")
    return content


def _parse(body: bytes | bytearray, charset: str | None) -> Json:
    reason = ""
    try:
        content: Json = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        reason = str(error)  # the error itself holds the whole body
    if not reason:
        return content
    _check_encoding(body, charset)
    # orjson refuses a lone surrogate such as "\ud83d", which JavaScript and many other clients send when they cut a text in
    # the middle of an emoji.
    if _SURROGATE.search(body):
        mended = _without_lone_surrogates(body)
        try:
            return orjson.loads(mended)  # type: ignore[no-any-return]
        except orjson.JSONDecodeError as error:
            reason = str(error)
    if "depth limit" in reason:
        raise BadInput("the request body is nested too deep")
    raise BadInput(f"the request body is not valid JSON: {reason}")


def _check_structure(body: bytes | bytearray) -> None:
    """Refuse a body of very many parts before it is parsed, which would hold everybody up.

    Raises:
        BadInput: names the limit.
    """
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
                raise BadInput(
                    f"the request body has more than {most} {what}, which is the limit: send fewer inputs in a request"
                )


def _outside_strings(body: bytes | bytearray) -> Iterator[bytes | bytearray]:
    """Yield what of a JSON text is not in a string, piece by piece: other threads can run in between."""
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
    """Say so if a body is not JSON because it is not UTF-8.

    Raises:
        BadInput: names what it seems to be.
    """
    says = f"; its content type says {charset}" if charset and charset.lower() not in {"utf-8", "utf8"} else ""
    found = next((name for bom, name in _OTHER_BOMS.items() if body.startswith(bom)), None)
    if found is None and 0 in body[:4] and body[:4].strip(b"\0"):
        found = "UTF-16 or UTF-32"
    if found is not None:
        raise BadInput(f"the request body is in {found}{says}: send it in UTF-8")
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
    """Return a JSON text with U+FFFD in place of lone surrogates, which no tokenizer takes.

    Raises:
        BadInput: there are very many.
    """
    # Written in the other way, a backslash can no longer be taken for the beginning of an escape.
    mended = bytearray(body.replace(rb"\\", rb"\u005c"))
    num_found = 0
    for first in range(0, len(mended), _PIECE_BYTES):
        end = first + _PIECE_BYTES
        # What begins before the end of a piece may have to be told by the escape after it.
        for found in _LONE_SURROGATE.finditer(mended, first, end + 2 * _ESCAPE_BYTES):
            if found.start() < end:
                num_found += 1
                mended[found.start() : found.end()] = rb"\ufffd"
        if num_found > _MAX_LONE_SURROGATES:
            raise BadInput(
                f"the request body has more than {_MAX_LONE_SURROGATES} lone surrogates, which is the limit: its texts have "
                "been cut in the middle of characters"
            )
    return mended


def integral(value: Json) -> Json:
    """Read 512.0 as 512: JSON has one kind of number, and some clients write all of them with a point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def describe(value: Json) -> str:
    """Say what a JSON value is, for an error message; long ones are cut."""
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

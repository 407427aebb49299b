"""Read a request body as JSON, whatever its content type says."""

from __future__ import annotations

import json
from typing import NoReturn, TypeAlias

import orjson

from gateway.errors import BadInput

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

_BOM = b"\xef\xbb\xbf"


def parse_object(body: bytes) -> dict[str, Json]:
    """Parse a body that must hold a JSON object.

    Raises:
        BadInput: it is empty, not UTF-8, not JSON, nested too deep, or not an object.
    """
    if not body:
        raise BadInput("the request body is empty; send a JSON object")
    content = _parse(body.removeprefix(_BOM))
    if not isinstance(content, dict):
        raise BadInput(f"the request body must be a JSON object, got {describe(content)}")
    return content


def _parse(body: bytes) -> Json:
    try:
        content: Json = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        # orjson refuses a lone surrogate such as "\ud83d", which JavaScript and many other clients send when they cut
        # a text in the middle of an emoji. The standard library takes it; for all else, orjson has the better message.
        if b"\\u" not in body:
            raise BadInput(f"the request body is not valid JSON: {error}") from None
    else:
        return content
    try:
        return _mend(json.loads(body.decode("utf-8"), parse_constant=_refuse_constant))
    except UnicodeDecodeError as error:
        raise BadInput(f"the request body is not valid UTF-8: byte {error.start} is {body[error.start]:#04x}") from None
    except RecursionError:
        raise BadInput("the request body is nested too deep") from None
    except ValueError as error:
        raise BadInput(f"the request body is not valid JSON: {error}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _mend(value: Json) -> Json:
    """Replace lone surrogates, which no tokenizer takes, by U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_mend(item) for item in value]
    if isinstance(value, dict):
        return {str(_mend(key)): _mend(item) for key, item in value.items()}
    return value


def integral(value: Json) -> Json:
    """Read 512.0 as 512: JSON has one kind of number, and some clients write all of them with a point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def describe(value: Json) -> str:
    """Say what a JSON value is, for an error message; long ones are cut."""
    match value:
        case str():
            text = f"the string {value[:40] + '…' if len(value) > 40 else value!r}"
        case bool() | None:
            text = {None: "null", True: "true", False: "false"}[value]
        case int() | float():
            text = f"the number {str(value)[:40]}"
        case list():
            text = f"a list of {len(value)}" if value else "an empty list"
        case dict():
            keys = ", ".join(repr(key[:40]) for key in list(value)[:3])
            text = f"an object with {keys}" if value else "an empty object"
    return text

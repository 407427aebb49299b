"""The parts of a name as clients write it: ``NAME/UNIT:TASK@HASH``. All parts except the name are optional.

A client that can send neither headers nor extra fields, such as Mem0, puts this information into the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote, unquote_to_bytes

from gateway.errors import BadInput

MAX_UNIT_BYTES = 256
"""The longest unit in a name, in bytes of UTF-8. The whole encoded name is cut to a few thousand."""

# Clients of Ollama and of its OpenAI paths add this tag to a name without a tag; it is not a task.
_DEFAULT_TAG = "latest"
_PINNED = re.compile(rf"(?P<plain>.+)@(?P<hash>[0-9a-f]{{12}})(?::{_DEFAULT_TAG})?", re.DOTALL)
# The characters that encodeURIComponent and Python's `quote` do not encode. Without `:` and `@`, a name is unambiguous.
_ENCODED = re.compile(r"(?:[A-Za-z0-9._~!*'()-]|%[0-9A-Fa-f]{2})+")


@dataclass(frozen=True, slots=True)
class Written:
    """One way to read a name.

    Attributes:
        name: the name of a model, an alias, an experiment or a source.
        unit: the unit as written, percent-encoded; only an experiment has units.
        task: the text after the colon.
        space_hash: the hash of the space that the vectors must be in, 12 hex digits.
    """

    name: str
    unit: str | None = None
    task: str | None = None
    space_hash: str | None = None


def readings(text: str) -> Iterator[Written]:
    """Yield the ways to read a name, the preferred one first: whole, as a source may have a colon, or with parts."""
    yield Written(text)
    plain, space_hash = text, None
    if pinned := _PINNED.fullmatch(text):
        plain, space_hash = pinned["plain"], pinned["hash"]
        yield Written(plain, space_hash=space_hash)
    bare, task = _split_task(plain)
    if bare != plain:
        yield Written(bare, task=task, space_hash=space_hash)


def read_after(experiment: str, text: str) -> Written | None:
    """Read a name as an experiment with a unit after it; return ``None`` if it does not begin with the experiment."""
    if not text.startswith(f"{experiment}/"):
        return None
    pinned = _PINNED.fullmatch(text)
    plain, space_hash = (pinned["plain"], pinned["hash"]) if pinned else (text, None)
    unit, task = _split_task(plain.removeprefix(f"{experiment}/"))
    return Written(experiment, unit, task, space_hash)


def _split_task(text: str) -> tuple[str, str | None]:
    """Return the text before the last colon, and the task after it."""
    bare, colon, task = text.rpartition(":")
    if not colon:
        return text, None
    return bare, None if task == _DEFAULT_TAG else task


def decode_unit(experiment: str, written: str) -> str:
    """Return a unit that is percent-encoded in a name.

    Raises:
        BadInput: the unit is empty, too long, not percent-encoded, or not UTF-8. The message may be logged, so it does
            not quote the unit.
    """
    how = "percent-encode it, as encodeURIComponent in JavaScript or quote(unit, safe='') in Python does"
    if not _ENCODED.fullmatch(written):
        raise BadInput(
            f"`model` must have a unit after {experiment + '/'!r}: letters, digits and -._~!*'() as they are, and all "
            f"other characters as %XX; {how}",
            param="model",
        )
    content = unquote_to_bytes(written)
    if len(content) > MAX_UNIT_BYTES:
        raise BadInput(
            f"the unit after {experiment + '/'!r} in `model` has {len(content)} bytes; the limit is {MAX_UNIT_BYTES}; send "
            "a hash of it",
            param="model",
        )
    try:
        unit = content.decode()
    except UnicodeDecodeError:
        raise BadInput(f"the unit after {experiment + '/'!r} in `model` is not UTF-8; {how}", param="model") from None
    if not unit.strip():
        raise BadInput(f"the unit after {experiment + '/'!r} in `model` is blank", param="model")
    return unit


def write_name(experiment: str, unit: str | None, space: str | None) -> str:
    """Return the name of an experiment with a unit and the hash of a space, as a client sends it."""
    name = experiment if unit is None else f"{experiment}/{quote(unit, safe='')}"
    return name if space is None else f"{name}@{space.rpartition('@')[2]}"

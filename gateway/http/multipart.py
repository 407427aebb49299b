"""Split a ``multipart/form-data`` body into its parts while it arrives (RFC 7578, 2046). Pure; holds a few KiB."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

from gateway.errors import BadInput
from gateway.http.parameters import read_parameter

_MAX_HEAD_BYTES = 8 * 1024
_MAX_PARTS = 20
# RFC 2046, 5.1.1.
_MAX_BOUNDARY = 70


@dataclass(frozen=True, slots=True)
class PartStart:
    """The start of a part: the name of the field, and the name of the file if the part is a file."""

    name: str
    filename: str | None


Event: TypeAlias = PartStart | bytes
"""The start of a part, or some content of the part that started last."""


class _State(Enum):
    BEFORE = auto()
    DELIMITER = auto()
    HEAD = auto()
    CONTENT = auto()
    AFTER = auto()


class Multipart:
    """Reads one body. Its events do not depend on the pieces in which it arrives, except for where content is cut.

    Args:
        content_type: the content type of the request, with the boundary.

    Raises:
        BadInput: the content type is another one, or has no boundary.
    """

    def __init__(self, content_type: str) -> None:
        boundary = read_parameter(content_type, "boundary")
        if content_type.partition(";")[0].strip().lower() != "multipart/form-data" or boundary is None:
            raise BadInput(
                "the body must be `multipart/form-data` with a boundary, the form in which clients upload files"
            )
        if not 0 < len(boundary) <= _MAX_BOUNDARY or not boundary.isascii():
            raise BadInput(f"the boundary of the body must have 1 to {_MAX_BOUNDARY} ASCII characters")
        self._delimiter = b"\r\n--" + boundary.encode()
        self._held = bytearray(b"\r\n")  # the body may begin with the first delimiter
        self._state = _State.BEFORE
        self._num_parts = 0

    def feed(self, data: bytes) -> Iterator[Event]:
        """Take the next piece of the body, and yield the events that it completes.

        Raises:
            BadInput: the body is not valid ``multipart/form-data``, or exceeds a limit.
        """
        self._held += data
        while (event := self._step()) is not None:
            if event:
                yield event

    def finish(self) -> None:
        """Check that the body was complete.

        Raises:
            BadInput: the body was cut off.
        """
        if self._state is not _State.AFTER:
            raise BadInput("the body ended before its last boundary: the upload was cut off")

    def _step(self) -> Event | None:
        """Advance by one step; return ``None`` if more bytes are needed, an empty event if the step yields nothing."""
        match self._state:
            case _State.BEFORE | _State.CONTENT:
                return self._read_content()
            case _State.DELIMITER:
                return self._read_delimiter()
            case _State.HEAD:
                return self._read_head()
            case _State.AFTER:
                self._held.clear()
                return None

    def _read_content(self) -> Event | None:
        is_part = self._state is _State.CONTENT
        end = self._held.find(self._delimiter)
        if end >= 0:
            content = bytes(self._held[:end]) if is_part else b""
            del self._held[: end + len(self._delimiter)]
            self._state = _State.DELIMITER
            return content
        num_safe = len(self._held) - len(self._delimiter) + 1  # the rest may be the start of a delimiter
        if num_safe <= 0:
            return None
        content = bytes(self._held[:num_safe]) if is_part else b""
        del self._held[:num_safe]
        return content

    def _read_delimiter(self) -> Event | None:
        rest = self._held.lstrip(b" \t")
        if len(rest) < 2:
            self._check_head_size()
            return None
        mark = bytes(rest[:2])
        if mark not in (b"\r\n", b"--"):
            raise BadInput("a boundary of the body must be followed by a line break")
        self._state = _State.HEAD if mark == b"\r\n" else _State.AFTER
        # The line break may be the first half of the blank line that ends a head without fields.
        del self._held[: len(self._held) - len(rest) + (0 if self._state is _State.HEAD else 2)]
        return b""

    def _read_head(self) -> Event | None:
        end = self._held.find(b"\r\n\r\n")
        if end < 0:
            self._check_head_size()
            return None
        lines = bytes(self._held[:end]).decode("utf-8", "replace").split("\r\n")
        del self._held[: end + 4]
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise BadInput(f"the body has more than {_MAX_PARTS} parts")
        self._state = _State.CONTENT
        return self._part_of(lines)

    def _check_head_size(self) -> None:
        if len(self._held) > _MAX_HEAD_BYTES:
            raise BadInput(f"the head of a part of the body has more than {_MAX_HEAD_BYTES} bytes")

    @staticmethod
    def _part_of(lines: list[str]) -> PartStart:
        disposition = ""
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip().lower() == "content-disposition":
                disposition = value.strip()
        name = read_parameter(disposition, "name")
        if name is None:
            raise BadInput("a part of the body has no name: `Content-Disposition: form-data; name=…` is missing")
        return PartStart(name, read_parameter(disposition, "filename"))

"""Lines of a file, of bounded length, each with its number and the place from which reading can continue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from gateway.bulk.fields import Record

MAX_LINE_BYTES = 16 * 2**20
"""The longest line or CSV record. A text of this size has about a million tokens, far more than any model reads."""

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Mark:
    """A place between two lines.

    Attributes:
        offset: the number of uncompressed bytes before it.
        number: the number of the last line before it, counted from 1.
    """

    offset: int = 0
    number: int = 0


@dataclass(frozen=True, slots=True)
class Line:
    """A line without its end; ``None`` for the content of a line that is too long.

    Attributes:
        end: its end.
    """

    content: bytes | None
    after: Mark
    end: str = "\n"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A record, or the problem with it.

    Attributes:
        number: the number of its line, or of its row in a Parquet file, counted from 1.
        after: where reading continues.
    """

    content: Record | str
    number: int
    after: Mark


def read_lines(file: BinaryIO, start: Mark, max_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """Yield the lines after a mark, including blank ones; memory is bounded by the length limit of lines.

    Args:
        file: an open file at any position; it is moved to the mark. A compressed file is decompressed up to there
            again.
    """
    file.seek(start.offset)
    offset, number = start.offset, start.number
    while raw := file.readline(max_bytes + 2):  # including the line end, which may be two bytes
        offset += len(raw)
        number += 1
        if raw.endswith(b"\n"):
            content: bytes | None = raw[:-2] if raw.endswith(b"\r\n") else raw[:-1]
        elif len(raw) == max_bytes + 2:
            while rest := file.readline(_CHUNK_BYTES):
                offset += len(rest)
                if rest.endswith(b"\n"):
                    break
            content = None
        else:
            content = raw  # the last line, without an end
        if content is not None and len(content) > max_bytes:
            content = None
        elif content is not None and number == 1:
            content = content.removeprefix(b"\xef\xbb\xbf")  # some editors write a byte order mark first
        yield Line(content, Mark(offset, number), "\r\n" if raw.endswith(b"\r\n") else "\n")

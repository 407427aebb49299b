"""The exposure log: the units and their arms in each experiment, as JSON lines in a rotated file."""

from __future__ import annotations

import glob
import logging
import os
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Annotated

import orjson
import structlog
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config

from gateway.config.files import OpenFile, open_regular
from gateway.errors import StartError
from gateway.telemetry import metrics

log = structlog.get_logger(__name__)

_SECONDS_BETWEEN_WARNINGS = 60.0


_MOST_SECONDS = 100_000_000_000.0  # the year 5138: a calendar has no room for the largest numbers


def _check_time(text: str) -> str:
    """Accept a time with its zone, from 1970 on."""
    time = datetime.fromisoformat(text)
    if time.tzinfo is None or not 0 <= time.timestamp() < _MOST_SECONDS:
        raise ValueError
    return text


@with_config(ConfigDict(strict=True, extra="forbid"))
@dataclass(frozen=True, slots=True)
class Exposure:
    """The first request of a unit in an arm. It is written even if it fails, and again once the unit gets an answer.

    An analysis of outcomes by arm must keep the units that got only errors; without them, it compares only lucky units.

    Attributes:
        time: ISO 8601 in UTC.
        generation: a hash of the salt, the arms and the weights that chose the arm.
        unit: salted hash, 16 hex digits.
        model: the model that answered or should have answered.
        space: the space of the vectors; ``None`` without an answer, and for scores.
        share: the share of the units that the weights give to the arm; ``None`` in logs of earlier versions.
        source: where the unit came from, such as ``header:x-unit``.
        answered: whether the request was answered.
        declared: a hash that tells declarations of the experiment's outcome apart, so that a later change is noticed.
    """

    time: Annotated[str, AfterValidator(_check_time)]
    experiment: str
    generation: str
    arm: str
    unit: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    model: str
    space: str | None
    share: Annotated[float, Field(ge=0, le=1)] | None = None
    source: str | None = None
    answered: bool = True
    declared: str | None = None


_EXPOSURE = TypeAdapter(Exposure)


class ExposureLog:
    """Appends exposures to a file. At ``max_bytes`` it becomes ``FILE.1``, the previous file ``FILE.2``, and so on.

    A file belongs to one process: each replica needs its own.

    Raises:
        StartError: the file cannot be written.
    """

    def __init__(self, path: Path, max_bytes: int, num_backups: int) -> None:
        self._path = path
        self._warned_at = -_SECONDS_BETWEEN_WARNINGS
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _File(path, maxBytes=max_bytes, backupCount=num_backups, encoding="utf-8")
        except OSError as error:
            raise StartError(f"the exposure log {path} cannot be written: {error.strerror}") from error
        weakref.finalize(self, self._file.close)

    def write(self, exposure: Exposure) -> bool:
        """Append an exposure, and return whether that worked.

        A full disk loses the line and counts it; no request fails.
        """
        line = orjson.dumps(exposure).decode()
        try:
            if self._file.is_lost:
                self._file.close()  # the next line opens it again
            self._file.emit(logging.makeLogRecord({"msg": line}))
        except (OSError, ValueError) as error:  # ValueError: a failed rotation can leave a closed file
            metrics.DROPPED_EXPOSURES.inc()
            # The next line reopens the file; an open file would keep the bytes that it could not write.
            with suppress(OSError, ValueError):
                self._file.close()
            if time.monotonic() - self._warned_at > _SECONDS_BETWEEN_WARNINGS:
                self._warned_at = time.monotonic()
                log.error("exposure_not_written", path=str(self._path), reason=str(error))
            return False
        return True

    def files(self) -> list[Path]:
        """Return the existing files, oldest first.

        A log such as ``/dev/stdout`` has no files: reading a pipe would wait for this process itself.
        """
        names = f"{glob.escape(self._path.name)}.*"
        rotated = [path for path in self._path.parent.glob(names) if path.suffix[1:].isdecimal()]
        rotated.sort(key=lambda path: -int(path.suffix[1:]))
        return [*rotated, *([self._path] if self._path.is_file() else [])]

    def close(self) -> None:
        self._file.close()


class _File(RotatingFileHandler):
    """The library's rotating handler, except that errors are raised, and that a named pipe is never waited for.

    A pipe without a reader cannot be opened, and one whose reader has stopped reading takes no more lines.
    """

    _opened: OpenFile

    def _open(self) -> TextIOWrapper:
        path = Path(self.baseFilename)
        _end_last_line(path)
        stream = open(path, "a", encoding=self.encoding, opener=_open_at_once)  # noqa: SIM115  the handler closes it
        self._opened = OpenFile(path)
        return stream

    @property
    def is_lost(self) -> bool:
        """Whether another program has removed or replaced the file, so that further lines would be lost."""
        return self.stream is not None and self._opened.is_lost

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the library's name
        raise  # noqa: PLE0704  called while the error is handled


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def _end_last_line(path: Path) -> None:
    """End a line that a crash or a full disk cut short, so that the next line does not continue it."""
    if path.is_file() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def now() -> str:
    """Return the current time in the log's format."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def iso(seconds: float) -> str:
    """Return a time in seconds since the epoch in the log's format."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def read_exposures(paths: Iterable[Path]) -> Iterator[Exposure]:
    """Read logs, one after the other. Malformed lines, such as those cut short by a crash, are skipped and logged.

    Raises:
        StartError: a file cannot be read.
    """
    for path in paths:
        num_unread = 0
        try:
            with open_regular(path) as file:
                for line in file:
                    if (exposure := _parse(line)) is not None:
                        yield exposure
                    elif line.strip():
                        num_unread += 1
        except OSError as error:
            raise StartError(f"the exposure log {path} cannot be read: {error.strerror}") from error
        if num_unread:
            log.warning("exposures_not_read", path=str(path), lines=num_unread)


def _parse(line: bytes) -> Exposure | None:
    try:
        return _EXPOSURE.validate_json(line)
    except ValidationError:
        return None

"""Write captured texts to one file per day, in a thread, and delete old files."""

from __future__ import annotations

import errno
import hashlib
import hmac
import importlib
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from functools import cached_property, partial
from pathlib import Path

import orjson
import structlog

from gateway.config.capture import Capture, dated, dated_files
from gateway.config.files import open_to_append, read_bounded
from gateway.telemetry import metrics

log = structlog.get_logger(__name__)

MAX_WAITING = 1_000
"""The number of texts that may wait to be written; further ones are dropped."""
MAX_CHARACTERS = 10_000
"""The length limit of a text in characters. A longer text is hardly a question, and a few would fill the memory."""
MAX_BYTES_PER_DAY = 64 * 1024 * 1024
"""The size limit of a file in bytes; further texts of the day are dropped."""

_MAX_KEY_BYTES = 4096
_CLEAN_EVERY_S = 600.0
_SECONDS_BETWEEN_WARNINGS = 60.0
_STOP_LIMIT_S = 5.0

Scrubber = Callable[[str], object]
"""Returns the part of a text that may be kept, or ``None``; a wrong function returns something else."""


class CaptureFailed(Exception):
    """A text cannot be written. The message does not contain it."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A text that was offered.

    Attributes:
        unit: the sender's id; only a keyed hash of it is written.
    """

    text: str
    name: str
    model: str
    task: str | None
    unit: str | None


class CaptureWriter:
    """Appends texts to the day's file.

    ``offer`` never waits. The thread scrubs, writes and deletes. Texts that it cannot write are counted and lost.

    Args:
        path: the path of the file without its date.
    """

    def __init__(self, name: str, capture: Capture, path: Path) -> None:
        self.name = name
        self.capture = capture
        self.path = path
        self._waiting: queue.Queue[Captured | None] = queue.Queue(MAX_WAITING)
        self._warned_at = -_SECONDS_BETWEEN_WARNINGS
        self._thread = threading.Thread(target=self._run, name=f"capture-{name}", daemon=True)
        self._thread.start()

    def offer(self, captured: Captured) -> None:
        """Queue a text or drop it; return immediately."""
        if len(captured.text) > MAX_CHARACTERS:
            self._count("too_long")
            return
        try:
            self._waiting.put_nowait(captured)
        except queue.Full:
            self._count("dropped")

    def stop(self) -> None:
        """Write waiting texts for at most some seconds, and end the thread."""
        with suppress(queue.Full):
            self._waiting.put(None, timeout=_STOP_LIMIT_S)
        self._thread.join(_STOP_LIMIT_S)

    def _run(self) -> None:
        cleaned_at = -_CLEAN_EVERY_S
        cleaned_on: date | None = None
        while True:
            now = datetime.now(UTC)
            if now.date() != cleaned_on or time.monotonic() - cleaned_at >= _CLEAN_EVERY_S:
                cleaned_at, cleaned_on = time.monotonic(), now.date()
                self._guard(self._delete_old)
            try:
                captured = self._waiting.get(timeout=min(_CLEAN_EVERY_S, _seconds_left_of_day(now)))
            except queue.Empty:
                continue
            if captured is None:
                return
            self._count(self._guard(partial(self._write, captured)) or "failed")

    def _guard(self, work: Callable[[], str | None]) -> str | None:
        """Run a step, catching every error: a full disk or a faulty hook must not end the thread."""
        try:
            return work()
        except Exception as error:  # see above
            if time.monotonic() - self._warned_at > _SECONDS_BETWEEN_WARNINGS:
                self._warned_at = time.monotonic()
                # Of other errors only the type, because the message of a hook's error may quote the text.
                reason = str(error) if isinstance(error, CaptureFailed) else type(error).__name__
                reason = str(error.strerror) if isinstance(error, OSError) else reason
                log.error("capture_failed", name=self.name, path=str(self.path), reason=reason)
            return None

    def _write(self, captured: Captured) -> str:
        """Write a text, and return the outcome for the metrics."""
        text = self._scrubbed(captured.text)
        if not text:
            return "scrubbed"
        now = datetime.now(UTC)
        entry = {
            "_id": secrets.token_hex(8),
            "text": text,
            "time": now.isoformat(timespec="seconds"),
            "name": captured.name,
            "model": captured.model,
            "task": captured.task,
        }
        if captured.unit is not None:
            entry["group"] = hmac.digest(self._key, captured.unit.encode(), hashlib.sha256).hex()[:16]
        line = orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE)
        descriptor = open_to_append(dated(self.path, now.date()), 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if size + len(line) > MAX_BYTES_PER_DAY:
                return "full"
            if os.write(descriptor, line) != len(line):  # the disk is full; half a line would corrupt the next
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
        return "written"

    def _scrubbed(self, text: str) -> str | None:
        if self._scrub is None:
            return text
        kept = self._scrub(text)
        if kept is not None and not isinstance(kept, str):  # `True` of a function that only says what may be kept
            raise CaptureFailed(f"{self.capture.scrub} must return a text or None, and returned {type(kept).__name__}")
        return kept if kept and kept.strip() else None

    def _delete_old(self) -> None:
        """Delete the files whose first text may be ``days`` days old."""
        today = datetime.now(UTC).date()
        for day, file in dated_files(self.path).items():
            if (today - day).days >= self.capture.days:
                file.unlink(missing_ok=True)
                log.info("capture_deleted", name=self.name, path=str(file))

    @cached_property
    def _scrub(self) -> Scrubber | None:
        return None if self.capture.scrub is None else load_scrub(self.capture.scrub)

    @cached_property
    def _key(self) -> bytes:
        """The secret of the units' hashes, in a file next to the texts. Without it, no hash can be linked to a unit."""
        path = self.path.with_name(f"{self.path.name}.key")
        if not path.exists():
            _write_key(path)
        key = read_bounded(path, _MAX_KEY_BYTES)
        if len(key) < 32:
            raise CaptureFailed(f"the key {path.name} of the captured units is truncated: delete it to make a new one")
        return key

    def _count(self, outcome: str) -> None:
        metrics.CAPTURED_TEXTS.labels(self.name, outcome).inc()


def _seconds_left_of_day(now: datetime) -> float:
    return (datetime.combine(now.date(), time_of_day.min, UTC) + timedelta(days=1) - now).total_seconds()


def _write_key(path: Path) -> None:
    """Write a new secret atomically, unless one exists by then: a full disk must not leave an empty file behind."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(32))
        with suppress(FileExistsError):
            os.link(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def load_scrub(place: str) -> Scrubber:
    """Import a function for ``scrub``, such as ``package.module:function``.

    Raises:
        ImportError: the module cannot be imported.
        AttributeError: the module has no such function.
        TypeError: the object is not a function.
    """
    module, _, name = place.partition(":")
    function: object = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{place} is not a function")
    scrub: Scrubber = function
    return scrub

"""Structured logs on standard error: one line per event, as JSON or for a terminal. Never a client's text, never a key.

Lines are formatted where the event happens and written by a thread: a stalled reader (a paused ``| jq``, a log driver that
hangs) must not stall the event loop. Lines that do not fit in the queue are dropped, counted, and reported when the reader
comes back.
"""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Final, TextIO

import orjson
import structlog
from structlog.typing import EventDict, Processor

from gateway.telemetry import metrics
from gateway.telemetry.console import ConsoleRenderer, is_colored
from gateway.telemetry.tracebacks import format_exception, print_traceback

# Libraries whose INFO lines are about their internals.
_QUIET = (
    "infinity_emb",
    "transformers",
    "sentence_transformers",
    "huggingface_hub",
    "httpx",
    "httpx2",
    "torch",
    "uvicorn.error",
)

# Values of types that JSON lacks are written by `default`, as `json` would write them.
_AS_STRINGS: Final = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
MAX_QUEUED_BYTES: Final = 8 * 1024 * 1024
_WRITE_BYTES: Final = 64 * 1024
# Seconds that the process waits, when it ends, for the last lines to be written.
_FLUSH_S: Final = 2.0
# Seconds during which lines are gathered before they are written. Waking the thread for each request costs more than
# the line itself, since the two threads then compete for the interpreter. A warning is written immediately.
_GATHER_S: Final = 0.01
# Seconds after which the thread looks for lines that did not wake it.
_LOOK_S: Final = 1.0


def configure_logs(level: str, style: str) -> None:
    """Send the log lines of the gateway and of every library through one formatter.

    Args:
        level: the minimum severity.
        style: ``json``, ``console``, or ``auto`` for ``console`` if standard error is a terminal, else ``json``.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    is_console = style == "console" or (style == "auto" and sys.stderr.isatty())
    rendering: list[Processor] = (
        [ConsoleRenderer(has_colors=is_colored(sys.stderr))]
        if is_console
        else [format_exception, structlog.processors.JSONRenderer(_as_json)]
    )
    handler = QueuedHandler(sys.stderr, MAX_QUEUED_BYTES)
    handler.setLevel(level.upper())  # a library may log more
    # Not through `logging`, which takes three times as long: this runs for each request.
    structlog.configure(
        processors=[*shared, *rendering],
        logger_factory=lambda name="gateway": _Lines(handler, name),
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        cache_logger_on_first_use=True,
    )
    # No progress bars among the lines. Libraries read this when they are imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    logging.setLoggerClass(_Logger)  # of the libraries that are imported later
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger) and any(map(_is_standard_stream, logger.handlers)):
            logger.handlers[:] = [other for other in logger.handlers if not _is_standard_stream(other)]
            logger.propagate = True
    # Infinity clears the root logger's handlers when it is imported, so the gateway's loggers must not depend on them.
    for name in ("", "gateway", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)  # Python would print them to standard error itself, and block there
    threading.excepthook = _log_failed_thread  # also these
    sys.unraisablehook = _log_ignored_error


def _as_json(event: EventDict, default: Callable[[object], object]) -> str:
    """Return an event as JSON in ASCII, so that no character from a client moves a terminal's cursor."""
    try:
        line = orjson.dumps(event, default, _AS_STRINGS)
    except TypeError:  # a number of more than 64 bits, a lone surrogate, a key that is not a string
        return json.dumps(_plain(event), default=default)
    return line.decode() if line.isascii() else json.dumps(orjson.loads(line))


def _plain(value: object) -> object:
    """Return a value with strings as keys, and with null for numbers that JSON does not have."""
    if isinstance(value, float) and not isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


class _Logger(logging.Logger):
    """Passes on the records that a library wants to print to standard error itself.

    Ray, transformers, torch, and pymilvus give their loggers a handler for that when they are imported. Their lines would
    not be JSON, and a stalled reader would block the thread that logs.
    """

    _prints = False

    def addHandler(self, hdlr: logging.Handler) -> None:  # noqa: N802 - the library's name
        """Add a handler, unless it writes to a standard stream."""
        if _is_standard_stream(hdlr):
            self._prints = True
        else:
            super().addHandler(hdlr)

    @property
    def propagate(self) -> bool:
        """Whether the parent's handlers get the records too."""
        return self._prints or self._propagates

    @propagate.setter
    def propagate(self, value: bool) -> None:
        self._propagates = value


def _log_failed_thread(failed: threading.ExceptHookArgs) -> None:
    """Log an exception that nothing in its thread caught."""
    if failed.exc_value is not None and not isinstance(failed.exc_value, SystemExit):
        name = failed.thread.name if failed.thread else None
        structlog.get_logger(__name__).error("thread_failed", thread=name, exc_info=failed.exc_value)


def _log_ignored_error(ignored: sys.UnraisableHookArgs) -> None:
    """Log an exception that nothing can catch: it was raised while Python deleted an object, or in C code."""
    if sys.is_finalizing():  # nothing writes the queued lines anymore
        sys.__unraisablehook__(ignored)
        return
    where = getattr(ignored.object, "__qualname__", type(ignored.object).__qualname__)
    structlog.get_logger(__name__).error("error_ignored", where=where, exc_info=ignored.exc_value)


def _is_standard_stream(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stderr, sys.stdout)


class _Lines:
    """Takes the lines that structlog renders.

    Attributes:
        name: name of the module that logs.
    """

    def __init__(self, handler: QueuedHandler, name: str) -> None:
        self._handler = handler
        self.name = name

    def debug(self, line: str) -> None:
        """Queue a line."""
        self._handler.put(line)

    def warning(self, line: str) -> None:
        """Queue a line, and have it written at once."""
        self._handler.put(line, is_urgent=True)

    info = debug
    error = critical = exception = fatal = warning


def keep_locals_out() -> None:
    """Make structlog print tracebacks without the values of variables, in a program that has not configured it.

    If Rich is installed, structlog's defaults show all values, which holds the event loop for seconds and prints texts
    and keys. A program that creates the application itself, for example under another server, has these defaults.
    """
    if structlog.is_configured():
        return
    *others, _renderer = structlog.get_config()["processors"]
    structlog.configure(processors=[*others, structlog.dev.ConsoleRenderer(exception_formatter=print_traceback)])


def flush_logs() -> None:
    """Wait until all lines are written, for at most two seconds."""
    for handler in logging.getLogger("gateway").handlers:
        handler.flush()


class QueuedHandler(logging.Handler):
    """Formats records immediately, and lets a thread write them, in order.

    The thread is a daemon, and writes directly to the descriptor: a write that never returns blocks neither the end of the
    process nor the lock of Python's own buffer. ``logging`` flushes the handler at exit, which is bounded in time.

    Args:
        stream: the output, written through its file descriptor. A stream in memory cannot block, so it is written directly.
        max_bytes: the size of the queue; lines that do not fit are dropped and counted.
    """

    def __init__(self, stream: TextIO, max_bytes: int) -> None:
        super().__init__()
        self._stream = stream
        self._descriptor = _descriptor_of(stream)
        self._max_bytes = max_bytes
        self._lines: deque[bytes] = deque()
        self._num_bytes = 0
        self._num_dropped = 0
        self._is_writing = False
        # Its lock is reentrant, unlike that of an event: the garbage collector may run while this thread holds the lock, and
        # delete an object whose error is then logged here.
        self._changed = threading.Condition()
        self._is_urgent = False
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Format a record and queue its line, without waiting for the reader. Never raises."""
        try:
            text = self.format(record)
        except Exception:  # as in the library's handlers: a record that cannot be formatted must not fail the request
            self.handleError(record)
            return
        self.put(text, is_urgent=record.levelno >= logging.WARNING)

    def put(self, text: str, *, is_urgent: bool = False) -> None:
        """Queue a line without waiting for the reader."""
        line = text.encode("utf-8", "backslashreplace") + b"\n"
        if self._descriptor is None:
            self._write(line)
            return
        with self._changed:
            if self._num_bytes + len(line) > self._max_bytes:
                self._num_dropped += 1
                metrics.LOG_LINES_DROPPED.inc()
                return
            self._lines.append(line)
            self._num_bytes += len(line)
            self._is_urgent |= is_urgent
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
                self._thread.start()
            if is_urgent or not self._is_writing:
                self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything is written, for at most two seconds."""
        with self._changed:
            self._is_urgent = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._lines and not self._is_writing, _FLUSH_S)

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                # With a limit: a line that is logged while this thread begins to wait does not wake it.
                while not self._changed.wait_for(lambda: self._lines, _LOOK_S):
                    pass
                self._is_writing = True
                if self._num_bytes < _WRITE_BYTES:
                    self._changed.wait_for(lambda: self._is_urgent, _GATHER_S)
                self._is_urgent = False
                content = self._take()
            self._write(content)
            with self._changed:
                self._num_bytes -= len(content)
                num_dropped, self._num_dropped = self._num_dropped, 0
            if num_dropped:
                structlog.get_logger(__name__).warning("log_lines_dropped", num_lines=num_dropped)

    def _take(self) -> bytes:
        """Return the next lines to write together."""
        lines = [self._lines.popleft()]
        size = len(lines[0])
        while self._lines and size + len(self._lines[0]) <= _WRITE_BYTES:
            lines.append(self._lines.popleft())
            size += len(lines[-1])
        return b"".join(lines)

    def _write(self, content: bytes) -> None:
        try:
            if self._descriptor is None:
                self._stream.write(content.decode())
                self._stream.flush()
                return
            while content:
                try:
                    content = content[os.write(self._descriptor, content) :]
                except BlockingIOError:  # another process has made the pipe non-blocking
                    select.select((), (self._descriptor,), ())
        except (OSError, ValueError):  # closed: the lines are lost
            metrics.LOG_LINES_DROPPED.inc(content.count(b"\n"))


def _descriptor_of(stream: TextIO) -> int | None:
    """Return the file descriptor of a stream, or ``None`` for one in memory."""
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None

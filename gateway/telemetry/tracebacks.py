"""Tracebacks for the log: no values of variables, which may be texts or keys, and a bounded number of frames.

They are formatted on the event loop, where the exception happened. structlog's default renderer shows the values of
variables, so it calls ``repr`` on every one of them; with a batch of texts, that takes more than ten seconds.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from itertools import islice
from types import TracebackType
from typing import Final, TextIO

from structlog.typing import EventDict, ExcInfo, WrappedLogger

_FIRST_FRAMES: Final = 5
_LAST_FRAMES: Final = 25
# The maximum number of exceptions of a chain or a group that are shown.
_MAX_EXCEPTIONS: Final = 6
_MAX_MESSAGE: Final = 2_000
_MAX_LINE: Final = 300

_CAUSE = "The above exception was the direct cause of the following exception:"
_CONTEXT = "During handling of the above exception, another exception occurred:"


def format_traceback(error: BaseException) -> str:
    """Return the traceback of an exception and its causes, within milliseconds and without a final line break."""
    shown = list(islice(chain(error), _MAX_EXCEPTIONS + 1))
    lines: list[str] = []
    if len(shown) > _MAX_EXCEPTIONS:
        _, is_context = shown.pop()
        lines += ["(earlier exceptions are left out)", "", _CONTEXT if is_context else _CAUSE, ""]
    for exception, is_context in reversed(shown):
        lines += _lines_of(exception)
        if exception is not error:
            lines += ["", _CONTEXT if is_context else _CAUSE, ""]
    return "\n".join(lines)


def chain(error: BaseException) -> Iterator[tuple[BaseException, bool]]:
    """Yield an exception, then its causes and contexts, each once and with whether it is a context.

    An exception can be its own cause: pymilvus raises ``error from error``.
    """
    seen: set[int] = set()
    following: BaseException | None = error
    is_context = False
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following, is_context
        is_context = following.__cause__ is None
        if not is_context:
            following = following.__cause__
        else:
            following = None if following.__suppress_context__ else following.__context__


def exception_of(event: EventDict) -> BaseException | None:
    """Return the exception to log with an event."""
    exc_info = event.get("exc_info")
    if isinstance(exc_info, BaseException):
        return exc_info
    if isinstance(exc_info, tuple):
        return exc_info[1] if isinstance(exc_info[1], BaseException) else None
    return sys.exc_info()[1] if exc_info else None


def format_exception(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Put the traceback of an event in ``exception``; structlog calls this as a processor."""
    error = exception_of(event)
    event.pop("exc_info", None)
    if error is not None:
        event["exception"] = format_traceback(error)
    return event


def print_traceback(stream: TextIO, exc_info: ExcInfo) -> None:
    """Write a traceback; structlog's console renderer calls this as its formatter."""
    stream.write("\n" + format_traceback(exc_info[1]))


def _lines_of(error: BaseException) -> Iterator[str]:
    """Yield the lines of one exception; for a group, also those of its first parts."""
    if error.__traceback__ is not None:
        yield "Traceback (most recent call last):"
        yield from _frames(error.__traceback__)
    yield _headline(error)
    for note in getattr(error, "__notes__", ())[:_MAX_EXCEPTIONS]:
        yield _cut(str(note), _MAX_MESSAGE)
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions[:_MAX_EXCEPTIONS]:
            yield f"  one of {len(error.exceptions)}: {_headline(part)}"
            if part.__traceback__ is not None:
                yield from (f"  {line}" for line in _frames(part.__traceback__))


def _headline(error: BaseException) -> str:
    kind = type(error)
    name = (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )
    try:
        message = str(error)
    except Exception:  # as in the standard library: an exception that cannot be shown is still to be reported
        message = "<exception str() failed>"
    return f"{name}: {_cut(message, _MAX_MESSAGE)}" if message else name


def _frames(last: TracebackType) -> Iterator[str]:
    """Yield the lines of the outermost and the innermost frames."""
    places: list[TracebackType] = []
    place: TracebackType | None = last
    while place is not None:
        places.append(place)
        place = place.tb_next
    num_omitted = len(places) - _FIRST_FRAMES - _LAST_FRAMES
    for index, frame in enumerate(places):
        if num_omitted > 0 and _FIRST_FRAMES <= index < _FIRST_FRAMES + num_omitted:
            if index == _FIRST_FRAMES:
                yield f"  ... {num_omitted:,} frames are left out ..."
            continue
        for text in traceback.format_list(traceback.extract_tb(frame, limit=1)):
            yield from (_cut(line, _MAX_LINE) for line in text.rstrip("\n").split("\n"))


def _cut(text: str, max_characters: int) -> str:
    return text if len(text) <= max_characters else f"{text[:max_characters]}…"

"""Log lines for people at a terminal: short, the outcome in color, details left to the JSON format."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping
from datetime import datetime
from typing import TextIO

from structlog.typing import EventDict, WrappedLogger

_RESET, _DIM, _RED, _YELLOW, _GREEN = "\x1b[0m", "\x1b[2m", "\x1b[31m", "\x1b[33m", "\x1b[32m"
_LEVEL_COLORS = {"warning": _YELLOW, "error": _RED, "critical": _RED}
# Of every event, and said otherwise.
_LEFT_OUT = frozenset({"event", "level", "logger", "timestamp", "exc_info", "exception", "stack"})


def is_colored(stream: TextIO) -> bool:
    """Return whether colors are for a stream: a terminal, unless ``NO_COLOR`` says otherwise (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class ConsoleRenderer:
    """Writes an event as one line; a traceback follows, without the values of variables, which may be texts or keys."""

    def __init__(self, *, has_colors: bool) -> None:
        self._has_colors = has_colors

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> str:
        is_request = event.get("event") == "request" and "status" in event
        said = self._request(event) if is_request else self._other(event)
        line = f"{self._paint(_clock(event.get('timestamp')), _DIM)} {said}"
        return line + _trace(event)

    def _request(self, event: EventDict) -> str:
        status = int(event["status"])
        color = _RED if status >= 500 else _YELLOW if status >= 400 else _GREEN
        parts = [
            _plain(f"{event['method']} {event['path']}"),
            self._paint(str(status), color),
            f"{event['ms']:.0f} ms" if event["ms"] >= 10 else f"{event['ms']:.1f} ms",
            *(_plain(part) for part in _subject(event)),
            *(_plain(event[key]) for key in ("error_code", "reason") if key in event),
            self._paint(_plain(event.get("caller", "")), _DIM),
        ]
        return " ".join(part for part in parts if part)

    def _other(self, event: EventDict) -> str:
        level = str(event.get("level", "info"))
        name = self._paint(_plain(event.get("event", "")), _LEVEL_COLORS.get(level, ""))
        values = [
            f"{key}={_lines(value)}" for key, value in event.items() if key not in _LEFT_OUT and value not in (None, "")
        ]
        return " ".join([f"{level}: {name}" if level in _LEVEL_COLORS else name, *values])

    def _paint(self, text: str, color: str) -> str:
        return f"{color}{text}{_RESET}" if self._has_colors and color and text else text


def _subject(event: Mapping[str, object]) -> list[str]:
    """Return what was asked for: the model, how many texts and tokens."""
    named = [str(event[key]) for key in ("model",) if key in event]
    for key, word in (("num_texts", "text"), ("num_tokens", "token")):
        if isinstance(number := event.get(key), int):
            named.append(f"{number:,} {word}{'' if number == 1 else 's'}")
    return named


def _clock(timestamp: object) -> str:
    """Return an event's time of day here, from its time in UTC."""
    try:
        return datetime.fromisoformat(str(timestamp)).astimezone().strftime("%H:%M:%S")
    except ValueError:
        return str(timestamp or "")


def _plain(value: object) -> str:
    """Return a value in one line without what could steer the terminal: some of it comes from clients."""
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _lines(value: object) -> str:
    """Return a value, of several lines each below the other: nine problems of a file, say."""
    lines = [_plain(line) for line in str(value).split("\n")]
    return lines[0] if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)


def _trace(event: EventDict) -> str:
    given = event.get("exc_info")
    if given is True:
        given = sys.exc_info()
    if isinstance(given, BaseException):
        given = (type(given), given, given.__traceback__)
    if isinstance(given, tuple) and given[0] is not None:
        lines = "".join(traceback.format_exception(*given)).rstrip("\n").split("\n")
        return "".join(f"\n{_plain(line)}" for line in lines)
    return f"\n{event['exception']}" if event.get("exception") else ""

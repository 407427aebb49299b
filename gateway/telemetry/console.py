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
            f"{event['method']} {event['path']}",
            self._paint(str(status), color),
            f"{event['ms']:.0f} ms" if event["ms"] >= 10 else f"{event['ms']:.1f} ms",
            *_subject(event),
            *(str(event[key]) for key in ("error_code", "reason") if key in event),
            self._paint(str(event.get("caller", "")), _DIM),
        ]
        return " ".join(_one_line(part) for part in parts if part)

    def _other(self, event: EventDict) -> str:
        level = str(event.get("level", "info"))
        text = str(event.get("event", ""))
        name = self._paint(text, _LEVEL_COLORS.get(level, ""))
        values = [f"{key}={value}" for key, value in event.items() if key not in _LEFT_OUT and value not in (None, "")]
        shown = f"{level}: {name}" if level in _LEVEL_COLORS else name
        return " ".join([shown, *values])

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


def _one_line(text: str) -> str:
    return text.replace("\n", " ")


def _trace(event: EventDict) -> str:
    given = event.get("exc_info")
    if given is True:
        given = sys.exc_info()
    if isinstance(given, BaseException):
        given = (type(given), given, given.__traceback__)
    if isinstance(given, tuple) and given[0] is not None:
        return "\n" + "".join(traceback.format_exception(*given)).rstrip("\n")
    return f"\n{event['exception']}" if event.get("exception") else ""

"""Log lines for people at a terminal: short, with a colored outcome; the JSON format has the details."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from typing import Final, TextIO

from structlog.typing import EventDict, WrappedLogger

from gateway.telemetry.tracebacks import exception_of, format_traceback

_RESET, _DIM, _RED, _YELLOW, _GREEN = "\x1b[0m", "\x1b[2m", "\x1b[31m", "\x1b[33m", "\x1b[32m"
_LEVEL_COLORS = {"warning": _YELLOW, "error": _RED, "critical": _RED}
# Keys of every event that are rendered in another way.
_OMITTED = frozenset({"event", "level", "logger", "timestamp", "exc_info", "exception", "stack"})
# A line or two of a terminal; the JSON format has more of the message.
_MAX_REASON: Final = 160
# Sentences for the events while the gateway starts and stops. All other events show their name and values, as does an
# event that lacks the values of its sentence.
_SENTENCES: Final[Mapping[str, str]] = {
    "listening": "listening on {url}",
    "operator_port": "operator's port at {url}",
    "models_loading": "{number} of {of} models loading; until a model is ready, requests for it get a 503",
    "model_downloading": "{model}: downloading {size} from {source}, license {license}",
    "model_download": "{model}: downloaded {done} of {of}",
    "model_downloaded": "{model}: downloaded after {seconds} s",
    "model_loading": "{model}: loading {source}",
    "model_ready": "{model}: ready after {seconds} s",
    "model_on_demand": "{model}: loads when it is first used",
    "model_disabled": "{model}: not loaded; {reason}",
    "model_failed": "{model}: cannot be loaded; {reason}",
    "stopping": "stopping ({signal}): new requests are taken for {drain_delay_s} s, and those that run are answered",
}


def is_colored(stream: TextIO) -> bool:
    """Return whether a stream gets colors: it is a terminal and ``NO_COLOR`` is not set (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class ConsoleRenderer:
    """Renders an event as one line, and a traceback without the values of variables, which may be texts or keys."""

    def __init__(self, *, has_colors: bool) -> None:
        self._has_colors = has_colors

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> str:
        is_request = event.get("event") == "request" and "status" in event
        text = self._request(event) if is_request else self._other(event)
        line = f"{self._paint(_clock(event.get('timestamp')), _DIM)} {text}"
        return line + _trace(event)

    def _request(self, event: EventDict) -> str:
        status = int(event["status"])
        color = _RED if status >= 500 else _YELLOW if status >= 400 else _GREEN
        parts = [
            _plain(f"{event['method']} {event['path']}"),
            self._paint(str(status), color),
            f"{event['ms']:.0f} ms" if event["ms"] >= 10 else f"{event['ms']:.1f} ms",
            *(_plain(part) for part in _subject(event)),
            *(_cut(_plain(event[key])) for key in ("error_code", "reason") if key in event),
            self._paint(_plain(event.get("caller", "")), _DIM),
        ]
        return " ".join(part for part in parts if part)

    def _other(self, event: EventDict) -> str:
        level = str(event.get("level", "info"))
        if (sentence := _sentence(event)) is not None:
            return (
                f"{self._paint(f'{level}:', _LEVEL_COLORS[level])} {sentence}" if level in _LEVEL_COLORS else sentence
            )
        name = self._paint(_plain(event.get("event", "")), _LEVEL_COLORS.get(level, ""))
        values = [
            f"{key}={_lines(value)}" for key, value in event.items() if key not in _OMITTED and value not in (None, "")
        ]
        return " ".join([f"{level}: {name}" if level in _LEVEL_COLORS else name, *values])

    def _paint(self, text: str, color: str) -> str:
        return f"{color}{text}{_RESET}" if self._has_colors and color and text else text


def _sentence(event: Mapping[str, object]) -> str | None:
    """Return an event as a sentence, if there is a sentence for it and the event has its values."""
    template = _SENTENCES.get(str(event.get("event")))
    values = {key: _lines(value) if key == "reason" else _plain(value) for key, value in event.items()}
    try:
        return template and template.format_map(values)
    except KeyError:
        return None


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_REASON else f"{text[: _MAX_REASON - 1]}…"


def _subject(event: Mapping[str, object]) -> list[str]:
    """Return the model of a request, and its numbers of texts and tokens."""
    words = [str(event["model"])] if "model" in event else []
    for key, noun in (("num_texts", "text"), ("num_tokens", "token")):
        if isinstance(number := event.get(key), int):
            words.append(f"{number:,} {noun}{'' if number == 1 else 's'}")
    return words


def _clock(timestamp: object) -> str:
    """Return the local time of day of an event."""
    try:
        return datetime.fromisoformat(str(timestamp)).astimezone().strftime("%H:%M:%S")
    except ValueError:
        return str(timestamp or "")


def _plain(value: object) -> str:
    """Return a value in one line, with control characters escaped: some values come from clients."""
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _lines(value: object) -> str:
    """Return a value; if it has several lines, such as the problems of a file, start each on a line below."""
    lines = [_plain(line) for line in str(value).split("\n")]
    return lines[0] if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)


def _trace(event: EventDict) -> str:
    error = exception_of(event)
    if error is not None:
        return "".join(f"\n{_plain(line)}" for line in format_traceback(error).split("\n"))
    return f"\n{event['exception']}" if event.get("exception") else ""

"""The log at a terminal: readable lines, with colors where they are supported, and unchanged JSON."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime

import orjson
import pytest

from gateway.telemetry.console import ConsoleRenderer, is_colored

MOMENT = datetime(2026, 11, 25, 9, 36, 23, 965288, tzinfo=UTC)
CLOCK = MOMENT.astimezone().strftime("%H:%M:%S")
REQUEST = {
    "event": "request",
    "level": "info",
    "timestamp": MOMENT.isoformat().replace("+00:00", "Z"),
    "request_id": "req-1",
    "caller": "search",
    "method": "POST",
    "path": "/v1/embeddings",
    "status": 200,
    "ms": 23.84,
    "model": "mini",
    "num_texts": 1,
    "num_tokens": 1205,
    "tokenize_ms": 0.2,
}


def rendered(event: Mapping[str, object], *, has_colors: bool = False) -> str:
    return ConsoleRenderer(has_colors=has_colors)(None, "info", dict(event))


def test_a_request_is_a_short_line() -> None:
    assert rendered(REQUEST) == f"{CLOCK} POST /v1/embeddings 200 24 ms mini 1 text 1,205 tokens search"


def test_a_refused_request_is_shown_with_its_model_and_reason() -> None:
    refused = {**REQUEST, "status": 404, "ms": 1.23, "model": "minni", "error_code": "model_not_found"}
    refused |= {"reason": "no model 'minni'; available: mini", "num_texts": None, "num_tokens": None}

    assert rendered(refused) == (
        f"{CLOCK} POST /v1/embeddings 404 1.2 ms minni model_not_found no model 'minni'; available: mini search"
    )


@pytest.mark.parametrize(
    ("status", "color"), [(200, "32"), (302, "32"), (404, "33"), (499, "33"), (500, "31"), (503, "31")]
)
def test_the_status_has_the_color_of_its_kind(status: int, color: str) -> None:
    assert f"\x1b[{color}m{status}\x1b[0m" in rendered({**REQUEST, "status": status}, has_colors=True)
    assert "\x1b" not in rendered({**REQUEST, "status": status})


def test_a_long_reason_is_cut() -> None:
    refused = {**REQUEST, "status": 400, "error_code": "bad_input", "reason": "x" * 300}

    assert f"{'x' * 159}… search" in rendered(refused)


def printed(event: str, level: str = "info", **values: object) -> str:
    return rendered({"event": event, "level": level, "timestamp": REQUEST["timestamp"], **values})


def test_the_start_is_in_words() -> None:
    url, reason = "http://127.0.0.1:8000", "no accelerator is present"

    assert printed("listening", url=url, models=["mini", "m3"]) == f"{CLOCK} listening on {url}"
    assert printed("models_loading", number=1, of=3) == (
        f"{CLOCK} 1 of 3 models loading; until a model is ready, requests for it get a 503"
    )
    assert printed("model_loading", model="mini", source="package:a/b") == f"{CLOCK} mini: loading package:a/b"
    assert printed("model_ready", model="mini", seconds=3.2) == f"{CLOCK} mini: ready after 3.2 s"
    assert (
        printed("model_disabled", "warning", model="m3", reason=reason) == f"{CLOCK} warning: m3: not loaded; {reason}"
    )


def test_an_event_without_the_values_of_its_sentence_shows_those_that_it_has() -> None:
    assert printed("model_loading", model="on-demand") == f"{CLOCK} model_loading model=on-demand"


def test_names_from_files_cannot_control_the_terminal() -> None:
    assert printed("model_ready", model="\x1b[2J{url}\n", seconds=1) == f"{CLOCK} \\x1b[2J{{url}}\\n: ready after 1 s"


def test_another_event_has_its_values_and_is_marked_when_it_is_a_warning() -> None:
    event = {"event": "model_loaded", "level": "info", "model": "mini", "seconds": 3.2, "logger": "gateway.fleet"}
    event |= {"timestamp": REQUEST["timestamp"]}

    assert rendered(event) == f"{CLOCK} model_loaded model=mini seconds=3.2"
    assert rendered({**event, "level": "warning"}) == f"{CLOCK} warning: model_loaded model=mini seconds=3.2"


def test_text_from_clients_cannot_control_the_terminal() -> None:
    line = rendered({**REQUEST, "model": "\x1b[2J\x07evil\r\n09:00:00 POST"})

    assert "\x1b" not in line
    assert len(line.splitlines()) == 1
    assert "\\x1b[2J\\x07evil\\r\\n09:00:00 POST" in line


def test_a_traceback_follows_its_line_without_the_values_of_variables() -> None:
    try:
        secret = "a text of a client"
        raise ValueError(len(secret))
    except ValueError as error:
        shown = rendered({"event": "unexpected_error", "level": "error", "exc_info": error})

    assert shown.splitlines()[1] == "Traceback (most recent call last):"
    assert shown.splitlines()[-1] == "ValueError: 18"
    assert "a text of a client" not in shown
    assert "raise ValueError(len(secret))" in shown


def test_problems_of_a_file_are_listed_one_per_line() -> None:
    shown = rendered({"event": "reload_refused", "level": "error", "reason": "a.yaml:1:1: one\na.yaml:2:1: two"})

    assert shown.splitlines()[-2:] == ["  a.yaml:1:1: one", "  a.yaml:2:1: two"]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_colors_are_only_for_a_terminal_that_supports_them(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], expected: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    leader, follower = pty.openpty()

    with os.fdopen(follower, "w") as terminal:
        assert is_colored(terminal) is expected
    os.close(leader)
    assert not is_colored(io.StringIO())


LOG_ONE = """
import structlog
from gateway.telemetry.logs import configure_logs
configure_logs("info", {style!r})
structlog.get_logger("gateway.access").info("request", method="GET", path="/x", status=503, ms=1.0, caller="a")
"""


@pytest.mark.parametrize("style", ["console", "json", "auto"])
def test_no_escape_reaches_a_file(style: str) -> None:
    written = subprocess.run(
        [sys.executable, "-c", LOG_ONE.format(style=style)], capture_output=True, check=True, timeout=60
    ).stderr

    assert b"\x1b" not in written
    if style != "console":
        line = orjson.loads(written)
        assert (line["event"], line["status"], line["level"], line["logger"]) == (
            "request",
            503,
            "info",
            "gateway.access",
        )

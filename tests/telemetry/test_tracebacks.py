"""An unexpected exception costs the event loop some milliseconds, and its log line has no value of a variable."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable

import pytest
import structlog
from fastapi import APIRouter
from fastapi.testclient import TestClient

from gateway.app import create_app
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.fleet import Fleet
from gateway.telemetry.logs import configure_logs
from gateway.telemetry.tracebacks import format_traceback
from tests.console.served import registry_of, usual_models
from tests.telemetry.test_logs import restored_logging

__all__ = ["restored_logging"]

SECRET = "a-text-of-a-client"
MOST_CPU_S = 0.15
"""Some ten milliseconds, with room for a machine that is busy. The renderer of structlog with Rich took over 60 s."""


class Texts:
    """A local variable whose representation is slow and noisy."""

    def __repr__(self) -> str:
        return SECRET * 1_000_000


def fail(depth: int, texts: object) -> None:
    """Raise below many frames with large locals."""
    held = [texts] * 20
    lists = [[SECRET] * 100] * 100
    if not depth:
        raise KeyError(len(held) + len(lists))
    fail(depth - 1, texts)


def raised(cause: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011  any
        cause()
    return caught.value


@pytest.mark.usefixtures("restored_logging")
@pytest.mark.parametrize("style", ["console", "json", "default"])
def test_an_endpoint_that_raises_in_deep_frames_holds_the_event_loop_for_milliseconds(
    style: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    structlog.reset_defaults()
    monkeypatch.setattr(sys, "stderr", output := io.StringIO())
    if style != "default":
        configure_logs("info", style)
    spent: list[float] = []
    router = APIRouter()

    @router.get("/raises")
    async def raises() -> None:
        texts = Texts()
        spent.append(time.process_time())
        fail(300, texts)

    models = usual_models()
    app = create_app(Deployment(registry_of(models), Settings(), Fleet(models)))
    app.include_router(router)
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.get("/raises")
        spent.append(time.process_time())

    assert answer.status_code == 500
    assert spent[1] - spent[0] < MOST_CPU_S
    logged = output.getvalue() + capsys.readouterr().out
    assert "KeyError: 120" in logged
    assert "raise KeyError(len(held) + len(lists))" in logged
    assert SECRET not in logged
    assert len(logged) < 20_000
    if style == "json":
        [line] = [one for line in logged.splitlines() if (one := json.loads(line))["event"] == "unexpected_error"]
        assert line.keys() >= {"exception", "request_id"}
        assert "exc_info" not in line
    structlog.reset_defaults()


def test_only_the_outermost_and_innermost_frames_are_shown() -> None:
    text = format_traceback(raised(lambda: fail(500, None)))

    assert text.startswith("Traceback (most recent call last):\n  File")
    assert "frames are left out" in text
    assert text.count("\n  File") == 30
    assert text.endswith("KeyError: 120")


def test_a_chain_has_the_causes_first_and_is_bounded() -> None:
    def chain(number: int) -> None:
        if not number:
            raise ValueError("the first")
        try:
            chain(number - 1)
        except ValueError as error:
            raise ValueError(f"number {number}") from error

    short = format_traceback(raised(lambda: chain(2)))
    assert short.index("ValueError: the first") < short.index("the direct cause") < short.index("ValueError: number 2")
    long = format_traceback(raised(lambda: chain(100)))
    assert long.startswith("(earlier exceptions are left out)")
    assert long.endswith("ValueError: number 100")
    assert long.count("Traceback") == 6


def test_a_context_is_shown_unless_it_is_suppressed_and_a_circle_ends() -> None:
    def handle(*, is_hidden: bool) -> None:
        try:
            raise KeyError("inner")
        except KeyError:
            if is_hidden:
                raise ValueError("outer") from None
            raise ValueError("outer")  # noqa: B904  the tested case

    assert "During handling" in format_traceback(raised(lambda: handle(is_hidden=False)))
    assert "inner" not in format_traceback(raised(lambda: handle(is_hidden=True))).rsplit("\n", 1)[-1]
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert format_traceback(one).count("ValueError") == 2
    one.__cause__ = one  # as pymilvus does with `raise error from error`
    assert format_traceback(one).count("ValueError") == 1


def test_messages_notes_and_groups_are_bounded_and_a_broken_message_does_no_harm() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    group = ExceptionGroup("many", [ValueError("x" * 100_000), *(Mute() for _ in range(1_000))])
    group.add_note("n" * 100_000)
    text = format_traceback(group)
    assert len(text) < 10_000
    assert "one of 1001: ValueError: xxx" in text
    assert "<exception str() failed>" in text

"""Stand-in judges, and rankings for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from gateway.compare.judge import endpoint
from tests.compare.judge.stand_in import Respond, StandIn, serve_judge

StartJudge = Callable[[Respond], StandIn]


@pytest.fixture
def start_judge() -> Iterator[StartJudge]:
    """Return a function that serves a judge until the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda respond: stack.enter_context(serve_judge(respond))


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE_S", 0.01)

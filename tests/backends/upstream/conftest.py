"""Remote models that retry immediately."""

from __future__ import annotations

import pytest

from gateway.backends.upstream import backend as backend_module


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses between two attempts, in which these tests would spend most of their time."""
    monkeypatch.setattr(backend_module, "_FIRST_PAUSE_S", 0.005)

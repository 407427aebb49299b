"""The tests of ``tests/api/test_rerank.py``, all of them, on models behind connections to replicas."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from gateway.fleet import Model
from tests.api.conftest import *  # noqa: F403  its fixtures
from tests.api.test_rerank import *  # noqa: F403  its tests
from tests.cluster.wired import wired, wires  # noqa: F401  a fixture


@pytest.fixture
def make_model(make_model: Callable[..., Model], wires: AsyncExitStack) -> Callable[..., Model]:  # noqa: F811
    """Return a function that makes models behind connections."""
    return wired(make_model, wires)

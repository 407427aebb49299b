"""Servers for the tests of models that run elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from tests.backends.stand_in import StandIn


@pytest.fixture
async def server() -> AsyncIterator[StandIn]:
    async with StandIn().serving() as one:
        yield one


@pytest.fixture
async def servers() -> AsyncIterator[tuple[StandIn, StandIn]]:
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(StandIn().serving()), await stack.enter_async_context(StandIn().serving())

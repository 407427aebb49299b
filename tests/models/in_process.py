"""Gateways with real engines in the process of the tests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import httpx

from gateway.app import create_app
from gateway.config.registry import Alias, ModelEntry, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment

Connect: TypeAlias = Callable[..., Awaitable[httpx.AsyncClient]]


@contextlib.asynccontextmanager
async def connecting() -> AsyncIterator[Connect]:
    """Give a function that starts a gateway, and returns a client of it; all of them are stopped at the end."""
    async with contextlib.AsyncExitStack() as stack:

        async def connect(
            *entries: ModelEntry, aliases: Mapping[str, tuple[str, str | None]] | None = None, **settings: Any
        ) -> httpx.AsyncClient:
            named = {name: Alias(name=name, model=model, task=task) for name, (model, task) in (aliases or {}).items()}
            registry = Registry(path=Path("models.yaml"), version=1, models=entries, aliases=named)
            deployment = Deployment(registry, Settings(cpu_threads=1, **settings))
            stack.push_async_callback(deployment.stop)
            await deployment.start()
            assert {model.id: model.reason for model in deployment.fleet if model.reason} == {}
            transport = httpx.ASGITransport(create_app(deployment))
            return await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://gateway"))

        yield connect

"""Gateways with real engines in the process of the tests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest_asyncio

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


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="connect")
async def connect_in_module() -> AsyncIterator[Connect]:
    """Return a function that starts a gateway, which serves to the end of the module, and returns a client of it."""
    async with connecting() as connect:
        yield connect


def entry(model_id: str, folder: Path, **fields: Any) -> ModelEntry:
    """Return the entry of a checkpoint that torch computes exactly on the CPU."""
    fields = {"device": "cpu", "enabled": True, "dtype": "float32", "runtime": "torch", **fields}
    return ModelEntry(id=model_id, source=str(folder), **fields)

"""A model of the tests of the API, behind a connection as between a front and a replica."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from gateway.backends.base import Backend, Report, unreported
from gateway.cluster.host import Host
from gateway.cluster.line import Place
from gateway.cluster.pool import Pool
from gateway.cluster.vocabulary import RemoteVocabulary
from gateway.fleet import Model
from gateway.types import Embeddings, EmbedJob, ModelInfo, Vocabulary


class Wired:
    """A backend whose jobs go through a socket to another one."""

    def __init__(self, inner: Backend, stack: AsyncExitStack) -> None:
        self._inner = inner
        self._stack = stack

    async def plan(self, report: Report = unreported) -> ModelInfo:
        return await self._inner.plan(report)

    async def start(self, report: Report = unreported) -> ModelInfo:
        info = await self._inner.start(report)
        secret = secrets.token_bytes(32)
        host = Host(self._inner, info, secret, "127.0.0.1")
        await host.start()
        self._stack.push_async_callback(host.stop)
        self._pool = Pool(info.id, lambda: None)
        self._stack.push_async_callback(self._pool.close)
        self._pool.update({"r": Place("r", "127.0.0.1", host.port, secret.hex(), info.fingerprint, "n", info.device)})
        while not self._pool.usable:
            await self._pool.changed(1)
        return info

    async def embed(self, job: EmbedJob) -> Embeddings:
        return await self._pool.embed(job)

    async def vocabulary(self) -> Vocabulary:
        return RemoteVocabulary(self._pool.usable[0], asyncio.get_running_loop(), 10)

    async def stop(self) -> None:
        await self._inner.stop()

    def __setattr__(self, name: str, value: object) -> None:
        """Set the attributes that the tests set on the fake there."""
        object.__setattr__(self._inner if name == "_on_embed" else self, name, value)


@pytest.fixture
async def wires() -> AsyncIterator[AsyncExitStack]:
    """Close everything that the models have opened."""
    async with AsyncExitStack() as stack:
        yield stack


def wired(make: Callable[..., Model], stack: AsyncExitStack) -> Callable[..., Model]:
    """Return a function that makes the same models, behind a connection."""

    def make_wired(*args: object, **kwargs: object) -> Model:
        model = make(*args, **kwargs)
        model.backend = Wired(model.backend, stack)
        return model

    return make_wired

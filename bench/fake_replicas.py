"""Replicas without a model, whose batches take as long as a function says, and requests to them through the gateway.

To compare a simulation with something that runs.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import numpy as np
import orjson
from aiohttp import web

from bench.load import HOST
from bench.queueing import Times
from gateway.backends.upstream.backend import UpstreamBackend
from gateway.config.model_entry import ModelEntry
from gateway.config.settings import Settings
from gateway.types import EmbedJob, ModelState, Truncate

_MODEL = "fake"
_WIDTH = 8
_PATIENCE_S = 60.0


class FakeReplica:
    """A server that takes all requests that wait as one batch, up to a limit, as a replica of the simulation does."""

    def __init__(self, batch_s: Callable[[int], float], max_batch: int) -> None:
        self._batch_s = batch_s
        self._max_batch = max_batch
        self._waiting: asyncio.Queue[asyncio.Future[None]] = asyncio.Queue()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Serve, and yield the base URL of the API."""
        app = web.Application()
        app.add_routes([web.post("/v1/embeddings", self._embeddings)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, HOST, 0)
        await site.start()
        worker = asyncio.create_task(self._work())
        try:
            yield f"http://{HOST}:{runner.addresses[0][1]}/v1"
        finally:
            worker.cancel()
            await runner.cleanup()

    async def _embeddings(self, request: web.Request) -> web.Response:
        texts: list[str] = orjson.loads(await request.read())["input"]
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait(turn)
        await turn
        data = [{"object": "embedding", "index": i, "embedding": _vector(text)} for i, text in enumerate(texts)]
        return web.Response(body=orjson.dumps({"object": "list", "data": data}), content_type="application/json")

    async def _work(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self._max_batch and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            await asyncio.sleep(self._batch_s(len(batch)))
            for turn in batch:
                if not turn.done():
                    turn.set_result(None)


def _vector(text: str) -> str:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
    return base64.b64encode(np.random.default_rng(seed).normal(size=_WIDTH).astype("<f4").tobytes()).decode()


async def run_fakes(replicas: Sequence[FakeReplica], arrivals: Times) -> Times:
    """Send requests of one text to replicas at given times, as the gateway sends them; return the seconds of each."""
    async with AsyncExitStack() as stack:
        urls = tuple([await stack.enter_async_context(replica.serving()) for replica in replicas])
        upstream = {"urls": urls, "max_connections": 1000}
        fields = {"id": _MODEL, "backend": "openai", "source": _MODEL, "upstream": upstream}
        backend = UpstreamBackend(ModelEntry.model_validate(fields), Settings(max_queue_texts=100_000))
        await backend.plan()
        await backend.start(_ignore)
        stack.push_async_callback(backend.stop)
        started = time.monotonic() + 0.1

        async def ask(number: int, at: float) -> float:
            await asyncio.sleep(started + at - time.monotonic())
            sent = time.monotonic()
            await backend.embed(EmbedJob([f"text {number}"], None, Truncate.END, sent + _PATIENCE_S, caller="bench"))
            return time.monotonic() - sent

        return np.array(await asyncio.gather(*(ask(number, at) for number, at in enumerate(arrivals.tolist()))))


def _ignore(_state: ModelState, _reason: str) -> None:
    """Take no note of the model's state."""

"""Helpers that load models on stand-in servers and send them requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from gateway.backends.upstream.backend import UpstreamBackend
from gateway.backends.upstream.resolver import RESOLVER, Resolver
from gateway.config.model_entry import ModelEntry
from gateway.config.settings import Settings
from gateway.types import EmbedJob, ModelState, Truncate
from tests.backends.stand_in import MODEL, StandIn, vector_of

TEXTS = [f"text number {i}" for i in range(10)]
PATIENCE_S = 30


def entry(*servers: StandIn, kind: str = "openai", **changes: Any) -> ModelEntry:
    """Return an entry of the registry for a model on these servers; ``upstream`` in ``changes`` extends its own."""
    path = "/v1" if kind == "openai" else ""
    upstream = {"urls": tuple(server.url + path for server in servers), "probe_interval_s": 0.1, "max_retries": 2}
    fields: dict[str, Any] = {"id": "far", "backend": kind, "source": MODEL}
    return ModelEntry.model_validate(
        {**fields, **changes, "upstream": {**upstream, **changes.get("upstream", {})}}, context={}
    )


def job(texts: list[str] = TEXTS, seconds: float = PATIENCE_S, **changes: Any) -> EmbedJob:
    fields: dict[str, Any] = {"task": None, "truncate": Truncate.END, "caller": "test"}
    return EmbedJob(texts, deadline=time.monotonic() + seconds, **{**fields, **changes})


def expected(texts: list[str] = TEXTS, weights: str = "first") -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.stack([vector_of(text, weights) for text in texts])


class States:
    """Collects the reports of a backend."""

    def __init__(self) -> None:
        self.reported: list[tuple[ModelState, str]] = []

    def __call__(self, state: ModelState, reason: str) -> None:
        self.reported.append((state, reason))

    async def wait_for(self, state: ModelState) -> str:
        return await wait_until(
            lambda: self.reported[-1][1] if self.reported and self.reported[-1][0] is state else None
        )


async def wait_until(look: Callable[[], Any]) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        while (found := look()) is None or found is False:  # noqa: ASYNC110  the condition has no event
            await asyncio.sleep(0.02)
    return found


@asynccontextmanager
async def loaded(
    model: ModelEntry, states: States | None = None, resolver: Resolver | None = None, **settings: Any
) -> AsyncIterator[UpstreamBackend]:
    backend = UpstreamBackend(model, Settings(**settings), resolver or RESOLVER)
    await backend.plan()
    await backend.start(states or States())
    try:
        yield backend
    finally:
        await backend.stop()

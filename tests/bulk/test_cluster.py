"""``gateway embed --cluster``: each call goes to one replica, all replicas are busy, and requests come first."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from gateway.backends.base import Replica
from gateway.backends.fake import FakeBackend, fake_info
from gateway.bulk.embedder import BlockEmbedder
from gateway.bulk.local import local_embedder
from gateway.bulk.model_spec import read_spec
from gateway.bulk.rows import Row
from gateway.config.model_entry import ModelEntry
from gateway.config.registry import Registry
from gateway.config.settings import Settings
from gateway.errors import Overloaded
from gateway.types import Embeddings, EmbedJob, ModelState, Priority, Truncate

NUM_REPLICAS = 3


class OnReplicas(FakeBackend):
    """A model on replicas, of which each takes one job at a time; the queue of all is full at first."""

    def __init__(self) -> None:
        super().__init__(fake_info("mini", 8))
        self.jobs: list[EmbedJob] = []
        self.most_at_once = self._at_once = 0
        self.refusals = 0

    def replicas(self) -> Sequence[Replica]:
        return [Replica(f"mini#{i}", ModelState.READY) for i in range(NUM_REPLICAS)]

    async def embed(self, job: EmbedJob) -> Embeddings:
        if len(job.texts) > 1 and self.refusals:
            self.refusals -= 1
            raise Overloaded("full of the requests of others", retry_after_s=0)
        self.jobs.append(job)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await asyncio.sleep(0.2)
            return await super().embed(job)
        finally:
            self._at_once -= 1


class FakeSite:
    """The place of a cluster, without one."""

    def __init__(self, backend: OnReplicas, settings: Settings) -> None:
        self._backend = backend
        self.settings = settings

    def backend(self, _entry: ModelEntry) -> OnReplicas:
        return self._backend

    def is_here(self, _entry: ModelEntry) -> bool:
        return False

    def why_disabled(self, _entry: ModelEntry) -> str:
        return ""

    def is_kept_elsewhere(self, _entry: ModelEntry) -> bool:
        return False

    async def disconnect(self) -> None:
        pass


async def test_a_block_is_spread_over_the_replicas_and_waits_for_the_requests_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend, sites = OnReplicas(), []
    backend.refusals = 2

    def site_of(_registry: Registry, settings: Settings) -> FakeSite:
        sites.append(FakeSite(backend, settings))
        return sites[0]

    monkeypatch.setattr("gateway.deployment.site_of", site_of)
    fields = {"id": "mini", "source": "./x", "enabled": True, "replicas": {"min": 1, "max": NUM_REPLICAS}}
    registry = Registry(path=Path("models.yaml"), version=1, models=(ModelEntry.model_validate(fields),))
    settings = Settings(cluster="auto")

    async with local_embedder(registry, settings, read_spec("mini", None, Truncate.END)) as embedder:
        rows = [Row(f"d{i}", f"text {i}", {}, f"row {i}", i) for i in range(embedder.block_texts)]
        embedded = await BlockEmbedder(embedder, lambda _number: None).embed(rows)

    work = [job for job in backend.jobs if len(job.texts) > 1]
    assert embedder.block_texts == 512 * NUM_REPLICAS
    assert len(embedded.embedded.rows) == len(rows)
    assert {len(job.texts) for job in work} == {64}
    assert backend.most_at_once == 2 * NUM_REPLICAS
    assert {job.priority for job in backend.jobs} == {Priority.LOW, Priority.NORMAL}
    assert {job.priority for job in work} == {Priority.LOW}
    # Replicas with other limits would be others, next to those that serve.
    assert sites[0].settings.max_queue_texts == settings.max_queue_texts

"""Shadows: a sample of the traffic is also sent to a second model, whose vectors are discarded."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from gateway.config.registry import Registry, Shadow
from gateway.errors import RequestError
from gateway.routing.router import Choice, Router
from gateway.telemetry import metrics
from gateway.types import EmbedJob, Priority, Truncate

log = structlog.get_logger(__name__)

# The maximum number of concurrent requests to the second model, which limits its share of a busy device.
_MAX_CONCURRENT = 4
# The queue has a limit on requests; this limits its memory when requests are large.
_MAX_QUEUED_CHARACTERS = 16_000_000
_CALLER = "shadow"
# A request in a batch may wait for a day; a copy of it must not occupy the queue for so long.
_MAX_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class _Copy:
    """The parts of a request that a shadow needs."""

    texts: Sequence[str]
    task: str | None
    truncate: Truncate
    timeout_s: float
    priority: Priority
    num_characters: int


class ShadowQueue:
    """The copies for one shadow. If the second model cannot keep up, the newest copies are dropped."""

    def __init__(self, shadow: Shadow, router: Router) -> None:
        self.shadow = shadow
        self._router = router
        self._waiting: deque[_Copy] = deque()
        self._num_characters = 0
        self._workers: set[asyncio.Task[None]] = set()
        self._num_working = 0
        self._is_stopped = False
        self._labels = (shadow.of, shadow.to)

    def offer(
        self, texts: Sequence[str], task: str | None, truncate: Truncate, timeout_s: float, priority: Priority
    ) -> None:
        """Queue a copy of a request, or drop it; return at once."""
        size = sum(map(len, texts))
        is_full = len(self._waiting) >= self.shadow.max_queue or self._num_characters + size > _MAX_QUEUED_CHARACTERS
        if is_full or self._is_stopped:
            metrics.SHADOW_REQUESTS.labels(*self._labels, "dropped").inc()
            return
        self._waiting.append(_Copy(texts, task, truncate, min(timeout_s, _MAX_WAIT_S), priority, size))
        self._num_characters += size
        # Counted up and down: during a reload, the old and the new queue share a gauge.
        metrics.SHADOW_QUEUE.labels(*self._labels).inc()
        if self._num_working < _MAX_CONCURRENT:
            # Counted here, not by the tasks: a task that is about to end takes no further copy.
            self._num_working += 1
            worker = asyncio.create_task(self._work())
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)

    async def stop(self) -> None:
        """Drop the copies that wait or are in progress; from now on, drop every offered copy."""
        self._is_stopped = True
        metrics.SHADOW_REQUESTS.labels(*self._labels, "dropped").inc(len(self._waiting))
        metrics.SHADOW_QUEUE.labels(*self._labels).dec(len(self._waiting))
        self._waiting.clear()
        workers = list(self._workers)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self) -> None:
        try:
            while self._waiting:
                copy = self._waiting.popleft()
                self._num_characters -= copy.num_characters
                metrics.SHADOW_QUEUE.labels(*self._labels).dec()
                outcome = "dropped"
                try:
                    outcome = await self._embed(copy)
                finally:
                    metrics.SHADOW_REQUESTS.labels(*self._labels, outcome).inc()
        finally:
            self._num_working -= 1

    async def _embed(self, copy: _Copy) -> str:
        """Have the second model embed a copy; return the outcome."""
        started = time.monotonic()
        try:
            target = self._router.resolve(self.shadow.to, copy.task)
            result = await target.model.compute(  # a cache would measure the cache, and fill up
                EmbedJob(
                    texts=copy.texts,
                    task=target.task,
                    truncate=copy.truncate,
                    deadline=started + copy.timeout_s,
                    caller=_CALLER,
                    priority=copy.priority,
                )
            )
        except RequestError as error:
            return error.code
        except Exception:  # a fault of the second model must not end its queue, and does not reach clients
            log.exception("shadow_failed", of=self.shadow.of, to=self.shadow.to)
            return "internal_error"
        metrics.SHADOW_SECONDS.labels(*self._labels).observe(time.monotonic() - started)
        metrics.SHADOW_TEXTS.labels(*self._labels).inc(len(copy.texts))
        metrics.SHADOW_TOKENS.labels(*self._labels).inc(sum(result.num_tokens))
        return "ok"


class Shadows:
    """Every shadow of a registry."""

    def __init__(self, registry: Registry, router: Router) -> None:
        self._queues = [ShadowQueue(shadow, router) for shadow in registry.shadows]

    def offer(
        self,
        choice: Choice,
        texts: Sequence[str],
        task: str | None,
        truncate: Truncate,
        timeout_s: float,
        priority: Priority,
    ) -> None:
        """Copy a request for each shadow of its name or model, with the probability of the shadow's sample."""
        for queue in self._queues:
            shadow = queue.shadow
            is_meant = shadow.of in (choice.asked, choice.model.id) and shadow.to != choice.model.id
            if is_meant and random.random() < shadow.sample:  # noqa: S311  a sample, not a secret
                queue.offer(texts, choice.task or task, truncate, timeout_s, priority)

    @property
    def pairs(self) -> set[tuple[str, str]]:
        """Each name whose traffic is copied, with the model that gets the copies."""
        return {(queue.shadow.of, queue.shadow.to) for queue in self._queues}

    async def stop(self) -> None:
        """Stop every shadow."""
        for queue in self._queues:
            await queue.stop()

"""Watch an engine for a hanging forward, a lost card, a replica that fails on every text, and wrong vectors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from gateway.config.settings import Settings
from gateway.errors import InternalError
from gateway.types import EmbedJob, Truncate

if TYPE_CHECKING:
    from gateway.engine.infinity import Engine

log = structlog.get_logger(__name__)

# A poisoned request can fail a few batches by itself; after this many, the watchdog asks the model if it still works.
_SUSPICIOUS_FAILURES = 3
# On a CPU, a text of 32,768 tokens may take minutes in one forward. It is hung after this many times its expected time.
_TIMES_EXPECTED = 3
# The watchdog asks the first of these that the model has embedded at its start: some model may fail on any one text.
_QUESTIONS = ("Does it still work?", "The quick brown fox jumps over the lazy dog.", "1", "a")


@dataclass(frozen=True, slots=True)
class Trouble:
    """A problem of an engine.

    Attributes:
        replica: the replica with the lost card; ``None`` if a reload may help.
    """

    reason: str
    replica: int | None = None


class Stopwatch:
    """Measures how long forwards have been running, in the time that the watchdog has observed.

    A stopped process, or a sleeping machine, computes nothing. So at most ``longest_look_s`` counts between two looks,
    regardless of the clock.
    """

    def __init__(self, longest_look_s: float, now: float) -> None:
        self._longest_look_s = longest_look_s
        self._looked_at = now
        self._seen: dict[int, tuple[float, float]] = {}  # when a replica's forward began, and how long it was seen

    def look(self, busy_since: Sequence[float | None], now: float) -> list[float]:
        """Return how many seconds each replica's forward has been running; 0 if none is.

        Args:
            busy_since: the time at which each replica's forward began.
        """
        elapsed_s = min(now - self._looked_at, self._longest_look_s)
        self._looked_at = now
        before, self._seen = self._seen, {}
        for replica, started in enumerate(busy_since):
            if started is not None:
                last_started, seen_s = before.get(replica, (None, 0.0))
                is_same = last_started == started
                self._seen[replica] = (started, seen_s + elapsed_s if is_same else min(now - started, elapsed_s))
        return [self._seen.get(replica, (0.0, 0.0))[1] for replica in range(len(busy_since))]


class Watchdog:
    """Watches the engines of one model, one after the other.

    Attributes:
        question: the text that a replica is asked to embed.
    """

    def __init__(self, model: str, settings: Settings) -> None:
        self._model = model
        self._settings = settings
        self.question = ""

    async def find_question(self, engine: Engine) -> str:
        """Find a text that an engine embeds, to ask later; return the problem if it fails on every one.

        Raises:
            RequestError: the engine does not answer.
        """
        problem = ""
        for self.question in _QUESTIONS:
            if not (problem := await self._try(engine, 0)):
                break
        return problem

    async def until_wrong(self, engine: Engine, lost: Collection[int]) -> Trouble:
        """Watch an engine until it has a problem, and return the problem. The watch continues during questions.

        Args:
            lost: replicas whose cards are known to be lost.
        """
        limit_s = self._settings.forward_timeout_s
        interval_s = min(1.0, limit_s / 4)
        stopwatch = Stopwatch(2 * interval_s, time.monotonic())
        next_recheck = time.monotonic() + self._settings.golden_interval_s
        question: asyncio.Task[str] | None = None
        replicas = [replica for replica in range(engine.num_replicas) if replica not in lost]
        try:
            while True:
                await asyncio.sleep(interval_s)
                now = time.monotonic()
                if trouble := self._find_trouble(engine, replicas, stopwatch, now):
                    return trouble
                if question is not None and question.done():
                    if reason := question.result():
                        return Trouble(reason)
                    question = None
                if question is not None:
                    continue
                suspects = [
                    replica for replica in replicas if engine.num_failed_in_a_row(replica) >= _SUSPICIOUS_FAILURES
                ]
                if suspects:
                    question = asyncio.create_task(self._ask(self._try(engine, replica) for replica in suspects))
                elif now >= next_recheck:
                    next_recheck = now + self._settings.golden_interval_s
                    question = asyncio.create_task(self._ask(engine.recheck(limit_s, replica) for replica in replicas))
        finally:
            if question is not None:
                question.cancel()

    def _find_trouble(
        self, engine: Engine, replicas: Sequence[int], stopwatch: Stopwatch, now: float
    ) -> Trouble | None:
        """Return a replica whose card is lost, or a forward that takes too long."""
        for replica in replicas:
            if replica in engine.lost:
                return Trouble(engine.lost[replica], replica)
        busy = stopwatch.look([engine.busy_since(replica) for replica in replicas], now)
        for replica, busy_s in zip(replicas, busy, strict=True):
            limit_s = max(self._settings.forward_timeout_s, _TIMES_EXPECTED * engine.expected_s(replica))
            if busy_s > limit_s:
                reason = f"a forward has been running for {busy_s:.0f} s; the limit is {limit_s:.0f} s"
                return Trouble(reason, None if engine.device(replica) == "cpu" else replica)
        return None

    async def _try(self, engine: Engine, replica: int) -> str:
        deadline = time.monotonic() + self._settings.forward_timeout_s
        try:
            await engine.submit(EmbedJob([self.question], None, Truncate.END, deadline, caller="watchdog"), replica)
        except InternalError as error:
            return f"it fails on every text: {error.message}"
        return ""

    async def _ask(self, questions: Iterable[Awaitable[str]]) -> str:
        """Return the first problem that a question finds; a model that accepts no question counts as healthy."""
        for question in questions:
            try:
                if reason := await question:
                    return reason
            except Exception as error:
                # A full queue, for example, says nothing about the model, and must not end the watch.
                log.warning("watchdog_not_answered", model=self._model, error=repr(error))
        return ""

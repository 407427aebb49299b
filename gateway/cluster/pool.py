"""The replicas of one model: choose a replica for each job, and another if that replica dies."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from math import ceil
from typing import Final

import structlog

from gateway.backends.base import Replica
from gateway.cluster.line import Line, LineLost, Place
from gateway.cluster.values import work_of
from gateway.errors import DeadlineExceeded, ModelNotReady, ModelRecovering, Overloaded
from gateway.types import Embeddings, EmbedJob, ModelInfo, ModelState

log = structlog.get_logger(__name__)

# A job that was lost with its replica is sent to this many others, because computing an embedding twice is harmless. No
# more than that, because the job itself may kill the replicas.
_MAX_RETRIES: Final = 2
# The seconds that a job waits without a replica: a lost one may soon be replaced.
PATIENCE_S: Final = 1.0
_RETRY_AFTER_S: Final = 5
# Comparing more replicas than this takes longer than it saves, as the simulation in docs/scale.md shows.
_MAX_COMPARED: Final = 64


class Pool:
    """The connections to a model's replicas.

    Args:
        on_change: called when a line may have become usable or unusable.
        fingerprint: the weights that each replica must have; by default, the first replica's.
        on_fault: called with the reason when a replica finds that its model does not work.
        serves: whether this process sends jobs; otherwise it only reads the load of the replicas.

    Attributes:
        lines: the lines by replica id.
    """

    def __init__(
        self,
        model: str,
        on_change: Callable[[], None],
        fingerprint: str | None = None,
        on_fault: Callable[[str], None] = lambda _reason: None,
        *,
        serves: bool = True,
    ) -> None:
        self._serves = serves
        self._model = model
        self._on_change = on_change
        self._on_fault = on_fault
        self.fingerprint = fingerprint
        self.lines: dict[str, Line] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    def update(self, places: Mapping[str, Place]) -> None:
        """Open lines to new replicas, and close the lines to removed replicas once their jobs are done."""
        for replica, place in places.items():
            if replica in self.lines:
                continue
            self.fingerprint = self.fingerprint or place.fingerprint
            if place.fingerprint != self.fingerprint:
                log.error(
                    "replica_refused",
                    model=self._model,
                    replica=replica,
                    node=place.node[:12],
                    reason="its weights differ from those of the other replicas",
                )
                continue
            self.lines[replica] = Line(
                place,
                self.fingerprint,
                self._note_change,
                self._on_fault,
                on_quiet=self._relieve,
                serves=self._serves,
            )
        for replica in self.lines.keys() - places.keys():
            self.lines[replica].is_leaving = True
            self._close_if_done(replica)
        self._note_change()

    def _note_change(self) -> None:
        for replica in [replica for replica, line in self.lines.items() if line.is_leaving]:
            self._close_if_done(replica)
        self._changed.set()
        self._changed = asyncio.Event()
        self._on_change()

    def _relieve(self, quiet: Line) -> None:
        """Give the jobs of a silent replica to others, if there are any: on a single one, they may still be answered."""
        if any(not line.is_quiet for line in self.usable):
            quiet.give_up_jobs()

    def _close_if_done(self, replica: str) -> None:
        if not self.lines[replica].num_requests:
            task = asyncio.create_task(self.lines.pop(replica).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    @property
    def usable(self) -> list[Line]:
        """The lines to replicas that accept jobs."""
        return [line for line in self.lines.values() if line.is_usable]

    @property
    def info(self) -> ModelInfo | None:
        """The model's info, from any of the replicas."""
        return next((line.info for line in self.lines.values() if line.info is not None), None)

    async def embed(self, job: EmbedJob) -> Embeddings:
        """Embed the texts of a job on the replica that should finish it first.

        Raises:
            Overloaded: the replicas are full.
            ModelNotReady: there is no replica, or several replicas died while they had this job.
            RequestError: the job was rejected or failed.
        """
        work = work_of(job.texts, job.query, job.firsts)
        tried: list[Line] = []
        refusing: list[Line] = []
        refusal: ModelNotReady | Overloaded | None = None
        for _attempt in range(_MAX_RETRIES + 1):
            line = await self.choose(work, job.deadline, tried, refusing)
            if line is None:
                break
            tried.append(line)
            try:
                return await line.embed(job)
            except LineLost as error:
                lost = str(error)
            except (ModelNotReady, Overloaded) as error:  # nothing was computed
                refusal, lost = error, error.message
                refusing.append(line)
            log.debug("job_moved", model=self._model, replica=line.place.id, reason=lost)
        if refusal is not None:
            raise self._overloaded(refusal) if isinstance(refusal, Overloaded) else refusal
        if not tried:
            raise ModelRecovering(f"model {self._model!r} has no replica at the moment", retry_after_s=_RETRY_AFTER_S)
        raise ModelRecovering(
            f"model {self._model!r}: {len(set(tried))} of its replicas were lost while they had this request",
            retry_after_s=_RETRY_AFTER_S,
        )

    async def choose(
        self, work: int, deadline: float, tried: Collection[Line] = (), refusing: Collection[Line] = ()
    ) -> Line | None:
        """Return the usable line that should finish the work first; wait a moment if no line is usable.

        Args:
            tried: lines that already had the job. Other nodes are preferred, because a lost node loses all of its
                replicas. If there is no other line, one that sends messages again gets the job a second time.
            refusing: the lines of those that rejected it. They do not get it again.

        Raises:
            DeadlineExceeded: the deadline has passed.
        """
        until = min(time.monotonic() + PATIENCE_S, deadline)
        while True:
            lines = [line for line in self.usable if line not in tried]
            back = [line for line in self.usable if line not in refusing and not line.is_quiet]
            lines = [line for line in lines if not line.is_quiet] or back or lines
            nodes = {line.place.node for line in tried}
            lines = [line for line in lines if line.place.node not in nodes] or lines
            if lines:
                some = random.sample(lines, min(len(lines), _MAX_COMPARED))  # in random order, to break ties
                usual = _usual_rate(some)
                return min(some, key=lambda line: line.expected_s(work, usual))
            left_s = until - time.monotonic()
            if left_s <= 0:
                if time.monotonic() >= deadline:
                    raise DeadlineExceeded("the request did not finish within its time limit: no replica was available")
                return None
            await self.changed(left_s)

    async def changed(self, timeout_s: float) -> None:
        """Wait until a line may have become usable or unusable, for at most ``timeout_s`` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return

    def replicas(self) -> list[Replica]:
        """Return the replicas, sorted by id."""
        return [_replica(self.lines[name]) for name in sorted(self.lines)]

    async def metrics(self) -> dict[str, str]:
        """Return the metrics of each replica that answers, by replica id."""
        lines = dict(sorted(self.lines.items()))
        pages = await asyncio.gather(*(line.metrics() for line in lines.values()), return_exceptions=True)
        return {name: page for name, page in zip(lines, pages, strict=True) if isinstance(page, str)}

    def _overloaded(self, refusal: Overloaded) -> Overloaded:
        """Return a replica's rejection, with the time until all replicas together have room."""
        rates = [line.load.rate for line in self.usable]
        work = sum(line.load.work for line in self.usable)
        if len(rates) > 1 and all(rates):
            return type(refusal)(refusal.message, retry_after_s=ceil(work / sum(rates)))
        return refusal

    async def close(self) -> None:
        """Close all lines; jobs in progress fail."""
        lines = list(self.lines.values())  # a leaving line is removed when its last job fails
        self.lines.clear()
        for line in lines:
            await line.close()
        if self._closing:
            await asyncio.wait(self._closing)


def _usual_rate(lines: Sequence[Line]) -> float:
    """Return the expected rate of a new replica: the mean of the others, so that it gets an equal share."""
    known = [line.load.rate for line in lines if line.load.rate]
    return sum(known) / len(known) if known else 1.0


def _replica(line: Line) -> Replica:
    state, reason = (ModelState.READY, "") if line.is_usable else (line.state, line.reason or line.trouble)
    if not line.is_usable and state is ModelState.READY:
        state, reason = (
            ModelState.RECOVERING,
            reason or ("it accepts no more jobs" if line.is_leaving else "not connected"),
        )
    return Replica(line.place.id, state, reason, line.place.node, line.place.device)

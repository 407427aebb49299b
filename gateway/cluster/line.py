"""The front's end of the connection to one replica: send jobs and receive answers, even if the replica fails."""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from gateway.cluster.values import Load, WireEmbeddings, WireJob
from gateway.cluster.wire import Connection, Message
from gateway.errors import DeadlineExceeded, RequestError
from gateway.telemetry import metrics
from gateway.types import Embeddings, EmbedJob, ModelInfo, ModelState

log = structlog.get_logger(__name__)

_CONNECT_S: Final = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
# A replica sends a message every half second. After a silence of the first length, in seconds, its jobs go to other
# replicas, if there are any. The connection stays, because its event loop may be busy. After the second, it is closed.
_QUIET_S, _SILENCE_S = 1.5, 5.0
# The seconds between checks. If one comes much later than that, this process was stopped, not the replica.
_CHECK_S: Final = 0.25
# Prometheus waits for ten seconds by default.
_METRICS_S: Final = 3.0
# The seconds after a deadline to wait for the replica's own error.
_GRACE_S: Final = 0.25


class LineLost(Exception):
    """The replica died or cannot be reached; another replica may answer."""


@dataclass(frozen=True, slots=True)
class Place:
    """The address of a replica, which it announces through Ray Serve.

    Attributes:
        id: the replica's id in Serve.
        secret: the secret that both ends of the connection must know.
        node: the id of its node in the Ray cluster.
        device: the device that the model runs on, such as ``cuda:0``.
    """

    id: str
    host: str
    port: int
    secret: str
    fingerprint: str
    node: str
    device: str


@dataclass(eq=False, slots=True)
class _Call:
    """A job or another request that has been sent.

    Attributes:
        can_move: another replica can answer it instead.
    """

    answer: asyncio.Future[Any]
    can_move: bool
    on_tokens: Callable[[int], None] = field(default=lambda _num_tokens: None)


class Line:
    """A connection to one replica, which reconnects until the line is closed.

    Args:
        fingerprint: the weights that the replica must have.
        on_change: called when the line may have become usable or unusable.
        on_fault: called with the reason when the replica finds that its model does not work; its last answers may be wrong.
        on_quiet: called with this line, repeatedly, while the replica sends nothing for longer than usual.
        serves: whether this process sends jobs; otherwise it only reads the replica's load.

    Attributes:
        info: the model's info from the replica.
        load: the last load that the replica sent.
        is_leaving: the replica accepts no more jobs.
        is_quiet: the replica has sent nothing for longer than usual.
        trouble: the reason why the line is not connected.
    """

    def __init__(
        self,
        place: Place,
        fingerprint: str | None,
        on_change: Callable[[], None],
        on_fault: Callable[[str], None] = lambda _reason: None,
        *,
        on_quiet: Callable[[Line], None] = lambda _line: None,
        serves: bool = True,
    ) -> None:
        self.place = place
        self._on_quiet = on_quiet
        self._serves = serves
        self._fingerprint = fingerprint
        self._on_change = on_change
        self._on_fault = on_fault
        self.info: ModelInfo | None = None
        self.load = Load()
        self.state, self.reason = ModelState.LOADING, ""
        self.is_leaving = self.is_quiet = False
        self.trouble = ""
        self._is_closed = False
        self._dialed: Connection | None = None
        self._connection: Connection | None = None  # the same, once both ends know each other
        self._lost = asyncio.Event()
        self._calls: dict[int, _Call] = {}
        self._keys = itertools.count()
        self._heard_at = 0.0
        self.work = 0
        self._task = asyncio.create_task(self._keep_open())

    @property
    def is_usable(self) -> bool:
        """Whether the replica accepts jobs."""
        is_open = self._connection is not None and self.info is not None
        return is_open and not self.is_leaving and not self._is_closed and self.state is ModelState.READY

    @property
    def num_requests(self) -> int:
        """The number of this front's jobs in progress."""
        return len(self._calls)

    def expected_s(self, work: int, usual_rate: float) -> float:
        """Estimate the seconds until additional work would be finished.

        Args:
            usual_rate: the rate of a replica that has not measured its own yet, in characters per second.
        """
        return (self.load.others + self.work + work) / (self.load.rate or usual_rate)

    # ------------------------------------------------------------------------------------------------- connecting

    async def _keep_open(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._is_closed:
            try:
                await self._open()
            except (OSError, TimeoutError) as error:
                self.trouble = f"{self.place.host}:{self.place.port}: {str(error) or 'no answer'}"
            else:
                pause_s = _FIRST_PAUSE_S
                await self._watch()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _open(self) -> None:
        self._lost.clear()
        async with asyncio.timeout(_CONNECT_S):
            transport, self._dialed = await asyncio.get_running_loop().create_connection(
                self._make_connection, self.place.host, self.place.port
            )
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._heard_at = time.monotonic()

    def _make_connection(self) -> Connection:
        return Connection(
            bytes.fromhex(self.place.secret),
            is_front=True,
            on_open=self._opened,
            on_message=self._received,
            on_closed=self._closed,
        )

    async def _watch(self) -> None:
        """Wait until the connection is lost; close it after too long a silence."""
        while not self._lost.is_set():
            began = time.monotonic()
            try:
                async with asyncio.timeout(_CHECK_S):
                    await self._lost.wait()
            except TimeoutError:
                now = time.monotonic()
                if now - began < 2 * _CHECK_S:
                    self._check(now - self._heard_at)

    def _check(self, silent_s: float) -> None:
        """Give the jobs to other replicas after a silence, and close the connection after a longer one."""
        if silent_s > _SILENCE_S and self._dialed is not None:
            self._dialed.abort(f"it has sent nothing for {silent_s:.0f} s")
        elif silent_s > _QUIET_S and self._connection is not None:
            self.is_quiet = True
            self._on_quiet(self)

    def give_up_jobs(self) -> None:
        """Have the jobs in progress go to other replicas. The connection stays, and other requests wait for it."""
        if waiting := [call for call in self._calls.values() if call.can_move and not call.answer.done()]:
            log.warning("replica_silent", replica=self.place.id, node=self.place.node[:12], num_requests=len(waiting))
        for call in waiting:
            call.answer.set_exception(LineLost("it has sent nothing for a while"))

    def _opened(self, connection: Connection) -> None:
        self._connection = connection
        self.is_quiet = False
        self.trouble = ""
        if self._serves:
            connection.send("serves")

    def _closed(self, _connection: Connection, reason: str) -> None:
        was_open, self._connection = self._connection is not None, None
        self.trouble = reason
        self._lost.set()
        for call in self._calls.values():
            if not call.answer.done():
                call.answer.set_exception(LineLost(reason))
        if was_open and self.info is not None and not self._is_closed and not self.is_leaving:
            self._note_loss(self.info.id, reason)
        self._on_change()

    def _note_loss(self, model: str, reason: str) -> None:
        metrics.REPLICAS_LOST.labels(model).inc()
        log.warning(
            "replica_lost",
            model=model,
            replica=self.place.id,
            node=self.place.node[:12],
            reason=self.reason or reason,  # its own, such as a lost card, if it had the time to send one
            num_requests=len(self._calls),
        )

    # --------------------------------------------------------------------------------------------------- messages

    def _received(self, connection: Connection, message: Message) -> None:
        self._note_heard()
        match message:
            case ("answer", int(key), content):
                if (call := self._calls.get(key)) is not None and not call.answer.done():
                    call.answer.set_result(content)
            case ("error", int(key), RequestError() as error):
                if (call := self._calls.get(key)) is not None and not call.answer.done():
                    call.answer.set_exception(error)
            case ("tokens", int(key), int(num_tokens)):
                self._note_tokens(key, num_tokens)
            case ("load", Load() as load):
                self.load = load
            case ("info", ModelInfo() as info):
                self._accept(connection, info)
            case ("state", ModelState() as state, str(reason)):
                self._note_state(state, reason)
            case ("leaving",):
                self.is_leaving = True
                self._on_change()
            case _:
                raise ValueError(f"an unknown message: {str(message)[:80]}")

    def _note_heard(self) -> None:
        self._heard_at = time.monotonic()
        if self.is_quiet:
            self.is_quiet = False
            self._on_change()

    def _note_state(self, state: ModelState, reason: str) -> None:
        before, self.state, self.reason = self.state, state, reason
        if state is ModelState.RECOVERING is not before:
            self._on_fault(reason)
        self._on_change()

    def _accept(self, connection: Connection, info: ModelInfo) -> None:
        """Accept a replica with the right weights, and send no jobs to any other."""
        if self._fingerprint is not None and info.fingerprint != self._fingerprint:
            log.error(
                "replica_refused",
                replica=self.place.id,
                model=info.id,
                reason="it has different weights",
                fingerprint=info.fingerprint[:12],
                expected=self._fingerprint[:12],
            )
            self._is_closed = True
            connection.abort("it has different weights")
            return
        self.info = info

    def _note_tokens(self, key: int, num_tokens: int) -> None:
        call = self._calls.get(key)
        if call is None or call.answer.done():
            return
        try:
            call.on_tokens(num_tokens)
        except RequestError as error:
            call.answer.set_exception(error)

    # ------------------------------------------------------------------------------------------------------- jobs

    async def embed(self, job: EmbedJob) -> Embeddings:
        """Have the replica embed the texts of a job. If the caller is canceled, the job is canceled there too.

        Raises:
            LineLost: the replica died, or the connection was lost.
            RequestError: the replica rejected the job or failed, or the job has too many tokens for this front.
        """
        wire_job = WireJob.of(job)
        limit_s = wire_job.left_s + _GRACE_S
        content = await self._ask("embed", wire_job, limit_s=limit_s, work=wire_job.work, on_tokens=job.on_tokens)
        if not isinstance(content, WireEmbeddings):
            raise LineLost(f"it answered with {type(content).__name__}")
        result = content.embeddings()
        job.on_tokens(sum(result.num_tokens))
        return result

    async def vocabulary(self, method: str, items: Sequence[Any], *, flag: bool, limit_s: float) -> Any:
        """Have the replica ``split`` texts or ``join`` rows of token ids; see :class:`~gateway.types.Vocabulary`."""
        return await self._ask(method, list(items), flag, limit_s=limit_s)

    async def metrics(self) -> str:
        """Return the replica's metrics in Prometheus' text format.

        Raises:
            LineLost: the replica died, or the connection was lost.
            DeadlineExceeded: it has not answered in time.
        """
        return str(await self._ask("metrics", limit_s=_METRICS_S))

    async def _ask(
        self,
        kind: str,
        *parts: object,
        limit_s: float,
        work: int = 0,
        on_tokens: Callable[[int], None] = lambda _num_tokens: None,
    ) -> Any:
        connection = self._connection
        if connection is None:
            raise LineLost(self.trouble or "not connected")
        key = next(self._keys)
        call = self._calls[key] = _Call(asyncio.get_running_loop().create_future(), kind == "embed", on_tokens)
        self.work += work
        connection.send(kind, key, *parts)
        is_answered = False
        try:
            async with asyncio.timeout(max(0.0, limit_s)):
                answer = await call.answer
            is_answered = True
            return answer
        except LineLost:
            is_answered = self._connection is not connection  # a silent replica drops the job when it is back
            raise
        except TimeoutError:
            raise DeadlineExceeded("the request did not finish within its time limit") from None
        finally:
            del self._calls[key]
            self.work -= work
            if not is_answered:  # canceled, too late, or rejected here
                connection.send("cancel", key)
            if not self._calls:
                self._on_change()

    async def close(self) -> None:
        """Close the connection; jobs in progress fail."""
        self._is_closed = True
        if self._dialed is not None:
            self._dialed.close("this front is done with it")
        self._task.cancel()
        await asyncio.wait((self._task,))

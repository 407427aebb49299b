"""The replica's end of the connections to the fronts: it passes their jobs to the backend, and answers each job."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

import structlog

from gateway.backends.base import Backend
from gateway.cluster.pace import Pace
from gateway.cluster.values import Load, WireEmbeddings, WireJob
from gateway.cluster.wire import Connection, Message
from gateway.errors import InternalError, ModelRecovering, RequestError
from gateway.telemetry import metrics
from gateway.types import ModelInfo, ModelState

log = structlog.get_logger(__name__)

_GREETING_S: Final = 10.0
# The seconds between reports of the load to the fronts.
_REPORT_S: Final = 0.25
# The fronts receive a message at least this often, in seconds, as a sign of life.
_SILENCE_S: Final = 0.5
# A front whose kernel has taken nothing for so long, in seconds, is gone with its machine, or hangs. Otherwise, the kernel
# here would try for a quarter of an hour, and the front would count as connected for that time.
_UNTAKEN_S: Final = 15.0
# A smaller number of tokens is sent together with the answer.
_MANY_TOKENS: Final = 1024


class Front:
    """A front that is connected, and its jobs in progress.

    Attributes:
        serves: it sends jobs; another process only reads the replica's load, such as ``gateway cluster status``.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.serves = False
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.work = 0


class Host:
    """Answers the jobs of all fronts with one backend.

    Args:
        secret: the secret that a front must know.

    Attributes:
        port: the port on which it listens, once started.
        num_requests: the number of jobs in progress.
    """

    def __init__(self, backend: Backend, info: ModelInfo, secret: bytes, address: str) -> None:
        self._backend = backend
        self._info = info
        self._secret = secret
        self._address = address
        self.fronts: dict[Connection, Front] = {}
        self._server: asyncio.Server | None = None
        self._reporting: asyncio.Task[None] | None = None
        self._num_serving = 0
        self.port = 0
        self.num_requests = self._num_texts = self._work = 0
        self._pace = Pace()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._state: tuple[ModelState, str] = (ModelState.READY, "")
        self._state_since = time.monotonic()

    async def start(self) -> None:
        """Listen on a free port of the address."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._make_connection, self._address, 0)
        [listening] = self._server.sockets
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # on Linux; its connections inherit it
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * _UNTAKEN_S))
        self.port = listening.getsockname()[1]
        self._reporting = asyncio.create_task(self._report_load())

    def _make_connection(self) -> Connection:
        connection = Connection(
            self._secret, is_front=False, on_open=self._opened, on_message=self._received, on_closed=self._closed
        )
        asyncio.get_running_loop().call_later(_GREETING_S, _close_unless_open, connection)
        return connection

    def _opened(self, connection: Connection) -> None:
        self.fronts[connection] = Front(connection)
        connection.send("info", self._info)
        connection.send("state", *self._state)
        connection.send("load", self.load())

    def _closed(self, connection: Connection, reason: str) -> None:
        front = self.fronts.pop(connection, None)
        if front is None:
            log.debug("front_refused", reason=reason)
            return
        self._num_serving -= front.serves
        for task in front.tasks.values():  # no client waits for these answers
            task.cancel()

    # ----------------------------------------------------------------------------------------------------- messages

    def _received(self, connection: Connection, message: Message) -> None:
        front = self.fronts[connection]
        match message:
            case ("serves",):
                self._num_serving += not front.serves
                front.serves = True
            case ("embed", int(key), WireJob() as job):
                self._run(front, key, self._embed(front, key, job))
            case ("cancel", int(key)):
                if (task := front.tasks.get(key)) is not None:
                    task.cancel()
            case ("split" | "join" as method, int(key), list(items), bool(flag)):
                self._run(front, key, self._ask_vocabulary(connection, key, method, items, flag))
            case ("metrics", int(key)):
                connection.send("answer", key, metrics.render().decode())
            case _:
                raise ValueError(f"an unknown message: {str(message)[:80]}")

    def _run(self, front: Front, key: int, work: Coroutine[Any, Any, None]) -> None:
        task = front.tasks[key] = asyncio.create_task(work)
        task.add_done_callback(lambda _task: front.tasks.pop(key, None))

    async def _embed(self, front: Front, key: int, wire_job: WireJob) -> None:
        work, num_texts = wire_job.work, len(wire_job.content["texts"])
        self._count(front, 1, num_texts, work)

        def on_tokens(num_tokens: int) -> None:
            if num_tokens >= _MANY_TOKENS:
                front.connection.send("tokens", key, num_tokens)

        try:
            result = await self._backend.embed(wire_job.job(on_tokens))
            front.connection.send("answer", key, WireEmbeddings.of(result))
            self._pace.add(work)
        except asyncio.CancelledError:
            self._pace.cancel(work)
            raise
        except Exception as error:  # the front answers its client, and the replica continues
            front.connection.send("error", key, self._error_of(error))
        finally:
            self._count(front, -1, -num_texts, -work)

    async def _ask_vocabulary(
        self, connection: Connection, key: int, method: str, items: list[Any], flag: bool
    ) -> None:
        try:
            vocabulary = await self._backend.vocabulary()
            if method == "split":
                split = await asyncio.to_thread(vocabulary.split, items, add_special_tokens=flag)
                connection.send("answer", key, split)
            else:
                joined = await asyncio.to_thread(vocabulary.join, items, skip_special_tokens=flag)
                connection.send("answer", key, joined)
        except Exception as error:  # as above
            connection.send("error", key, self._error_of(error))

    def _error_of(self, error: Exception) -> RequestError:
        """Return the error that the front answers with, for every failure: this process continues."""
        if isinstance(error, RequestError):
            return error.with_traceback(None)
        log.error("replica_failed", exc_info=error)
        return InternalError(f"model {self._info.id!r} failed in its replica; the replica's log has the traceback")

    # --------------------------------------------------------------------------------------------------------- load

    def _count(self, front: Front, num_requests: int, num_texts: int, work: int) -> None:
        self.num_requests += num_requests
        self._num_texts += num_texts
        self._work += work
        front.work += work
        self._pace.set_busy(self.num_requests > 0)
        if self.num_requests:
            self._is_idle.clear()
        else:
            self._is_idle.set()

    def load(self, front: Front | None = None) -> Load:
        """Return the current load from the perspective of one front."""
        others = self._work - (0 if front is None else front.work)
        return Load(self.num_requests, self._num_texts, self._work, others, self._pace.rate, self._num_serving)

    async def _report_load(self) -> None:
        """Measure the rate, and send changes to the fronts."""
        reported: dict[Connection, Load] = {}
        last = time.monotonic()
        while True:
            await asyncio.sleep(_REPORT_S)
            self._pace.measure()
            is_due = time.monotonic() - last >= _SILENCE_S
            last = time.monotonic() if is_due else last
            reported = {connection: load for connection, load in reported.items() if connection in self.fronts}
            for connection, front in self.fronts.items():
                if is_due or reported.get(connection) != self.load(front):
                    reported[connection] = self.load(front)
                    connection.send("load", reported[connection])

    def report(self, state: ModelState, reason: str) -> None:
        """Send the state of the model to all fronts, which send jobs only while it is ready."""
        if state is not self._state[0]:
            self._state_since = time.monotonic()
        self._state = (state, reason)
        for connection in self.fronts:
            connection.send("state", state, reason)

    def why_unwell(self, patience_s: float) -> str:
        """Return the reason why only another process can help; empty while the model works, or may soon work again.

        Args:
            patience_s: the seconds that a model may be recovering.
        """
        state, reason = self._state
        if state is ModelState.RECOVERING and time.monotonic() - self._state_since > patience_s:
            return f"it has been recovering for more than {patience_s:.0f} s: {reason}"
        return reason or "the model has failed" if state is ModelState.FAILED else ""

    # --------------------------------------------------------------------------------------------------------- end

    async def drain(self, timeout_s: float) -> None:
        """Ask the fronts to send no more jobs, and wait for those in progress."""
        for connection in self.fronts:
            connection.send("leaving")
        if self._server is not None:
            self._server.close()
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            log.warning("drain_timed_out", num_requests=self.num_requests)

    async def stop(self) -> None:
        """Close all connections; jobs in progress get an error."""
        if self._reporting is not None:
            self._reporting.cancel()
        for connection, front in list(self.fronts.items()):
            for key, task in list(front.tasks.items()):
                task.cancel()
                connection.send("error", key, _stopped_error(self._info.id)())
            connection.close("the replica has stopped")
        if self._server is not None:
            self._server.close()


def _stopped_error(model: str) -> Callable[[], RequestError]:
    return lambda: ModelRecovering(f"a replica of model {model!r} has stopped", retry_after_s=5)


def _close_unless_open(connection: Connection) -> None:
    if not connection.is_open:
        connection.abort("no greeting in time")

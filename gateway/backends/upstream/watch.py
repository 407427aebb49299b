"""Monitor a model's servers: test those that are shut out or suspect, and check all periodically with the probe."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

import structlog

from gateway.backends.base import Report
from gateway.backends.upstream.failures import Failure, listed
from gateway.backends.upstream.probe import Probe
from gateway.backends.upstream.server import Server
from gateway.types import ModelState

log = structlog.get_logger(__name__)

_LOOK_S = 0.5
_TRIALS_AT_ONCE = 32
_SETTLE_S = 0.05  # failures at the same moment need only one trial


class Watch:
    """Decides which servers get requests: those that return the vectors of the probe.

    Args:
        servers: a list that may change.
        check_interval_s: the interval between the checks of a working server.
        report: takes the state of the model when it changes.
    """

    def __init__(
        self, model: str, servers: Sequence[Server], probe: Probe, check_interval_s: float, report: Report
    ) -> None:
        self._model = model
        self._servers = servers
        self._probe = probe
        self._check_interval_s = check_interval_s
        self._report = report
        self._was_ready = True
        self._suspicion = asyncio.Event()
        self._on_trial: set[Server] = set()
        self._turns = asyncio.Semaphore(_TRIALS_AT_ONCE)
        self._task = asyncio.create_task(self._run())

    def look(self) -> None:
        """Check now, rather than a moment later, whether a server is suspect."""
        self._suspicion.set()

    async def stop(self) -> None:
        """Stop monitoring."""
        self._task.cancel()
        await asyncio.wait((self._task,))

    async def _run(self) -> None:
        next_check = time.monotonic() + self._check_interval_s
        async with asyncio.TaskGroup() as trials:
            while True:
                now = time.monotonic()
                is_check_due = now >= next_check
                if is_check_due:
                    next_check = now + self._check_interval_s
                for server in self._servers:
                    is_due = is_check_due or server.breaker.is_trial_due(now)
                    if is_due and server not in self._on_trial:
                        self._on_trial.add(server)
                        trials.create_task(self._try(server))
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await self._suspicion.wait()
                        await asyncio.sleep(_SETTLE_S)
                self._suspicion.clear()
                self._show_state()  # servers may have left

    async def _try(self, server: Server) -> None:
        """Let a server in if it returns the vectors of the probe; otherwise shut it out."""
        async with self._turns:
            await self._try_now(server)

    async def _try_now(self, server: Server) -> None:
        started = time.monotonic()
        try:
            problem = await self._probe.compare(server)
        except Failure as failure:
            self._judge(server, failure, started)
        except Exception as error:  # no error of a server may end the watch
            server.shut_out(f"{server.name} no longer gives its known vectors: {str(error) or repr(error)}")
        else:
            if problem:
                # Its last vectors may be wrong, so a cache of the model is emptied even if other servers work.
                is_in_doubt = server.breaker.is_closed or server.has_unchecked
                server.has_unchecked = False
                server.shut_out(
                    f"{server.name} gives different vectors than before, so it may run another model: {problem}"
                )
                if is_in_doubt:
                    self._report(ModelState.RECOVERING, server.breaker.reason)
                    self._was_ready = False
            else:
                server.let_in()
        finally:
            self._on_trial.discard(server)
        self._show_state()

    def _judge(self, server: Server, failure: Failure, started: float) -> None:
        """Decide the state of a server that has not answered the probe."""
        breaker = server.breaker
        is_busy = failure.outcome == "overloaded" or (failure.outcome == "timeout" and server.answered_at > started)
        if breaker.is_closed and is_busy:
            breaker.postpone(time.monotonic())  # it works for other requests
        elif breaker.is_closed and not breaker.is_suspect:
            server.note(failure)  # as good a reason to suspect it as a client's request
        else:
            server.shut_out(str(failure), is_refusing=failure.outcome == "refused")

    def _show_state(self) -> None:
        is_ready = any(server.breaker.is_closed for server in self._servers)
        if is_ready == self._was_ready:
            return
        self._was_ready = is_ready
        reasons = listed(server.breaker.reason for server in self._servers)
        self._report(ModelState.READY if is_ready else ModelState.RECOVERING, "" if is_ready else reasons)
        log.warning("upstream_state", model=self._model, is_ready=is_ready, reasons=reasons)

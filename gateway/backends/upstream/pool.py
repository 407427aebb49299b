"""The servers of a model. They come and go if the URL is a name with many addresses (``dns+http://``)."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import structlog

from gateway.backends.base import Replica, Report
from gateway.backends.upstream.dialects import Dialect
from gateway.backends.upstream.failures import Failure
from gateway.backends.upstream.probe import Probe
from gateway.backends.upstream.resolver import NotResolved, Resolver
from gateway.backends.upstream.server import Server
from gateway.backends.upstream.watch import Watch
from gateway.config.upstream import DNS, Upstream, server_names
from gateway.telemetry import forgetting, metrics
from gateway.types import ModelState

log = structlog.get_logger(__name__)

# More addresses than any headless Service should have. Each address costs connections, metric series and trials.
MAX_ADDRESSES: Final = 1024
# A request may have chosen a server just before the server left, and may pause before it sends.
LINGER_S: Final = 3.0
# Comparing a thousand servers takes 0.2 ms per request. The best of 64 is as good (docs/scale.md).
_MAX_COMPARED = 64
_PORTS = {"http": 80, "https": 443}


@dataclass(slots=True)
class Name:
    """A URL whose host is a name that is looked up periodically.

    Attributes:
        url: the URL without ``dns+``.
        addresses: the addresses from the last successful look-up.
        reason: the reason why the last look-up failed; empty if it succeeded.
    """

    url: str
    host: str
    port: int
    path: str
    addresses: Sequence[str] = ()
    reason: str = ""

    @classmethod
    def parse(cls, url: str) -> Name:
        """Parse a URL that begins with ``dns+``."""
        url = url.removeprefix(DNS)
        parts = urlsplit(url)
        return cls(url, parts.hostname or "", parts.port or _PORTS[parts.scheme], parts.path)


class Turns:
    """A semaphore with one turn per server; the number of servers changes."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(0)
        self._size = self._num_excess = 0

    def resize(self, size: int) -> None:
        """Set the number of turns; excess turns end when they are released."""
        self._num_excess += max(0, self._size - size)
        for _ in range(size - self._size):
            self.release()
        self._size = size

    async def acquire(self) -> None:
        """Wait for a turn and take it."""
        await self._free.acquire()

    def release(self) -> None:
        """Give a turn back."""
        if self._num_excess:
            self._num_excess -= 1
        else:
            self._free.release()


class Pool:
    """The servers of a model, one for each URL or address.

    The addresses of a name are looked up every ``resolve_interval_s``. A new address gets requests once the watch has
    verified its vectors. A removed address gets no more requests once another server works, and is closed after its
    last request. If a name cannot be looked up, or has no address, the previous addresses stay in use, and the watch
    finds out whether they still work.

    Attributes:
        servers: the servers that may get requests, in the order of the registry, those of a name by address. The list
            object never changes.
        low_turns: the turns of low-priority requests.
    """

    def __init__(self, model: str, dialect: Dialect, upstream: Upstream, resolver: Resolver) -> None:
        self.servers: list[Server] = []
        self.low_turns = Turns()
        self._width = 0  # the width of the vectors; 0 while unknown
        self._model = model
        self._dialect = dialect
        self._upstream = upstream
        self._resolver = resolver
        fixed = [url for url in upstream.urls if not url.startswith(DNS)]
        self._fixed = dict(zip(server_names(fixed), fixed, strict=True))
        self._names = [Name.parse(url) for url in upstream.urls if url.startswith(DNS)]
        # Otherwise two names with the same addresses would have servers with the same name.
        self._shows_path = len({urlsplit(url).path for url in upstream.urls}) > 1
        self._leaving: dict[Server, float] = {}
        self._task: asyncio.Task[None] | None = None
        self._watch: Watch | None = None

    @property
    def unresolved(self) -> list[str]:
        """The reasons why names could not be looked up."""
        return [name.reason for name in self._names if name.reason]

    @property
    def reasons(self) -> list[str]:
        """The reasons why servers get no requests, and why names could not be looked up."""
        return [*self.unresolved, *(server.breaker.reason for server in self.servers)]

    @property
    def all_names(self) -> set[str]:
        """The names of all servers, including those that are leaving."""
        return {server.name for server in (*self.servers, *self._leaving)}

    async def find(self) -> None:
        """Look up all names for the first time, and create a server for each address."""
        await self._look_up()
        self._update()

    def set_width(self, width: int) -> None:
        """Set the dimensions of the vectors; servers that come from now on are checked before they get requests."""
        self._width = width
        for server in self.servers:
            server.width = width

    def open(self, probe: Probe, check_interval_s: float, report: Report) -> None:
        """Start to monitor the servers and to look up the names periodically.

        Args:
            check_interval_s: the interval between the checks of a working server.
            report: takes the state of the model when it changes.
        """
        self._watch = Watch(self._model, self.servers, probe, check_interval_s, report)
        if self._names:
            self._task = asyncio.create_task(self._keep_looking())

    def look(self) -> None:
        """Check now, rather than a moment later, whether a server is suspect or new."""
        if self._watch is not None:
            self._watch.look()

    def replicas(self) -> Sequence[Replica]:
        """Return the servers while they are monitored."""
        if self._watch is None:
            return []
        ready, not_ready = ModelState.READY, ModelState.RECOVERING
        return [
            Replica(server.name, ready if server.breaker.is_closed else not_ready, server.breaker.reason)
            for server in self.servers
        ]

    def choose(self, failures: Mapping[Server, Failure]) -> Server | None:
        """Return the server to ask, preferring those that have not failed this request, then those not suspect.

        Among several, choose the server with the fewest texts in flight; break ties at random, since other gateways
        choose at the same time.

        Args:
            failures: the failures of this request, by server.
        """
        servers: Sequence[Server] = self.servers
        if len(servers) > _MAX_COMPARED:
            some = random.sample(servers, _MAX_COMPARED)
            servers = some if any(one.breaker.is_closed and one not in failures for one in some) else servers
        working = [server for server in servers if server.breaker.is_closed]
        fresh = [server for server in working if server not in failures]
        again = [server for server in working if server in failures and failures[server].is_worth_repeating]
        return min(
            fresh or again,
            key=lambda server: (server.breaker.is_suspect, server.num_texts, random.random()),  # noqa: S311
            default=None,
        )

    async def close(self) -> None:
        """Stop the look-ups, and close all connections. The servers stay in the list for their names and reasons."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
            self._task = None
        if self._watch is not None:
            await self._watch.stop()
            self._watch = None
        for server in (*self.servers, *self._leaving):
            await server.close()

    async def _keep_looking(self) -> None:
        while True:
            # The random factor keeps gateways that were started together from all asking at the same moment.
            await asyncio.sleep(self._upstream.resolve_interval_s * random.uniform(0.9, 1.1))  # noqa: S311
            try:
                await self._look_up()
                if self._update():
                    self.look()
                await self._close_left()
            except Exception:  # no error of a resolver may end this task
                log.exception("upstream_names_not_looked_up", model=self._model)

    async def _look_up(self) -> None:
        await asyncio.gather(*map(self._look_up_one, self._names))

    async def _look_up_one(self, name: Name) -> None:
        outcome, reason = "ok", ""
        try:
            addresses = await self._resolver.resolve(name.host, name.port)
        except NotResolved as error:
            outcome, reason = error.outcome, str(error)
        else:
            if len(addresses) > MAX_ADDRESSES:
                reason = (
                    f"{name.host!r} has {len(addresses)} addresses; the limit is {MAX_ADDRESSES}: the others get none"
                )
            name.addresses = addresses[:MAX_ADDRESSES]
        metrics.UPSTREAM_LOOKUPS.labels(self._model, outcome).inc()
        if reason != name.reason:  # once, rather than every few seconds
            (log.warning if reason else log.info)(
                "upstream_name", model=self._model, name=name.host, reason=reason, addresses=len(name.addresses)
            )
        name.reason = reason

    def _wanted(self) -> Iterator[tuple[str, str, str | None]]:
        """Yield the name, the URL and the address of each server that should exist."""
        for name, url in self._fixed.items():
            yield name, url, None
        for dns in self._names:
            for address in dns.addresses:
                host = f"[{address}]" if ":" in address else address
                yield f"{host}:{dns.port}{dns.path if self._shows_path else ''}", dns.url, address

    def _update(self) -> bool:
        """Create and remove servers to match the URLs and addresses; return whether anything has changed."""
        before = {server.name: server for server in self.servers}
        leaving = {server.name: server for server in self._leaving}
        present: dict[str, Server] = {}
        added = []
        for name, url, address in self._wanted():
            if name in present:
                continue
            server = before.get(name) or leaving.get(name)
            if server is None:
                server = Server(self._model, name, url, self._dialect, self._upstream, address)
                server.width = self._width
            if name not in before:
                added.append(name)
                if self._width:
                    server.hold()
            self._leaving.pop(server, None)
            present[name] = server
        gone = [server for name, server in before.items() if name not in present]
        if not any(server.breaker.is_closed for server in present.values()):
            # All servers were replaced at once. The old ones may work for a while; when they fail, the watch shuts them
            # out.
            gone = [server for server in gone if not server.breaker.is_closed]
        for server in gone:
            del before[server.name]
            self._leaving[server] = time.monotonic()
        self.servers[:] = {**present, **before}.values()
        self.low_turns.resize(len(self.servers))
        if before and (added or gone):
            log.info("upstream_servers", model=self._model, added=added, gone=[server.name for server in gone])
        return bool(added or gone)

    async def _close_left(self) -> None:
        """Close the servers that have left and answered their last request, and remove their metrics."""
        now = time.monotonic()
        for server, left_at in list(self._leaving.items()):
            if not server.num_texts and now - left_at >= LINGER_S:
                del self._leaving[server]
                await server.close()
                forgetting.forget_server(self._model, server.name)

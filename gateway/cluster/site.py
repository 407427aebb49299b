"""The cluster on which the models of this process run. All of their backends share one connection to it."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from typing import Final

import structlog

from gateway.backends.base import Backend
from gateway.cluster import head
from gateway.cluster.backend import RayBackend
from gateway.cluster.deploying import Cluster
from gateway.cluster.placing import MAKE_INFINITY, Spec, make_spec
from gateway.cluster.reclaiming import Reclaimer
from gateway.config.model_entry import ModelEntry
from gateway.config.settings import Settings

log = structlog.get_logger(__name__)

# How long a backend that stops waits, in seconds, while another one is being deployed.
_RELEASE_S: Final = 2.0
_SWITCHED_OFF = "switched off in models.yaml (`enabled: false`)"
_NO_CARD = "no machine of the cluster has an accelerator (`enabled: true` in models.yaml runs it on the CPU)"


class ClusterSite:
    """The cluster that the models of this process run on. The first model that loads connects to it.

    Args:
        address: ``local``, ``auto`` or the ``HOST:PORT`` of the head.
        make_backend: ``module:function`` that makes the backend in a replica; see :class:`gateway.cluster.placing.Spec`.

    Attributes:
        on_lost: called once, with the reason, if the cluster's head is gone and this process has to end.
    """

    def __init__(self, address: str, settings: Settings, make_backend: str = MAKE_INFINITY) -> None:
        self.cluster = Cluster(address)
        self._settings = settings
        self._make_backend = make_backend
        self._is_connected = False
        self._connecting = threading.Lock()
        self._turn = threading.Lock()  # to claim or to release deployments
        self._users: dict[str, int] = {}
        self._handles: dict[str, object] = {}
        self._reclaimer = Reclaimer(self.cluster, self._users)
        self.on_lost: Callable[[str], None] = lambda _reason: None
        self._watching: list[asyncio.Task[None]] = []

    def backend(self, entry: ModelEntry) -> Backend:
        """Return the backend of a model, not started."""
        return RayBackend(entry, self._settings, self)

    # ------------------------------------------------------------------------------------------------------ as a site

    def is_here(self, _entry: ModelEntry) -> bool:
        return False

    def why_disabled(self, entry: ModelEntry) -> str:
        if entry.enabled is False:
            return _SWITCHED_OFF
        if entry.is_remote:
            return ""
        self.connect()
        return "" if self.cluster.has_cards or entry.enabled is True else _NO_CARD

    def is_kept_elsewhere(self, entry: ModelEntry) -> bool:
        return not entry.is_remote and self._reclaimer.is_kept_by_older(entry.id)

    # ------------------------------------------------------------------------------------------------- for its backends

    def connect(self) -> None:
        """Connect to the cluster unless already connected. Blocks.

        Raises:
            StartError: there is no cluster at the address.
        """
        with self._connecting:
            if not self._is_connected:
                started = time.monotonic()
                self.cluster.connect()
                self._is_connected = True
                log.info("cluster_connected", seconds=round(time.monotonic() - started, 2))

    async def use(self, entry: ModelEntry) -> Spec:
        """Deploy a model for another backend of this process; return the data of its replicas.

        Raises:
            LoadError: a file of the entry cannot be read.
            StartError: there is no cluster at the address.
        """
        spec = await asyncio.to_thread(self._make_spec, entry)
        self._users[spec.name] = self._users.get(spec.name, 0) + 1
        try:
            await asyncio.to_thread(self.deploy, spec)
        except BaseException:  # also if the load is canceled
            await self.leave(spec.name, delete=False)
            raise
        _take_signals_back()
        if not self._watching:
            watches = (head.watch(self.cluster.head, self._lose), self._reclaimer.run())
            self._watching = [asyncio.create_task(watch) for watch in watches]
        return spec

    def _make_spec(self, entry: ModelEntry) -> Spec:
        self.connect()
        return make_spec(entry, self._settings, has_cards=self.cluster.has_cards, make_backend=self._make_backend)

    def deploy(self, spec: Spec) -> None:
        """Claim and deploy a model unless it is deployed, and have its replicas announced. Blocks.

        Does nothing if no backend uses it any longer, because its load was canceled in the meantime.

        Raises:
            TimeoutError: Serve does not remove the deployment that it has given up.
        """
        with self._turn:
            if spec.name not in self._users:
                return
            try:
                self.cluster.claims.claim(spec.name)
                self.cluster.deploy(spec)
                self._handles[spec.name] = self.cluster.watch(spec.name)
            finally:
                if spec.name not in self._users:  # canceled since; `_release` may not have waited
                    self._let_go(spec.name)

    async def look_around(self) -> None:
        """Delete the deployments that no gateway has used for a while, and note what older gateways use."""
        try:
            await self._reclaimer.look()
        except Exception as error:  # Serve may be restarting; the next look asks again
            log.warning("cluster_not_answering", error=repr(error))

    async def leave(self, name: str, *, delete: bool) -> None:
        """Record that a backend has ended; if requested, delete its deployment unless another gateway uses it."""
        self._users[name] -= 1
        if not self._users[name]:
            del self._users[name]
            if self._is_connected:
                await asyncio.to_thread(self._release, name, delete=delete)

    def _release(self, name: str, *, delete: bool) -> None:
        if not self._turn.acquire(timeout=-1 if delete else _RELEASE_S):
            return  # a process that stops does not wait for Serve, and its claims end with it
        try:
            if name in self._users:  # another backend has begun to use it
                return
            self._let_go(name)
            if delete:
                self.cluster.delete_unused(name)
        finally:
            self._turn.release()

    def _let_go(self, name: str) -> None:
        self._handles.pop(name, None)
        self.cluster.claims.release(name)

    def _lose(self, reason: str) -> None:
        self._is_connected = False  # Ray would wait for the head before it disconnects
        self.on_lost(reason)

    async def disconnect(self) -> None:
        """Disconnect from the cluster."""
        for watch in self._watching:
            watch.cancel()
        if self._is_connected:
            await asyncio.to_thread(self.cluster.disconnect)


def _take_signals_back() -> None:
    """Replace Ray's signal handlers, which print a stack at SIGTERM, by Python's. Called on the main thread."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            if (handler := signal.getsignal(number)) is not None:
                signal.signal(number, handler)

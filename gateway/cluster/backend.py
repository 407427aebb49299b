"""The backend of a model that runs as replicas on a Ray cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, Protocol

import structlog

from gateway.backends.base import Replica, Report, unreported
from gateway.cluster.deploying import Cluster, Deployed
from gateway.cluster.discovery import DIRECTORY
from gateway.cluster.line import Line
from gateway.cluster.placing import Spec
from gateway.cluster.pool import Pool
from gateway.cluster.vocabulary import RemoteVocabulary
from gateway.config.model_entry import ModelEntry
from gateway.config.replicas import Replicas
from gateway.config.settings import Settings
from gateway.errors import LoadError, ModelNotReady, ModelRecovering, ShuttingDown
from gateway.telemetry import metrics
from gateway.types import Embeddings, EmbedJob, ModelInfo, ModelState, Vocabulary

log = structlog.get_logger(__name__)

# The seconds between questions to Serve about a model that has no replica yet.
_POLL_S: Final = 0.5
# A model that no machine has room for fails after this time in seconds, and is retried later.
_PLACE_S: Final = 60.0
# The seconds between looks for deployments that may be deleted, while a model has no place.
_LOOK_S: Final = 5.0
# The seconds between checks of a model that has lost all replicas; longer each time that it is deployed again.
_FIRST_PAUSE_S: Final = 5.0
_LONGEST_PAUSE_S: Final = 60.0
# When a replica is replaced, a gap of this length in seconds is normal.
_GAP_S: Final = 2.0


class Site(Protocol):
    """Deploys models for the backends of this process; see :class:`gateway.cluster.site.ClusterSite`."""

    @property
    def cluster(self) -> Cluster: ...

    async def use(self, entry: ModelEntry) -> Spec: ...

    def deploy(self, spec: Spec) -> None: ...

    async def look_around(self) -> None: ...

    def is_kept_elsewhere(self, entry: ModelEntry) -> bool: ...

    async def leave(self, name: str, *, delete: bool) -> None: ...


class RayBackend:
    """The :class:`~gateway.backends.base.Backend` of a model with replicas on a Ray cluster.

    ``plan`` deploys the model, unless another front already has, and waits for the first replica; ``stop`` leaves the
    model to the other fronts.
    """

    def __init__(self, entry: ModelEntry, settings: Settings, site: Site) -> None:
        self._entry = entry
        self._settings = settings
        self._site = site
        self._report: Report = unreported
        self._spec: Spec | None = None
        self._pool = Pool(entry.id, self._lines_changed, on_fault=self._note_fault)
        self._end_watch: Callable[[], None] = lambda: None
        self._is_stopped = False
        self._is_ready = False
        self._is_retry = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._gap: asyncio.TimerHandle | None = None
        metrics.REPLICAS_LOST.labels(entry.id)  # starts at 0, so that the first loss is an increase

    @property
    def lines(self) -> list[Line]:
        """The connections to the replicas."""
        return list(self._pool.lines.values())

    async def plan(self, report: Report = unreported) -> ModelInfo:
        self._is_stopped = False
        if self._spec is None:
            self._spec = await self._site.use(self._entry)
            log.info("model_deployed", model=self._entry.id, deployment=self._spec.name)
        self._end_watch = DIRECTORY.watch(self._spec.name, self._pool.update)
        try:
            info = await self._first_info(self._spec, report)
        except BaseException:  # also a canceled plan must close the connections
            self._is_retry = True
            self._end_watch()
            await self._pool.close()
            raise
        self._is_retry = False
        return info

    async def _first_info(self, spec: Spec, report: Report) -> ModelInfo:
        """Return the model's info once a replica accepts jobs.

        Raises:
            LoadError: no replica can load the model, or no machine has room for a replica.
        """
        began = looked = time.monotonic()
        shown = None if self._is_retry else ""
        cluster = self._site.cluster
        while not self._pool.usable:
            deployed = await asyncio.to_thread(cluster.look, spec.name)
            if await self._has_failed(deployed):  # Serve does not retry until the model is deployed again
                error = await self._load_error(deployed.reason or f"Ray Serve says {deployed.status}")
                await self._stop(delete=True)
                raise error
            if deployed.is_gone:  # an operator has removed it, or shut Serve down
                await asyncio.to_thread(self._site.deploy, spec)
            if deployed.reason != shown and await self._is_loading(spec):
                shown = deployed.reason
                report(ModelState.LOADING, shown)
            now = time.monotonic()
            is_late, is_due = now - began > _PLACE_S, now - looked > _LOOK_S
            if (is_late or is_due) and not await asyncio.to_thread(cluster.has_begun, spec.name):
                looked = now
                if is_late:
                    needs = "a graphics card" if spec.num_gpus else "a core"
                    raise await self._load_error(
                        f"no machine of the cluster has room for a replica, which needs {needs}"
                    )
                await self._site.look_around()
            await self._pool.changed(_POLL_S)
        assert self._pool.info is not None  # noqa: S101  a usable line has it
        return self._pool.info

    async def _is_loading(self, spec: Spec) -> bool:
        """Return whether the model loads: one that has failed does not while it waits for a place again."""
        return not self._is_retry or await asyncio.to_thread(self._site.cluster.has_begun, spec.name)

    async def _load_error(self, reason: str) -> LoadError:
        await self._site.look_around()
        if self._site.is_kept_elsewhere(self._entry):
            reason += (
                ". Older gateways still serve it with another entry, other settings or another version, so this gateway is "
                "not ready until they end"
            )
        return LoadError(reason)

    async def _has_failed(self, deployed: Deployed) -> bool:
        """Return whether Serve has given up on a deployment: between an end and the next start, it only seems so."""
        if deployed.has_failed:
            await asyncio.sleep(_POLL_S)
            deployed = await asyncio.to_thread(self._site.cluster.look, deployed.name)
        return deployed.has_failed

    async def start(self, report: Report) -> ModelInfo:
        info = self._pool.info if self._pool.usable else await self.plan(report)
        assert info is not None  # noqa: S101  a usable line has it
        self._report = report
        self._is_ready = True
        if self._spec is not None:
            self._run(self._warn_of_missing(self._spec))
        return info

    async def _warn_of_missing(self, spec: Spec) -> None:
        """Log once, after a while, if there are fewer replicas than the registry wants: no machine has room for them."""
        await asyncio.sleep(_PLACE_S)
        num_running, wanted = len(self._pool.usable), spec.replicas.min
        if num_running < wanted:
            deployed = await asyncio.to_thread(self._site.cluster.look, spec.name)
            log.warning(
                "replicas_missing",
                model=self._entry.id,
                running=num_running,
                wanted=wanted,
                reason=deployed.reason or "`gateway cluster status` shows the running replicas",
            )

    def replicas(self) -> Sequence[Replica]:
        """Return the replicas, for ``/v1/models``."""
        return self._pool.replicas()

    async def replica_metrics(self) -> Mapping[str, str]:
        """Return the metrics of each replica that answers."""
        return await self._pool.metrics()

    def count_replicas(self) -> tuple[int, int]:
        """Return the number of replicas that accept jobs, and the smallest number that there should be."""
        return len(self._pool.usable), (self._entry.replicas or Replicas()).min

    def _note_fault(self, reason: str) -> None:
        """Empty the model's cache, even if other replicas work, because the replica's last vectors may be wrong."""
        if self._is_ready:
            self._report(ModelState.RECOVERING, reason)
            if self._pool.usable:
                self._report(ModelState.READY, "")

    def _lines_changed(self) -> None:
        """Report the model as recovering while no replica accepts jobs, except for short gaps."""
        if not self._is_ready:
            return
        if self._pool.usable:
            if self._gap is not None:
                self._gap.cancel()
                self._gap = None
            self._report(ModelState.READY, "")
        elif self._gap is None:
            self._gap = asyncio.get_running_loop().call_later(_GAP_S, self._report_gap)

    def _report_gap(self) -> None:
        if self._is_ready and not self._pool.usable:
            reasons = {line.reason or line.trouble for line in self.lines} - {""}
            self._report(ModelState.RECOVERING, "; ".join(sorted(reasons)) or "no replica is running")
            self._run(self._deploy_again())

    async def _deploy_again(self) -> None:
        """Deploy the model again if Serve has given up on it, or if another front or an operator removed its deployment."""
        pause_s = _FIRST_PAUSE_S
        while self._is_ready and self._spec is not None and not self._pool.usable:
            try:
                deployed = await asyncio.to_thread(self._site.cluster.look, self._spec.name)
                if deployed.is_gone or await self._has_failed(deployed):
                    await asyncio.to_thread(self._site.deploy, self._spec)
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)  # its replicas may fail again
            except Exception as error:  # Serve may be restarting; the next check asks again
                log.warning("cluster_not_answering", model=self._entry.id, error=repr(error))
            await self._pool.changed(pause_s)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def embed(self, job: EmbedJob) -> Embeddings:
        self._require_running()
        return await self._pool.embed(job)

    async def vocabulary(self) -> Vocabulary:
        """Return the model's vocabulary in a replica. Its methods block, so call them in threads."""
        self._require_running()
        limit_s = self._settings.request_timeout_s
        loop = asyncio.get_running_loop()
        line = await self._pool.choose(0, time.monotonic() + limit_s)
        if line is None:
            raise ModelRecovering(f"model {self._entry.id!r} has no replica at the moment", retry_after_s=5)
        return RemoteVocabulary(line, loop, limit_s)

    def _require_running(self) -> None:
        if self._is_stopped:
            raise ShuttingDown("the gateway is shutting down", retry_after_s=5)
        if not self._is_ready:
            raise ModelNotReady(f"model {self._entry.id!r} is not loaded", retry_after_s=5)

    async def stop(self) -> None:
        await self._stop(delete=False)

    async def remove(self) -> None:
        """Stop, and delete the deployment unless another gateway uses it."""
        await self._stop(delete=True)

    async def _stop(self, *, delete: bool) -> None:
        self._is_ready, self._is_stopped = False, True
        self._end_watch()
        self._end_watch = lambda: None
        if self._gap is not None:
            self._gap.cancel()
        for task in list(self._tasks):
            task.cancel()
        await self._pool.close()
        if self._spec is not None:
            name, self._spec = self._spec.name, None
            await self._site.leave(name, delete=delete)

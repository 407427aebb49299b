"""The registry and the models in service, and the reload that replaces them while requests are answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from typing import TYPE_CHECKING

import structlog

from gateway.backends.base import Backend
from gateway.backends.infinity import InfinityBackend
from gateway.backends.on_demand import OnDemandBackend
from gateway.backends.residents import Residents
from gateway.cluster.environment import site_of
from gateway.config.registry import Experiment, ModelEntry, Registry
from gateway.config.settings import Settings
from gateway.config.upstream import server_names
from gateway.errors import ConfigError, ReloadRefused, StartError
from gateway.experiments.exposures import now
from gateway.experiments.split import Split
from gateway.fleet import Fleet, MakeBackend, Model
from gateway.recent import RecentErrors, RecentTraffic
from gateway.routing.changes import Reloaded, changed_aliases, changed_experiments
from gateway.routing.router import Router
from gateway.routing.rules import broken_rules, moved_names, name_spaces
from gateway.routing.shadow import Shadows
from gateway.telemetry import forgetting, metrics
from gateway.types import ModelKind, ModelState

if TYPE_CHECKING:
    from gateway.capture.captures import Captures
    from gateway.cluster.site import ClusterSite

log = structlog.get_logger(__name__)

ReadRegistry = Callable[[], Registry]


def make_real_backend(
    entry: ModelEntry,
    settings: Settings,
    residents: Residents,
    on_card_lost: Callable[[str], None],
    cluster: ClusterSite | None = None,
) -> Backend:
    """Return a model's backend: an engine in this process (always or on demand), a cluster, or other servers."""
    if entry.is_remote:
        from gateway.backends.upstream.backend import UpstreamBackend  # slow to import

        return UpstreamBackend(entry, settings)
    if cluster is not None:
        return cluster.backend(entry)
    engine = InfinityBackend(entry, settings, residents, on_card_lost)
    return OnDemandBackend(entry, engine, settings, residents) if entry.is_on_demand else engine


class Deployment:
    """A registry, its models, and the router over them: a reload replaces all of them together, between two requests.

    Args:
        fleet: the models of ``registry``; by default they are made from it.
        read_registry: reads the registry again, for a reload.
        make_backend: makes the backend of a model; by default an embedded Infinity engine.

    Attributes:
        resources: connections and files, which are closed once everything has stopped.
        lost: the reason why this process has to end, such as a card that can no longer compute; normally empty.
        on_lost: called once when that happens.
        counting_since: the time when each experiment was first served with its present arms and weights, ISO 8601.
        errors, traffic: the last requests that failed; the rate and the latency of each model.
        changing: held from a change of the registry's file until it is served, so that changes come one after another.
    """

    def __init__(
        self,
        registry: Registry,
        settings: Settings,
        fleet: Fleet | None = None,
        read_registry: ReadRegistry | None = None,
        make_backend: MakeBackend | None = None,
    ) -> None:
        residents = Residents()
        cluster = site_of(registry, settings) if make_backend is None else None
        make_backend = make_backend or (lambda entry: make_real_backend(entry, settings, residents, self.lose, cluster))
        self.settings = settings
        self.is_draining = False
        self.lost = ""
        self.on_lost: Callable[[], None] = lambda: None
        self.resources = AsyncExitStack()
        if cluster is not None:
            self.resources.push_async_callback(cluster.disconnect)
            cluster.on_lost = self.lose
        self.counting_since: dict[str, str] = {}
        self.errors = RecentErrors()
        self.traffic = RecentTraffic()
        self.captures: Captures | None = None
        self._generations: dict[str, str] = {}
        self._reloader = Reloader(read_registry or (lambda: registry), make_backend)
        self._reloading, self.changing = asyncio.Lock(), asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._serve(registry, fleet or Fleet.from_registry(registry, make_backend, cluster))

    def spaces_of(self, experiment: Experiment) -> dict[str, str]:
        """Return the space of each arm whose model is known and returns vectors."""
        models = [(arm, self.fleet.get(arm.model)) for arm in experiment.arms]
        return {
            arm.label: model.info.space(arm.task or model.info.default_task)
            for arm, model in models
            if model is not None and model.info is not None and model.info.kind is ModelKind.EMBED
        }

    def served_since(self, experiment: Experiment) -> float:
        """Return when the present weights of an experiment were first served, in seconds since the epoch."""
        # A thread that asks may have an experiment that a reload has just removed.
        return datetime.fromisoformat(self.counting_since.get(experiment.id) or now()).timestamp()

    def _serve(self, registry: Registry, fleet: Fleet) -> None:
        generations = {experiment.id: Split(experiment).generation for experiment in registry.experiments}
        self.counting_since = {
            name: self.counting_since[name] if self._generations.get(name) == generation else now()
            for name, generation in generations.items()
        }
        self._generations = generations
        self.registry = registry
        self.fleet = fleet
        self.router = Router(registry, fleet)
        self.shadows = Shadows(registry, self.router)
        self.captures = _captures(registry, self.captures)
        unkept = [experiment.id for experiment in registry.experiments if experiment.outcome is not None]
        if unkept and self.settings.state_dir is None:
            log.warning(
                "outcomes_not_kept", experiments=unkept, mend="set GATEWAY_STATE_DIR to a folder on a local disk"
            )

    async def start(self) -> None:
        """Load the models.

        Raises:
            StartError: a model that the registry calls ``required`` is not ready, or the loaded models show that the
                registry breaks a rule, such as a fallback in another space.
        """
        self._refuse(_capture_problems(self.registry))  # before models are loaded, which may take minutes
        await self.fleet.start()
        self._refuse(broken_rules(self.registry, self.fleet))
        self._accept_models()
        self._seek_absent_models()

    def _refuse(self, problems: Iterable[str]) -> None:
        if text := "\n".join(f"{self.registry.path}: {problem}" for problem in problems):
            raise StartError(text)

    @property
    def is_ready(self) -> bool:
        """Whether new requests should come here."""
        return self.fleet.is_ready and not self.is_draining

    def drain(self) -> None:
        """Announce that this process is about to stop; until then it still answers requests."""
        self.is_draining = True

    def lose(self, reason: str) -> None:
        """Become unready and end the process: only a new process can use a lost card or cluster again."""
        if not self.lost:
            self.lost = reason
            self.drain()
            self.on_lost()

    async def reload(self) -> Reloaded:
        """Read the registry again and serve it, once all of its models are loaded and warm.

        Until then, nothing changes. If anything is wrong, nothing changes at all. Requests in progress when the new
        models take over finish on the old models. Concurrent reloads run one after the other.

        Raises:
            ReloadRefused: the file is wrong, a new model cannot be loaded, or a name would move to another space.
        """
        async with self._reloading:
            await self.fleet.started.wait()
            started = time.monotonic()
            registry, fleet = await self._reloader.prepare(self.fleet)
            # In a thread, because it hashes thousands of units. The lock keeps other reloads out.
            experiments = await asyncio.to_thread(changed_experiments, self.registry, registry)
            reloaded = self._switch_to(registry, fleet, experiments, started)
            metrics.RELOADS.labels("ok").inc()
            log.info(
                "reloaded",
                loaded=reloaded.loaded,
                kept=reloaded.kept,
                removed=reloaded.removed,
                aliases=reloaded.aliases,
                experiments=reloaded.experiments,
            )
            return reloaded

    def _switch_to(self, registry: Registry, fleet: Fleet, experiments: dict[str, str], started: float) -> Reloaded:
        """Serve another registry. Nothing awaits here, so a request sees either the old registry or the new one."""
        old_registry, old_fleet, old_shadows, old_captures = self.registry, self.fleet, self.shadows, self.captures
        for cache in fleet.take_over(old_fleet, registry):
            self._run_in_background(cache.close())
        self._serve(registry, fleet)
        self._accept_models()
        self._run_in_background(self._retire_names(old_registry, old_shadows))
        if old_captures is not None:
            self._run_in_background(asyncio.to_thread(old_captures.stop, self.captures))
        self._seek_absent_models()
        for model in old_fleet:
            if model not in fleet:
                self._run_in_background(self._retire(model))
        ids = {model.id for model in fleet}
        self.traffic.keep(ids)
        for model in old_fleet:
            if model.id not in ids:
                forgetting.forget_model(model.id)
        return Reloaded(
            loaded=tuple(m.id for m in fleet if m not in old_fleet and m.takes_requests),
            kept=tuple(m.id for m in fleet if m in old_fleet),
            removed=tuple(m.id for m in old_fleet if m.id not in ids),
            aliases=changed_aliases(old_registry, registry),
            experiments=experiments,
            seconds=time.monotonic() - started,
        )

    def _accept_models(self) -> None:
        """Remember the spaces of the loaded models, and describe them in the metrics."""
        self._reloader.remember_spaces(self.registry, self.fleet)
        for info in (model.info for model in self.fleet if model.info is not None):
            metrics.describe_model(
                info.id,
                source=info.source,
                revision=info.revision or "",
                space=info.space() if info.kind is ModelKind.EMBED else "",
                dtype=info.dtype,
                device=info.device,
                runtime=info.engine,
            )

    def _seek_absent_models(self) -> None:
        for model in self.fleet:
            if self.fleet.is_absent(model):
                # In the background, because a server that hangs must not delay a reload.
                self._run_in_background(self.fleet.seek(model, self._accept_found_model))

    def _accept_found_model(self) -> Sequence[str]:
        """Accept a model whose server has been found; return the rules that it breaks, which need a loaded model."""
        problems = self._reloader.find_problems(self.registry, self.fleet)
        if not problems:
            self._accept_models()
        return problems

    async def _retire(self, model: Model) -> None:
        """Stop a model when its last request has ended, and remove its metrics, unless a new model has its name."""
        await model.retire(self.settings.request_timeout_s)
        present = self.fleet.get(model.id)
        if present is None:
            forgetting.forget_model(model.id)
            return
        for server in _servers(model) - _servers(present):
            forgetting.forget_server(model.id, server)

    async def _retire_names(self, registry: Registry, shadows: Shadows) -> None:
        """Stop the old shadows, and remove the metrics of removed names, including those of their last requests."""
        await shadows.stop()
        for of, to in shadows.pairs - self.shadows.pairs:
            forgetting.forget_shadow(of, to)
        self._forget_arms(registry)
        await asyncio.sleep(self.settings.request_timeout_s)
        self._forget_arms(registry)

    def _forget_arms(self, registry: Registry) -> None:
        """Remove the metrics of an old registry's experiments and arms that the present registry lacks."""
        for experiment in registry.experiments:
            present = self.registry.experiment(experiment.id)
            if present is None:
                forgetting.forget_experiment(experiment.id)
                continue
            for label in {arm.label for arm in experiment.arms} - {arm.label for arm in present.arms}:
                forgetting.forget_experiment(experiment.id, label)

    def _run_in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def stop(self) -> None:
        """Stop every model, and close all resources; waiting requests get an error."""
        async with self.resources:
            await self.shadows.stop()
            for task in list(self._background):
                task.cancel()
            await asyncio.gather(*self._background, return_exceptions=True)
            await self.fleet.stop()
            if self.captures is not None:
                await asyncio.to_thread(self.captures.stop)


def _captures(registry: Registry, before: Captures | None) -> Captures | None:
    """Return the captures of a registry. If it has no captures, do not import their package."""
    if before is None and not registry.captures():
        return None
    from gateway.capture.captures import Captures

    return Captures(registry, before)


def _capture_problems(registry: Registry) -> list[str]:
    if not registry.captures():
        return []
    from gateway.capture.captures import capture_problems

    return capture_problems(registry)


class Reloader:
    """Reads a registry again, loads its models, and checks that they may replace the ones that are served."""

    def __init__(self, read_registry: ReadRegistry, make_backend: MakeBackend) -> None:
        self._read_registry = read_registry
        self._make_backend = make_backend
        # Includes names that are gone, because such a name may come back for another model.
        self._known_spaces: dict[str, dict[str, str]] = {}

    def remember_spaces(self, registry: Registry, fleet: Fleet) -> None:
        """Remember the space of each served name, so that no name moves to another space unnoticed."""
        for name, spaces in name_spaces(registry, fleet).items():
            self._known_spaces[name] = {**self._known_spaces.get(name, {}), **spaces}

    def find_problems(self, registry: Registry, fleet: Fleet) -> list[str]:
        """Return the rules that the models of a registry break, and the names that would move to another space."""
        return [*broken_rules(registry, fleet), *moved_names(self._known_spaces, registry, fleet)]

    async def prepare(self, served: Fleet) -> tuple[Registry, Fleet]:
        """Read the registry, load and warm up its models, and return both; log and count a refusal.

        Args:
            served: the present fleet; models with unchanged entries are kept.

        Raises:
            ReloadRefused: the file is wrong, a new model cannot be loaded, or a name would move to another space.
        """
        try:
            registry = await asyncio.to_thread(self._read_registry)
            return registry, await self._load(registry, served)
        except (ConfigError, ReloadRefused) as error:
            metrics.RELOADS.labels("refused").inc()
            log.error("reload_refused", reason=str(error))
            if isinstance(error, ReloadRefused):
                raise
            raise ReloadRefused(str(error)) from error
        except Exception:  # a broken disk or library can raise anything; the present models stay
            metrics.RELOADS.labels("refused").inc()
            log.exception("reload_failed")
            raise

    async def _load(self, registry: Registry, served: Fleet) -> Fleet:
        """Load the new models and check the fleet; if it is refused, stop the new models again."""
        fleet = served.successor(registry, self._make_backend)
        new = [model for model in fleet if model not in served]
        try:
            problems = _capture_problems(registry)
            if not problems:
                await fleet.load()
                problems = [
                    *(problem for model in new if (problem := _why_not_loaded(model, served.get(model.id)))),
                    *self.find_problems(registry, fleet),
                ]
            if problems:
                raise ReloadRefused("\n".join(f"{registry.path}: {problem}" for problem in problems))
        except BaseException:  # also a canceled reload must free the memory of its models
            for model in new:
                await model.retire(0)
                if (old := served.get(model.id)) is not None:
                    old.report(old.state, old.reason)  # the gauge of this id showed the new model's state
            raise
        return fleet


def _why_not_loaded(model: Model, before: Model | None) -> str:
    """Return the reason why a new model blocks a reload. A model that had already failed may fail again, unless required."""
    if model.state is not ModelState.FAILED:
        return ""
    had_failed = before is not None and before.state is ModelState.FAILED and before.entry.loads_like(model.entry)
    return "" if had_failed and not model.entry.required else f"{model.id} {model.reason}"


def _servers(model: Model) -> set[str]:
    """Return the names of the servers that run a model, as its metrics write them."""
    upstream = model.entry.upstream
    if upstream is None:
        return set()
    from gateway.backends.upstream.backend import UpstreamBackend  # slow to import

    return (
        model.backend.server_names if isinstance(model.backend, UpstreamBackend) else set(server_names(upstream.urls))
    )

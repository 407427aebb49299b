"""What is served right now, and how that is exchanged while requests are answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass

import structlog

from gateway.backends.base import Backend
from gateway.backends.infinity import InfinityBackend
from gateway.backends.upstream.backend import UpstreamBackend, server_names
from gateway.config.registry import ModelEntry, Registry
from gateway.config.settings import Settings
from gateway.errors import ConfigError, ReloadRefused, StartError
from gateway.experiments.exposures import now
from gateway.experiments.split import Split
from gateway.fleet import Fleet, MakeBackend, Model
from gateway.routing.changes import changed_aliases, changed_experiments
from gateway.routing.router import Router
from gateway.routing.rules import broken_rules, moved_names, name_spaces
from gateway.routing.shadow import Shadows
from gateway.telemetry import metrics
from gateway.types import ModelKind, ModelState

log = structlog.get_logger(__name__)

# Between attempts to reach servers that could not be reached when their model was loaded.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 60.0

ReadRegistry = Callable[[], Registry]


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload has changed.

    Attributes:
        loaded: ids of the models that were loaded for it.
        kept: ids of those that went on as they were.
        removed: ids of those that are gone.
        aliases: what has changed of each alias that leads elsewhere now, or is new, or gone.
        experiments: what has changed of each experiment.
    """

    loaded: tuple[str, ...]
    kept: tuple[str, ...]
    removed: tuple[str, ...]
    aliases: dict[str, str]
    experiments: dict[str, str]
    seconds: float


def make_real_backend(entry: ModelEntry, settings: Settings) -> Backend:
    """Return what runs a model: an engine in this process, or other servers."""
    return UpstreamBackend(entry, settings) if entry.is_remote else InfinityBackend(entry, settings)


class Deployment:
    """A registry, its models, and the router over them: replaced together, between two requests, by a reload.

    Args:
        fleet: the models of ``registry``, where they are not to be made from it.
        read_registry: reads the registry anew, for a reload.
        make_backend: makes what runs a model; by default an embedded Infinity engine.

    Attributes:
        resources: what is closed once everything has stopped, connections and files, say.
        counting_since: when each experiment was first served with its present arms and weights, ISO 8601.
    """

    def __init__(
        self,
        registry: Registry,
        settings: Settings,
        fleet: Fleet | None = None,
        read_registry: ReadRegistry | None = None,
        make_backend: MakeBackend | None = None,
    ) -> None:
        self.settings = settings
        self.is_draining = False
        self._make_backend = make_backend or (lambda entry: make_real_backend(entry, settings))
        self._read_registry = read_registry or (lambda: registry)
        self._reloading = asyncio.Lock()
        self._sought: set[Model] = set()
        self.resources = AsyncExitStack()
        self.counting_since: dict[str, str] = {}
        self._generations: dict[str, str] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        # Of names that are gone as well: one may come back for another model.
        self._known_spaces: dict[str, dict[str, str]] = {}
        self._serve(registry, fleet or Fleet.from_registry(registry, self._make_backend))

    def _serve(self, registry: Registry, fleet: Fleet) -> None:
        generations = {one.id: Split(one).generation for one in registry.experiments}
        self.counting_since = {
            name: self.counting_since[name] if self._generations.get(name) == generation else now()
            for name, generation in generations.items()
        }
        self._generations = generations
        self.registry = registry
        self.fleet = fleet
        self.router = Router(registry, fleet)
        self.shadows = Shadows(registry, self.router)

    async def start(self) -> None:
        """Load the models.

        Raises:
            StartError: a model that the registry calls ``required`` is not ready, or the loaded models show that the
                registry breaks a rule: a fallback of another space, say.
        """
        await self.fleet.start()
        if problems := broken_rules(self.registry, self.fleet):
            raise StartError("\n".join(f"{self.registry.path}: {problem}" for problem in problems))
        self._remember_spaces()
        self._seek_absent()

    @property
    def is_ready(self) -> bool:
        """Whether new requests should come here."""
        return self.fleet.is_ready and not self.is_draining

    def drain(self) -> None:
        """Say that this process is about to stop; what comes until then is still answered."""
        self.is_draining = True

    def _remember_spaces(self) -> None:
        for name, spaces in name_spaces(self.registry, self.fleet).items():
            self._known_spaces[name] = {**self._known_spaces.get(name, {}), **spaces}
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

    def _seek_absent(self) -> None:
        """Have models whose servers could not be reached loaded when they can, unless that is going on already."""
        for model in self.fleet:
            if self._is_absent(model) and model not in self._sought:
                self._sought.add(model)
                self._later(self._seek(model))

    def _is_absent(self, model: Model) -> bool:
        return model in self.fleet and model.entry.is_remote and model.state is ModelState.FAILED

    async def _seek(self, model: Model) -> None:
        """Try again and again, beside reloads: servers that hang must not hold up one."""
        pause_s = _FIRST_PAUSE_S
        try:
            while self._is_absent(model):
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                if self._is_absent(model):
                    await self._try_again(model)
        finally:
            self._sought.discard(model)

    async def _try_again(self, model: Model) -> None:
        """Load a model that had failed; it may not break a rule that could not be checked without it."""
        await self.fleet.load_one(model)
        if model not in self.fleet:  # a reload has replaced or removed it meanwhile
            await model.retire(0)
            return
        if model.state is not ModelState.READY:
            return
        problems = [
            *broken_rules(self.registry, self.fleet),
            *moved_names(self._known_spaces, self.registry, self.fleet),
        ]
        if problems:
            model.report(ModelState.FAILED, f"failed to load: {'; '.join(problems)}")
            await model.backend.stop()
            return
        self._remember_spaces()

    async def reload(self) -> Reloaded:
        """Read the registry anew and serve what it says, once all of that is loaded and warm.

        Until then, and for ever if anything is wrong, everything stays as it is. Requests that are being answered when the
        new models take over end on the old ones. Several reloads come one after the other.

        Raises:
            ReloadRefused: the file is wrong, a new model cannot be loaded, or a name would move to another space.
        """
        async with self._reloading:
            await self.fleet.started.wait()
            started = time.monotonic()
            try:
                registry = await asyncio.to_thread(self._read_registry)
                fleet = await self._prepare(registry)
            except (ConfigError, ReloadRefused) as error:
                metrics.RELOADS.labels("refused").inc()
                log.error("reload_refused", reason=str(error))
                if isinstance(error, ReloadRefused):
                    raise
                raise ReloadRefused(str(error)) from error
            except Exception:  # a broken disk or library can raise anything; what is served goes on
                metrics.RELOADS.labels("refused").inc()
                log.exception("reload_failed")
                raise
            reloaded = self._exchange(registry, fleet, started)
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

    async def _prepare(self, registry: Registry) -> Fleet:
        """Load what is new, and check that all of it may be served; what was loaded in vain is stopped again."""
        fleet = self.fleet.successor(registry, self._make_backend)
        new = [model for model in fleet if model not in self.fleet]
        try:
            await fleet.load()
            problems = [
                *(problem for model in new if (problem := self._why_not_loaded(model))),
                *broken_rules(registry, fleet),
                *moved_names(self._known_spaces, registry, fleet),
            ]
            if problems:
                raise ReloadRefused("\n".join(f"{registry.path}: {problem}" for problem in problems))
        except BaseException:
            for model in new:
                await model.retire(0)
                if (old := self.fleet.get(model.id)) is not None:
                    old.report(old.state, old.reason)  # the gauge of this id showed the new one's state
            raise
        return fleet

    def _why_not_loaded(self, model: Model) -> str:
        """Return what is wrong with a new model; one that had failed before may fail again, if it may fail at all."""
        if model.state is not ModelState.FAILED:
            return ""
        before = self.fleet.get(model.id)
        had_failed = before is not None and before.state is ModelState.FAILED and before.entry.loads_like(model.entry)
        return "" if had_failed and not model.entry.required else f"{model.id} {model.reason}"

    def _exchange(self, registry: Registry, fleet: Fleet, started: float) -> Reloaded:
        """Switch over; nothing awaits in here, so that each request sees either the old or the new."""
        old_registry, old_fleet, old_shadows = self.registry, self.fleet, self.shadows
        fleet.take_over(registry)
        self._serve(registry, fleet)
        self._remember_spaces()
        self._later(self._retire_names(old_registry, old_shadows))
        self._seek_absent()
        for model in old_fleet:
            if model not in fleet:
                self._later(self._retire(model))
        ids = {model.id for model in fleet}
        for model in old_fleet:
            if model.id not in ids:
                metrics.forget_model(model.id)
        return Reloaded(
            loaded=tuple(m.id for m in fleet if m not in old_fleet and m.state is ModelState.READY),
            kept=tuple(m.id for m in fleet if m in old_fleet),
            removed=tuple(m.id for m in old_fleet if m.id not in ids),
            aliases=changed_aliases(old_registry, registry),
            experiments=changed_experiments(old_registry, registry),
            seconds=time.monotonic() - started,
        )

    async def _retire(self, model: Model) -> None:
        """Stop a model when its last request has ended; its counts go with it, unless its name is back."""
        await model.retire(self.settings.request_timeout_s)
        present = self.fleet.get(model.id)
        if present is None:
            metrics.forget_model(model.id)
            return
        for server in _servers(model) - _servers(present):
            metrics.forget_server(model.id, server)

    async def _retire_names(self, registry: Registry, shadows: Shadows) -> None:
        """Stop the shadows of before, and remove the metrics of names that are gone, also those of their last requests."""
        await shadows.stop()
        for of, to in shadows.pairs - self.shadows.pairs:
            metrics.forget_shadow(of, to)
        self._forget_arms(registry)
        await asyncio.sleep(self.settings.request_timeout_s)
        self._forget_arms(registry)

    def _forget_arms(self, registry: Registry) -> None:
        """Remove the metrics of experiments and arms that another registry has and the present one has not."""
        for experiment in registry.experiments:
            present = self.registry.experiment(experiment.id)
            if present is None:
                metrics.forget_experiment(experiment.id)
                continue
            for label in {arm.label for arm in experiment.arms} - {arm.label for arm in present.arms}:
                metrics.forget_experiment(experiment.id, label)

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def stop(self) -> None:
        """Stop every model, and close what is open; requests that still wait get an error."""
        async with self.resources:
            await self.shadows.stop()
            for task in list(self._retiring):
                task.cancel()
            await asyncio.gather(*self._retiring, return_exceptions=True)
            await self.fleet.stop()


def _servers(model: Model) -> set[str]:
    """Return the names of the servers that run a model, as its metrics have them."""
    upstream = model.entry.upstream
    return set() if upstream is None else set(server_names(upstream.urls))

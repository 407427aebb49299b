"""All models of the registry, with the state of each, and the reason if it is disabled or failed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import structlog

from gateway.backends.base import Backend, Removable, Waiting
from gateway.backends.enabled import USUAL_REASONS, Here, Site, load_order
from gateway.backends.on_demand import OnDemandBackend
from gateway.backends.same_space import Reference, verify_same_space
from gateway.config.registry import ModelEntry, Registry
from gateway.errors import LicenseNotAccepted, LoadError, StartError, TooLittleMemory
from gateway.telemetry import metrics
from gateway.types import Embeddings, EmbedJob, ModelInfo, ModelState, Vocabulary

if TYPE_CHECKING:
    from gateway.cache.model_cache import ModelCache

log = structlog.get_logger(__name__)

MakeBackend: TypeAlias = Callable[[ModelEntry], Backend]
"""Makes the backend of an entry of the registry."""

# The pause between attempts to load a model that lacked servers or memory.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 60.0

# The states of an on-demand model after its start, while it is not in memory.
_ON_DEMAND_STATES = (ModelState.UNLOADED, ModelState.LOADING)
# A reload tries these models again: the file, the card or the license acceptance that was missing may exist now.
_RETRIED_STATES = (ModelState.FAILED, ModelState.DISABLED)
_NOT_LOADED_STATES = (ModelState.FAILED, ModelState.DOWNLOADING, ModelState.LOADING)


@dataclass(eq=False, slots=True)
class Model:
    """One model of the registry and its state.

    Attributes:
        info: known once the checkpoint has been read, even if loading fails after that.
        reason: the reason why the model is disabled or failed; empty otherwise.
        created: Unix time at which the model became ready, for OpenAI's ``created``.
        cache: the cache of the model's vectors, if the entry has one.
        lacks_memory: the model failed because it did not fit into memory.
    """

    entry: ModelEntry
    backend: Backend
    state: ModelState = ModelState.LOADING
    info: ModelInfo | None = None
    reason: str = ""
    created: int = 0
    cache: ModelCache | None = None
    lacks_memory: bool = False
    _num_in_flight: int = 0
    _is_retired: bool = False
    _is_idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.cache = _open_cache(self.entry)

    @property
    def id(self) -> str:
        return self.entry.id

    @property
    def on_demand(self) -> OnDemandBackend | None:
        """The backend, if it loads the model on demand."""
        return self.backend if isinstance(self.backend, OnDemandBackend) else None

    @property
    def takes_requests(self) -> bool:
        """Whether the model is ready, or a request would make it ready."""
        if self.on_demand is not None and self.state in _ON_DEMAND_STATES:
            return self.on_demand.is_started
        return self.state is ModelState.READY

    def report(self, state: ModelState, reason: str) -> None:
        """Set the state, and show it in the metrics."""
        self.state, self.reason = state, reason
        if state is ModelState.RECOVERING and self.cache is not None:
            self.cache.forget()  # the model's vectors may have been wrong for a while
        if self._is_retired:  # the metrics of this id belong to another model by now, or are gone
            return
        metrics.MODEL_READY.labels(self.id).set(self.takes_requests)
        for possible in ModelState:
            metrics.MODEL_STATE.labels(self.id, possible.value).set(possible is state)

    async def embed(self, job: EmbedJob) -> Embeddings:
        """Embed the texts of a job; the backend computes only those that are not in the cache.

        Raises:
            RequestError: one of those of :meth:`gateway.backends.base.Backend.embed`.
        """
        if self.cache is None or self.info is None:
            return await self.compute(job)
        return await self.cache.embed(job, self.info, self.compute)

    async def compute(self, job: EmbedJob) -> Embeddings:
        """Have the backend embed the texts of a job; see :meth:`gateway.backends.base.Backend.embed`."""
        with self.in_use():
            return await self.backend.embed(job)

    def as_reference(self) -> Reference | None:
        """Return the reference for other models of its space; ``None`` until the checkpoint has been read."""
        if self.info is None:
            return None
        golden = None if self.entry.golden is None or self.entry.is_remote else Path(self.entry.golden)
        return Reference(self.info, self.state, golden, self.compute)

    @asynccontextmanager
    async def vocabulary(self) -> AsyncIterator[Vocabulary]:
        """Give the model's vocabulary, and keep the backend running while the context lasts."""
        with self.in_use():
            yield await self.backend.vocabulary()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep a reload from stopping the backend while the context lasts."""
        self._num_in_flight += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self._num_in_flight -= 1
            if self._num_in_flight == 0:
                self._is_idle.set()

    async def retire(self, grace_s: float) -> None:
        """Stop the backend permanently when its last request has ended, or after a grace period."""
        self._is_retired = True
        try:
            if self._num_in_flight:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._is_idle.wait(), grace_s)
        finally:
            await (self.backend.remove() if isinstance(self.backend, Removable) else self.backend.stop())
            await self._close_cache()

    def take_entry(self, entry: ModelEntry) -> ModelCache | None:
        """Take the entry of another registry, which needs no load; return the cache if it has been replaced."""
        before, self.entry = self.entry, entry
        if before.cache == entry.cache:
            return None
        replaced, self.cache = self.cache, _open_cache(entry)
        return replaced

    async def stop(self) -> None:
        """Stop the backend, and close the cache."""
        await self.backend.stop()
        await self._close_cache()

    async def _close_cache(self) -> None:
        if self.cache is not None:
            await self.cache.close()


class Fleet:
    """The models of a registry, in its order.

    ``started`` is set when every enabled model is ready or has failed.
    """

    def __init__(self, models: Sequence[Model], site: Site | None = None) -> None:
        self._models = {model.id: model for model in models}
        self._site = site or Here()
        self.started = asyncio.Event()
        self._is_replaced = False

    @classmethod
    def from_registry(cls, registry: Registry, make_backend: MakeBackend, site: Site | None = None) -> Fleet:
        return cls([Model(entry, make_backend(entry)) for entry in registry.models], site)

    def successor(self, registry: Registry, make_backend: MakeBackend) -> Fleet:
        """Return the fleet of another registry: keep each model whose entry has not changed, and create the others.

        Failed and disabled models are replaced, so that they are loaded again.
        """
        models = []
        for entry in registry.models:
            model = self.get(entry.id)
            if model is None or model.state in _RETRIED_STATES or not model.entry.loads_like(entry):
                model = Model(entry, make_backend(entry))
            models.append(model)
        return Fleet(models, self._site)

    def take_over(self, old: Fleet, registry: Registry) -> list[ModelCache]:
        """Replace the old fleet, and give the kept models their new entries; return the caches to close."""
        replaced = [self._models[entry.id].take_entry(entry) for entry in registry.models]
        old._is_replaced = True
        self.started.set()
        return [cache for cache in replaced if cache is not None]

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def __contains__(self, model: Model) -> bool:
        return self._models.get(model.id) is model

    @property
    def max_tokens(self) -> int:
        """The largest ``max_tokens`` of all models; 0 before any is known."""
        return max((model.info.max_tokens for model in self if model.info is not None), default=0)

    def get(self, model_id: str) -> Model | None:
        return self._models.get(model_id)

    @property
    def is_ready(self) -> bool:
        """Whether loading has ended, and all required models and at least one model take requests.

        A model that is not loaded is also required while older gateways serve another version of it: orchestrators end them
        once this one is ready.
        """
        is_ready = {model.id: model.takes_requests for model in self}
        required = [model.id for model in self if model.entry.required or self._is_kept_elsewhere(model)]
        return self.started.is_set() and any(is_ready.values()) and all(is_ready[name] for name in required)

    def _is_kept_elsewhere(self, model: Model) -> bool:
        return model.state in _NOT_LOADED_STATES and self._site.is_kept_elsewhere(model.entry)

    async def start(self) -> None:
        """Load the enabled models.

        A model that cannot be loaded becomes ``failed``, with the reason, and the other models serve.

        Raises:
            StartError: a model that the registry calls ``required`` is not ready.
        """
        await self.load()
        self.started.set()
        lost = [model for model in self if model.entry.required and model.state is not ModelState.READY]
        if lost:
            raise StartError("\n".join(f"{model.id} is required, but {model.reason}" for model in lost))

    async def load(self) -> None:
        """Load the models that are enabled and not loaded yet.

        Models in this process load one after the other, in :func:`load_order`, so that each sees how much memory is
        left. Models that run elsewhere need no memory here, and load concurrently. A model that is compared with
        another model waits until that model has loaded.
        """
        waiting = [model for model in self if model.state is ModelState.LOADING]
        for model in waiting:
            if reason := await asyncio.to_thread(self._site.why_disabled, model.entry):
                model.report(ModelState.DISABLED, reason)
                note = log.info if reason in USUAL_REASONS else log.warning
                note("model_disabled", model=model.id, reason=reason)
        loading = [model for model in waiting if model.state is ModelState.LOADING]
        if loading:
            log.info("models_loading", number=len(loading), of=len(self._models))
        has_loaded = {model.id: asyncio.Event() for model in loading}
        by_id = {model.id: model for model in loading if self._site.is_here(model.entry)}
        order = await asyncio.to_thread(load_order, [model.entry for model in by_id.values()])
        here = [by_id[entry.id] for entry in order]

        async def load(*models: Model) -> None:
            for model in models:
                if (other := has_loaded.get(model.entry.same_space_as or "")) is not None:
                    await other.wait()
                try:
                    await self.load_one(model)
                finally:
                    has_loaded[model.id].set()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load(*here))
            for model in loading:
                if model.id not in by_id:
                    tasks.create_task(load(model))

    async def load_one(self, model: Model) -> None:
        """Load a model, or prepare it for loading on demand. After that, it takes requests or has failed."""
        # Loads with absent or wrong servers are retried indefinitely: log the reason only when it changes.
        logged = model.reason if model.state is ModelState.FAILED else None
        (log.info if logged is None else log.debug)("model_loading", model=model.id, source=model.entry.source)
        started = time.monotonic()
        try:
            planned = await model.backend.plan(model.report)
            # With `same_space_as`, the space is unknown until it has been checked.
            model.info = planned if model.entry.same_space_as is None else None
            model.info = await self._checked(model, await model.backend.start(model.report))
        except LicenseNotAccepted as error:
            model.report(ModelState.DISABLED, str(error))
            log.warning("model_disabled", model=model.id, reason=str(error))
        except LoadError as error:
            model.lacks_memory = isinstance(error, TooLittleMemory)
            later = "; the gateway loads it as soon as there is room" if model.lacks_memory else ""
            model.report(ModelState.FAILED, f"failed to load: {error}{later}")
            (log.debug if model.reason == logged else log.error)("model_failed", model=model.id, reason=str(error))
        except Exception as error:  # a checkpoint can make the libraries raise anything; the others must still serve
            model.report(ModelState.FAILED, f"failed to load: {type(error).__name__}: {error}")
            (log.debug if model.reason == logged else log.error)("model_failed", model=model.id, exc_info=True)
        else:
            model.created = int(time.time())
            seconds = round(time.monotonic() - started, 2)
            if model.on_demand is None:
                model.report(ModelState.READY, "")
                log.info("model_ready", model=model.id, seconds=seconds)
            else:
                model.report(ModelState.UNLOADED, "")
                log.info("model_on_demand", model=model.id, seconds=seconds)

    def is_absent(self, model: Model) -> bool:
        """Return whether a load failed for a temporary reason: absent servers, or too little memory."""
        if self._is_replaced or model.state is not ModelState.FAILED:
            return False
        return model.lacks_memory or not self._site.is_here(model.entry)

    async def seek(self, model: Model, accept: Callable[[], Sequence[str]]) -> None:
        """Try to load an absent model until it is ready, or the fleet is replaced.

        Args:
            accept: called once the model is ready; returns the rules that the model breaks. If there are any, the model
                fails.
        """
        pause_s = _FIRST_PAUSE_S
        while self.is_absent(model):
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if self.is_absent(model) and await self._may_succeed(model):
                await self._try_again(model, accept)

    @staticmethod
    async def _may_succeed(model: Model) -> bool:
        """Return whether a load may succeed. A load reads gigabytes, so it is not tried while the card is full."""
        return not model.lacks_memory or not isinstance(model.backend, Waiting) or await model.backend.may_fit()

    async def _try_again(self, model: Model, accept: Callable[[], Sequence[str]]) -> None:
        await self.load_one(model)
        if self._is_replaced:  # a reload has replaced or removed the model in the meantime
            await model.retire(0)
            return
        if model.state is ModelState.READY and (problems := accept()):
            model.report(ModelState.FAILED, f"failed to load: {'; '.join(problems)}")
            await model.backend.stop()

    async def _checked(self, model: Model, info: ModelInfo) -> ModelInfo:
        """Check that a started model is in the space that the registry claims, and return its info.

        Raises:
            LoadError: the model is not in that space.
        """
        other = model.entry.same_space_as
        if other is None:
            return info
        try:
            model_of_space = self.get(other)
            reference = None if model_of_space is None else model_of_space.as_reference()
            return await verify_same_space(info, model.backend, reference)
        except LoadError as error:
            await model.backend.stop()
            raise LoadError(f"the registry says that it is in the space of {other}, but {error}") from error

    async def stop(self) -> None:
        """Stop every model; waiting requests get an error."""
        for model in self:
            did_take_requests = model.takes_requests
            await model.stop()
            if did_take_requests:
                model.report(ModelState.STOPPED, "the gateway is shutting down")


def _open_cache(entry: ModelEntry) -> ModelCache | None:
    """Return the cache of a model. If it has no cache, do not import the cache's package."""
    if entry.cache is None:
        return None
    from gateway.cache.opening import open_cache

    return open_cache(entry.id, entry.cache, is_remote=entry.is_remote)

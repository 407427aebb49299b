"""Embed in this process on all of its cores and cards, or on the replicas of a cluster, without JSON."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from gateway.backends.base import Replicated
from gateway.bulk.chunking import ModelTokens
from gateway.bulk.embedder import TextRefused, TextVectors
from gateway.bulk.model_spec import OF_A_TEXT, PASSAGE_TASK, PROBE, ModelSpec, without_place
from gateway.bulk.rows import BulkError, SpaceNote
from gateway.cli.in_process import PATIENCE_S, in_process_deployment
from gateway.config.registry import Registry
from gateway.config.settings import Settings
from gateway.errors import (
    BadInput,
    InferenceFailed,
    ModelNotReady,
    Overloaded,
    RequestError,
    StartError,
)
from gateway.experiments.stats import ExperimentStats
from gateway.fleet import Model
from gateway.requests import EmbedAnswer, EmbedRequest
from gateway.routing.names import GATEWAY
from gateway.service import EmbeddingService
from gateway.types import Output, Priority

_CALLER = "embed"
# The number of texts that are sorted by length together. An interruption loses a block, seconds of work on a CPU.
_BLOCK_TEXTS = 2048
_CPU_BLOCK_TEXTS = 512
_MULTIVECTOR_TEXTS = 64
# The number for a cluster: a lost replica costs the work of one call, and other replicas take its next calls.
_CALLS_PER_BLOCK = 8
# The limit of a block with multi-vectors: 16,000 tokens of 1,024 dimensions are 64 MB.
_MULTIVECTOR_CHARACTERS = 64_000
_CHARACTERS = 1_000_000
# The seconds to wait until a model that hung or failed is reloaded.
_RECOVERY_S = 600.0


@asynccontextmanager
async def local_embedder(registry: Registry, settings: Settings, spec: ModelSpec) -> AsyncIterator[LocalEmbedder]:
    """Load a model, and yield an embedder.

    Raises:
        BulkError: the name is unknown or belongs to an experiment, or the model cannot be loaded or lacks such vectors.
    """
    if settings.cluster is None:
        # Only this job uses the queue, so limits would protect no one. The replicas of a cluster also serve clients.
        settings = settings.model_copy(update={"max_queue_texts": 10**9, "max_queue_tokens": 10**12})
    try:
        async with in_process_deployment(registry, settings, [spec.name]) as deployment:
            service = EmbeddingService(deployment, ExperimentStats(None))
            model = next(iter(deployment.fleet))
            assert model.info is not None  # noqa: S101  it is loaded
            yield await _prepare(service, model, spec)
    except BulkError:
        raise
    except StartError as error:
        raise BulkError(str(error)) from error


async def _prepare(service: EmbeddingService, model: Model, spec: ModelSpec) -> LocalEmbedder:
    """Find the task and the space by embedding a test text."""
    info = model.info
    assert info is not None  # noqa: S101  it is loaded
    task = PASSAGE_TASK if spec.prefers_passages and PASSAGE_TASK in info.tasks else None
    embedder = _Caller(service, spec, task)
    try:
        try:
            answer = await embedder.call([PROBE])
        except BadInput as error:
            if error.param != "task" or task is None:
                raise
            embedder = _Caller(service, spec, None)  # the name already includes a task
            answer = await embedder.call([PROBE])
    except RequestError as error:
        raise BulkError(f"--model {spec.name}: {error.message}") from error
    assert answer.space is not None  # noqa: S101  of vectors
    note = SpaceNote(
        space=answer.space,
        model=answer.model,
        task=answer.task,
        dimensions=answer.dimensions or 0,
        is_normalized=info.is_normalized,
        token_width=info.token_width if Output.MULTIVECTOR in spec.outputs else 0,
        has_sparse=Output.SPARSE in spec.outputs,
    )
    if isinstance(model.backend, Replicated) and not model.entry.is_remote:
        replicas = model.entry.replicas.most if model.entry.replicas is not None else 1
        return LocalEmbedder(
            replace(embedder, priority=Priority.LOW), note, Shape.on_replicas(note, info.devices, replicas)
        )
    return LocalEmbedder(embedder, note, Shape.here(note, info.devices))


@dataclass(frozen=True, slots=True)
class _Caller:
    """Sends texts to the service."""

    service: EmbeddingService
    spec: ModelSpec
    task: str | None
    priority: Priority = Priority.NORMAL

    async def call(self, texts: Sequence[str], *, is_late: bool = False) -> EmbedAnswer:
        return await self.service.embed(
            EmbedRequest(
                texts=texts,
                model=self.spec.name,
                timeout_s=PATIENCE_S,
                caller=_CALLER,
                client=GATEWAY,
                task=self.task,
                truncate=self.spec.truncate,
                dimensions=self.spec.dimensions,
                outputs=self.spec.outputs,
                priority=self.priority,
                is_late_chunked=is_late,
            )
        )

    async def tokens(self, task: str | None) -> ModelTokens:
        target = self.service.target(self.spec.name, self.task, GATEWAY)
        async with self.service.vocabulary(target, "tokenize") as vocabulary:
            return ModelTokens.of(vocabulary, target.info, task)


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of blocks and calls.

    Attributes:
        block_texts, max_texts, num_calls: see :class:`~gateway.bulk.embedder.Embedder`.
    """

    block_texts: int
    max_texts: int
    num_calls: int

    @classmethod
    def here(cls, note: SpaceNote, devices: Sequence[str]) -> Shape:
        """Return the shape for an engine in this process, which distributes each call over its devices."""
        texts = _block_texts(note, devices) * len(devices)
        return cls(texts, texts, 2 + len(devices))

    @classmethod
    def on_replicas(cls, note: SpaceNote, devices: Sequence[str], num_replicas: int) -> Shape:
        """Return the shape for replicas: each call goes to one replica, which always has the next call waiting."""
        texts = _block_texts(note, devices)
        return cls(texts * num_replicas, max(1, texts // _CALLS_PER_BLOCK), 2 * num_replicas)


def _block_texts(note: SpaceNote, devices: Sequence[str]) -> int:
    per_block = _CPU_BLOCK_TEXTS if devices == ("cpu",) else _BLOCK_TEXTS
    return _MULTIVECTOR_TEXTS if note.token_width else per_block


class LocalEmbedder:
    """An :class:`~gateway.bulk.embedder.Embedder` of a model in this process."""

    def __init__(self, caller: _Caller, note: SpaceNote, shape: Shape) -> None:
        self._caller = caller
        self.note = note
        self.block_texts, self.max_texts, self.num_calls = shape.block_texts, shape.max_texts, shape.num_calls
        self.max_characters = _MULTIVECTOR_CHARACTERS if note.token_width else _CHARACTERS

    async def tokens(self) -> ModelTokens:
        try:
            return await self._caller.tokens(self.note.task)
        except RequestError as error:
            raise BulkError(f"--chunk needs the model's tokens, but {error.message}") from error

    async def embed(self, texts: Sequence[str], *, is_late: bool = False) -> TextVectors:
        deadline = time.monotonic() + _RECOVERY_S
        while True:
            try:
                answer = await self._caller.call(texts, is_late=is_late)
            except OF_A_TEXT as error:
                raise TextRefused(without_place(error.message)) from error
            except InferenceFailed as error:
                if await self._works():
                    raise TextRefused(without_place(error.message)) from error
                raise BulkError(f"the model fails: {error.message}") from error
            except (ModelNotReady, Overloaded) as error:
                if error.retry_after_s is None or time.monotonic() > deadline:
                    raise BulkError(error.message) from error
                await asyncio.sleep(error.retry_after_s)
            except RequestError as error:
                raise BulkError(error.message) from error
            else:
                return TextVectors(
                    answer.vectors if answer.has_dense else None,
                    answer.num_tokens,
                    len(answer.truncated),
                    answer.sparse,
                    answer.multivectors,
                )

    async def _works(self) -> bool:
        """Return whether the model can embed another text, which means that the texts caused the failure."""
        try:
            await self._caller.call([PROBE])
        except RequestError:
            return False
        return True

"""The engine of one model: Infinity's ``AsyncEmbeddingEngine`` with our encoder and our batcher in it."""

from __future__ import annotations

from gateway.embedding import Embeddings, EmbedJob
from gateway.engine.batcher import Batcher, Limits
from gateway.engine.encoders.base import Encoder
from gateway.engine.infinity_library import AsyncEmbeddingEngine, EngineArgs
from gateway.errors import ModelNotReady


class Engine(AsyncEmbeddingEngine):
    """Infinity's engine with two parts replaced.

    - ``__init__``: Infinity's ``select_model`` picks one of its own embedders, which need transformers 4 and know
      neither tasks nor several outputs; here the encoder is given.
    - ``astart`` and ``astop``: Infinity's ``BatchHandler`` gives way to :class:`~gateway.engine.batcher.Batcher`, which
      says why.

    Capabilities, ``embed`` and the overload status are Infinity's own.
    """

    def __init__(self, args: EngineArgs, encoder: Encoder, limits: Limits) -> None:
        self._engine_args = args
        self._model_replicas = [encoder]  # Infinity's name; what `capabilities` asks
        self._encoder = encoder
        self._limits = limits
        self.running = False
        self._min_inference_t = self._max_inference_t = float("nan")  # measured by `select_model`; printed by `__str__`
        self._batcher: Batcher | None = None

    async def astart(self) -> None:
        """Start the engine. It may be stopped and started again."""
        if not self.running:
            self._batcher = Batcher(self.engine_args.served_model_name, self._encoder, self._limits)
            self._batch_handler = self._batcher  # type: ignore[assignment]  # Infinity's name; has its interface
            await self._batcher.spawn()
            self.running = True

    async def astop(self) -> None:
        """Stop the engine after the batch in hand; whoever still waits is told."""
        if self.running and self._batcher is not None:
            self.running = False
            await self._batcher.shutdown()

    async def submit(self, job: EmbedJob) -> Embeddings:
        """Embed a job: :meth:`Batcher.submit`, which says what it raises.

        Raises:
            ModelNotReady: the engine was never started.
        """
        if self._batcher is None:
            raise ModelNotReady(f"model {self.engine_args.served_model_name!r} is not started", retry_after_s=5)
        return await self._batcher.submit(job)

"""The engine of one model: Infinity's ``AsyncEmbeddingEngine`` with our encoder and our batcher in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from gateway.engine.batcher import Batcher, Limits
from gateway.engine.infinity import AsyncEmbeddingEngine, EngineArgs
from gateway.engine.model.base import Encoder
from gateway.errors import ModelNotReady, RequestError
from gateway.golden import GoldenCheck
from gateway.types import Embeddings, EmbedJob


class Engine(AsyncEmbeddingEngine):
    """Infinity's engine with two parts replaced.

    - ``__init__``: Infinity's ``select_model`` picks one of its own embedders, which need transformers 4 and know
      neither tasks nor several outputs; here the encoder is given.
    - ``astart`` and ``astop``: Infinity's ``BatchHandler`` gives way to :class:`~gateway.engine.batcher.Batcher`, which
      says why.

    Capabilities, ``embed`` and the overload status are Infinity's own.
    """

    def __init__(
        self, args: EngineArgs, encoders: Sequence[Encoder], limits: Limits, golden: GoldenCheck | None = None
    ) -> None:
        self._engine_args = args
        self._model_replicas = list(encoders)  # Infinity's name; what `capabilities` asks
        self.encoders = encoders
        self._limits = limits
        self._golden = golden
        self.running = False
        self._min_inference_t = self._max_inference_t = float("nan")  # measured by `select_model`; printed by `__str__`
        self._batcher: Batcher | None = None

    async def astart(self) -> None:
        """Start the engine. It may be stopped and started again."""
        if not self.running:
            self._batcher = Batcher(self.engine_args.served_model_name, self.encoders, self._limits)
            self._batch_handler = self._batcher  # type: ignore[assignment]  # Infinity's name; has its interface
            await self._batcher.spawn()
            self.running = True

    async def astop(self) -> None:
        """Stop the engine after the batch in hand; whoever still waits is told."""
        if self.running and self._batcher is not None:
            self.running = False
            await self._batcher.shutdown()

    async def submit(self, job: EmbedJob, replica: int | None = None) -> Embeddings:
        """Embed a job: :meth:`Batcher.submit`, which says what it raises.

        Raises:
            ModelNotReady: the engine was never started.
        """
        return await self._started().submit(job, replica)

    async def recheck(self, timeout_s: float, replica: int) -> str:
        """Hold a replica against the golden vectors again; say what is wrong, if anything is.

        Raises:
            RequestError: it could not be asked; one of those of :meth:`Batcher.submit`.
        """
        if self._golden is None:
            return ""
        return await self._golden.recheck(partial(self.submit, replica=replica), timeout_s)

    @property
    def num_replicas(self) -> int:
        return len(self.encoders)

    @property
    def num_queued(self) -> int:
        """How many texts wait for a computing thread."""
        return 0 if self._batcher is None else self._batcher.num_queued

    def busy_since(self, replica: int) -> float | None:
        """Return when a replica's forward in hand began (``time.monotonic()``); ``None`` if there is none."""
        return None if self._batcher is None else self._batcher.busy_since(replica)

    def num_failed_in_a_row(self, replica: int) -> int:
        """Return how many batches in a row have given nothing but errors on a replica."""
        return 0 if self._batcher is None else self._batcher.num_failed_in_a_row(replica)

    def _started(self) -> Batcher:
        if self._batcher is None:
            raise ModelNotReady(f"model {self.engine_args.served_model_name!r} is not started", retry_after_s=5)
        return self._batcher

    def give_up(self, error: Callable[[], RequestError]) -> None:
        """Answer everybody, now and later, with an error, and let go of the threads: one of them may hang for ever."""
        self.running = False
        if self._batcher is not None:
            self._batcher.give_up(error)

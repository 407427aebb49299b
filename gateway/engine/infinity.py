"""Infinity's ``AsyncEmbeddingEngine`` with our encoder and our batcher in it. The only import of ``infinity_emb``.

Only the required modules of the library are imported. Its package's ``__init__`` imports a web server, and
``infinity_emb.inference`` imports all of Infinity's embedders with sentence-transformers: 1.8 s of CPU time and
143 MiB at each start. So both packages are added to ``sys.modules`` without being executed, with the paths and specs that
the import system finds. Their modules are then imported as usual, and are the library's own, unchanged. A release that
needs more of the two packages fails at this import.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
from torch import nn

from gateway.engine.batcher import Batcher, Limits
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.items import Item
from gateway.errors import ModelNotReady, RequestError
from gateway.golden import GoldenCheck
from gateway.types import Embeddings, EmbedJob, Truncate


def _add_package(name: str) -> ModuleType:
    """Make the modules of a package importable without running its ``__init__``."""
    spec = find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"{name} is not installed", name=name)
    package = sys.modules[name] = module_from_spec(spec)
    return package


_add_package("infinity_emb")
_inference = _add_package("infinity_emb.inference")
_inference.BatchHandler = _inference.select_model = None  # type: ignore[attr-defined]  # replaced: see `Engine`

# At import, the library reads its environment, creates a cache folder in its home or in the working directory, and clears
# the root logger's handlers. `gateway.engine` turns off its usage reports to PostHog.
_root = logging.getLogger()
_handlers, _level = list(_root.handlers), _root.level
_home = os.environ.get("INFINITY_HOME")
with tempfile.TemporaryDirectory() as _folder:  # the cache is for vectors, and is not used here
    os.environ["INFINITY_HOME"] = _folder
    from infinity_emb.args import EngineArgs
    from infinity_emb.engine import AsyncEmbeddingEngine
    from infinity_emb.primitives import (
        Device,
        DeviceID,
        Dtype,
        InferenceEngine,
        LoadingStrategy,
        ModelCapabilites,
        OverloadStatus,
    )

os.environ.pop("INFINITY_HOME")
if _home is not None:
    os.environ["INFINITY_HOME"] = _home
_root.handlers[:] = _handlers
_root.setLevel(_level)

__all__ = ["Engine", "EngineArgs", "engine_args"]

_EMBED_TIMEOUT_S = 3600.0


def engine_args(
    name: str, folder: Path, device: str, dtype: str, *, revision: str | None, trust_remote_code: bool
) -> EngineArgs:
    """Return Infinity's description of a model.

    Args:
        device: torch device, such as ``cpu`` or ``cuda:0``.
    """
    kind, _, index = device.partition(":")
    # Given, because Infinity imports transformers to choose it.
    strategy = LoadingStrategy(
        device_mapping=[device], loading_dtype=dtype, quantization_dtype=None, device_placement=device
    )
    return EngineArgs(
        model_name_or_path=str(folder),
        served_model_name=name,
        revision=revision,
        trust_remote_code=trust_remote_code,
        engine=InferenceEngine.torch,
        device=Device[kind],
        device_id=DeviceID([int(index)] if index else []),
        dtype=Dtype[dtype],
        bettertransformer=False,
        model_warmup=False,
        _loading_strategy=strategy,
    )


class Engine(AsyncEmbeddingEngine):
    """The engine of one model: Infinity's, with two parts replaced.

    - ``__init__``: Infinity's ``select_model`` picks one of Infinity's embedders, which need transformers 4 and support
      neither tasks nor several outputs. Here the encoders are given.
    - ``astart`` and ``astop``: Infinity's ``BatchHandler`` is replaced with :class:`~gateway.engine.batcher.Batcher`,
      which says why.

    The parts that Infinity's own methods need are at the end of this file.
    """

    def __init__(
        self,
        args: EngineArgs,
        encoders: Sequence[Encoder],
        limits: Limits,
        golden: GoldenCheck | None = None,
        warm_ups: Sequence[Sequence[Sequence[Item]]] = (),
    ) -> None:
        self._engine_args = args
        self.encoders = encoders
        self._limits = limits
        self._golden = golden
        self._warm_ups = warm_ups
        self.running = False
        self._min_inference_t = self._max_inference_t = float("nan")  # measured by `select_model`; printed by `__str__`
        self._batcher: Batcher | None = None

    async def astart(self) -> None:
        """Start the engine; it may be stopped and started again."""
        if not self.running:
            self._batcher = Batcher(self.engine_args.served_model_name, self.encoders, self._limits, self._warm_ups)
            self._batch_handler = _BatchHandler(self._batcher, self._limits)  # type: ignore[assignment]  # Infinity's name
            await self._batcher.spawn()
            self.running = True

    async def astop(self) -> None:
        """Stop the engine after the running batch; requests that still wait get an error."""
        if self.running and self._batcher is not None:
            self.running = False
            await self._batcher.shutdown()

    @property
    def capabilities(self) -> set[ModelCapabilites]:
        return {"embed"}

    async def submit(self, job: EmbedJob, replica: int | None = None) -> Embeddings:
        """Embed a job with :meth:`Batcher.submit`, which lists the other errors.

        Raises:
            ModelNotReady: the engine was never started.
        """
        return await self._started().submit(job, replica)

    async def recheck(self, timeout_s: float, replica: int) -> str:
        """Compare a replica with the golden vectors again; return the problem, or an empty string.

        Raises:
            RequestError: the replica did not answer; one of the errors of :meth:`Batcher.submit`.
        """
        if self._golden is None:
            return ""
        return await self._golden.recheck(partial(self.submit, replica=replica), timeout_s)

    @property
    def num_replicas(self) -> int:
        return len(self.encoders)

    @property
    def num_queued(self) -> int:
        """The number of texts that wait for a computing thread."""
        return 0 if self._batcher is None else self._batcher.num_queued

    def busy_since(self, replica: int) -> float | None:
        """Return when a replica's running forward began (``time.monotonic()``); ``None`` without a running forward."""
        return None if self._batcher is None else self._batcher.busy_since(replica)

    def expected_s(self, replica: int) -> float:
        """Return the seconds that a replica's batch in hand should take on a CPU; 0 if nothing is known."""
        return 0.0 if self._batcher is None else self._batcher.expected_s(replica)

    def num_failed_in_a_row(self, replica: int) -> int:
        """Return how many consecutive batches on a replica have returned only errors."""
        return 0 if self._batcher is None else self._batcher.num_failed_in_a_row(replica)

    @property
    def lost(self) -> Mapping[int, str]:
        """The replicas whose cards can no longer compute in this process, with the reason."""
        return {} if self._batcher is None else self._batcher.lost

    def lose(self, replica: int, reason: str) -> None:
        """Give up a replica whose card hangs; see :meth:`Batcher.lose`."""
        if self._batcher is not None:
            self._batcher.lose(replica, reason)

    def device(self, replica: int) -> str:
        """Return the torch device of a replica."""
        return self.encoders[replica].device

    def holders(self) -> list[weakref.ref[object]]:
        """Return weak references to the holders of the weights, to check later whether they are gone."""
        holders: list[object] = []
        for encoder in self.encoders:
            holders += [encoder, encoder.runtime]
            for part in vars(encoder.runtime).values():
                held = part() if isinstance(part, weakref.ref) else part
                holders += held.modules() if isinstance(held, nn.Module) else []
        return [weakref.ref(holder) for holder in holders]

    def _started(self) -> Batcher:
        if self._batcher is None:
            raise ModelNotReady(f"model {self.engine_args.served_model_name!r} is not started", retry_after_s=5)
        return self._batcher

    def give_up(self, error: Callable[[], RequestError]) -> None:
        """Answer all current and future requests with an error, and abandon the threads: one may hang forever."""
        self.running = False
        if self._batcher is not None:
            self._batcher.give_up(error)


class _BatchHandler:
    """A batcher with the interface that the methods of Infinity's engine expect."""

    def __init__(self, batcher: Batcher, limits: Limits) -> None:
        self._batcher = batcher
        self._limits = limits

    async def embed(
        self, sentences: Sequence[str], matryoshka_dim: int | None = None
    ) -> tuple[list[npt.NDArray[np.float32]], int]:
        """Return pooled vectors, without a task, and the number of tokens."""
        deadline = time.monotonic() + _EMBED_TIMEOUT_S
        embeddings = await self._batcher.submit(EmbedJob(sentences, None, Truncate.END, deadline, caller="infinity"))
        return list(embeddings.vectors[:, :matryoshka_dim]), sum(embeddings.num_tokens)

    def is_overloaded(self) -> bool:
        return self._batcher.num_texts > self._limits.max_queue_texts

    def overload_status(self) -> OverloadStatus:
        return OverloadStatus(
            queue_fraction=self._batcher.num_texts / self._limits.max_queue_texts,
            queue_absolute=self._batcher.num_texts,
            results_absolute=self._batcher.num_requests,
        )

"""A backend without a model: its vectors can be told by eye. For tests, and for timing everything but the model."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from gateway.backends.base import Report
from gateway.embedding import Embeddings, EmbedJob, ModelInfo, Timings, Truncate
from gateway.errors import ContextLengthExceeded, ModelNotReady


class FakeBackend:
    """Embeds a text as ``[number of words, 1, 0, 0, …]``; a token is a word.

    Its score of a text against a query is the number of its words that are in the query, less 1.

    Args:
        info: what it claims to be.
        delay_s: how long each job takes.
        on_embed: called with each job first; may raise what the backend should fail with.
    """

    def __init__(
        self, info: ModelInfo, *, delay_s: float = 0.0, on_embed: Callable[[EmbedJob], None] = lambda _job: None
    ) -> None:
        self._info = info
        self._delay_s = delay_s
        self._on_embed = on_embed
        self._is_running = False

    async def plan(self) -> ModelInfo:
        return self._info

    async def start(self, report: Report = lambda _state, _reason: None) -> ModelInfo:
        self.report = report
        self._is_running = True
        return self._info

    async def embed(self, job: EmbedJob) -> Embeddings:
        if not self._is_running:
            raise ModelNotReady("the fake backend is not started")
        self._on_embed(job)
        await asyncio.sleep(self._delay_s)
        beside = len((job.query or "").split())
        words = [beside + len(text.split()[: job.max_text_tokens]) for text in job.texts]
        limit = self._info.max_tokens
        if job.truncate is Truncate.REFUSE and max(words) > limit:
            param = "input" if job.query is None else None
            raise ContextLengthExceeded(f"This model's maximum context length is {limit} tokens", param=param)
        vectors = np.zeros((len(words), self._info.width), dtype=np.float32)
        if job.query is None:
            vectors[:, 0] = np.minimum(words, limit)
            vectors[:, 1:2] = 1
        else:
            vectors[:, 0] = [_num_shared(job.query, text.split()[: job.max_text_tokens]) - 1 for text in job.texts]
        return Embeddings(
            vectors=vectors,
            num_tokens=[min(n, limit) for n in words],
            truncated=[i for i, n in enumerate(words) if n > limit],
            timings=Timings(0.0, 0.0, self._delay_s),
        )

    async def stop(self) -> None:
        self._is_running = False


def _num_shared(query: str, words: Sequence[str]) -> int:
    wanted = set(query.lower().split())
    return sum(word.lower() in wanted for word in words)


def fake_info(model_id: str = "fake", width: int = 8, **changes: object) -> ModelInfo:
    """Return the description of a fake model; ``changes`` replace single fields of it."""
    fields: dict[str, object] = {
        "id": model_id,
        "source": f"fake/{model_id}",
        "revision": None,
        "fingerprint": hashlib.sha256(model_id.encode()).hexdigest(),
        "width": width,
        "dimensions": (width,),
        "max_tokens": 256,
        "pooling": "mean",
        "is_normalised": True,
        "device": "cpu",
        "dtype": "float32",
        "engine": "fake",
        "memory_bytes": 0,
    }
    return ModelInfo(**{**fields, **changes})  # type: ignore[arg-type]

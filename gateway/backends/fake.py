"""A backend without a model, whose vectors can be checked by eye, for tests and for timing everything but the model."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from gateway.backends.base import Report, unreported
from gateway.errors import ContextLengthExceeded, ModelNotReady
from gateway.types import Embeddings, EmbedJob, ModelInfo, Output, SparseVector, States, Timings, Token, Truncate

_SPARSE = SparseVector(np.array([3, 70_000]), np.array([0.5, 0.25], np.float32))


class FakeVocabulary:
    """A word is a token; its id is its index among the words seen so far. Each text begins with ``[S]``."""

    def __init__(self) -> None:
        self._words = ["[S]"]

    def split(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[Token]]:
        head = [Token(0, "[S]", is_special=True, start=None, stop=None)] if add_special_tokens else []
        return [[*head, *(self._token(found) for found in re.finditer(r"\S+", text))] for text in texts]

    def join(self, rows: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]:
        return [
            " ".join(self._words[i] for i in row if i < len(self._words) and (i or not skip_special_tokens))
            for row in rows
        ]

    def _token(self, found: re.Match[str]) -> Token:
        word = found.group()
        if word not in self._words:
            self._words.append(word)
        return Token(self._words.index(word), word, is_special=False, start=found.start(), stop=found.end())


class FakeBackend:
    """Embeds a text as ``[number of words, 1, 0, 0, …]``; a token is a word, and its state ``[place in the text, 1]``.

    The sparse weights of every text are 0.5 for token 3 and 0.25 for token 70,000.

    Its score of a text against a query is the number of its words that are in the query, less 1. As a pair, two texts are
    embedded as one.

    Args:
        info: the info of the model that it simulates.
        delay_s: the duration of each job in seconds.
        on_embed: called first with each job; an exception that it raises becomes the backend's.
    """

    def __init__(
        self, info: ModelInfo, *, delay_s: float = 0.0, on_embed: Callable[[EmbedJob], None] = lambda _job: None
    ) -> None:
        self._info = info
        self._delay_s = delay_s
        self._on_embed = on_embed
        self._is_running = False
        self._vocabulary = FakeVocabulary()

    async def plan(self, report: Report = unreported) -> ModelInfo:
        return self._info

    async def start(self, report: Report = lambda _state, _reason: None) -> ModelInfo:
        self.report = report
        self._is_running = True
        return self._info

    async def embed(self, job: EmbedJob) -> Embeddings:
        if not self._is_running:
            raise ModelNotReady("the fake backend is not started")
        self._on_embed(job)
        firsts = job.firsts or [job.query] * len(job.texts)
        words = [
            len((first or "").split()) + len(text.split()[: job.max_text_tokens])
            for first, text in zip(firsts, job.texts, strict=True)
        ]
        limit = self._info.max_tokens
        if job.truncate is Truncate.REFUSE and max(words) > limit:
            param = "input" if job.query is None else None
            raise ContextLengthExceeded(f"This model's maximum context length is {limit} tokens", param=param)
        num_tokens = [min(n, limit) for n in words]
        job.check_total(sum(num_tokens))  # before the work, as an engine does
        await asyncio.sleep(self._delay_s)
        vectors = np.zeros((len(words), self._info.width), dtype=np.float32)
        if job.query is None:
            vectors[:, 0] = np.minimum(words, limit)
            vectors[:, 1:2] = 1
        else:
            vectors[:, 0] = [_num_shared(job.query, text.split()[: job.max_text_tokens]) - 1 for text in job.texts]
        return Embeddings(
            vectors=vectors,
            num_tokens=num_tokens,
            truncated=[i for i, n in enumerate(words) if n > limit],
            timings=Timings(0.0, 0.0, self._delay_s),
            sparse=[_SPARSE] * len(words) if Output.SPARSE in job.outputs else None,
            states=[_states(n) for n in num_tokens] if Output.STATES in job.outputs else None,
        )

    async def vocabulary(self) -> FakeVocabulary:
        return self._vocabulary

    async def stop(self) -> None:
        self._is_running = False


def _states(num_tokens: int) -> States:
    return np.stack((np.arange(num_tokens), np.ones(num_tokens)), axis=1).astype(np.float32)


def _num_shared(query: str, words: Sequence[str]) -> int:
    wanted = set(query.lower().split())
    return sum(word.lower() in wanted for word in words)


def fake_info(model_id: str = "fake", width: int = 8, **changes: object) -> ModelInfo:
    """Return the description of a fake model, with the fields in ``changes`` replaced."""
    fields: dict[str, object] = {
        "id": model_id,
        "source": f"fake/{model_id}",
        "revision": None,
        "fingerprint": hashlib.sha256(model_id.encode()).hexdigest(),
        "width": width,
        "dimensions": (width,),
        "max_tokens": 256,
        "pooling": "mean",
        "is_normalized": True,
        "device": "cpu",
        "dtype": "float32",
        "engine": "fake",
        "memory_bytes": 0,
        "has_states": True,
    }
    return ModelInfo(**{**fields, **changes})  # type: ignore[arg-type]

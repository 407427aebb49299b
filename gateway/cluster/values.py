"""Jobs and answers in the form sent between a front and a replica: the fields of the originals, and compact arrays."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gateway.similarity import QueryVectors
from gateway.types import Embeddings, EmbedJob, SparseVector, Timings, Vectors

Rows: TypeAlias = npt.NDArray[np.float32]
"""The vectors of tokens: ``(t, d)`` float32."""

# Fields that cannot be sent, or have no meaning on another machine.
_LEFT_OUT = ("deadline", "scorer", "on_tokens")


@dataclass(frozen=True, slots=True)
class Load:
    """The load of a replica.

    Attributes:
        num_requests: the number of requests in progress, of all fronts.
        num_texts: the number of texts in these requests.
        work: the remaining work, in characters.
        others: the part of the work that belongs to other fronts.
        rate: the characters per second that it processes while busy; 0 if unknown.
        num_fronts: the number of connected fronts that send it jobs.
    """

    num_requests: int = 0
    num_texts: int = 0
    work: int = 0
    others: int = 0
    rate: float = 0.0
    num_fronts: int = 0


@dataclass(frozen=True, slots=True)
class WireJob:
    """An :class:`~gateway.types.EmbedJob` in the form that is sent.

    Attributes:
        content: the job's fields, except ``on_tokens``: the front calls it when it receives the numbers of tokens.
        left_s: seconds until the deadline, because clocks differ between machines.
        query: the object whose method is the job's ``scorer``.
    """

    content: Mapping[str, Any]
    left_s: float
    query: QueryVectors | None

    @classmethod
    def of(cls, job: EmbedJob) -> WireJob:
        """Convert a job to the form that is sent.

        Raises:
            TypeError: the scorer is not a method of :class:`~gateway.similarity.QueryVectors`.
        """
        content = {field.name: getattr(job, field.name) for field in fields(job) if field.name not in _LEFT_OUT}
        query = None
        if job.scorer is not None:
            query = getattr(job.scorer, "__self__", None)
            if not isinstance(query, QueryVectors):
                raise TypeError(
                    f"a scorer must be a method of QueryVectors to be sent to a replica, got {job.scorer!r}"
                )
        return cls(content, job.deadline - time.monotonic(), query)

    def job(self, on_tokens: Callable[[int], None]) -> EmbedJob:
        """Convert the job back, for a backend on this machine."""
        scorer = None if self.query is None else self.query.score
        return EmbedJob(**self.content, deadline=time.monotonic() + self.left_s, scorer=scorer, on_tokens=on_tokens)

    @property
    def work(self) -> int:
        """The number of characters that a model reads for the job."""
        return work_of(self.content["texts"], self.content["query"], self.content["firsts"])


def work_of(texts: Sequence[str], query: str | None, firsts: Sequence[str | None] | None) -> int:
    """Return the number of characters that a model reads for texts, plus one per text."""
    before = len(query or "") * len(texts) + sum(len(first or "") for first in firsts or ())
    return before + sum(map(len, texts)) + len(texts)


@dataclass(frozen=True, slots=True)
class Packed:
    """Arrays of several texts in one.

    Attributes:
        lengths: the number of rows of each text.
    """

    lengths: npt.NDArray[np.int64]
    rows: npt.NDArray[Any]

    @classmethod
    def of(cls, arrays: Sequence[npt.NDArray[Any]]) -> Packed:
        """Join arrays whose shapes differ only in the first dimension."""
        lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
        return cls(lengths, np.concatenate(arrays) if arrays else np.zeros(0, np.float32))

    def arrays(self) -> Iterable[npt.NDArray[Any]]:
        """Yield the array of each text."""
        start = 0
        for length in self.lengths.tolist():
            yield self.rows[start : start + length]
            start += length


@dataclass(frozen=True, slots=True)
class WireEmbeddings:
    """:class:`~gateway.types.Embeddings` in the form that is sent."""

    vectors: Vectors
    num_tokens: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.int64]
    timings: Timings
    indices: Packed | None
    weights: Packed | None
    multivectors: Packed | None
    states: Packed | None

    @classmethod
    def of(cls, result: Embeddings) -> WireEmbeddings:
        """Convert a result to the form that is sent."""
        sparse = result.sparse
        return cls(
            vectors=np.ascontiguousarray(result.vectors),
            num_tokens=np.asarray(result.num_tokens, np.int64),
            truncated=np.asarray(result.truncated, np.int64),
            timings=result.timings,
            indices=None if sparse is None else Packed.of([weights.indices for weights in sparse]),
            weights=None if sparse is None else Packed.of([weights.values for weights in sparse]),
            multivectors=None if result.multivectors is None else Packed.of(result.multivectors),
            states=None if result.states is None else Packed.of(result.states),
        )

    def embeddings(self) -> Embeddings:
        """Convert the result back. Its arrays are views of the received bytes."""
        sparse = None
        if self.indices is not None and self.weights is not None:
            pairs = zip(self.indices.arrays(), self.weights.arrays(), strict=True)
            sparse = [SparseVector(indices, values) for indices, values in pairs]
        return Embeddings(
            vectors=self.vectors,
            num_tokens=self.num_tokens.tolist(),
            truncated=self.truncated.tolist(),
            timings=self.timings,
            sparse=sparse,
            multivectors=None if self.multivectors is None else list(self.multivectors.arrays()),
            states=None if self.states is None else list(self.states.arrays()),
        )

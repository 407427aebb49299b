"""Jobs and their answers, as they travel between a front and a replica: the fields of the originals, and compact arrays."""

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
"""Vectors of some tokens: ``(t, d)`` float32."""

# What cannot travel, or means nothing on another machine.
_LEFT_OUT = ("deadline", "scorer", "on_tokens")


@dataclass(frozen=True, slots=True)
class Load:
    """The work of a replica.

    Attributes:
        num_requests: requests in progress, of all fronts.
        num_texts: their texts.
        work: what is left to do, in characters.
        others: the part of it that is not this front's.
        rate: characters per second that it does while it is busy; 0 if that is unknown.
        num_fronts: fronts that are connected.
    """

    num_requests: int = 0
    num_texts: int = 0
    work: int = 0
    others: int = 0
    rate: float = 0.0
    num_fronts: int = 0


@dataclass(frozen=True, slots=True)
class WireJob:
    """An :class:`~gateway.types.EmbedJob` on its way.

    Attributes:
        content: the job's fields; ``on_tokens`` stays with the front, which learns the numbers of tokens.
        left_s: seconds until its deadline: the clocks of two machines have nothing in common.
        query: scores the texts in place of a ``scorer``, whose method it is.
    """

    content: Mapping[str, Any]
    left_s: float
    query: QueryVectors | None

    @classmethod
    def of(cls, job: EmbedJob) -> WireJob:
        """Return a job as it travels.

        Raises:
            TypeError: its scorer is not one of :class:`~gateway.similarity.QueryVectors`.
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
        """Return the job, for a backend on this machine."""
        scorer = None if self.query is None else self.query.score
        return EmbedJob(**self.content, deadline=time.monotonic() + self.left_s, scorer=scorer, on_tokens=on_tokens)

    @property
    def work(self) -> int:
        """The characters that a model reads for it."""
        return work_of(self.content["texts"], self.content["query"], self.content["firsts"])


def work_of(texts: Sequence[str], query: str | None, firsts: Sequence[str | None] | None) -> int:
    """Return the characters that a model reads for texts, and one more for each."""
    before = len(query or "") * len(texts) + sum(len(first or "") for first in firsts or ())
    return before + sum(map(len, texts)) + len(texts)


@dataclass(frozen=True, slots=True)
class Packed:
    """Arrays of several texts in one.

    Attributes:
        lengths: how many rows belong to each text.
    """

    lengths: npt.NDArray[np.int64]
    rows: npt.NDArray[Any]

    @classmethod
    def of(cls, arrays: Sequence[npt.NDArray[Any]]) -> Packed:
        """Return arrays, of equal shape but for their first dimension, as one."""
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
    """:class:`~gateway.types.Embeddings` on their way."""

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
        """Return a result as it travels."""
        sparse = result.sparse
        return cls(
            vectors=np.ascontiguousarray(result.vectors),
            num_tokens=np.asarray(result.num_tokens, np.int64),
            truncated=np.asarray(result.truncated, np.int64),
            timings=result.timings,
            indices=None if sparse is None else Packed.of([one.indices for one in sparse]),
            weights=None if sparse is None else Packed.of([one.values for one in sparse]),
            multivectors=None if result.multivectors is None else Packed.of(result.multivectors),
            states=None if result.states is None else Packed.of(result.states),
        )

    def embeddings(self) -> Embeddings:
        """Return the result; its arrays are views of what was received."""
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

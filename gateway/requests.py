"""Requests for embeddings, scores and labels, and their answers, in the gateway's own terms: no HTTP, no YAML."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from gateway.experiments.split import Assignment, UnitSource, no_unit_source
from gateway.precision import Precision, Ranges
from gateway.routing.names import Client
from gateway.types import (
    LabelFunction,
    ModelKind,
    MultiVector,
    Output,
    Priority,
    SparseVector,
    States,
    Timings,
    Truncate,
    Vectors,
)


@dataclass(frozen=True, slots=True)
class Request:
    """A request for a computation on texts.

    Attributes:
        kind: the kind of model that can answer it.
        model: public name, or ``None`` for the default of this kind.
        timeout_s: the seconds that the caller waits for the answer.
        caller: the party that the work is for; callers share a device fairly.
        client: the sender; decides which names the request may use.
        task: the task, by any of its names; ``None`` for the model's default.
        unit_source: looks up the values that an experiment can make a unit from.
        priority: low for a request that yields to all others.
        may_be_captured: the texts may be kept as a sample of the queries, if the name has a capture.
        reserve: called with the number of bytes that the work and its answer need, before they are used, and again with
            each better estimate; raises a :class:`RequestError` if there is no room.
    """

    kind: ClassVar[ModelKind]

    texts: Sequence[str]
    model: str | None
    timeout_s: float
    caller: str
    client: Client
    task: str | None = None
    truncate: Truncate = Truncate.END
    unit_source: UnitSource = no_unit_source
    priority: Priority = Priority.NORMAL
    may_be_captured: bool = True
    reserve: Callable[[int], None] = lambda _num_bytes: None

    @property
    def lengths(self) -> list[int]:
        """Characters that the model reads for each text."""
        return list(map(len, self.texts))


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest(Request):
    """A request for embeddings.

    Attributes:
        dimensions: requested size, or ``None`` for the model's own.
        is_normalized: whether vectors are normalized; ``None`` for the model's default.
        expect_space: the space that the vectors must be in, if the caller states one.
        precision: the kind of numbers that the dense vectors of the answer have.
        encoding: the encoding of the vectors in the answer, for the trace.
        max_token_vectors: the largest total number of tokens if the answer has a vector for each token.
    """

    kind: ClassVar[ModelKind] = ModelKind.EMBED

    dimensions: int | None = None
    is_normalized: bool | None = None
    outputs: Sequence[Output] = (Output.DENSE,)
    is_late_chunked: bool = False
    expect_space: str | None = None
    precision: Precision = Precision.FLOAT
    encoding: str | None = None
    max_token_vectors: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankRequest(Request):
    """A request to score texts against a query.

    Attributes:
        truncate: the end of the text to cut when text and query together are too long; a query always loses its end.
        max_text_tokens: the largest number of tokens in each text; ``None`` for no such limit.
        score_by: for a model that embeds: the outputs to score by, with their weights; ``None`` for the model's
            default.
    """

    kind: ClassVar[ModelKind] = ModelKind.RERANK

    query: str
    max_text_tokens: int | None = None
    score_by: Mapping[Output, float] | None = None

    @property
    def lengths(self) -> list[int]:
        """Characters that the model reads for each text, including the query each time."""
        return [len(self.query) + len(text) for text in self.texts]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyRequest(Request):
    """A request for the scores of a text's labels.

    Attributes:
        firsts: the text that is read before each text, as a pair with it; ``None`` for a text alone, or for all of them.
    """

    kind: ClassVar[ModelKind] = ModelKind.CLASSIFY

    firsts: Sequence[str | None] | None = None

    @property
    def lengths(self) -> list[int]:
        """Characters that the model reads for each text, including the first text of its pair."""
        if self.firsts is None:
            return list(map(len, self.texts))
        return [len(first or "") + len(text) for first, text in zip(self.firsts, self.texts, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(ABC):
    """The answer to a request.

    Attributes:
        name: the value of ``model`` in the answer.
        model: id of the model that answered.
        num_tokens: tokens of all texts together, after truncation; a query counts once with each text.
        truncated: indices of the texts that were cut.
        task: the task that the model used; ``None`` for a model without tasks.
        space: the space of the vectors; ``None`` for scores, which are in no space.
        assignment: the arm that the request was in, if it named an experiment.
    """

    name: str
    model: str
    num_tokens: int
    truncated: Sequence[int]
    timings: Timings
    task: str | None = None
    space: str | None = None
    assignment: Assignment | None = None

    @property
    @abstractmethod
    def num_texts(self) -> int: ...

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """The memory that the arrays take."""

    @property
    def dimensions(self) -> int | None:
        """Dimensions of the dense vectors; ``None`` if the answer has none."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedAnswer(Answer):
    """Finished vectors.

    Attributes:
        vectors: ``(n, d)`` float32, checked, cut and normalized, in input order.
        has_dense: the request asked for dense vectors.
        precision: the kind of numbers that the vectors are written in.
        ranges: the ranges of the dimensions, if the precision needs them.
        num_cached: the number of texts that had been embedded before; ``None`` for a model without a cache.
    """

    vectors: Vectors
    has_dense: bool
    precision: Precision = Precision.FLOAT
    ranges: Ranges | None = None
    sparse: Sequence[SparseVector] | None = None
    multivectors: Sequence[MultiVector] | None = None
    states: Sequence[States] | None = None
    num_cached: int | None = None

    @property
    def num_texts(self) -> int:
        return len(self.vectors)

    @property
    def num_bytes(self) -> int:
        arrays = (self.vectors, *(self.multivectors or ()), *(self.states or ()))
        sparse = sum(weights.indices.nbytes + weights.values.nbytes for weights in self.sparse or ())
        return sparse + sum(array.nbytes for array in arrays)

    @property
    def dimensions(self) -> int | None:
        return int(self.vectors.shape[1]) if self.has_dense else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankAnswer(Answer):
    """Scores of texts.

    Attributes:
        scores: ``(n,)`` float32, checked, before any sigmoid, in input order. A larger score means a better match.
        are_logits: whether the sigmoid of a score is a probability; otherwise, scores are similarities of vectors.
    """

    scores: Vectors
    are_logits: bool = True

    @property
    def num_texts(self) -> int:
        return len(self.scores)

    @property
    def num_bytes(self) -> int:
        return self.scores.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyAnswer(Answer):
    """The numbers that a model gives for the labels of texts.

    Attributes:
        logits: ``(n, labels)`` float32, checked, before any function is applied, in input order.
        labels: the names, in the order of the columns.
        function: the function from the numbers to scores.
    """

    logits: Vectors
    labels: Sequence[str]
    function: LabelFunction

    @property
    def num_texts(self) -> int:
        return len(self.logits)

    @property
    def num_bytes(self) -> int:
        """The memory of the numbers and of the label names, which the answer repeats for each text."""
        names = sum(map(len, self.labels))
        return self.logits.nbytes + len(self.logits) * names

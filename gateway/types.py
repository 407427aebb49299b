"""The values that pass between the service and the backends: no torch, no HTTP, no YAML."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from gateway.errors import BadInput
from gateway.precision import CALIBRATED, Precision, Ranges
from gateway.tasks import canonical_task, task_family

# Increment it when a change in the gateway's preprocessing changes the vectors: all spaces then become new.
PREPROCESSING_VERSION = 1

Vectors: TypeAlias = npt.NDArray[np.float32]
"""The vectors of one request: shape ``(n, d)``, float32, rows in input order."""

MultiVector: TypeAlias = npt.NDArray[np.float32]
"""A vector for each token of one text: shape ``(t, d)``, float32, usually with L2 norm 1."""

States: TypeAlias = npt.NDArray[np.float32]
"""The last hidden state of each token of one text: shape ``(t, d)``, float32, special tokens included."""


class Output(StrEnum):
    """A kind of representation that a model can return for a text."""

    DENSE = "dense"
    SPARSE = "sparse"
    MULTIVECTOR = "multivector"
    STATES = "states"
    """The token states that are pooled into the dense vector; only for models with ``has_states`` and TEI's clients."""


PER_TOKEN = frozenset({Output.MULTIVECTOR, Output.STATES})
"""Outputs whose size grows with the length of the text."""

TOKEN_BYTES = 56
"""Memory per token while its text waits: an integer in a list, and another in the key that finds equal texts."""


class ModelKind(StrEnum):
    """The kind of numbers that a model computes."""

    EMBED = "embed"
    """Vectors of texts."""
    RERANK = "rerank"
    """Scores of how well texts answer a query: one number per pair."""
    CLASSIFY = "classify"
    """A number for each of several labels of a text, or of a pair of texts."""


DOES = {ModelKind.EMBED: "embeds", ModelKind.RERANK: "reranks", ModelKind.CLASSIFY: "classifies"}
"""The verb for the work of each kind of model, for messages."""


class LabelFunction(StrEnum):
    """How the numbers that a model gives for the labels of a text become scores."""

    SOFTMAX = "softmax"
    """One label applies: the scores sum to 1."""
    SIGMOID = "sigmoid"
    """Each label applies independently of the others: each score is between 0 and 1."""
    NONE = "none"
    """The numbers are the scores."""


class Truncate(StrEnum):
    """How to treat a text that has more tokens than the model takes."""

    END = "end"
    """Keep the first tokens (the default)."""
    START = "start"
    """Keep the last tokens."""
    REFUSE = "refuse"
    """Answer 400 ``context_length_exceeded``."""


class Priority(StrEnum):
    """The precedence of a job among the jobs that wait for the same model."""

    NORMAL = "normal"
    """In fair turns with the other jobs."""
    LOW = "low"
    """Only while no job of normal priority waits, so it may wait until its deadline."""


class ModelState(StrEnum):
    """The state of a model; shown in ``/v1/models`` and ``/health/ready``."""

    DISABLED = "disabled"
    UNLOADED = "unloaded"
    """Loaded when a request needs it."""
    DOWNLOADING = "downloading"
    LOADING = "loading"
    READY = "ready"
    RECOVERING = "recovering"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class SparseVector:
    """Weights of the tokens of one text.

    Attributes:
        indices: the model's token ids, ascending, each once; int64.
        values: the weights of these tokens, usually above 0 and never 0; float32.
    """

    indices: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The properties and abilities of a model.

    Attributes:
        fingerprint: hex sha256 over everything that determines the vectors: weights files, tokenizer, kind of pooling.
        width: native dimensions of a dense vector; 0 for a model without one.
        dimensions: every accepted size of a dense vector, largest (``width``) first.
        token_width: dimensions of a vector in the multi-vector output; 0 without that output.
        max_weights: the maximum number of weights of a text in the sparse output, for any length; 0 for one per token.
        rerank: for a model that embeds: the outputs, with weights, by which it scores texts against a query; may be
            empty.
        is_mean_maxsim: multi-vectors are compared by the mean over the query's vectors, rather than by the sum.
        max_tokens: the longest text in tokens, special tokens included.
        max_query_tokens: the longest query, if queries are cut elsewhere than other texts; else ``None``.
        is_normalized: vectors have L2 norm 1, unless a request asks otherwise.
        tasks: each task of the model, with the instruction that precedes the text (may be empty).
        can_chunk_late: chunks of a document can be encoded together.
        default_task: the task of a request without a task; ``None`` for a model without tasks.
        instruction: the instruction for a text without a task.
        has_raw: the model can return vectors as they were pooled, not normalized.
        has_states: the model can return the states of a text's tokens, in addition to ``outputs``.
        kind: the kind of model. The ``width`` of a reranker is 1; the ``width`` of a classifier is its number of
            labels.
        labels: the labels of a model that classifies.
        label_function: the function that turns the numbers of the labels into scores.
        ranges: the ranges of the vectors of each size, normalized or not by the model's default; empty without
            calibration.
        notes: facts for the operator about where the model runs, such as an unused card.
    """

    id: str
    source: str
    revision: str | None
    fingerprint: str
    width: int
    dimensions: tuple[int, ...]
    max_tokens: int
    pooling: str
    is_normalized: bool
    device: str
    dtype: str
    engine: str
    memory_bytes: int
    outputs: tuple[Output, ...] = (Output.DENSE,)
    can_chunk_late: bool = False
    tasks: Mapping[str, str] = field(default_factory=dict)
    default_task: str | None = None
    instruction: str = ""
    has_raw: bool = True
    has_states: bool = False
    token_width: int = 0
    max_weights: int = 0
    rerank: Mapping[Output, float] = field(default_factory=dict)
    is_mean_maxsim: bool = True
    max_query_tokens: int | None = None
    kind: ModelKind = ModelKind.EMBED
    labels: tuple[str, ...] = ()
    label_function: LabelFunction = LabelFunction.NONE
    ranges: Mapping[int, Ranges] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    _spaces: dict[tuple[object, ...], str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def limit(self, task: str | None) -> int:
        """Return the longest text of a task in tokens, special tokens included."""
        if task == "retrieval.query" and self.max_query_tokens is not None:
            return self.max_query_tokens
        return self.max_tokens

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that each hold a replica of the model."""
        return tuple(self.device.split(", "))

    def space(
        self,
        task: str | None = None,
        dimensions: int | None = None,
        *,
        is_normalized: bool | None = None,
        output: Output = Output.DENSE,
        precision: Precision = Precision.FLOAT,
    ) -> str:
        """Return the space of the model's vectors: ``<model id>@<12 hex>``.

        Two vectors can be compared if, and only if, their spaces have the same hash. Jina v3 and BGE-M3 both have 1,024
        dimensions, so no check of sizes would notice if one answered for the other.

        The hash covers everything that must be equal for vectors to be comparable: the checkpoint's fingerprint (weights,
        tokenizer, pooling), normalization, dimensions, the family of the task with its exact instructions, and the version
        of the gateway's preprocessing. It leaves out device, dtype and engine, which change a vector too little to matter
        in a comparison. The part before ``@`` is for people.

        The space of int8 and uint8 vectors also depends on their ranges. Binary vectors share the space of the vectors
        whose signs they hold.

        Sparse weights and multi-vectors share the space of the dense vector that comes, or would come, with them.

        Args:
            task: one of ``tasks``, by any of its names; ``None`` for the default. A model without tasks ignores this.
            dimensions: ``None`` for ``width``.
            is_normalized: whether vectors are normalized; ``None`` for the model's default.
            precision: one of ``CALIBRATED`` only if ``ranges`` has the dimensions.
        """
        task = canonical_task(task) if task is not None and self.tasks else self.default_task
        key = (task, dimensions, is_normalized, output, precision)
        if (known := self._spaces.get(key)) is None:  # it is needed for each request
            known = self._spaces[key] = self._space(*key)
        return known

    def _space(
        self, task: str | None, dimensions: int | None, is_normalized: bool | None, output: Output, precision: Precision
    ) -> str:
        family = task_family(task) if task is not None else None
        instructions = (
            {name: text for name, text in sorted(self.tasks.items()) if task_family(name) == family}
            if task is not None
            else {"": self.instruction}
        )
        size = self.width if dimensions is None else dimensions
        extra = {"output": output.value} if output is Output.STATES else {}
        if precision in CALIBRATED:
            extra |= {"precision": precision.value, "ranges": self.ranges[size].digest}
        content = extra | {
            "fingerprint": self.fingerprint,
            # The spelling is part of every id that has been stored.
            "is_normalised": self.is_normalized if is_normalized is None else is_normalized,
            "dimensions": size,
            "family": family,
            "instructions": instructions,
            "preprocessing": PREPROCESSING_VERSION,
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return f"{self.id.replace('/', '-')}@{digest[:12]}"

    def spaces_by_task(self) -> dict[str | None, str]:
        """Return the space of each task, with native dimensions. A model without tasks has one entry, for ``None``."""
        tasks: list[str | None] = list(self.tasks) or [None]
        if self.default_task not in tasks:
            tasks.append(self.default_task)
        return {task: self.space(task) for task in tasks}


@dataclass(frozen=True, slots=True)
class EmbedJob:
    """Texts to embed with one model and one task.

    Attributes:
        task: one of ``ModelInfo.tasks``, or ``None`` for no task.
        outputs: representations to compute for each text; some of ``ModelInfo.outputs``, or ``STATES``.
        is_late_chunked: the texts are consecutive chunks of one document, which is encoded as a whole; the vector of a
            chunk is the mean over its own tokens.
        deadline: point on ``time.monotonic()`` after which the caller no longer waits.
        caller: the party that the work is for; callers share the device fairly.
        query: for a model that reranks: the query to score the texts against. The vector of a text is then its score.
        firsts: for a model that classifies: the text that is read before each text, as a pair with it; ``None`` for a
            text alone, or for all of them. The vector of a text then has a number for each label.
        scorer: turns the outputs of a text into a number, which is then the text's only output, as a vector of width 1.
        text_name: the name of the texts in an error.
        max_text_tokens: the maximum number of tokens per text, before it is combined with a query; ``None`` for no limit.
        max_total_tokens: the maximum number of tokens of all texts together, after truncation; ``None`` for no limit.
        may_wait: whether the job may wait until the model is loaded; otherwise it fails immediately.
        priority: low for work that can wait for all other work.
        on_tokens: called with the number of tokens counted so far, before any are computed; raises to refuse the job.
    """

    texts: Sequence[str]
    task: str | None
    truncate: Truncate
    deadline: float
    caller: str
    outputs: frozenset[Output] = frozenset({Output.DENSE})
    is_late_chunked: bool = False
    query: str | None = None
    firsts: Sequence[str | None] | None = None
    scorer: Callable[[Vectors, SparseVector | None, MultiVector | None], float] | None = None
    text_name: str = "input"
    max_text_tokens: int | None = None
    max_total_tokens: int | None = None
    may_wait: bool = True
    priority: Priority = Priority.NORMAL
    on_tokens: Callable[[int], None] = lambda _num_tokens: None

    @property
    def lengths(self) -> list[int]:
        """Characters that the model reads for each text, including the query or the first text of a pair."""
        firsts = self.firsts or [self.query] * len(self.texts)
        return [len(first or "") + len(text) for first, text in zip(firsts, self.texts, strict=True)]

    def check_total(self, num_tokens: int) -> None:
        """Refuse texts that together have too many tokens for the limit or for the free memory.

        Raises:
            BadInput: the texts have more than ``max_total_tokens``.
            RequestError: ``on_tokens`` refused them.
        """
        if self.max_total_tokens is not None and num_tokens > self.max_total_tokens:
            per_token = ", ".join(sorted(output.value for output in self.outputs & PER_TOKEN))
            raise BadInput(
                f"the texts have at least {num_tokens} tokens together, but the limit where each has a vector in the answer "
                f"({per_token}) is {self.max_total_tokens}: send several requests"
            )
        self.on_tokens(num_tokens)


@dataclass(frozen=True, slots=True)
class Timings:
    """Durations of the stages of one request, in seconds of wall-clock time. They do not overlap.

    ``inference_s``: at least one of its texts was being computed. ``queue_s``: none was computed, but one waited.
    ``tokenize_s``: none was computed and none waited, but one was being tokenized. ``serialize_s``: ``None`` until the
    answer has been written.
    """

    tokenize_s: float
    queue_s: float
    inference_s: float
    serialize_s: float | None = None

    @property
    def stages(self) -> dict[str, float]:
        """The seconds of each stage by its name, in the order of the stages."""
        known = {"tokenize": self.tokenize_s, "queue": self.queue_s, "inference": self.inference_s}
        return known if self.serialize_s is None else {**known, "serialize": self.serialize_s}


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The result of an :class:`EmbedJob`.

    Attributes:
        vectors: ``(n, width)`` float32, pooled, **not** normalized, in input order.
        num_tokens: tokens of each text as the model saw it: after truncation, special tokens included.
        truncated: indices of the texts that were cut, ascending.
        sparse: token weights of each text, if requested.
        multivectors: token vectors of each text, if requested.
        states: token states of each text, if requested.
        num_cached: the number of texts whose vectors came from the cache; ``None`` without a cache.
    """

    vectors: Vectors
    num_tokens: Sequence[int]
    truncated: Sequence[int]
    timings: Timings
    sparse: Sequence[SparseVector] | None = None
    multivectors: Sequence[MultiVector] | None = None
    states: Sequence[States] | None = None
    num_cached: int | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a text.

    Attributes:
        text: the part of the text that the token covers; the token's own name if it covers no part.
        is_special: the model's template added the token.
        start, stop: the ends of that part, in characters; ``None`` for special tokens.
    """

    id: int
    text: str
    is_special: bool
    start: int | None
    stop: int | None


class Vocabulary(Protocol):
    """Turns texts into a model's tokens and back. Safe to use from several threads."""

    def split(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[Token]]:
        """Return all tokens of each text, without cutting it or adding an instruction."""

    def join(self, rows: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]:
        """Return the text of each row of token ids; skip ids that the model does not have."""

"""The values that pass between the service and the backends: jobs, vectors, and a model's description.

Pure values: no torch, no HTTP, no YAML.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from gateway.errors import BadInput

# Raise it when the gateway's own treatment of a text changes the vectors: then every space is a new one.
PREPROCESSING_VERSION = 1

# A query and a passage are meant to be compared with each other: their tasks share a space.
_FAMILIES = {"retrieval.query": "retrieval", "retrieval.passage": "retrieval"}

Vectors: TypeAlias = npt.NDArray[np.float32]
"""The vectors of one request: shape ``(n, d)``, float32, rows in input order."""


MultiVector: TypeAlias = npt.NDArray[np.float32]
"""A vector for each token of one text: shape ``(t, d)``, float32, each of L2 norm 1."""


States: TypeAlias = npt.NDArray[np.float32]
"""The last hidden state of each token of one text: shape ``(t, d)``, float32, special tokens included."""


class Output(StrEnum):
    """A kind of representation that a model can return for a text."""

    DENSE = "dense"
    SPARSE = "sparse"
    MULTIVECTOR = "multivector"
    STATES = "states"
    """What is pooled to the dense vector: of every model whose ``ModelInfo.has_states``, and of TEI's clients alone."""


PER_TOKEN = frozenset({Output.MULTIVECTOR, Output.STATES})
"""Outputs that are as large as their text is long."""


TOKEN_BYTES = 56
"""What a token takes while its text waits: an integer in a list, and once more in the key that finds equal texts."""


class ModelKind(StrEnum):
    """What a model computes."""

    EMBED = "embed"
    """Vectors of texts."""
    RERANK = "rerank"
    """How well a text answers a query: one number a pair."""


class Truncate(StrEnum):
    """What to do with a text that has more tokens than the model takes."""

    END = "end"
    """Keep the first tokens (the default)."""
    START = "start"
    """Keep the last tokens."""
    REFUSE = "refuse"
    """Answer 400 ``context_length_exceeded``."""


class ModelState(StrEnum):
    """Where a model is in its life; shown in ``/v1/models`` and ``/health/ready``."""

    DISABLED = "disabled"
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
        values: their weights, above 0; float32.
    """

    indices: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded model is and can do.

    Attributes:
        fingerprint: hex sha256 over everything in the checkpoint that determines its vectors: the weights files, the
            tokenizer, and the kind of pooling.
        width: native dimensions of a dense vector.
        dimensions: every accepted size of a dense vector, largest (``width``) first.
        max_tokens: the longest text in tokens, special tokens included.
        is_normalized: whether vectors have L2 norm 1 unless a request asks otherwise.
        tasks: each task the model knows, with the instruction put before the text (may be empty).
        can_chunk_late: whether chunks of a document can be encoded together.
        default_task: the task of a request that names none; ``None`` for a model without tasks.
        instruction: what is put before a text that has no task.
        has_raw: whether vectors can be had as they were pooled, not normalized.
        has_states: whether the states of a text's tokens can be had, beside ``outputs``.
        kind: what it computes; the ``width`` of a model that reranks is 1.
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
    kind: ModelKind = ModelKind.EMBED

    def space(
        self,
        task: str | None = None,
        dimensions: int | None = None,
        *,
        is_normalized: bool | None = None,
        output: Output = Output.DENSE,
    ) -> str:
        """Return the space of the model's vectors: ``<model id>@<12 hex>``.

        Two vectors can be compared if, and only if, their spaces have the same hash. Jina v3 and BGE-M3 both have 1,024
        dimensions, so no check of sizes would notice if one answered for the other.

        The hash covers everything that must be equal for vectors to be comparable: the checkpoint's fingerprint (weights,
        tokenizer, pooling), normalization, dimensions, the family of the task with its exact instructions, and the version
        of the gateway's preprocessing. It leaves out device, dtype and engine, which change a vector too little to matter
        in a comparison. The part before ``@`` is for people.

        Sparse weights and multi-vectors share the space of the dense vector that comes with them; token states have their
        own.

        Args:
            task: one of ``tasks`` by any of its names; ``None`` for the default. A model without tasks ignores it.
            dimensions: ``None`` for ``width``.
            is_normalized: ``None`` for what the model does by default.
        """
        task = canonical_task(task) if task is not None and self.tasks else self.default_task
        family = _FAMILIES.get(task, task) if task is not None else None
        instructions = (
            {name: text for name, text in sorted(self.tasks.items()) if _FAMILIES.get(name, name) == family}
            if task is not None
            else {"": self.instruction}
        )
        states = {"output": output.value} if output is Output.STATES else {}
        return _space_id(
            self.id.replace("/", "-"),
            json.dumps(
                states
                | {
                    "fingerprint": self.fingerprint,
                    # The spelling is part of every id that has been stored.
                    "is_normalised": self.is_normalized if is_normalized is None else is_normalized,
                    "dimensions": self.width if dimensions is None else dimensions,
                    "family": family,
                    "instructions": instructions,
                    "preprocessing": PREPROCESSING_VERSION,
                },
                sort_keys=True,
            ),
        )

    def spaces_by_task(self) -> dict[str | None, str]:
        """Return the space of each task, with native dimensions; for a model without tasks, that of ``None``."""
        tasks: list[str | None] = list(self.tasks) or [None]
        if self.default_task not in tasks:
            tasks.append(self.default_task)
        return {task: self.space(task) for task in tasks}


@lru_cache(maxsize=1024)
def _space_id(slug: str, content: str) -> str:
    return f"{slug}@{hashlib.sha256(content.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, slots=True)
class EmbedJob:
    """Texts to embed with one model and one task.

    Attributes:
        task: one of ``ModelInfo.tasks``, or ``None`` for no task.
        outputs: what to compute for each text; some of ``ModelInfo.outputs``, or ``STATES``.
        is_late_chunked: the texts are consecutive chunks of one document, which is encoded as a whole; the vector of a
            chunk is the mean over its own tokens.
        deadline: point on ``time.monotonic()`` after which nobody waits for the answer.
        caller: whom the work is for; work of different callers shares the device fairly.
        query: what the texts are scored against, by a model that reranks: the vector of a text is then its score.
        max_text_tokens: where each text is cut before it is put together with the query; ``None`` for no such limit.
        max_total_tokens: how many tokens all texts may have together, after truncation; ``None`` for no such limit.
        on_tokens: told how many they have, as far as is known, before they are computed; may refuse them.
    """

    texts: Sequence[str]
    task: str | None
    truncate: Truncate
    deadline: float
    caller: str
    outputs: frozenset[Output] = frozenset({Output.DENSE})
    is_late_chunked: bool = False
    query: str | None = None
    max_text_tokens: int | None = None
    max_total_tokens: int | None = None
    on_tokens: Callable[[int], None] = lambda _num_tokens: None

    def check_total(self, num_tokens: int) -> None:
        """Refuse texts that have too many tokens together, by the limit or by the memory that there is.

        Raises:
            BadInput: they have more than ``max_total_tokens``.
            RequestError: what ``on_tokens`` raises.
        """
        if self.max_total_tokens is not None and num_tokens > self.max_total_tokens:
            per_token = ", ".join(sorted(output.value for output in self.outputs & PER_TOKEN))
            raise BadInput(
                f"the texts have at least {num_tokens} tokens together, and the limit where each has a vector in the answer "
                f"({per_token}) is {self.max_total_tokens}: send several requests"
            )
        self.on_tokens(num_tokens)


@dataclass(frozen=True, slots=True)
class Timings:
    """How long the stages of one request took, in seconds of wall-clock: parts of its time that do not overlap.

    ``inference_s``: one of its texts was being computed. ``queue_s``: none was, and one waited. ``tokenize_s``: neither,
    and one was being tokenized. ``serialize_s`` is None until the answer has been written.
    """

    tokenize_s: float
    queue_s: float
    inference_s: float
    serialize_s: float | None = None

    @property
    def stages(self) -> dict[str, float]:
        """Return the seconds by the name of the stage, in the order in which a request goes through them."""
        known = {"tokenize": self.tokenize_s, "queue": self.queue_s, "inference": self.inference_s}
        return known if self.serialize_s is None else {**known, "serialize": self.serialize_s}


@dataclass(frozen=True, slots=True)
class Embeddings:
    """What a backend returns for an :class:`EmbedJob`.

    Attributes:
        vectors: ``(n, width)`` float32, pooled, **not** normalized, in input order.
        num_tokens: tokens of each text as the model saw it: after truncation, special tokens included.
        truncated: indices of the texts that were cut, ascending.
        sparse: token weights of each text, if they were asked for.
        multivectors: token vectors of each text, if they were asked for.
        states: token states of each text, if they were asked for.
    """

    vectors: Vectors
    num_tokens: Sequence[int]
    truncated: Sequence[int]
    timings: Timings
    sparse: Sequence[SparseVector] | None = None
    multivectors: Sequence[MultiVector] | None = None
    states: Sequence[States] | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a text.

    Attributes:
        text: the part of the text that it stands for; the token's own name where it stands for none.
        is_special: whether the model's template has put it there.
        start, stop: where that part begins and ends, in characters; ``None`` for special tokens.
    """

    id: int
    text: str
    is_special: bool
    start: int | None
    stop: int | None


class Vocabulary(Protocol):
    """What turns texts into a model's tokens and back. Safe to use from several threads."""

    def split(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[Token]]:
        """Return all tokens of each text: nothing is cut, and no instruction put before it."""

    def join(self, rows: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]:
        """Return the text of each row of token ids; ids that the model does not have are left out."""


TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
"""Tasks by their canonical names, which are Jina's."""

_TASK_SYNONYMS = {
    # Cohere's and Voyage's input types, and the usual names of prompts in sentence-transformers checkpoints.
    "query": "retrieval.query",
    "search_query": "retrieval.query",
    "document": "retrieval.passage",
    "passage": "retrieval.passage",
    "search_document": "retrieval.passage",
    "clustering": "separation",
}


def canonical_task(name: str) -> str:
    """Return the canonical name of a task; a name that is not known comes back as it is."""
    return _TASK_SYNONYMS.get(name, name)


def known_task_names() -> list[str]:
    """Return every name that :func:`canonical_task` understands."""
    return [*TASKS, *_TASK_SYNONYMS]

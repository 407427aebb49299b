"""Golden vectors: the vectors that a model must return for a few texts if the machine computes it correctly.

They are recorded once, in float32 with torch. The gateway compares the vectors of the serving runtime with them at
every start and periodically while it serves; ``gateway verify`` does the same. A file belongs to one checkpoint and
contains its fingerprint.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from gateway.config.files import read_bounded, write_whole
from gateway.errors import LoadError
from gateway.telemetry import metrics
from gateway.types import Embeddings, EmbedJob, Truncate, Vectors
from gateway.vectors import cosine

Embed: TypeAlias = Callable[[Sequence[tuple[str, str | None]]], Sequence[Vectors]]
"""Returns a vector of ``(width,)`` for each text and its task; computes it synchronously, in the calling thread."""

MIN_COSINE = {"float32": 0.9999, "float16": 0.9995, "bfloat16": 0.999}
"""Minimum cosine to the golden vector, by the number format of the computation, on a CPU or a card.

Rounding alone gives 0.99999 in float16 and 0.9995 in bfloat16, measured with 24 layers of width 1,024, random weights
and an emulation of a card's rounding.
"""
SAME_MODEL_COSINE = 0.999
"""Minimum cosine between two vectors of one text from the same model, on any device and in any number format."""

TEXTS = (
    "Hello, world",
    "How do I reset my password?",
    "The treaty was signed in 1648 and ended thirty years of war in central Europe.",
    "Ein Satz auf Deutsch, 一句中文, une phrase en français, جملة بالعربية.",
    "def mean(values):\n    return sum(values) / len(values)",
    " ".join(["A longer text repeats itself, so that positions far from the start are computed as well."] * 12),
)
_MAX_BYTES = 64 * 2**20
_VERSION = 1


@dataclass(frozen=True, slots=True)
class GoldenVector:
    """The vector that a text must have with a task: ``(width,)`` float32 of L2 norm 1."""

    text: str
    task: str | None
    vector: Vectors


@dataclass(frozen=True, slots=True)
class Comparison:
    """The cosine of a model's vector to a golden vector."""

    golden: GoldenVector
    cosine: float

    def __str__(self) -> str:
        return f"cosine {self.cosine:.6f} for {self.golden.text[:40]!r} (task {self.golden.task})"


def record(embed: Embed, tasks: Sequence[str | None]) -> list[GoldenVector]:
    """Compute the golden vectors of a model for each of its tasks."""
    return [golden for task in tasks for golden in golden_vectors(TEXTS, task, embed([(text, task) for text in TEXTS]))]


def golden_vectors(texts: Sequence[str], task: str | None, vectors: Iterable[Vectors]) -> list[GoldenVector]:
    """Return the vectors of texts with a task as golden vectors."""
    with np.errstate(all="ignore"):  # a vector of zeros becomes NaN, which no cosine agrees with
        units = [vector / np.linalg.norm(vector) for vector in vectors]
    return [GoldenVector(text, task, unit) for text, unit in zip(texts, units, strict=True)]


def compare(vectors: Iterable[Vectors], golden: Sequence[GoldenVector]) -> list[Comparison]:
    """Compare the vectors of the golden texts, in order, with the golden vectors."""
    return [
        Comparison(expected, cosine(vector, expected.vector)) for vector, expected in zip(vectors, golden, strict=True)
    ]


def compare_recorded(recorded: Iterable[GoldenVector], golden: Sequence[GoldenVector]) -> list[Comparison]:
    """Compare golden vectors with the recorded vectors of the same texts and tasks; a missing one has cosine -1."""
    known = {(vector.text, vector.task): vector.vector for vector in recorded}
    missing = np.zeros(0, np.float32)
    return compare([known.get((one.text, one.task), missing) for one in golden], golden)


@dataclass(frozen=True, slots=True)
class GoldenCheck:
    """The golden vectors of a model, which are checked at its start and while it serves.

    Attributes:
        min_cosine: the lowest cosine that the model's number format explains.
    """

    model: str
    vectors: Sequence[GoldenVector]
    min_cosine: float

    def check(self, embed: Embed) -> None:
        """Check a model that has just been loaded.

        Raises:
            LoadError: a vector differs by more than the number format explains.
        """
        if problem := self._judge(
            compare(embed([(vector.text, vector.task) for vector in self.vectors]), self.vectors)
        ):
            raise LoadError(f"{problem}: this machine does not compute the model correctly")

    async def recheck(self, embed: Callable[[EmbedJob], Awaitable[Embeddings]], timeout_s: float) -> str:
        """Check a serving model, between its requests; return a description of the problem, or an empty string."""
        comparisons: list[Comparison] = []
        for task in dict.fromkeys(vector.task for vector in self.vectors):
            wanted = [vector for vector in self.vectors if vector.task == task]
            deadline = time.monotonic() + timeout_s
            job = EmbedJob([vector.text for vector in wanted], task, Truncate.END, deadline, caller="golden vectors")
            comparisons += compare((await embed(job)).vectors, wanted)
        return self._judge(comparisons)

    def _judge(self, comparisons: Sequence[Comparison]) -> str:
        worst = min(comparisons, key=lambda comparison: comparison.cosine)
        metrics.GOLDEN_COSINE.labels(self.model).set(worst.cosine)
        metrics.GOLDEN_LIMIT.labels(self.model).set(self.min_cosine)
        if worst.cosine >= self.min_cosine:
            return ""
        return f"golden vectors: {worst}; the minimum is {self.min_cosine}"


def write(path: Path, fingerprint: str, golden: Sequence[GoldenVector]) -> None:
    """Store golden vectors atomically: even after a crash, the file is either the old one or the new one.

    Raises:
        LoadError: the file cannot be written; the old file stays.
    """
    content = {
        "version": _VERSION,
        "fingerprint": fingerprint,
        "vectors": [
            {
                "text": vector.text,
                "task": vector.task,
                "vector": base64.b64encode(vector.vector.astype("<f4").tobytes()).decode(),
            }
            for vector in golden
        ],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise LoadError(f"{path}: golden vectors cannot be written: {error.strerror or error}") from error


def read(path: Path, fingerprint: str, tasks: Collection[str]) -> list[GoldenVector]:
    """Read the golden vectors of the checkpoint with ``fingerprint``, for a model with these tasks.

    Raises:
        LoadError: the file is missing, malformed, or belongs to another checkpoint or to tasks that no longer exist.
    """
    try:
        content = json.loads(read_bounded(path, _MAX_BYTES))
        golden = [_golden_vector(row) for row in content["vectors"]]
        version, recorded = content["version"], str(content["fingerprint"])
        if version != _VERSION:
            raise ValueError(f"version {version!r}; this gateway reads version {_VERSION}")
    except FileNotFoundError as error:
        raise LoadError(f"{path}: there is no such file; write it with `gateway verify MODEL --record`") from error
    except OSError as error:
        raise LoadError(f"{path}: golden vectors cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoadError(f"{path}: not golden vectors that can be read: {error!r}") from error
    if recorded != fingerprint or not golden:
        raise LoadError(
            f"{path}: recorded from another checkpoint (fingerprint {recorded[:12]}, this one has {fingerprint[:12]}); "
            "the weights or the tokenizer have changed. Record them again with `gateway verify MODEL --record`"
        )
    unknown = [vector.task for vector in golden if vector.task is not None and vector.task not in tasks]
    if unknown:
        raise LoadError(
            f"{path}: holds vectors for the task {unknown[0]!r}, which the model does not have; the prompts have changed. "
            "Record them again with `gateway verify MODEL --record`"
        )
    return golden


def _golden_vector(row: Mapping[str, object]) -> GoldenVector:
    match row:
        case {"text": str(text), "task": (str() | None) as task, "vector": str(vector)}:
            return GoldenVector(text, task, np.frombuffer(base64.b64decode(vector, validate=True), dtype="<f4"))
    raise ValueError(f"not a golden vector: {str(row)[:80]}")

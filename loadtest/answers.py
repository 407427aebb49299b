"""Check a response against its request: a vector of numbers for each text, of the right width and space. Pure."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

_STAGE: Final = re.compile(r"([a-z]+);dur=([0-9.]+)")
MIN_COSINE: Final = 0.999
"""The minimum cosine between a vector and the vector of the same text alone: bfloat16 in another batch differs by "
"0.0003 at most."""


class WrongAnswer(Exception):
    """A response with status 200 that does not fit its request."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The facts in a right response."""

    vectors: NDArray[np.float32]
    tokens: int
    stages_ms: Mapping[str, float]


@dataclass(slots=True)
class Checker:
    """What all answers of one target have in common.

    Attributes:
        width: numbers of a vector; 0 until the first answer, which says it for all others.
        space: likewise; empty for a server that names none, which is known after the first answer.
        golden: vectors of texts that were asked for alone, before the load.
    """

    width: int = 0
    space: str | None = None
    golden: Mapping[str, NDArray[np.float32]] | None = None

    def check(self, texts: Sequence[str], body: bytes, headers: Mapping[str, str]) -> Answer:
        """Check an answer.

        Raises:
            WrongAnswer: says how.
        """
        try:
            answer = orjson.loads(body)
            items = answer["data"]
            tokens = int(answer["usage"]["total_tokens"])
            order = [item["index"] for item in items]
            vectors = _stack([item["embedding"] for item in items])
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise WrongAnswer(f"not an embeddings answer: {type(error).__name__}") from error
        if order != list(range(len(texts))):
            raise WrongAnswer(f"{len(order)} vectors for {len(texts)} texts, or in another order")
        self._check_vectors(vectors)
        self._check_space(headers.get("x-gateway-space") or "")
        self._check_golden(texts, vectors)
        timing = headers.get("server-timing") or ""
        return Answer(vectors, tokens, {name: float(value) for name, value in _STAGE.findall(timing)})

    def _check_vectors(self, vectors: NDArray[np.float32]) -> None:
        self.width = self.width or vectors.shape[1]
        if vectors.shape[1] != self.width:
            raise WrongAnswer(f"vectors of {vectors.shape[1]} numbers, not {self.width}")
        if not np.isfinite(vectors).all():
            raise WrongAnswer("a number that is not finite")
        if not vectors.any(axis=1).all():
            raise WrongAnswer("a vector of zeros")

    def _check_space(self, space: str) -> None:
        if self.space is None:
            self.space = space
        if space != self.space:
            raise WrongAnswer(f"space {space or 'unnamed'}, not {self.space or 'unnamed'}")

    def _check_golden(self, texts: Sequence[str], vectors: NDArray[np.float32]) -> None:
        if self.golden is None:
            return
        expected = np.stack([self.golden[text] for text in texts])
        lowest = float(_cosines(expected, vectors).min())
        if lowest < MIN_COSINE:
            raise WrongAnswer(f"the vector of another text, or a broken one: cosine {lowest:.4f}")


def _stack(embeddings: Sequence[Any]) -> NDArray[np.float32]:
    """Return the vectors of an answer, whichever form they came in, as (n, d)."""
    rows = [
        np.frombuffer(base64.b64decode(embedding), dtype="<f4")
        if isinstance(embedding, str)
        else np.asarray(embedding, dtype=np.float32)
        for embedding in embeddings
    ]
    return np.stack(rows)


def _cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosines: NDArray[np.float32] = (left * right).sum(axis=1) / norms
    return cosines

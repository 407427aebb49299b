"""Read the answers of servers, which are not trusted: vectors and token counts. Pure."""

from __future__ import annotations

import base64
import binascii
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import orjson

from gateway.types import Vectors

MAX_COUNT = 2**53
"""The largest number that is accepted from a server. JSON represents every whole number up to it exactly."""

# Python's json writes these for numbers that are not finite, and no strict JSON parser accepts them. The pattern never
# matches inside a base64 string, which has neither commas nor brackets.
_NOT_FINITE = re.compile(rb"(?<=[\[,:\s])-?(?:NaN|Infinity)(?=[\s,\]}])")
_BOM = b"\xef\xbb\xbf"

_Object: TypeAlias = Mapping[str, Any]


class WrongAnswer(Exception):
    """An answer with status 200 that does not fit the request; the message says why."""


class BadVectors(WrongAnswer):
    """Some texts got a vector that cannot be used.

    Attributes:
        indices: the positions of these texts in the request, ascending.
    """

    def __init__(self, what: str, indices: Sequence[int]) -> None:
        super().__init__(what)
        self.indices = tuple(indices)


class ErrorAnswer(WrongAnswer):
    """An error that was sent with status 200, as proxies for many providers do.

    Attributes:
        status: the HTTP status that the error should have had; 0 if it does not say.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(f"an error with status 200: {message}")
        self.status = status


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's vectors for some texts.

    Attributes:
        vectors: ``(n, d)`` float32, in the order of the texts; each finite, with a length above 0.
        num_tokens: the tokens of all texts together; 0 if the server does not say.
        has_numbers: whether the vectors were written as numbers, which take a hundred times as long to read as base64.
    """

    vectors: Vectors
    num_tokens: int
    has_numbers: bool = False

    @classmethod
    def joined(cls, answers: Sequence[Answer]) -> Answer:
        """Join the answers to consecutive texts."""
        if len(answers) == 1:
            return answers[0]
        num_tokens = min(sum(answer.num_tokens for answer in answers), MAX_COUNT)
        return cls(np.concatenate([answer.vectors for answer in answers]), num_tokens)


def read_json(content: bytes) -> object:
    """Parse an answer; numbers that are not finite, which JSON does not have, become ``None``.

    Raises:
        WrongAnswer: it is not JSON.
    """
    content = content.removeprefix(_BOM)
    try:
        return orjson.loads(content)
    except ValueError:
        pass
    try:
        return orjson.loads(_NOT_FINITE.sub(b"null", content))
    except ValueError:
        begins = f"it begins with {content[:40].decode(errors='replace')!r}" if content else "it is empty"
        raise WrongAnswer(f"an answer that is not JSON: {begins}") from None


def require_no_error(answer: object) -> None:
    """Check that an answer without vectors is not an error instead.

    Raises:
        ErrorAnswer: the answer is an error.
    """
    if not isinstance(answer, dict) or not (error := answer.get("error")):
        return
    inner = error if isinstance(error, dict) else answer
    codes = [str(inner.get(key)) for key in ("code", "status", "status_code")]
    status = next((int(code) for code in codes if re.fullmatch(r"[45]\d\d", code)), 0)
    raise ErrorAnswer(_message_of(answer)[0] or "no message", status)


def error_of(content: bytes) -> tuple[str, str]:
    """Return the message and the code of an error's body in any server's format; empty where missing."""
    try:
        body = orjson.loads(content)
    except ValueError:
        return _printable(content[:200].decode(errors="replace")), ""
    # Google's OpenAI paths put the error into a list of one.
    if isinstance(body, list) and len(body) == 1:
        [body] = body
    return _message_of(body) if isinstance(body, dict) else ("", "")


def _message_of(body: _Object) -> tuple[str, str]:
    error = body.get("error")
    inner = error if isinstance(error, dict) else body
    message = inner.get("message") or (error if isinstance(error, str) else body.get("detail")) or ""
    code = inner.get("code") or inner.get("error_type") or inner.get("type") or ""
    return _printable(str(message)[:500]), str(code)[:100]


def _printable(text: str) -> str:
    """Return a server's words on one line, without characters that would control a client's terminal."""
    return "".join(character if character.isprintable() else " " for character in text).strip()


def in_order(items: Sequence[_Object], num_texts: int) -> Sequence[_Object]:
    """Return the items of an answer in the order of the texts.

    If no item has an index, the items are in order already. If exactly one item lacks an index, its index is 0: some
    serializers omit zero values.

    Raises:
        WrongAnswer: the number of items is not the number of texts.
    """
    if len(items) != num_texts:
        raise WrongAnswer(f"{len(items)} vectors for {num_texts} texts")
    indices = [item.get("index") for item in items]
    if all(index is None for index in indices):
        return items
    by_index: dict[int, _Object] = {}
    for index, item in zip(indices, items, strict=True):
        place = 0 if index is None else index
        if type(place) is not int:  # True is an int as well
            raise WrongAnswer(f"the index {str(index)[:40]!r}, which is not a whole number")
        if not 0 <= place < num_texts:
            raise WrongAnswer(f"the index {place} for {num_texts} texts")
        if place in by_index:
            raise WrongAnswer(f"the index {place} twice, or two vectors without an index")
        by_index[place] = item
    return [by_index[place] for place in range(num_texts)]


def read_vectors(embeddings: Sequence[object]) -> Vectors:
    """Read the vector of each text: base64 of little-endian float32, or numbers.

    Raises:
        BadVectors: some texts have no vector, or a vector that is not finite or whose length is zero or overflows.
        WrongAnswer: they are not vectors, or not of one width.
    """
    rows = [_read_row(embedding) for embedding in embeddings]
    widths = Counter(len(row) for row in rows if len(row))
    if not widths:
        raise BadVectors("no vector", range(len(rows)))
    if len(widths) > 1:
        raise WrongAnswer(f"vectors of {', '.join(map(str, sorted(widths)))} dimensions in one answer")
    _refuse("no vector", np.array([len(row) == 0 for row in rows]))
    vectors = np.stack(rows)
    _refuse("a vector that is not finite (NaN or infinity)", np.array(~np.isfinite(vectors).all(axis=1)))
    with np.errstate(over="ignore", under="ignore"):
        lengths = np.linalg.norm(vectors, axis=1)
    is_bad: npt.NDArray[np.bool_] = (lengths == 0) | ~np.isfinite(lengths)
    _refuse("a vector without a direction: its length is zero or overflows", is_bad)
    return vectors


def _refuse(what: str, is_bad: npt.NDArray[np.bool_]) -> None:
    if is_bad.any():
        raise BadVectors(what, np.flatnonzero(is_bad).tolist())


def _read_row(embedding: object) -> Vectors:
    """Return a vector; empty if it is missing."""
    if not embedding:
        return np.empty(0, np.float32)
    if isinstance(embedding, str):
        try:
            return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
        except (ValueError, binascii.Error):
            raise WrongAnswer("a vector in text that is not base64 of float32 numbers") from None
    if not isinstance(embedding, list):
        raise WrongAnswer(f"{str(embedding)[:40]!r} instead of a vector")
    try:
        numbers = np.asarray(embedding)
        if numbers.dtype.kind == "O":  # nulls among them, or whole numbers beyond 64 bits
            numbers = np.asarray(embedding, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        raise WrongAnswer("a vector that is not a list of numbers") from None
    if numbers.ndim != 1:
        raise WrongAnswer(f"a list of shape {numbers.shape} instead of a vector: token vectors that were not pooled?")
    if numbers.dtype.kind not in "iuf":
        raise WrongAnswer("a vector that is not a list of numbers")
    with np.errstate(over="ignore", invalid="ignore"):  # becomes infinity, which is reported
        return numbers.astype(np.float32)


def read_count(value: object) -> int:
    """Read a number of tokens: a whole number from 0 to ``MAX_COUNT``; 0 for any other value."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return 0
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        return 0
    return int(min(value, MAX_COUNT))


def read_limit(value: object) -> int | None:
    """Read a limit that a server states; ``None`` if it states no plausible limit."""
    return read_count(value) or None


def read_retry_after_s(value: str | None, now: float) -> float | None:
    """Read ``Retry-After``, in seconds or as a date: 0 to ``MAX_COUNT`` seconds, or ``None`` if it is neither.

    Args:
        now: Unix time.
    """
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
            # One of the three forms of a date in HTTP names no time zone; it is UTC.
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now
        except (ValueError, TypeError, OverflowError, OSError):
            return None
    return min(max(0.0, seconds), float(MAX_COUNT)) if seconds == seconds else None  # noqa: PLR0124  NaN

"""How servers are asked for vectors, and what they answer: OpenAI's embeddings, and Hugging Face's TEI. Pure."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import orjson

from gateway.config.model_entry import ModelEntry
from gateway.config.upstream import Upstream
from gateway.embedding import Truncate, Vectors

DEFAULT_BATCH_TEXTS = 256


class WrongAnswer(Exception):
    """An answer with status 200 that is not what was asked for; says how."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server gave for some texts.

    Attributes:
        vectors: ``(n, d)`` float32, in the order of the texts.
        num_tokens: of all texts together; 0 if the server does not say.
    """

    vectors: Vectors
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server says of itself; ``None`` where it says nothing.

    Attributes:
        models: what it serves.
    """

    models: Sequence[str] = ()
    max_tokens: int | None = None
    max_batch_texts: int | None = None
    dtype: str | None = None


class Dialect(Protocol):
    """How one kind of server is asked.

    Attributes:
        embed_path: where vectors are asked for, after the base URL; so for the others.
        gives_raw: whether vectors come as they were pooled, and are normalised here.
    """

    embed_path: str
    facts_path: str
    gives_raw: bool

    def body(self, texts: Sequence[str], task: str | None, truncate: Truncate) -> bytes:
        """Write a request.

        Args:
            task: what the server calls it, or ``None``.
        """

    def read(self, content: bytes, headers: Mapping[str, str], num_texts: int) -> Answer:
        """Read an answer.

        Raises:
            WrongAnswer: it is none, or not for so many texts.
        """

    def read_facts(self, content: bytes) -> Facts:
        """Read what a server says of itself; nothing where it is not understood."""


class OpenAi:
    """``POST /embeddings`` as OpenAI has it, and everybody after."""

    embed_path, facts_path, gives_raw = "/embeddings", "/models", False

    def __init__(self, model: str, extra: Mapping[str, Any]) -> None:
        self._model = model
        self._extra = extra

    def body(self, texts: Sequence[str], task: str | None, truncate: Truncate) -> bytes:
        # Base64 is a third of the bytes, and read in a hundredth of the time; who does not know it sends numbers.
        body: dict[str, Any] = {"model": self._model, "input": texts, "encoding_format": "base64", **self._extra}
        if task is not None:
            body["task"] = task
        if truncate is not Truncate.END:  # what OpenAI has no word for is said in those of the gateway itself
            body["truncate"] = False if truncate is Truncate.REFUSE else "START"
        return orjson.dumps(body)

    def read(self, content: bytes, headers: Mapping[str, str], num_texts: int) -> Answer:
        try:
            answer = orjson.loads(content)
            items = sorted(answer["data"], key=lambda item: int(item["index"]))
            if [item["index"] for item in items] != list(range(num_texts)):
                raise WrongAnswer(f"{len(items)} vectors for {num_texts} texts")
            rows = [_row(item["embedding"]) for item in items]
            usage = answer.get("usage") or {}
            num_tokens = int(usage.get("total_tokens") or usage.get("prompt_tokens") or 0)
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
            raise WrongAnswer(f"not an answer of OpenAI's embeddings ({type(error).__name__})") from error
        return Answer(_stack(rows), num_tokens)

    def read_facts(self, content: bytes) -> Facts:
        try:
            cards = {card["id"]: card for card in orjson.loads(content)["data"]}
        except (ValueError, KeyError, TypeError):
            return Facts()
        card = cards.get(self._model, {})
        longest = card.get("max_model_len") or card.get("max_tokens")  # vLLM; another of these gateways
        return Facts(tuple(map(str, cards)), max_tokens=longest if isinstance(longest, int) else None)


class Tei:
    """``POST /embed`` of text-embeddings-inference."""

    embed_path, facts_path, gives_raw = "/embed", "/info", True

    def __init__(self, extra: Mapping[str, Any]) -> None:
        self._extra = extra

    def body(self, texts: Sequence[str], task: str | None, truncate: Truncate) -> bytes:
        body: dict[str, Any] = {
            "inputs": texts,
            "normalize": False,
            "truncate": truncate is not Truncate.REFUSE,
            "truncation_direction": "Left" if truncate is Truncate.START else "Right",
            **self._extra,
        }
        if task is not None:
            body["prompt_name"] = task
        return orjson.dumps(body)

    def read(self, content: bytes, headers: Mapping[str, str], num_texts: int) -> Answer:
        try:
            rows = [_row(row) for row in orjson.loads(content)]
        except (ValueError, TypeError) as error:
            raise WrongAnswer(f"not an answer of TEI's /embed ({type(error).__name__})") from error
        if len(rows) != num_texts:
            raise WrongAnswer(f"{len(rows)} vectors for {num_texts} texts")
        tokens = headers.get("x-compute-tokens", "")
        return Answer(_stack(rows), int(tokens) if tokens.isdecimal() else 0)

    def read_facts(self, content: bytes) -> Facts:
        try:
            info = orjson.loads(content)
            names = {str(info[key]) for key in ("model_id", "served_model_name") if info.get(key)}
            return Facts(
                tuple(sorted(names)),
                max_tokens=info.get("max_input_length"),
                max_batch_texts=info.get("max_client_batch_size"),
                dtype=info.get("model_dtype"),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return Facts()


def make_dialect(entry: ModelEntry, upstream: Upstream) -> Dialect:
    """Return how a model's servers are asked."""
    if entry.backend == "tei":
        return Tei(upstream.extra_body)
    return OpenAi(upstream.model or entry.source, upstream.extra_body)


def error_of(content: bytes) -> tuple[str, str]:
    """Return the message and the code of an error's body, whichever server wrote it; empty where there is none."""
    try:
        body = orjson.loads(content)
    except ValueError:
        return content[:200].decode(errors="replace").strip(), ""
    if not isinstance(body, dict):
        return "", ""
    error = body.get("error")
    inner = error if isinstance(error, dict) else body
    message = inner.get("message") or (error if isinstance(error, str) else body.get("detail")) or ""
    code = inner.get("code") or inner.get("error_type") or inner.get("type") or ""
    return str(message)[:500], str(code)


def _row(embedding: Any) -> Vectors:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
    row: Vectors = np.asarray(embedding, dtype=np.float32)
    if row.ndim != 1:
        raise ValueError("a vector is a list of numbers")
    return row


def _stack(rows: Sequence[Vectors]) -> Vectors:
    widths = {len(row) for row in rows}
    if len(widths) != 1:
        raise WrongAnswer(f"vectors of {', '.join(map(str, sorted(widths)))} dimensions in one answer")
    vectors = np.stack(rows)
    if not np.isfinite(vectors).all():
        raise WrongAnswer("a vector that is not finite (NaN or infinity)")
    return vectors

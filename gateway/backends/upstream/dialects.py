"""The requests and answers of two kinds of servers: OpenAI's embeddings, and Hugging Face's TEI. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import orjson

from gateway.backends.upstream.answers import (
    Answer,
    WrongAnswer,
    in_order,
    read_count,
    read_json,
    read_limit,
    read_vectors,
    require_no_error,
)
from gateway.config.model_entry import ModelEntry
from gateway.config.upstream import Extra, Upstream
from gateway.types import Truncate

DEFAULT_BATCH_TEXTS = 256

Encoding: TypeAlias = str | None
"""The value of ``encoding_format``; ``None`` omits the field."""


@dataclass(frozen=True, slots=True)
class Facts:
    """A server's statements about itself; ``None`` where it makes none.

    Attributes:
        models: names of the models that it serves.
    """

    models: Sequence[str] = ()
    max_tokens: int | None = None
    max_batch_texts: int | None = None
    dtype: str | None = None


class Dialect(Protocol):
    """The requests and answers of one kind of server.

    Attributes:
        embed_path: the path for vectors, relative to the base URL; likewise for the other path.
        gives_raw: whether vectors arrive unnormalized, as they were pooled, and are normalized here.
        encodings: the encodings to request vectors in, the best first; not every server accepts each.
    """

    embed_path: str
    facts_path: str
    gives_raw: bool
    encodings: Sequence[Encoding]

    def body(self, texts: Sequence[str], task: str | None, truncate: Truncate, encoding: Encoding) -> bytes:
        """Write a request.

        Args:
            task: the server's name for the task, or ``None``.
            encoding: one of ``encodings``.
        """

    def read(self, content: bytes, headers: Mapping[str, str], num_texts: int) -> Answer:
        """Read an answer.

        Raises:
            WrongAnswer: the answer does not have ``num_texts`` vectors.
        """

    def read_facts(self, content: bytes) -> Facts:
        """Read the parts of a server's description of itself that the gateway understands."""


class OpenAi:
    """``POST /embeddings`` as OpenAI defined it."""

    embed_path, facts_path, gives_raw = "/embeddings", "/models", False

    def __init__(self, model: str, task_field: str, extra: Mapping[str, Extra]) -> None:
        self._model = model
        self._task_field = task_field
        self._extra = extra
        # Base64 takes a third of the bytes and a hundredth of the time to read. Many servers that do not know it send
        # numbers; some refuse it, or refuse the field.
        self.encodings: Sequence[Encoding] = (None,) if "encoding_format" in extra else ("base64", "float", None)

    def body(self, texts: Sequence[str], task: str | None, truncate: Truncate, encoding: Encoding) -> bytes:
        body: dict[str, Any] = {"model": self._model, "input": texts, "encoding_format": encoding, **self._extra}
        if task is not None:
            body[self._task_field] = task
        if truncate is not Truncate.END:  # OpenAI has no field for this, so the gateway's own field is used
            body["truncate"] = False if truncate is Truncate.REFUSE else "START"
        return _write_body(body, self._extra)

    def read(self, content: bytes, headers: Mapping[str, str], num_texts: int) -> Answer:
        answer = read_json(content)
        items = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(answer, dict) or not isinstance(items, list):
            require_no_error(answer)
            raise WrongAnswer("an answer without a list `data`")
        if not all(isinstance(item, dict) and "embedding" in item for item in items):
            raise WrongAnswer("an entry of `data` without `embedding`")
        items = in_order(items, num_texts)
        usage = answer.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        return Answer(
            read_vectors([item["embedding"] for item in items]),
            read_count(usage.get("total_tokens")) or read_count(usage.get("prompt_tokens")),
            has_numbers=isinstance(items[0]["embedding"], list),
        )

    def read_facts(self, content: bytes) -> Facts:
        try:
            cards = {card["id"]: card for card in orjson.loads(content)["data"]}
        except (ValueError, KeyError, TypeError):
            return Facts()
        card = cards.get(self._model, {})
        # The fields of vLLM and of another instance of this gateway.
        return Facts(
            tuple(map(str, cards)),
            max_tokens=read_limit(card.get("max_model_len")) or read_limit(card.get("max_tokens")),
        )


class Tei:
    """``POST /embed`` of text-embeddings-inference."""

    embed_path, facts_path, gives_raw = "/embed", "/info", True
    encodings: Sequence[Encoding] = (None,)

    def __init__(self, task_field: str, extra: Mapping[str, Extra]) -> None:
        self._task_field = task_field
        self._extra = extra

    def body(self, texts: Sequence[str], task: str | None, truncate: Truncate, encoding: Encoding) -> bytes:
        body: dict[str, Any] = {
            "inputs": texts,
            "normalize": False,
            "truncate": truncate is not Truncate.REFUSE,
            "truncation_direction": "Left" if truncate is Truncate.START else "Right",
            **self._extra,
        }
        if task is not None:
            body[self._task_field] = task
        return _write_body(body, self._extra)

    def read(self, content: bytes, headers: Mapping[str, str], num_texts: int) -> Answer:
        rows = read_json(content)
        if not isinstance(rows, list):
            require_no_error(rows)
            raise WrongAnswer("an answer that is not a list of vectors")
        if len(rows) != num_texts:
            raise WrongAnswer(f"{len(rows)} vectors for {num_texts} texts")
        return Answer(read_vectors(rows), read_count(headers.get("x-compute-tokens")), has_numbers=True)

    def read_facts(self, content: bytes) -> Facts:
        try:
            info = orjson.loads(content)
        except ValueError:
            return Facts()
        if not isinstance(info, dict):
            return Facts()
        names = {str(info[key]) for key in ("model_id", "served_model_name") if info.get(key)}
        return Facts(
            tuple(sorted(names)),
            max_tokens=read_limit(info.get("max_input_length")),
            max_batch_texts=read_limit(info.get("max_client_batch_size")),
            dtype=str(info["model_dtype"])[:40] if info.get("model_dtype") else None,
        )


def _write_body(body: Mapping[str, Any], extra: Mapping[str, Extra]) -> bytes:
    """Write a body without the fields that ``extra_body`` sets to null, and without an encoding that is ``None``."""
    left_out = {name for name, value in extra.items() if value is None}
    return orjson.dumps(
        {
            name: value
            for name, value in body.items()
            if name not in left_out and (name != "encoding_format" or value is not None)
        }
    )


def make_dialect(entry: ModelEntry, upstream: Upstream) -> Dialect:
    """Return the dialect of a model's servers."""
    field = task_field(entry, upstream)
    if entry.backend == "tei":
        return Tei(field, upstream.extra_body)
    return OpenAi(upstream.model or entry.source, field, upstream.extra_body)


def task_field(entry: ModelEntry, upstream: Upstream) -> str:
    """Return the field in which a model's servers read the task."""
    return upstream.task_field or ("prompt_name" if entry.backend == "tei" else "task")

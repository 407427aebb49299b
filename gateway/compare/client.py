"""Ask a gateway for models and vectors, over HTTP or in this process, and wait where it says to wait."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import orjson

from gateway.errors import CompareError
from gateway.types import Vectors

_PATIENCE_S = 600.0
_FIRST_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a gateway says of a model in ``/v1/models``.

    Attributes:
        width: native dimensions.
        dimensions: every size that can be asked for.
        state: ``ready``, or why not.
    """

    id: str
    state: str
    reason: str | None
    width: int | None
    dimensions: Sequence[int]
    max_tokens: int | None
    tasks: Sequence[str]
    normalized: bool | None
    device: str | None
    dtype: str | None


@dataclass(frozen=True, slots=True)
class Embedded:
    """One answer.

    Attributes:
        vectors: ``(n, d)`` float32, as the gateway returned them.
        model: id of the model that answered.
        task: the task that it was asked for, if it has any.
        elapsed_s: from the request to the parsed answer.
        is_experiment: the name is an experiment's: which model answers depends on who asks.
    """

    vectors: Vectors
    space: str
    model: str
    task: str | None
    num_tokens: int
    elapsed_s: float
    is_experiment: bool


class Refused(CompareError):
    """The gateway refused a request, and would again.

    Attributes:
        status: the HTTP status.
        param: the field that it does not like, if it says so.
    """

    def __init__(self, message: str, status: int, param: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


class GatewayClient:
    """A gateway to compare models of.

    Args:
        http: sends the requests; its base URL is the gateway's.
        source: what to call the gateway in results and errors.
    """

    def __init__(self, http: httpx.AsyncClient, source: str) -> None:
        self._http = http
        self.source = source
        self._name = f"the gateway ({source})"

    async def card(self, name: str) -> ModelCard:
        """Return the card of a model.

        Raises:
            CompareError: there is no such model, or the gateway does not answer.
        """
        answer = await self._send("GET", f"/v1/models/{quote(name, safe='/:')}", None)
        try:
            content = orjson.loads(answer.content)
            return ModelCard(**{field: content.get(field) for field in ModelCard.__slots__})
        except (orjson.JSONDecodeError, AttributeError) as error:
            raise CompareError(f"{self.source} is no gateway: its /v1/models/{name} is not understood") from error

    async def embed(
        self,
        model: str,
        texts: Sequence[str],
        task: str | None = None,
        dimensions: int | None = None,
        expect_space: str | None = None,
    ) -> Embedded:
        """Embed texts.

        Raises:
            Refused: the gateway refuses the request, because the space is another one, say.
            CompareError: it does not answer, or answers with something else than vectors.
        """
        body: dict[str, object] = {"model": model, "input": list(texts), "encoding_format": "base64"}
        body |= {"task": task} if task is not None else {}
        body |= {"dimensions": dimensions} if dimensions is not None else {}
        headers = {"x-gateway-expect-space": expect_space} if expect_space is not None else {}
        started = time.monotonic()
        answer = await self._send("POST", "/v1/embeddings", body, headers)
        try:
            content = orjson.loads(answer.content)
            rows = [np.frombuffer(base64.b64decode(row["embedding"]), dtype="<f4") for row in content["data"]]
            vectors = np.stack(rows).astype(np.float32, copy=False)
            space = answer.headers["x-gateway-space"]
            num_tokens = int(content["usage"]["prompt_tokens"])
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise CompareError(
                f"{self.source} is no gateway: it answers for {model!r} without vectors or without their space"
            ) from error
        if len(vectors) != len(texts):
            raise CompareError(f"{self._name} returned {len(vectors)} vectors for {len(texts)} texts")
        return Embedded(
            vectors=vectors,
            space=space,
            model=answer.headers.get("x-gateway-model", model),
            task=answer.headers.get("x-gateway-task"),
            num_tokens=num_tokens,
            elapsed_s=time.monotonic() - started,
            is_experiment="x-gateway-experiment" in answer.headers,
        )

    async def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None, headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """Send a request, again where that can help: a model that loads, a queue that is full, a connection that broke."""
        content = None if body is None else orjson.dumps(body)
        deadline = time.monotonic() + _PATIENCE_S
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                answer = await self._http.request(method, path, content=content, headers=headers)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                raise CompareError(
                    f"no gateway answers at {self.source}: {str(error) or 'it takes too long'}"
                ) from error
            except (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError) as error:
                problem = f"{type(error).__name__} {error}".strip()
            except httpx.HTTPError as error:
                raise CompareError(f"{self._name} cannot be asked: {error}") from error
            else:
                if answer.is_success:
                    return answer
                problem = _message(answer)
                can_help = answer.status_code in (429, 503) and answer.headers.get("x-should-retry") != "false"
                if not can_help:
                    raise Refused(
                        f"{self._name} answers {answer.status_code}: {problem}", answer.status_code, _param(answer)
                    )
                pause_s = _retry_after_s(answer) or pause_s
            if time.monotonic() + pause_s > deadline:
                raise CompareError(f"{self._name} has not answered for {_PATIENCE_S:.0f} s: {problem}")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 30.0)


def _retry_after_s(answer: httpx.Response) -> float | None:
    """Return the pause that an answer asks for; a proxy may write a date, which is not read."""
    text = answer.headers.get("retry-after", "")
    return float(text) if re.fullmatch(r"[1-9]\d{0,5}", text, re.ASCII) else None


def _message(answer: httpx.Response) -> str:
    try:
        return str(orjson.loads(answer.content)["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return answer.text[:200] or answer.reason_phrase


def _param(answer: httpx.Response) -> str | None:
    try:
        param = orjson.loads(answer.content)["error"]["param"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return param if isinstance(param, str) else None

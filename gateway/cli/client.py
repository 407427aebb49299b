"""A client of the gateway's API, for commands that ask a gateway over HTTP or in this process."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import numpy as np
import orjson
from pydantic import BaseModel, ValidationError

from gateway.api.openai_schema import ModelCard
from gateway.errors import StartError
from gateway.experiments.report import ExperimentList, ExperimentReport
from gateway.precision import Precision
from gateway.types import MultiVector, Output, SparseVector, Token, Truncate, Vectors

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_MAX_SHOWN_CHARACTERS = 200
_TRUNCATE = {Truncate.END: "END", Truncate.START: "START", Truncate.REFUSE: "NONE"}
_DTYPES = {Precision.FLOAT: "<f4", Precision.INT8: "i1", Precision.UINT8: "u1"}
Answer = TypeVar("Answer", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class EmbeddedTexts:
    """The vectors of one request, and the facts about them.

    Attributes:
        vectors: ``(n, d)`` float32, as the gateway returned them; ``(n, 0)`` without dense vectors.
        model: id of the model that answered.
        task: the task that the texts were embedded for; ``None`` for a model without tasks.
        elapsed_s: seconds from the request to the parsed answer.
        is_experiment: whether the name is an experiment's, so that the model depends on the caller.
        sparse, multivectors: one for each text; empty unless they were requested.
        num_truncated: texts that were cut.
        truncated: their places, of which an answer lists at most 100.
        num_cached: texts that the gateway had embedded before, and read from its cache.
    """

    vectors: Vectors
    space: str
    model: str
    task: str | None
    num_tokens: int
    elapsed_s: float
    is_experiment: bool
    sparse: Sequence[SparseVector] = ()
    multivectors: Sequence[MultiVector] = ()
    num_truncated: int = 0
    truncated: frozenset[int] = frozenset()
    num_cached: int = 0


class Refused(StartError):
    """The gateway refused a request, and would refuse it again.

    Attributes:
        status: the HTTP status.
        param: the field that the gateway objects to, if it names one.
        code: the gateway's code for the error, if the answer has one.
        reason: the gateway's message, without the name of the gateway.
    """

    def __init__(self, message: str, status: int, param: str | None, code: str | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.reason = reason or message


class GatewayClient:
    """Sends requests to one gateway.

    Args:
        http: a client whose base URL is the gateway's.
        source: the gateway's name in results and errors.
        patience_s: the seconds during which a request is repeated if it may succeed later: the model is loading, the
            queue is full, or the connection broke. With 0, each request is sent once.
    """

    def __init__(self, http: httpx.AsyncClient, source: str, patience_s: float = 0.0) -> None:
        self._http = http
        self.source = source
        self._name = f"the gateway ({source})"
        self._patience_s = patience_s
        self._has_answered = False

    async def card(self, name: str) -> ModelCard:
        """Return the card of a model.

        Raises:
            StartError: the model does not exist, or the gateway does not answer.
        """
        return await self._get(f"/v1/models/{quote(name, safe='/:')}", ModelCard)

    async def experiments(self) -> ExperimentList:
        """Return the experiments that the key may see.

        Raises:
            StartError: the gateway does not answer, or answers with something other than experiments.
        """
        return await self._get("/v1/experiments", ExperimentList)

    async def evidence(self, experiment_id: str) -> ExperimentReport:
        """Return an experiment with the figures of its arms.

        Raises:
            StartError: the experiment does not exist, or the gateway does not answer.
        """
        return await self._get(f"/v1/experiments/{quote(experiment_id)}", ExperimentReport)

    async def embed(  # noqa: PLR0913  an argument for each field
        self,
        model: str,
        texts: Sequence[str],
        task: str | None = None,
        dimensions: int | None = None,
        expect_space: str | None = None,
        precision: Precision = Precision.FLOAT,
        outputs: Sequence[Output] = (Output.DENSE,),
        truncate: Truncate = Truncate.END,
        *,
        is_late: bool = False,
    ) -> EmbeddedTexts:
        """Embed texts.

        Args:
            precision: float, int8 or uint8; the numbers of the vectors are then integers.
            outputs: the representations to ask for.
            truncate: the treatment of texts that are too long.
            is_late: the texts are consecutive chunks of one document.

        Raises:
            Refused: the gateway refuses the request: for example, the space is not the expected one.
            StartError: the gateway does not answer, or answers with something other than vectors.
        """
        body: dict[str, object] = {"model": model, "input": list(texts), "encoding_format": "base64"}
        optional = {"task": task, "dimensions": dimensions, "late_chunking": is_late or None}
        body |= {name: value for name, value in optional.items() if value is not None}
        body |= {"embedding_type": precision.value} if precision is not Precision.FLOAT else {}
        body |= {"outputs": list(outputs)} if tuple(outputs) != (Output.DENSE,) else {}
        body |= {"truncate": _TRUNCATE[truncate]} if truncate is not Truncate.END else {}
        headers = {"x-gateway-expect-space": expect_space} if expect_space is not None else {}
        started = time.monotonic()
        answer = await self._send("POST", "/v1/embeddings", orjson.dumps(body), headers)
        try:
            content = orjson.loads(answer.content)
            rows = content["data"]
            vectors = _dense(rows, precision) if Output.DENSE in outputs else np.empty((len(rows), 0), np.float32)
            sparse = [_sparse(row["sparse"]) for row in rows] if Output.SPARSE in outputs else []
            multivectors = [_multivector(row["multivector"]) for row in rows] if Output.MULTIVECTOR in outputs else []
            space = answer.headers["x-gateway-space"]
            num_tokens = int(content["usage"]["prompt_tokens"])
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise StartError(
                f"{self.source} is not a gateway: its answer for {model!r} has no vectors, or does not name their space"
            ) from error
        if len(vectors) != len(texts):
            raise StartError(f"{self._name} returned {len(vectors)} vectors for {len(texts)} texts")
        return EmbeddedTexts(
            vectors=vectors,
            space=space,
            model=answer.headers.get("x-gateway-model", model),
            task=answer.headers.get("x-gateway-task"),
            num_tokens=num_tokens,
            elapsed_s=time.monotonic() - started,
            is_experiment="x-gateway-experiment" in answer.headers,
            sparse=sparse,
            multivectors=multivectors,
            **_counts(answer.headers),
        )

    async def tokenize(
        self, model: str, texts: Sequence[str], task: str | None, *, add_special_tokens: bool
    ) -> list[list[Token]]:
        """Return the tokens of texts.

        Args:
            task: its instruction is put before each text.

        Raises:
            Refused: the gateway refuses the request: the model runs elsewhere, for example.
            StartError: the gateway does not answer, or answers with something other than tokens.
        """
        body: dict[str, object] = {"inputs": list(texts), "add_special_tokens": add_special_tokens}
        body |= {"prompt_name": task} if task is not None else {}
        path = f"/tei/{quote(model, safe='/:')}/tokenize"
        answer = await self._send("POST", path, orjson.dumps(body))
        try:
            rows = [
                [Token(token["id"], token["text"], token["special"], token["start"], token["stop"]) for token in row]
                for row in orjson.loads(answer.content)
            ]
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise StartError(f"{self.source} is not a gateway of this version: it returns no tokens") from error
        if len(rows) != len(texts):
            raise StartError(f"{self._name} returned the tokens of {len(rows)} texts for {len(texts)}")
        return rows

    async def _get(self, path: str, model: type[Answer]) -> Answer:
        answer = await self._send("GET", path)
        try:
            return model.model_validate_json(answer.content)
        except ValidationError as error:
            raise StartError(
                f"{self.source} is not a gateway of this version: its answer to {path} cannot be read"
            ) from error

    async def _send(
        self, method: str, path: str, content: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """Send a request, and repeat it while that can help and the patience lasts."""
        deadline = time.monotonic() + self._patience_s
        pause_s = _FIRST_PAUSE_S
        while True:
            answer = await self._try(method, path, content, headers)
            if isinstance(answer, httpx.Response):
                if answer.is_success:
                    return answer
                failure: StartError = self._refusal(answer)
                if answer.status_code not in {429, 503} or answer.headers.get("x-should-retry") == "false":
                    raise failure
                pause_s = _retry_after_s(answer) or pause_s
            else:
                failure = answer
            if not self._patience_s:
                raise failure
            if time.monotonic() + pause_s > deadline:
                raise StartError(f"{failure}; gave up after {self._patience_s:.0f} s")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _try(
        self, method: str, path: str, content: bytes | None, headers: Mapping[str, str] | None
    ) -> httpx.Response | StartError:
        """Send a request once; return the answer, or a failure after which another attempt may succeed."""
        try:
            answer = await self._http.request(method, path, content=content, headers=headers)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            failure = StartError(f"no gateway answers at {self.source}: {str(error) or 'it takes too long'}")
            if self._has_answered:  # the gateway may be restarting; otherwise, the address is wrong
                return failure
            raise failure from error
        # Here and below, the message of the error is left out, because it can hold the key.
        except (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError) as error:
            return StartError(self._broken_off(error))
        except httpx.HTTPError as error:
            raise StartError(f"{self._name} cannot be reached: {type(error).__name__}") from error
        self._has_answered = True
        return answer

    def _broken_off(self, error: httpx.TransportError) -> str:
        if isinstance(error, httpx.TimeoutException) and (timeout_s := self._http.timeout.read):
            return f"{self._name} has not answered for {timeout_s:.0f} s"
        return f"{self._name} dropped the connection: {type(error).__name__}"

    def _refusal(self, answer: httpx.Response) -> Refused:
        hint = "; --api-key-env names the environment variable with the key" if answer.status_code == 401 else ""
        try:
            error = orjson.loads(answer.content)["error"]
            message, param, code = str(error["message"]), error.get("param"), error.get("code")
        except (orjson.JSONDecodeError, KeyError, TypeError):  # a proxy answers, or another server
            shown = " ".join(answer.text.split())[:_MAX_SHOWN_CHARACTERS]
            message, param = f"{answer.reason_phrase}; is it a gateway?{shown and f' It says: {shown}'}", None
            code = None
        whole = f"{self._name} answers {answer.status_code}: {message}{hint}"
        return Refused(whole, answer.status_code, param, code, message)


def _dense(rows: Sequence[Mapping[str, Any]], precision: Precision) -> Vectors:
    vectors = [np.frombuffer(base64.b64decode(row["embedding"]), _DTYPES[precision]) for row in rows]
    return np.stack(vectors).astype(np.float32, copy=False)


def _sparse(weights: Mapping[str, Any]) -> SparseVector:
    return SparseVector(np.array(weights["indices"], np.int64), np.array(weights["values"], np.float32))


def _multivector(vectors: Sequence[Sequence[float]]) -> MultiVector:
    """Return ``(t, d)`` float32; ``(0, 0)`` for a text without tokens."""
    return np.array(vectors, np.float32).reshape(len(vectors), -1 if vectors else 0)


@asynccontextmanager
async def connect(
    url: str,
    api_key: str | None,
    *,
    timeout_s: float,
    patience_s: float = 0.0,
    headers: Mapping[str, str] | None = None,
) -> AsyncIterator[GatewayClient]:
    """Yield a client of a running gateway.

    Args:
        url: the gateway's address, or that of its API, which ends with ``/v1``.
        timeout_s: the seconds to wait for an answer.
        patience_s: see :class:`GatewayClient`.
        headers: headers to send with every request.

    Raises:
        StartError: ``url`` is not an address.
    """
    base_url = _base_url(url)
    # As bytes, since httpx takes only ASCII in a header that is text.
    sent = {name.encode(): value.encode() for name, value in (headers or {}).items()}
    if api_key:
        sent[b"authorization"] = f"Bearer {api_key.strip()}".encode(errors="surrogateescape")
    timeout = httpx.Timeout(timeout_s, connect=10.0)
    with client_errors(StartError):
        client = httpx.AsyncClient(base_url=base_url, headers=sent, timeout=timeout)
    async with client as http:
        yield GatewayClient(http, base_url, patience_s)


@contextmanager
def client_errors(kind: type[StartError]) -> Iterator[None]:
    """Turn errors of the environment's proxies or certificates into one that names the variables to check."""
    try:
        yield
    except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
        raise kind(
            "cannot create an HTTP client; check HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR: "
            f"{error}"
        ) from error


def _base_url(text: str) -> str:
    try:
        url = httpx.URL(text)
        host = url.host
    except (httpx.InvalidURL, UnicodeError) as error:  # including names that IDNA does not know
        raise StartError(f"--url {text}: {error}") from error
    is_address = url.scheme in {"http", "https"} and host and (url.port or 0) <= 65_535
    if not is_address or url.query or url.fragment:
        raise StartError(f"--url {text}: must be an address such as http://127.0.0.1:8000")
    return text.rstrip("/").removesuffix("/v1")


def _counts(headers: Mapping[str, str]) -> dict[str, Any]:
    """Return the number of cut texts and their places, and the number of cached texts.

    ``0,3,+12`` lists two places and counts twelve more texts; ``3/32`` means that three of 32 texts were cached.
    """
    parts = [part for part in headers.get("x-gateway-truncated", "").split(",") if part]
    cached = headers.get("x-gateway-cache", "").partition("/")[0]
    return {
        "num_truncated": sum(int(part) if part.startswith("+") else 1 for part in parts),
        "truncated": frozenset(int(part) for part in parts if part.isdecimal()),
        "num_cached": int(cached) if cached.isdecimal() else 0,
    }


def _retry_after_s(answer: httpx.Response) -> float | None:
    """Return the pause that an answer requests in seconds; a date, as some proxies write it, is ignored."""
    text = answer.headers.get("retry-after", "")
    return float(text) if re.fullmatch(r"[1-9]\d{0,5}", text, re.ASCII) else None

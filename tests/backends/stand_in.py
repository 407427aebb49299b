"""Servers to run models on: OpenAI's embeddings and TEI's, with vectors that a test can compute, and faults on command."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from jsonschema import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.listener import make_listener
from tests.tei_contract import REQUESTS, validate, validate_answer

MODEL = "acme/embed"
WIDTH = 16


def vector_of(text: str, weights: str = "first", width: int = WIDTH) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the vector of a text from a model with these weights; its length is not 1."""
    seed = int.from_bytes(hashlib.sha256(f"{weights} {text}".encode()).digest()[:8])
    return np.random.default_rng(seed).normal(size=width).astype(np.float32)


@dataclass
class StandIn:
    """One server.

    Attributes:
        weights: of the model it runs; another name is another model behind the same one.
        fault: the fault of requests for vectors; empty for none.
        fault_on: the fault happens to requests with this word in one of their texts, and to no others; to all when empty.
        host: the address that it listens on.
        certificate: a file with a certificate and its key, for TLS.
        task_field: in which it reads the task; ``""``: in none.
        encodings: the accepted values of ``encoding_format``; ``None``: a request without it.
        refused: texts that it refuses, with the whole request.
        rewrite: changes an answer, parsed, before it is sent.
        respond: makes the answer to a request for vectors, if it does not return ``None``.
        models_response: the answer to ``GET /models``; ``info_response`` likewise.
        bodies: of the requests for vectors, as they came; ``headers`` likewise.
        delay_s: before an answer.
        most_at_once: requests that were there together.
        breaches: of TEI's contract, in requests to ``/embed`` and their answers, except commanded ones.
    """

    port: int = 0
    host: str = "127.0.0.1"
    certificate: Path | None = None
    weights: str = "first"
    width: int = WIDTH
    fault: str = ""
    fault_on: str = ""
    task_field: str | None = None
    encodings: tuple[str | None, ...] = ("base64", "float", None)
    refused: tuple[str, ...] = ()
    rewrite: Callable[[Any], Any] | None = None
    respond: Callable[[dict[str, Any]], Response | None] | None = None
    models_response: Response | None = None
    info_response: Response | None = None
    retry_after: str | None = None
    delay_s: float = 0.0
    key: str | None = None
    speaks_base64: bool = True
    max_texts: int = 10_000
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    breaches: list[str] = field(default_factory=list)
    _at_once: int = 0

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    async def embeddings(self, request: Request) -> Response:
        """``POST /v1/embeddings``."""
        body = await self._take(request)
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        if (response := self._refuse(body, texts, _openai_error)) is not None:
            return response
        if (response := await self._fail(texts, _openai_error)) is not None:
            return response
        task = body.get("task" if self.task_field is None else self.task_field)
        data = [{"object": "embedding", "index": i, "embedding": self._write(t, task)} for i, t in enumerate(texts)]
        if self._is_short(texts):
            data.pop()
        # Out of order: what counts is `index`.
        num_tokens = sum(len(text.split()) for text in texts)
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return self._written({"object": "list", "data": data[::-1], "model": body["model"], "usage": usage})

    async def embed(self, request: Request) -> Response:
        """``POST /embed``."""
        body = await self._take(request)
        self._hold(lambda: validate(REQUESTS["/embed"], body))
        texts = body["inputs"]
        response = self._refuse(body, texts, _tei_error) or await self._fail(texts, _tei_error) or self._embed(body)
        if self.fault not in ("half", "garbage", "nan") and self.rewrite is None and self.respond is None:
            content = json.loads(bytes(response.body))
            self._hold(lambda: validate_answer("/embed", response.status_code, content))
        return response

    def _embed(self, body: dict[str, Any]) -> Response:
        texts = body["inputs"]
        if len(texts) > self.max_texts:
            return _tei_error(422, f"batch size {len(texts)} > maximum allowed batch size {self.max_texts}")
        task = body.get("prompt_name" if self.task_field is None else self.task_field)
        rows = [self.vector(text, task).tolist() for text in texts]
        if self._is_short(texts):
            rows.pop()
        num_tokens = sum(len(text.split()) for text in texts)
        headers = {"x-compute-tokens": str(num_tokens)}
        response = self._written(rows)
        response.headers.update(headers)
        return response

    def _written(self, answer: Any) -> Response:
        # NaN is written as Python does: JSON has no word for it.
        return Response(json.dumps(self.rewrite(answer) if self.rewrite else answer), media_type="application/json")

    async def models(self, _request: Request) -> Response:
        return self.models_response or JSONResponse(
            {"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 512}]}
        )

    async def info(self, _request: Request) -> Response:
        """``GET /info``."""
        if self.info_response is not None:
            return self.info_response
        facts = {
            "model_id": MODEL,
            "model_sha": None,
            "model_dtype": "float16",
            "served_model_name": MODEL,
            "model_type": {"embedding": {"pooling": "mean"}},
            "max_concurrent_requests": 512,
            "max_input_length": 512,
            "max_batch_tokens": 16_384,
            "max_client_batch_size": self.max_texts,
            "auto_truncate": True,
            "tokenization_workers": 1,
            "version": "1.9.3",
        }
        self._hold(lambda: validate_answer("/info", 200, facts))
        return JSONResponse(facts)

    def _hold(self, check: Callable[[], None]) -> None:
        """Validate a value against TEI's contract."""
        try:
            check()
        except (ValidationError, AssertionError) as error:
            self.breaches.append(str(error))

    async def _take(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(await request.body())
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await asyncio.sleep(self.delay_s)
        finally:
            self._at_once -= 1
        return body

    def _is_short(self, texts: list[str]) -> bool:
        return self.fault == "one missing" and any(self.fault_on in text for text in texts)

    def _refuse(self, body: dict[str, Any], texts: list[str], error: Callable[[int, str], Response]) -> Response | None:
        if (encoding := body.get("encoding_format")) not in self.encodings:
            return error(400, f"encoding_format {encoding!r} is not supported")
        if refused := [text for text in texts if text in self.refused]:
            return error(400 if error is _openai_error else 422, f"cannot be {refused[0]!r}")
        return self.respond(body) if self.respond else None

    async def _fail(self, texts: list[str], error: Callable[[int, str], Response]) -> Response | None:
        """Cause the requested fault; ``error`` writes an error in the dialect's format."""
        if not any(self.fault_on in text for text in texts):
            return None
        if self.key is not None and self.headers[-1].get("authorization") != f"Bearer {self.key}":
            return error(401, "no such key")
        if self.fault.isdecimal():
            response = error(int(self.fault), "as was commanded")
            response.headers.update({"retry-after": self.retry_after} if self.retry_after else {})
            return response
        if self.fault == "too long":
            return error(*(_TOO_LONG_FOR_TEI if error is _tei_error else _TOO_LONG))
        half = StreamingResponse(_half(), headers={"content-length": "1000"}, media_type="application/json")
        return {"half": half, "garbage": Response(b"<html>It works!</html>")}.get(self.fault)

    def vector(self, text: str, task: str | None) -> np.ndarray[Any, np.dtype[np.float32]]:
        vector = vector_of(f"[{task}] {text}" if task else text, self.weights, self.width)
        is_bad = self.fault == "nan" and self.fault_on in text
        return vector * np.float32(np.nan) if is_bad else vector

    def _write(self, text: str, task: str | None) -> object:
        vector = self.vector(text, task)
        return base64.b64encode(vector.tobytes()).decode() if self.speaks_base64 else vector.tolist()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[StandIn]:
        """Serve, on the port of the last time if there was one."""
        app = Starlette(
            routes=[
                Route("/v1/embeddings", self.embeddings, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/embed", self.embed, methods=["POST"]),
                Route("/info", self.info),
            ]
        )
        with make_listener(self.port, self.host) as listener:
            self.port = listener.getsockname()[1]
            config = uvicorn.Config(app, log_level="critical", lifespan="off", ssl_certfile=self.certificate)
            server = _Server(config)
            task = asyncio.create_task(server.serve(sockets=[listener]))
            await server.begun.wait()
            try:
                yield self
            finally:
                server.ended.set()
                await task
            assert self.breaches == []


class _Server(uvicorn.Server):
    """Begins and ends at once, where uvicorn looks every tenth of a second, and ends running requests."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.begun, self.ended = asyncio.Event(), asyncio.Event()

    def install_signal_handlers(self) -> None:
        pass

    async def main_loop(self) -> None:
        self.begun.set()
        await self.ended.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        for task in list(self.server_state.tasks):
            task.cancel()
        await asyncio.gather(*self.server_state.tasks, return_exceptions=True)


_TOO_LONG = (400, "This model's maximum context length is 512 tokens")
_TOO_LONG_FOR_TEI = (422, "`inputs` must have less than 512 tokens. Given: 900")


def _openai_error(status: int, message: str) -> Response:
    code = "context_length_exceeded" if "context length" in message else None
    return JSONResponse({"error": {"message": message, "code": code}}, status)


def _tei_error(status: int, message: str) -> Response:
    types = {400: "Empty", 413: "Validation", 422: "Validation", 429: "Overloaded", 503: "Unhealthy"}
    return JSONResponse({"error": message, "error_type": types.get(status, "Backend")}, status)


async def _half() -> AsyncIterator[bytes]:
    yield b'{"object": "list", "data": [{"index": 0, "embe'
    raise ConnectionError("commanded")

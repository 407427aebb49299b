"""Servers to run models on: OpenAI's embeddings and TEI's, with vectors that can be told, and faults on command."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvicorn
from jsonschema import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.tei_contract import REQUESTS, validate, validate_answer

MODEL = "acme/embed"
WIDTH = 16


def vector_of(text: str, weights: str = "first", width: int = WIDTH) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return what a model with these weights gives for a text: of a length of its own, not 1."""
    seed = int.from_bytes(hashlib.sha256(f"{weights} {text}".encode()).digest()[:8])
    return np.random.default_rng(seed).normal(size=width).astype(np.float32)


@dataclass
class StandIn:
    """One server.

    Attributes:
        weights: of the model it runs; another name is another model behind the same one.
        fault: what happens to a request for vectors; nothing when empty.
        bodies: of the requests for vectors, as they came; ``headers`` likewise.
        delay_s: before an answer.
        most_at_once: requests that were there together.
        breaches: of TEI's contract, in what was asked of ``/embed`` and what was answered; nothing that was commanded.
    """

    port: int = 0
    weights: str = "first"
    width: int = WIDTH
    fault: str = ""
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
        return f"http://127.0.0.1:{self.port}"

    async def embeddings(self, request: Request) -> Response:
        """``POST /v1/embeddings``."""
        body = await self._take(request)
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        if (response := await self._fail(_openai_error)) is not None:
            return response
        task = body.get("task")
        data = [{"object": "embedding", "index": i, "embedding": self._write(t, task)} for i, t in enumerate(texts)]
        if self.fault == "one missing":
            data.pop()
        # Out of order: what counts is `index`.
        num_tokens = sum(len(text.split()) for text in texts)
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return JSONResponse({"object": "list", "data": data[::-1], "model": body["model"], "usage": usage})

    async def embed(self, request: Request) -> Response:
        """``POST /embed``."""
        body = await self._take(request)
        self._hold(lambda: validate(REQUESTS["/embed"], body))
        response = await self._fail(_tei_error) or self._embed(body)
        if self.fault not in ("half", "garbage", "nan"):
            content = json.loads(bytes(response.body))
            self._hold(lambda: validate_answer("/embed", response.status_code, content))
        return response

    def _embed(self, body: dict[str, Any]) -> Response:
        texts = body["inputs"]
        if len(texts) > self.max_texts:
            return _tei_error(422, f"batch size {len(texts)} > maximum allowed batch size {self.max_texts}")
        rows = [self._vector(text, body.get("prompt_name")).tolist() for text in texts]
        if self.fault == "one missing":
            rows.pop()
        num_tokens = sum(len(text.split()) for text in texts)
        headers = {"x-compute-tokens": str(num_tokens)}
        # As there: what is no number cannot be written.
        return Response(json.dumps(rows), headers=headers, media_type="application/json")

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 512}]})

    async def info(self, _request: Request) -> Response:
        """``GET /info``."""
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
        """Hold something against TEI's contract."""
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

    async def _fail(self, error: Callable[[int, str], Response]) -> Response | None:
        """Do what was commanded; ``error`` writes an error as the dialect has it."""
        if self.key is not None and self.headers[-1].get("authorization") != f"Bearer {self.key}":
            return error(401, "no such key")
        if self.fault.isdecimal():
            response = error(int(self.fault), "as was commanded")
            response.headers.update({"retry-after": self.retry_after} if self.retry_after else {})
            return response
        if self.fault == "too long":
            return error(*(_TOO_LONG_FOR_TEI if error is _tei_error else _TOO_LONG))
        if self.fault == "half":
            return StreamingResponse(_half(), headers={"content-length": "1000"}, media_type="application/json")
        if self.fault == "garbage":
            return Response(b"<html>It works!</html>")
        return None

    def _vector(self, text: str, task: str | None) -> np.ndarray[Any, np.dtype[np.float32]]:
        vector = vector_of(f"[{task}] {text}" if task else text, self.weights, self.width)
        return vector * np.float32(np.nan) if self.fault == "nan" else vector

    def _write(self, text: str, task: str | None) -> object:
        vector = self._vector(text, task)
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
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", self.port))
            self.port = listener.getsockname()[1]
            config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
            server = uvicorn.Server(config)
            server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
            task = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started:  # noqa: ASYNC110  it has no event
                await asyncio.sleep(0.01)
            try:
                yield self
            finally:
                server.should_exit = True
                await task
            assert self.breaches == []


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

"""One server that runs a model: sends it requests, and keeps track of whether it works."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from contextlib import nullcontext

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from gateway.backends.upstream.answers import Answer, BadVectors, ErrorAnswer, WrongAnswer, read_retry_after_s
from gateway.backends.upstream.breaker import Breaker
from gateway.backends.upstream.dialects import Dialect, Facts
from gateway.backends.upstream.failures import Failure, TooLarge, failure_of
from gateway.backends.upstream.quirks import Quirks, learn
from gateway.config.upstream import Upstream
from gateway.errors import BadInput, RequestError
from gateway.telemetry import metrics, tracing
from gateway.types import Truncate

# The size of an answer depends on its vectors: a number takes at most 32 bytes however it is written, and no known
# model has wider vectors. Other fields, and repeated texts, are added.
_BYTES_PER_NUMBER = 32
_WIDEST = 16_384
_BYTES_PER_TEXT = 1024
_BYTES_BESIDE = 64 * 1024
_MAX_ERROR_BYTES = 64 * 1024
_MAX_FACTS_BYTES = 4 * 1024 * 1024  # some list hundreds of models


class Server:
    """One of a model's servers.

    Args:
        url: URL of the API. Its host is sent as ``Host``, and must be the name in the certificate.
        address: the address to connect to; by default the addresses of the URL's host.

    Attributes:
        name: host and port, for metrics and messages.
        num_texts: the texts in flight to the server.
        width: dimensions of the vectors that the server must return; 0 while unknown.
        quirks: the server's quirks; ``None`` while unknown.
        answered_at: the time of the last correct answer to a client's request, on ``time.monotonic()``.
        has_unchecked: clients have had vectors of it since a trial last showed that its vectors are the model's.
        is_refusing: whether the server is shut out because it refuses every request, for example due to a wrong key.
        is_found: whether the server was found by looking up a name, rather than listed in the registry.
    """

    def __init__(
        self, model: str, name: str, url: str, dialect: Dialect, upstream: Upstream, address: str | None = None
    ) -> None:
        self.name = name
        self.is_found = address is not None
        self.breaker = Breaker(upstream.probe_interval_s)
        self.num_texts = 0
        self.width = 0
        self.quirks: Quirks | None = None
        self.answered_at = 0.0
        self.has_unchecked = False
        self.is_refusing = False
        self._model = model
        self.url = url
        self._dialect = dialect
        self._timeout_s = upstream.timeout_s
        self._slots = asyncio.Semaphore(upstream.max_connections)
        headers = {"content-type": "application/json"}
        self._key = "" if upstream.api_key is None else upstream.api_key.get_secret_value()
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        # aiohttp, not httpx as elsewhere: it takes 0.3 ms of CPU time per request; httpx takes 1.2 ms.
        self._http = aiohttp.ClientSession(
            headers=headers,
            connector=_connector(address),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=upstream.connect_timeout_s),
            trust_env=False,  # a proxy of the environment would see every text
        )
        self._up = metrics.UPSTREAM_UP.labels(model, self.name)
        self._texts = metrics.UPSTREAM_TEXTS.labels(model, self.name)
        self._show_state()

    @property
    def has_numbers(self) -> bool:
        """Whether the server is known to write vectors as numbers for every requested encoding."""
        return self.quirks is not None and self.quirks.has_numbers

    async def facts(self) -> Facts:
        """Ask the server for its facts. A server that has none, or that refuses, may still return vectors.

        Raises:
            Failure: it does not answer.
        """
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._http.get(self.url + self._dialect.facts_path, allow_redirects=False) as response,
            ):
                content, is_whole = await _read(response, _MAX_FACTS_BYTES)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._no_answer(error) from error
        return self._dialect.read_facts(content) if response.status == 200 and is_whole else Facts()

    async def learn(self) -> None:
        """Learn the server's quirks.

        Raises:
            Failure: it does not answer.
            RequestError: it does not take any request.
        """

        async def ask(texts: Sequence[str], quirks: Quirks) -> Answer:
            return await self._counted(texts, None, Truncate.END, quirks, is_trial=True)

        self.quirks = await learn(ask, self._dialect.encodings)

    async def embed(
        self, texts: Sequence[str], task: str | None, truncate: Truncate, deadline: float, *, is_trial: bool = False
    ) -> Answer:
        """Have the server embed texts.

        Args:
            task: the server's name for it, or ``None``.
            deadline: on ``time.monotonic()``.
            is_trial: whether this request tests if the server works. A trial does not wait for clients' requests.

        Raises:
            Failure: the server has not answered correctly.
            TooLarge: the server takes fewer texts in one request.
            RequestError: the server refuses the texts: no server would take them.
            TimeoutError: the deadline has passed.
        """
        quirks = self.quirks or Quirks(self._dialect.encodings[0])
        async with asyncio.timeout(deadline - time.monotonic()):
            return await self._counted(quirks.applied(texts), task, truncate, quirks, is_trial=is_trial)

    async def _counted(
        self, texts: Sequence[str], task: str | None, truncate: Truncate, quirks: Quirks, *, is_trial: bool
    ) -> Answer:
        """Send a request, and count its outcome."""
        self.num_texts += len(texts)
        self._show_state()
        try:
            async with nullcontext() if is_trial else self._slots:
                started = time.monotonic()
                outcome = "abandoned"  # by a client that disconnected or timed out
                try:
                    answer = await self._ask(texts, task, truncate, quirks)
                    outcome = "ok"
                except Failure as failure:
                    outcome = failure.outcome
                    raise
                except (TooLarge, RequestError):
                    outcome = "refused"
                    raise
                finally:
                    metrics.UPSTREAM_REQUESTS.labels(self._model, self.name, outcome).inc()
                    if outcome in ("ok", "refused"):
                        metrics.UPSTREAM_SECONDS.labels(self._model, self.name).observe(time.monotonic() - started)
                return answer
        finally:
            self.num_texts -= len(texts)
            self._show_state()

    async def _ask(self, texts: Sequence[str], task: str | None, truncate: Truncate, quirks: Quirks) -> Answer:
        if self._http.closed:  # while this waited for a slot
            raise Failure("broken", f"the connections to {self.name} have been closed")
        headers: dict[str, str] = {}
        tracing.inject(headers)
        body = self._dialect.body(texts, task, truncate, quirks.encoding)
        per_text = _BYTES_PER_NUMBER * (self.width or _WIDEST) + _BYTES_PER_TEXT
        limit = _BYTES_BESIDE + len(body) + per_text * len(texts)
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._http.post(
                    self.url + self._dialect.embed_path, data=body, headers=headers, allow_redirects=False
                ) as response,
            ):
                is_ok = 200 <= response.status < 300  # some frameworks answer a POST with 201
                content, is_whole = await _read(response, limit if is_ok else _MAX_ERROR_BYTES)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._no_answer(error) from error
        if not is_ok:
            raise self._failure(response, response.status, content)
        if not is_whole:
            raise self._wrong(f"an answer of more than {limit} bytes for {len(texts)} texts")
        try:
            answer = self._dialect.read(content, response.headers, len(texts))
        except ErrorAnswer as error:
            if error.status:
                raise self._failure(response, error.status, content) from error
            raise self._wrong(self._without_key(error, content)) from error
        except BadVectors as error:
            raise self._wrong(str(error), error.indices) from error
        except WrongAnswer as error:
            raise Failure("wrong", f"{self.name} gives {self._without_key(error, content)}") from error
        if self.width and answer.vectors.shape[1] != self.width:
            raise self._wrong(
                f"vectors of {answer.vectors.shape[1]} dimensions, and gave {self.width} before: it runs another model"
            )
        return answer

    def _wrong(self, what: str, bad_texts: Sequence[int] = ()) -> Failure:
        """Return the failure for an answer that the same server would give again."""
        return Failure(
            "wrong",
            f"{self.name} gives {what}",
            is_worth_repeating=False,
            is_grave=True,
            is_permanent=bool(bad_texts),
            bad_texts=bad_texts,
        )

    def _failure(self, response: aiohttp.ClientResponse, status: int, content: bytes) -> Failure | BadInput | TooLarge:
        after = read_retry_after_s(response.headers.get("retry-after"), time.time())
        if self._key:  # some servers repeat it
            content = content.replace(self._key.encode(), "…".encode())
        return failure_of(self.name, self._model, status, content, after)

    def _without_key(self, error: WrongAnswer, content: bytes) -> str:
        is_repeated = self._key and self._key.encode() in content
        return "something other than vectors, with the API key in it" if is_repeated else str(error)

    def _no_answer(self, error: Exception) -> Failure:
        match error:
            case aiohttp.ConnectionTimeoutError() | aiohttp.ClientConnectorError():
                return Failure("unreachable", f"{self.name} cannot be reached ({type(error).__name__})")
            case TimeoutError():
                reason = f"{self.name} has not answered within {self._timeout_s:g} s"
                return Failure("timeout", reason, is_worth_repeating=False)
            case _:
                return Failure("broken", f"{self.name} has dropped the connection ({type(error).__name__})")

    def note(self, failure: Failure) -> None:
        """Record a client's failed request. An overloaded server does work, so that failure does not count."""
        if failure.outcome != "overloaded":
            self.breaker.note_failure(is_grave=failure.is_grave)

    def note_success(self) -> None:
        """Record that a client's request was answered."""
        self.answered_at = time.monotonic()
        self.has_unchecked = True
        self.breaker.note_success()

    def _show_state(self) -> None:
        self._up.set(self.breaker.is_closed)
        self._texts.set(self.num_texts)

    def let_in(self) -> None:
        """Send the server requests: a trial has shown that it works."""
        self.breaker.close(time.monotonic())
        self.is_refusing = self.has_unchecked = False
        self._show_state()

    def hold(self) -> None:
        """Send the server nothing until a first trial, which is due at once, shows that it works."""
        self.breaker.hold(f"the vectors of {self.name} have not been checked yet")
        self._show_state()

    def shut_out(self, reason: str, *, is_refusing: bool = False) -> None:
        """Send the server nothing until a trial shows that it works."""
        self.breaker.open(reason, time.monotonic())
        self.is_refusing = is_refusing
        self._show_state()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()


def _connector(address: str | None) -> aiohttp.TCPConnector:
    """Return a connector to one address, or to the host's addresses. It has no limit; slots are counted elsewhere."""
    if address is None:
        return aiohttp.TCPConnector(limit=0)
    return aiohttp.TCPConnector(limit=0, resolver=_OneAddress(address))


class _OneAddress(AbstractResolver):
    """Resolves every name to the same address, so that a server keeps its name in requests and for TLS."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._family = socket.AF_INET6 if ":" in address else socket.AF_INET

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host, host=self._address, port=port, family=self._family, proto=0, flags=socket.AI_NUMERICHOST
            )
        ]

    async def close(self) -> None:
        """Do nothing: nothing is open."""


async def _read(response: aiohttp.ClientResponse, limit: int) -> tuple[bytes, bool]:
    """Read at most ``limit`` bytes of an answer, unpacked; return whether that is all of it."""
    content = bytearray()
    async for piece in response.content.iter_any():
        content += piece
        if len(content) > limit:
            return bytes(content[:limit]), False
    return bytes(content), True

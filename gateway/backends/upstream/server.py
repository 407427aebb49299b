"""One server that runs a model: asks it, and keeps note of whether it works."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import aiohttp

from gateway.backends.upstream.breaker import Breaker
from gateway.backends.upstream.dialects import Answer, Dialect, Facts, WrongAnswer, error_of
from gateway.config.upstream import Upstream
from gateway.embedding import Truncate
from gateway.errors import BadInput, ContextLengthExceeded, RequestError
from gateway.telemetry import metrics, tracing

_REFUSALS = {400, 413, 422}
_OPERATOR_FAULTS = {401: "refuses the API key", 403: "refuses the API key", 404: "knows no such path or model"}
_LENGTH_WORDS = ("context length", "maximum length", "max_model_len", "less than")


class Failure(Exception):
    """A server has not answered as it should; another one, or the same one later, may.

    Attributes:
        outcome: in one word, for the metrics.
        retry_after_s: when the server wants to be asked again, if it says so.
        is_worth_repeating: whether the same server may be asked again; otherwise only another one.
        is_fatal: the server is to be left alone at once, as it gives vectors that must not be used, or none to anybody.
    """

    def __init__(
        self,
        outcome: str,
        reason: str,
        *,
        retry_after_s: float | None = None,
        is_worth_repeating: bool = True,
        is_fatal: bool = False,
    ) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.retry_after_s = retry_after_s
        self.is_worth_repeating = is_worth_repeating
        self.is_fatal = is_fatal


class Server:
    """One of a model's servers.

    Attributes:
        name: host and port, for metrics and messages.
        num_texts: on their way to it.
        width: of the vectors that it must give; 0 while that is not known.
    """

    def __init__(self, model: str, url: str, dialect: Dialect, upstream: Upstream) -> None:
        self.name = urlsplit(url).netloc
        self.breaker = Breaker(upstream.probe_interval_s)
        self.num_texts = 0
        self.width = 0
        self._model = model
        self._url = url
        self._dialect = dialect
        self._timeout_s = upstream.timeout_s
        self._slots = asyncio.Semaphore(upstream.max_connections)
        headers = {"content-type": "application/json"}
        if upstream.api_key is not None:
            headers["authorization"] = f"Bearer {upstream.api_key.get_secret_value()}"
        # aiohttp, and not httpx as elsewhere: it takes 0.3 ms of a core for a request where httpx takes 1.2.
        self._http = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),  # slots are counted here
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=upstream.connect_timeout_s),
            trust_env=False,  # a proxy of the environment would see every text
        )
        self._up = metrics.UPSTREAM_UP.labels(model, self.name)
        self._texts = metrics.UPSTREAM_TEXTS.labels(model, self.name)
        self._show_state()

    async def facts(self) -> Facts:
        """Ask the server what it is.

        Raises:
            Failure: it does not answer, or refuses.
        """
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._http.get(self._url + self._dialect.facts_path, allow_redirects=False) as response,
            ):
                status, content = response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._no_answer(error) from error
        if status in (401, 403):
            raise Failure("refused", f"{self.name} {_OPERATOR_FAULTS[status]}", is_fatal=True)
        if status >= 500:
            raise Failure("failed", f"{self.name} answers {status} to {self._dialect.facts_path}")
        return self._dialect.read_facts(content) if status == 200 else Facts()

    async def embed(
        self, texts: Sequence[str], task: str | None, truncate: Truncate, deadline: float, *, is_trial: bool = False
    ) -> Answer:
        """Have the server embed texts, and take note of how that went.

        Args:
            task: what the server calls it, or ``None``.
            deadline: on ``time.monotonic()``.
            is_trial: whether the caller decides by the vectors what this says of the server, and it is not noted here.

        Raises:
            Failure: see there.
            RequestError: the server refuses the texts: no server would take them.
            TimeoutError: the deadline has passed.
        """
        self.num_texts += len(texts)
        started = time.monotonic()
        try:
            async with asyncio.timeout(deadline - started), self._slots:
                started = time.monotonic()
                answer = await self._ask(texts, task, truncate)
        except Failure as failure:
            self._count(failure.outcome, None)
            if not is_trial:
                self.note(failure)
            raise
        except RequestError:
            self._count("refused", started)
            raise
        else:
            self._count("ok", started)
            if not is_trial:
                self.breaker.note_success()
            return answer
        finally:
            self.num_texts -= len(texts)
            self._show_state()

    async def _ask(self, texts: Sequence[str], task: str | None, truncate: Truncate) -> Answer:
        headers: dict[str, str] = {}
        tracing.inject(headers)
        body = self._dialect.body(texts, task, truncate)
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._http.post(
                    self._url + self._dialect.embed_path, data=body, headers=headers, allow_redirects=False
                ) as response,
            ):
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._no_answer(error) from error
        if response.status != 200:
            raise self._failure(response.status, content, response.headers.get("retry-after"))
        try:
            answer = self._dialect.read(content, response.headers, len(texts))
        except WrongAnswer as error:
            raise Failure("wrong", f"{self.name} gives {error}") from error
        if self.width and answer.vectors.shape[1] != self.width:
            reason = (
                f"{self.name} gives vectors of {answer.vectors.shape[1]} dimensions, and gave {self.width} before: it "
                "runs another model"
            )
            raise Failure("wrong", reason, is_worth_repeating=False, is_fatal=True)
        return answer

    def _no_answer(self, error: Exception) -> Failure:
        match error:
            case aiohttp.ConnectionTimeoutError() | aiohttp.ClientConnectorError():
                return Failure("unreachable", f"{self.name} cannot be reached ({type(error).__name__})")
            case TimeoutError():
                reason = f"{self.name} has not answered within {self._timeout_s:g} s"
                return Failure("timeout", reason, is_worth_repeating=False)
            case _:
                return Failure("broken", f"{self.name} has broken the connection off ({type(error).__name__})")

    def _failure(self, status: int, content: bytes, retry_after: str | None) -> Failure | RequestError:
        message, code = error_of(content)
        said = f": {message}" if message else ""
        if status in _REFUSALS:
            kind = ContextLengthExceeded if _is_about_length(code, message) else BadInput
            return kind(f"the server of model {self._model!r} refuses the request{said}", param="input")
        if status in _OPERATOR_FAULTS:
            reason = f"{self.name} {_OPERATOR_FAULTS[status]} ({status}){said}"
            return Failure("refused", reason, is_worth_repeating=False, is_fatal=True)
        if status in (429, 503):
            after = _retry_after_s(retry_after)
            outcome = "overloaded" if status == 429 else "unready"
            return Failure(outcome, f"{self.name} is {outcome} ({status}){said}", retry_after_s=after)
        # 502 and 504 come from a proxy in between; with 500 the server itself may have failed on these very texts.
        return Failure("failed", f"{self.name} answers {status}{said}", is_worth_repeating=status in (502, 504))

    def note(self, failure: Failure) -> None:
        """Take note of a failure: some in a row, or one that is fatal, shut the server out."""
        now = time.monotonic()
        if failure.is_fatal:
            self.breaker.open(str(failure), now)
        elif failure.outcome != "overloaded":  # then it works, and says so
            self.breaker.note_failure(str(failure), now)
        self._show_state()

    def _count(self, outcome: str, started: float | None) -> None:
        metrics.UPSTREAM_REQUESTS.labels(self._model, self.name, outcome).inc()
        if started is not None:
            metrics.UPSTREAM_SECONDS.labels(self._model, self.name).observe(time.monotonic() - started)

    def _show_state(self) -> None:
        self._up.set(self.breaker.is_closed)
        self._texts.set(self.num_texts)

    def let_in(self) -> None:
        """Send the server requests: a trial has shown that it is well."""
        self.breaker.note_success()
        self._show_state()

    def shut_out(self, reason: str) -> None:
        """Send the server nothing until a trial shows that it is well."""
        self.breaker.open(reason, time.monotonic())
        self._show_state()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()


def _is_about_length(code: str, message: str) -> bool:
    return code == ContextLengthExceeded.code or (
        ("token" in message or "characters" in message) and any(words in message for words in _LENGTH_WORDS)
    )


def _retry_after_s(value: str | None) -> float | None:
    """Read ``Retry-After``: seconds, or a date."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None

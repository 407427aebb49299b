"""A chat endpoint with OpenAI's API: ask for a grade, find out which requests it accepts, and retry."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from gateway.cli.client import client_errors
from gateway.compare.judge.answers import Answer, Outcome, read_answer
from gateway.compare.judge.prompt import ANSWER_SCHEMA, Message, as_one_message
from gateway.errors import CompareError

_PATH = "/chat/completions"
_FORMATS = ("json_schema", "json_object", "text")
# An answer has about 40 tokens. The first limit is enough for most models that think before; some need the second.
_MAX_ANSWER_TOKENS, MAX_THOUGHT_TOKENS = 2_048, 8_192
CUT_REMEDY = "turn off the judge's thinking, give its server a longer context, or use another judge"
_MAX_ANSWER_BYTES = 2**20
_ANSWER_TIMEOUT_S = 180.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_MAX_SHOWN_CHARACTERS = 200
_LATER = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_NOT_ACCEPTED = frozenset({400, 413, 422})
# A failure that stays while other requests are answered comes from the texts of the request.
_MAX_OWN_FAULTS = 5
_KEY = "JUDGE_API_KEY, or the environment variable that --judge-key-env names"
_WRONG_KEY = f"; the key came from {_KEY}"
_NO_KEY = f"; no key was sent: set {_KEY}"
_HINT_404 = "; is it the address of an OpenAI-style API, such as http://127.0.0.1:8080/v1, and does it have the model?"


class NoDialect(CompareError):
    """The endpoint gives no grade to any form of a request. Another pair may fare better, if a filter rejected this one.

    Attributes:
        spent: the tokens of all attempts, and the outcome of the last answer; ``REFUSED`` if there was no answer.
    """

    def __init__(self, message: str, spent: Answer) -> None:
        super().__init__(message)
        self.spent = spent


@dataclass(frozen=True, slots=True)
class _Failure:
    """A request that may succeed later.

    Attributes:
        pause_s: the pause that the endpoint asks for.
        may_be_own: the texts of the request may be the reason.
    """

    text: str
    pause_s: float | None = None
    may_be_own: bool = False


@dataclass(frozen=True, slots=True)
class Dialect:
    """The parts of OpenAI's API that an endpoint or its model accepts.

    Attributes:
        answer_format: ``json_schema``, ``json_object``, or ``text`` if it accepts no ``response_format``.
        has_temperature: whether it accepts temperature 0; some reasoning models do not.
        limit: the name of the field that bounds the length of the answer.
        has_system: whether it accepts a system message.
        max_tokens: that bound, in tokens.
    """

    answer_format: str = _FORMATS[0]
    has_temperature: bool = True
    limit: str = "max_tokens"
    has_system: bool = True
    max_tokens: int = _MAX_ANSWER_TOKENS

    def body(self, model: str, messages: Sequence[Message]) -> bytes:
        """Return the body of a request."""
        fields: dict[str, object] = {
            "model": model,
            "messages": list(messages) if self.has_system else as_one_message(messages),
            self.limit: self.max_tokens,
        }
        if self.has_temperature:
            fields["temperature"] = 0
        if self.answer_format == "json_schema":
            schema = {"name": "grade", "strict": True, "schema": ANSWER_SCHEMA}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif self.answer_format == "json_object":
            fields["response_format"] = {"type": "json_object"}
        return json.dumps(fields).encode()

    def others(self, error_text: str) -> Iterator[Dialect]:
        """Yield the dialects to try next after a rejected request, most likely first.

        Args:
            error_text: the error's text.
        """
        lowered = error_text.lower()
        if "max_completion_tokens" in lowered and self.limit == "max_tokens":
            yield replace(self, limit="max_completion_tokens")
        if "temperature" in lowered and self.has_temperature:
            yield replace(self, has_temperature=False)
        if "system" in lowered and self.has_system:
            yield replace(self, has_system=False)
        yield from (
            replace(self, answer_format=name) for name in _FORMATS[_FORMATS.index(self.answer_format) + 1 :][:1]
        )


class ChatEndpoint:
    """Sends requests to a chat endpoint.

    Args:
        http: a client with the key in its headers.
        url: the URL of the chat completions.
        patience_s: the seconds during which to repeat a request that may succeed later.
        secret: the key, which must not appear in any message.
    """

    def __init__(
        self, http: httpx.AsyncClient, url: httpx.URL, model: str, patience_s: float, secret: str | None = None
    ) -> None:
        self._http = http
        self._url = url
        self._patience_s = patience_s
        self._secret = secret
        self._resume_at = 0.0
        self._has_answered = False
        self._num_answered = 0
        self.model = model
        self.dialect = Dialect()
        self.name = f"the judge ({_shown(url)})"

    async def find_dialect(self, messages: Sequence[Message]) -> Answer:
        """Try dialects until the endpoint accepts a request and answers with a grade, then keep that dialect.

        Returns:
            The answer, with the tokens of all attempts.

        Raises:
            NoDialect: the endpoint accepts no form of the request, or gives no readable answer.
            CompareError: the endpoint does not answer.
        """
        untried = [self.dialect]
        tried: set[Dialect] = set()
        error_text = ""
        prompt_tokens = completion_tokens = 0
        outcome = Outcome.REFUSED
        while untried:
            dialect = untried.pop()
            if dialect in tried:
                continue
            tried.add(dialect)
            status, content = await self._send(dialect.body(self.model, messages))
            if status not in _NOT_ACCEPTED:
                answer = read_answer(content, dialect.max_tokens)
                prompt_tokens += answer.prompt_tokens
                completion_tokens += answer.completion_tokens
                if answer.outcome in {Outcome.GRADED, Outcome.REFUSED}:
                    self.dialect = dialect
                    return replace(answer, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
                outcome = answer.outcome
                error_text = _shown_answer(answer, dialect) or self._quote(content)
                # With fewer tokens, the other forms would be cut off as well.
                if dialect.max_tokens == MAX_THOUGHT_TOKENS:
                    untried = [one for one in untried if one.max_tokens == MAX_THOUGHT_TOKENS]
                untried += reversed(list(dialect.others("")))
                if answer.outcome is Outcome.CUT:
                    untried.append(replace(dialect, max_tokens=MAX_THOUGHT_TOKENS))
                continue
            error_text = self._quote(content)
            untried += reversed(list(dialect.others(error_text)))
        raise NoDialect(
            f"{self.name} gives no grade to any form of the request; its last answer: {error_text}",
            Answer(outcome, None, "", prompt_tokens, completion_tokens),
        )

    async def ask(self, messages: Sequence[Message]) -> Answer:
        """Ask for a grade, again with a higher limit if the answer is cut at its limit of tokens.

        A rejected request is ``REFUSED``, for example by a content filter. A request that fails again and again, while the
        endpoint answers others, is ``UNREADABLE``.

        Raises:
            CompareError: the endpoint does not answer, or rejects the key or the model.
        """
        dialect = self.dialect
        status, content = await self._send(dialect.body(self.model, messages))
        if status in _NOT_ACCEPTED:
            return Answer(Outcome.REFUSED)
        answer = read_answer(content, dialect.max_tokens)
        if answer.outcome is not Outcome.CUT or dialect.max_tokens == MAX_THOUGHT_TOKENS:
            return answer
        longer = replace(dialect, max_tokens=MAX_THOUGHT_TOKENS)
        status, content = await self._send(longer.body(self.model, messages))
        if status in _NOT_ACCEPTED:  # longer than the model can read and write
            return answer
        self.dialect, again = longer, read_answer(content, longer.max_tokens)
        return replace(
            again,
            prompt_tokens=again.prompt_tokens + answer.prompt_tokens,
            completion_tokens=again.completion_tokens + answer.completion_tokens,
        )

    async def _send(self, body: bytes) -> tuple[int, bytes]:
        """Send a request, and retry temporary failures until the time limit; all requests pause together."""
        deadline = time.monotonic() + self._patience_s
        pause_s = _FIRST_PAUSE_S
        num_answered, num_own_faults = self._num_answered, 0
        while True:
            await asyncio.sleep(max(0.0, self._resume_at - time.monotonic()))
            result = await self._try(body)
            if not isinstance(result, _Failure):
                self._num_answered += 1
                return result
            pause_s = min(pause_s, _LONGEST_PAUSE_S)
            wait_s = pause_s * random.uniform(0.75, 1.25)  # noqa: S311  vary it, so that not all requests resume at once
            if (
                result.pause_s is not None and result.pause_s >= _FIRST_PAUSE_S
            ):  # with 0, it would be asked without a pause
                wait_s = result.pause_s
            is_last = time.monotonic() + wait_s > deadline
            num_own_faults += result.may_be_own
            has_answered_others = self._num_answered > num_answered
            if result.may_be_own and has_answered_others and (is_last or num_own_faults >= _MAX_OWN_FAULTS):
                return 500, b""
            if is_last:
                why = f"gave up after {self._patience_s:.0f} s"
                if result.pause_s is not None and result.pause_s > self._patience_s:
                    why = f"it asks to wait {result.pause_s:,.0f} s, and the limit is {self._patience_s:.0f} s"
                raise CompareError(f"{result.text}; {why}. Run again to continue: grades are kept")
            self._resume_at = max(self._resume_at, time.monotonic() + wait_s)
            pause_s *= 2

    async def _try(self, body: bytes) -> tuple[int, bytes] | _Failure:
        """Send a request once, and return a temporary failure."""
        try:
            response, content = await self._post(body)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            failure = f"{self.name} cannot be reached: {str(error) or 'it takes too long'}"
            if not self._has_answered:
                raise CompareError(failure) from error
            return _Failure(failure)
        except (httpx.TimeoutException, TimeoutError):
            return _Failure(f"{self.name} gave no answer in {_ANSWER_TIMEOUT_S:g} s", may_be_own=True)
        # Leave out the error's message, which may contain the key.
        except httpx.TransportError as error:
            return _Failure(f"{self.name} dropped the connection: {type(error).__name__}", may_be_own=True)
        except httpx.HTTPError as error:
            raise CompareError(f"{self.name} cannot be asked: {type(error).__name__}") from error
        status, self._has_answered = response.status_code, True
        if status == 200 or status in _NOT_ACCEPTED:
            return status, content
        failure = f"{self.name} answers {status}: {self._quote(content) or response.reason_phrase}"
        if status not in _LATER:
            raise CompareError(f"{failure}{self._hint(status)}")
        return _Failure(failure, _retry_after_s(response), may_be_own=status == 500)

    def _hint(self, status: int) -> str:
        if status in {401, 403}:
            return _WRONG_KEY if self._secret else _NO_KEY
        return _HINT_404 if status == 404 else ""

    async def _post(self, body: bytes) -> tuple[httpx.Response, bytes]:
        """Send a request and read the response, within limits of size and time: a broken server may never stop."""
        request = self._http.stream("POST", self._url, content=body, headers={"content-type": "application/json"})
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S), request as response:
                content = bytearray()
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > _MAX_ANSWER_BYTES:
                        break
                return response, bytes(content)
        except httpx.LocalProtocolError as error:  # a retry does not help
            raise CompareError(
                f"{self.name} cannot be asked: the request is not valid HTTP; does the key contain a line break?"
            ) from error

    def _quote(self, content: bytes) -> str:
        """Return the message in an error's body, shortened and without the key."""
        text = content[: 16 * _MAX_SHOWN_CHARACTERS].decode(errors="replace")
        try:
            error = json.loads(content)
            found = error.get("error", error) if isinstance(error, dict) else error
            text = str(found.get("message", text)) if isinstance(found, dict) else str(found)
        except (ValueError, RecursionError):
            pass
        if self._secret:
            text = text.replace(self._secret, "…")
        return " ".join(text.split())[:_MAX_SHOWN_CHARACTERS]


@asynccontextmanager
async def connect_judge(
    url: str, model: str, api_key: str | None, *, patience_s: float = 600.0
) -> AsyncIterator[ChatEndpoint]:
    """Yield a client of a chat endpoint.

    Args:
        url: the address of the API, with or without ``/chat/completions``.

    Raises:
        CompareError: ``url`` is not an address.
    """
    address = chat_url(url)
    key = api_key.strip() if api_key else None
    headers = {b"authorization": f"Bearer {key}".encode(errors="surrogateescape")} if key else None
    timeout = httpx.Timeout(_ANSWER_TIMEOUT_S, connect=10.0)
    # A proxy from the environment would send the texts off the machine.
    with client_errors(CompareError):
        client = httpx.AsyncClient(headers=headers, timeout=timeout, trust_env=not is_on_this_machine(address))
    async with client as http:
        yield ChatEndpoint(http, address, model, patience_s, key)


def chat_url(text: str) -> httpx.URL:
    """Return the address of the chat completions of an API.

    Raises:
        CompareError: ``text`` is not an address, or holds a password.
    """
    try:
        url = httpx.URL(text)
        host = url.host
    except (httpx.InvalidURL, UnicodeError) as error:  # also for a name that IDNA does not accept
        raise CompareError(f"--judge {text}: {error}") from error
    if url.userinfo:
        raise CompareError("--judge: the address holds a password; --judge-key-env names the variable with the key")
    if url.scheme not in {"http", "https"} or not host or (url.port or 0) > 65_535 or url.fragment:
        raise CompareError(f"--judge {text}: must be an address such as http://127.0.0.1:8080/v1")
    path = url.path.rstrip("/")
    if not path.endswith(_PATH):
        path = f"{path or '/v1'}{_PATH}"
    return url.copy_with(path=path)


def is_on_this_machine(url: httpx.URL) -> bool:
    """Return whether requests to an address stay on this machine."""
    if url.host == "localhost":
        return True
    try:
        return ipaddress.ip_address(url.host).is_loopback
    except ValueError:
        return False


def _shown_answer(answer: Answer, dialect: Dialect) -> str:
    """Return an answer without a grade for a message; empty if it is not a chat completion."""
    if answer.outcome is Outcome.CUT:
        return f"{answer.said!r}, cut off after {dialect.max_tokens:,} tokens: {CUT_REMEDY}"
    return repr(answer.said) if answer.said else ""


def _shown(url: httpx.URL) -> str:
    return str(url.copy_with(query=None))


def _retry_after_s(response: httpx.Response) -> float | None:
    """Return the pause that a response asks for, in seconds or as a date."""
    text = response.headers.get("retry-after", "").strip()
    try:
        pause_s = float(text)
        return max(0.0, pause_s) if math.isfinite(pause_s) else None
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())

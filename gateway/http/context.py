"""The facts about a request, which accumulate while it is handled and end in its log line."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Scope

from gateway.access.keyring import Client
from gateway.access.memory import Reservation
from gateway.errors import RequestError
from gateway.http.body import Body
from gateway.http.error_forms import ErrorForm
from gateway.types import Priority, Timings

_CONTEXT = "gateway.context"
# A message may quote a text, which no log line may hold.
_QUOTED = re.compile(r"(the string|an object with|refuses the request:) .*", re.DOTALL)
_MAX_REASON = 300


@dataclass(slots=True)
class RequestContext:
    """The facts about a request: for the log line, the metrics and the answer's headers.

    Attributes:
        client: the sender.
        memory: the part of the budget that the request holds; released when it ends, for whatever reason.
        body: the body, on its way in.
        sent: the headers of the request.
        path: without doubled slashes, and without the prefix that a proxy serves the gateway under.
        headers: further headers of any answer.
        reason: why the request was refused, without quotations of the client's texts; `param` is the field at fault.
        asked: the model as the client named it, for the log of a request that no model answered.
        api_key: hex sha256 of the key that the request carries, also where no key is required.
        key_owner: the owner of that key: the client's name where keys are known, else the key's hash.
        trace_ids: join a log line to the request's trace, if that is recorded.
        priority: as the request asks for.
        time_limit_s: seconds that it may take; ``None`` for the limit of all requests.
        error_form: the form of an error: the path's, unless the body turns out to be another API's.
    """

    request_id: str
    client: Client
    memory: Reservation
    body: Body
    sent: Headers
    method: str = "GET"
    path: str = "/"
    headers: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    error_code: str | None = None
    reason: str | None = None
    param: str | None = None
    asked: str | None = None
    model: str | None = None
    task: str | None = None
    num_texts: int | None = None
    num_tokens: int | None = None
    timings: Timings | None = None
    api_key: str | None = None
    key_owner: str | None = None
    experiment: str | None = None
    arm: str | None = None
    trace_ids: Mapping[str, str] = field(default_factory=dict)
    priority: Priority = Priority.NORMAL
    time_limit_s: float | None = None
    error_form: ErrorForm = ErrorForm.OPENAI

    @classmethod
    def of(cls, request: Request) -> RequestContext:
        return cls.in_scope(request.scope)

    @classmethod
    def in_scope(cls, scope: Scope) -> RequestContext:
        context: RequestContext = scope[_CONTEXT]
        return context

    def enter(self, scope: Scope) -> None:
        """Make this the context of a request."""
        scope[_CONTEXT] = self

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def caller(self) -> str:
        """The client's name, in logs and where several share a queue."""
        return self.client.name

    def refuse(self, error: RequestError) -> None:
        """Add the reason why the request is refused."""
        self.error_code, self.param = error.code, error.param
        self.reason = _QUOTED.sub(r"\1 …", error.message)[:_MAX_REASON]

    def describe(self, model: str, task: str | None, num_texts: int, num_tokens: int, timings: Timings) -> None:
        """Add the facts of the answer."""
        self.model, self.task, self.num_texts, self.num_tokens = model, task, num_texts, num_tokens
        self.timings = timings

"""The facts about a request: they accumulate while it is handled, and are then logged."""

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
# An error message may quote a client's text, which must not reach the log.
_QUOTED = re.compile(r"(the string|an object with|refuses the request:) .*", re.DOTALL)
_MAX_REASON = 300
MAX_SHOWN_PATH = 200
"""The number of a path's characters that an error message quotes: clients may send any path."""
# From the third part on, a path has names, perhaps with a unit in them: `/tei/EXPERIMENT/UNIT/embed`.
_NUM_LOGGED_PARTS = 2


@dataclass(slots=True)
class RequestContext:
    """The facts about a request: for the log line, the metrics and the answer's headers.

    Attributes:
        client: the sender.
        memory: the part of the budget that the request holds; released when it ends, for any reason.
        body: the body, on its way in.
        sent: the headers of the request.
        path: the path without doubled slashes, and without the prefix under which a proxy serves the gateway.
        headers: additional headers for every kind of answer.
        reason: the reason why the request was refused, without quotations of the client's texts; `param` is the field
            at fault.
        asked: the model as the client named it, for the log of a request that no model answered.
        api_key: hex sha256 of the key that the request carries, even where no key is required.
        key_owner: the owner of that key: the client's name where keys are known, else the key's hash.
        trace_ids: the ids that connect a log line to the request's trace, if the trace is recorded.
        priority: the priority in the request.
        time_limit_s: seconds that the request may take; ``None`` for the general limit.
        error_form: the form of an error answer: that of the path, unless the body turns out to belong to another API.
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
        """The client's name, for logs and for queues that clients share."""
        return self.client.name

    def refuse(self, error: RequestError) -> None:
        """Record why the request is refused."""
        self.error_code, self.param = error.code, error.param
        shown = error.message.replace(self.path[:MAX_SHOWN_PATH], _without_names(self.path))
        self.reason = _QUOTED.sub(r"\1 …", shown)[:_MAX_REASON]

    def describe(self, model: str, task: str | None, num_texts: int, num_tokens: int, timings: Timings) -> None:
        """Record the facts about the answer."""
        self.model, self.task, self.num_texts, self.num_tokens = model, task, num_texts, num_tokens
        self.timings = timings


def _without_names(path: str) -> str:
    """Return the beginning of a path, for the log, which has no units."""
    parts = path[:MAX_SHOWN_PATH].split("/")
    return path if len(parts) <= _NUM_LOGGED_PARTS + 1 else "/".join([*parts[: _NUM_LOGGED_PARTS + 1], "…"])

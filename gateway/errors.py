"""Every error of the gateway, as one tree.

::

    GatewayError
    ├── StartError                      the process or a model cannot start
    │   ├── ConfigError                 models.yaml or a setting is wrong (all problems at once)
    │   ├── LoadError                   a model's checkpoint is missing, corrupt, unsuitable or too large
    │   │   └── NotReachable            none of the servers that run a model gives vectors
    │   └── CompareError                a comparison's data, models or gateway do not allow it
    └── RequestError                    one request failed; carries the HTTP status and the code
        ├── BadInput               400
        │   ├── ContextLengthExceeded
        │   ├── UnsupportedDimensions
        │   ├── UnsupportedOutput
        │   ├── EmptyInput
        │   ├── BodyTooSlow
        │   ├── InvalidHttp
        │   └── ReloadRefused
        ├── Unauthorized           401
        ├── Forbidden              403
        │   └── ModelNotAllowed
        ├── NotFound               404
        │   ├── ModelNotFound
        │   └── ExperimentNotFound
        ├── MethodNotAllowed       405
        ├── SpaceMismatch          412
        ├── BodyTooLarge           413
        │   └── TooMuchMemory
        ├── UnsupportedEncoding    415
        ├── Overloaded             429
        │   ├── RateLimited
        │   └── MemoryFull         503
        ├── HeadersTooLarge        431
        ├── InternalError          500
        │   ├── InferenceFailed
        │   │   └── UpstreamFailed 502
        │   ├── OutOfMemory
        │   └── InvalidVectors
        ├── UnsupportedTransferCoding 501
        ├── ModelNotReady          503
        │   ├── ModelUnavailable
        │   ├── ModelRecovering
        │   ├── UpstreamUnavailable
        │   └── ShuttingDown
        ├── DeadlineExceeded       504
        └── ClientDisconnected     499  (logged; nobody is there to read it)

The middleware is the one exit: it renders a ``RequestError``, and nothing else builds an error body.
The table in ``docs/errors.md`` is generated from these classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class GatewayError(Exception):
    """Root of every error that the gateway raises on purpose."""


# ---------------------------------------------------------------------------------------------------------- start


class StartError(GatewayError):
    """The process, or one model of it, cannot start."""


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that is wrong in a configuration file.

    ``line`` and ``column`` count from 1; both are 0 when the problem has no place in a file.
    """

    file: str
    line: int
    column: int
    key: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return f"{place}: {self.key}: {self.message}" if self.key else f"{place}: {self.message}"


class ConfigError(StartError):
    """The registry or a setting is wrong; ``problems`` lists everything found, in file order."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class LoadError(StartError):
    """A model cannot be loaded: its checkpoint is missing, corrupt, not supported, or does not fit."""


class NotReachable(LoadError):
    """None of the servers that run a model gives vectors; they are asked again from time to time."""


class CompareError(StartError):
    """A comparison cannot be made: its data, its models or the gateway that is asked do not allow it."""


# -------------------------------------------------------------------------------------------------------- request


class RequestError(GatewayError):
    """One request failed, for a reason that its caller is told.

    Attributes:
        status: HTTP status of the answer.
        type: OpenAI's error ``type``.
        code: machine-readable ``code``, stable across releases.
        param: the request field at fault, if one is.
        retry_after_s: whole seconds after which a new try makes sense, 1 to 120; sent as ``Retry-After``.
        is_permanent: a retry of the same request cannot succeed; sent as ``x-should-retry: false``.
    """

    status: ClassVar[int]
    type: ClassVar[str]
    code: ClassVar[str]

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: int | None = None, is_permanent: bool = False
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = None if retry_after_s is None else min(120, max(1, retry_after_s))
        self.is_permanent = is_permanent


class BadInput(RequestError):
    """A field is missing, malformed, or has a value that is not accepted."""

    status, type, code = 400, "invalid_request_error", "invalid_input"


class ContextLengthExceeded(BadInput):
    """A text is longer than the model takes, and the request said ``truncate: false``."""

    code = "context_length_exceeded"


class UnsupportedDimensions(BadInput):
    """``dimensions`` is not a size that the model can return."""

    code = "unsupported_dimensions"


class UnsupportedOutput(BadInput):
    """The model does not make what was asked for, sparse weights say. On TEI's paths a 424, as there."""

    code = "unsupported_output"


class EmptyInput(BadInput):
    """On TEI's paths: a list without a text. 400 there too, where all else that is wrong in a request is 422."""

    code = "empty_input"


class BodyTooSlow(BadInput):
    """The request's body did not come within the time that it has. Not 408: clients would send it again, as slowly."""

    code = "body_timeout"


class InvalidHttp(BadInput):
    """The bytes are not an HTTP/1.1 request, or break one of its rules: no `Host` header, for example, or two of them."""

    code = "invalid_http"


class ReloadRefused(BadInput):
    """The registry cannot be served as it is now; everything stays as it was. The message lists every problem."""

    code = "reload_refused"


class Unauthorized(RequestError):
    """API keys are configured, and the request carries none of them."""

    status, type, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(RequestError):
    """The path is for the operator, and the request does not carry the operator's key."""

    status, type, code = 403, "permission_error", "forbidden"


class ModelNotAllowed(Forbidden):
    """The API key is not for this model."""

    code = "model_not_allowed"


class NotFound(RequestError):
    """No such path."""

    status, type, code = 404, "invalid_request_error", "not_found"


class ModelNotFound(NotFound):
    """No model, alias or source has that name."""

    code = "model_not_found"


class ModelDisabled(ModelNotFound):
    """The registry has the model, and does not enable it here."""

    code = "model_disabled"


class ExperimentNotFound(NotFound):
    """No experiment has that id."""

    code = "experiment_not_found"


class MethodNotAllowed(RequestError):
    """The path exists, but not with that HTTP method."""

    status, type, code = 405, "invalid_request_error", "method_not_allowed"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class SpaceMismatch(RequestError):
    """``x-gateway-expect-space`` names another space than the one the vectors would come from."""

    status, type, code = 412, "invalid_request_error", "space_mismatch"


class BodyTooLarge(RequestError):
    """The request body is larger than the limit."""

    status, type, code = 413, "invalid_request_error", "body_too_large"


class TooMuchMemory(BodyTooLarge):
    """The request and its answer would need more memory than a single request may use. Send it in parts."""

    code = "too_much_memory"


class UnsupportedEncoding(RequestError):
    """The body has a ``Content-Encoding`` that the gateway does not decode; the message names those that it does."""

    status, type, code = 415, "invalid_request_error", "unsupported_encoding"


class Overloaded(RequestError):
    """The model's queue is full; nothing was computed. Retry after the seconds in ``Retry-After``."""

    status, type, code = 429, "rate_limit_error", "overloaded"


class RateLimited(Overloaded):
    """The client has used its requests or tokens of this minute. ``x-ratelimit-*`` say how much there is and when again."""

    code = "rate_limit_exceeded"


class MemoryFull(Overloaded):
    """The memory for requests is in use; nothing was computed. Retry after the seconds in ``Retry-After``."""

    status, type, code = 503, "server_error", "memory_full"


class HeadersTooLarge(RequestError):
    """The request's headers are larger than the gateway takes."""

    status, type, code = 431, "invalid_request_error", "headers_too_large"


class InternalError(RequestError):
    """A fault of the gateway. The message is fixed and names the request id; the log has the traceback."""

    status, type, code = 500, "server_error", "internal_error"


class InferenceFailed(InternalError):
    """The model's forward pass raised; the next request is not affected."""

    code = "inference_failed"


class UpstreamFailed(InferenceFailed):
    """The server that runs the model failed, was too slow, or its answer did not hold vectors for these texts."""

    status, code = 502, "upstream_failed"


class OutOfMemory(InternalError):
    """One text alone needs more memory than the device has left; the message names its tokens."""

    code = "out_of_memory"


class InvalidVectors(InternalError):
    """The model returned vectors that are not finite or not of the promised width; none is handed out."""

    code = "invalid_vectors"


class UnsupportedTransferCoding(RequestError):
    """`Transfer-Encoding` names more than `chunked`. 501 as RFC 9112 has it, with `x-should-retry: false`."""

    status, type, code = 501, "invalid_request_error", "unsupported_transfer_encoding"


class ModelNotReady(RequestError):
    """The model is still loading. Retry after the seconds in ``Retry-After``."""

    status, type, code = 503, "server_error", "model_not_ready"


class ModelUnavailable(ModelNotReady):
    """The model failed to load; a retry does not help until the operator acts."""

    code = "model_unavailable"


class ModelRecovering(ModelNotReady):
    """The model hung or failed, and is being loaded anew. Retry after the seconds in ``Retry-After``."""

    code = "model_recovering"


class UpstreamUnavailable(ModelNotReady):
    """No server that runs the model can be reached. Retry after the seconds in ``Retry-After``."""

    code = "upstream_unavailable"


class ShuttingDown(ModelNotReady):
    """The gateway is stopping; another replica, or the restarted one, will answer."""

    code = "shutting_down"


class DeadlineExceeded(RequestError):
    """The request was not done within its time limit; its queued texts were dropped."""

    status, type, code = 504, "server_error", "deadline_exceeded"


class ClientDisconnected(RequestError):
    """The client went away before the answer; its queued texts were dropped."""

    status, type, code = 499, "invalid_request_error", "client_disconnected"

"""Every error of the gateway, as one tree.

::

    GatewayError
    ├── StartError                      the process or a model cannot start
    │   ├── ConfigError                 models.yaml or a setting is wrong (all problems at once)
    │   ├── LoadError                   a model's checkpoint is missing, corrupt, unsuitable or too large
    │   │   ├── TooLittleMemory         it does not fit next to what the device holds now
    │   │   ├── LicenseNotAccepted      the license of the weights must be accepted first
    │   │   ├── CardLostAtLoad          its card can compute nothing more in this process
    │   │   └── NotReachable            no server that runs the model returns vectors
    │   └── CompareError                the data, the models or the gateway do not allow a comparison
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
        ├── OutcomesUnavailable    503
        ├── DeadlineExceeded       504
        └── ClientDisconnected     499  (only logged: the client is gone)

The middleware is the one exit: it renders every ``RequestError`` that a handler raises. Only ``gateway.http.protocol``
responds by itself, with an ``InvalidHttp``, to bytes that are not a request. docs/errors.md is made from these classes.
"""

from __future__ import annotations

from copyreg import __newobj__ as _new  # type: ignore[attr-defined]
from dataclasses import dataclass
from typing import ClassVar


class GatewayError(Exception):
    """Root of every error that the gateway raises on purpose. Pickled with all attributes, for replicas elsewhere."""

    def __reduce__(self) -> tuple[object, ...]:
        return _new, (type(self), *self.args), self.__dict__  # without `__init__`, which may take other arguments


class StartError(GatewayError):
    """The process or one of its models cannot start."""


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One mistake in a configuration file.

    ``line`` and ``column`` count from 1; both are 0 when the problem has no position in a file.
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
    """The registry or a setting is wrong; ``problems`` lists every mistake, in file order."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class LoadError(StartError):
    """A model cannot be loaded: its checkpoint is missing, corrupt or unsupported, or does not fit into memory."""


class TooLittleMemory(LoadError):
    """A model does not fit into the memory that a device has left.

    Attributes:
        device: torch device, such as ``cpu`` or ``cuda:0``.
        missing_bytes: the number of missing bytes; 0 if unknown.
    """

    def __init__(self, message: str, device: str, missing_bytes: int = 0) -> None:
        super().__init__(message)
        self.device = device
        self.missing_bytes = missing_bytes


class LicenseNotAccepted(LoadError):
    """The weights are not downloaded before models.yaml accepts their license, which forbids commercial use."""


class CardLostAtLoad(LoadError):
    """The card failed while a model was loaded on it, and can compute nothing more in this process.

    Attributes:
        device: torch device, such as ``cuda:0``.
    """

    def __init__(self, message: str, device: str) -> None:
        super().__init__(message)
        self.device = device


class NotReachable(LoadError):
    """No server that runs the model returns vectors; the gateway keeps trying them."""


class CompareError(StartError):
    """A comparison cannot run: its data, its models or the gateway do not allow it."""


class RequestError(GatewayError):
    """One request failed; the message gives its caller the reason.

    Attributes:
        status: HTTP status of the response.
        type: OpenAI's error ``type``.
        code: machine-readable ``code``, stable across releases.
        param: the request field at fault, if any.
        retry_after_s: whole seconds after which a retry may succeed, 1 to 120; sent as ``Retry-After``.
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
    """A field is missing or malformed, or its value is not accepted."""

    status, type, code = 400, "invalid_request_error", "invalid_input"


class ContextLengthExceeded(BadInput):
    """A text is longer than the model's limit, and the request says ``truncate: false``."""

    code = "context_length_exceeded"


class UnsupportedDimensions(BadInput):
    """The model cannot return vectors of the requested ``dimensions``."""

    code = "unsupported_dimensions"


class UnsupportedOutput(BadInput):
    """The model cannot return the requested output, such as sparse weights. On TEI's paths the status is 424, as in TEI."""

    code = "unsupported_output"


class EmptyInput(BadInput):
    """The list is empty: on `/v1/tokenize`, and on TEI's paths, where all other invalid requests are a 422, as in TEI."""

    code = "empty_input"


class BodyTooSlow(BadInput):
    """The request's body did not arrive in time. Not a 408, which clients would retry just as slowly."""

    code = "body_timeout"


class InvalidHttp(BadInput):
    """The bytes are not a valid HTTP/1.1 request: the `Host` header is missing or repeated, for example."""

    code = "invalid_http"


class ReloadRefused(BadInput):
    """The changed registry cannot be served, so the old one stays in use. The message lists every problem."""

    code = "reload_refused"


class Unauthorized(RequestError):
    """The gateway requires an API key, and the request has no valid one."""

    status, type, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(RequestError):
    """The path is for operators, and the request does not have the admin key."""

    status, type, code = 403, "permission_error", "forbidden"


class ModelNotAllowed(Forbidden):
    """The API key may not use this model."""

    code = "model_not_allowed"


class NotFound(RequestError):
    """The path does not exist, or is switched off; then the message says how to switch it on."""

    status, type, code = 404, "invalid_request_error", "not_found"


class ModelNotFound(NotFound):
    """No model, alias or source has that name."""

    code = "model_not_found"


class ModelDisabled(ModelNotFound):
    """The registry lists the model but does not enable it on this machine."""

    code = "model_disabled"


class ExperimentNotFound(NotFound):
    """No experiment has that id."""

    code = "experiment_not_found"


class MethodNotAllowed(RequestError):
    """The path does not allow this HTTP method."""

    status, type, code = 405, "invalid_request_error", "method_not_allowed"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class SpaceMismatch(RequestError):
    """The vectors would be in another space than ``x-gateway-expect-space`` demands."""

    status, type, code = 412, "invalid_request_error", "space_mismatch"


class BodyTooLarge(RequestError):
    """The request body is larger than the limit."""

    status, type, code = 413, "invalid_request_error", "body_too_large"


class TooMuchMemory(BodyTooLarge):
    """The request and its response need more memory than one request may use. Send it in parts."""

    code = "too_much_memory"


class UnsupportedEncoding(RequestError):
    """The gateway does not decode the body's ``Content-Encoding``; the message lists the supported ones."""

    status, type, code = 415, "invalid_request_error", "unsupported_encoding"


class Overloaded(RequestError):
    """The model's queue is full; nothing was computed. Retry after the seconds in ``Retry-After``."""

    status, type, code = 429, "rate_limit_error", "overloaded"


class RateLimited(Overloaded):
    """The client used up its requests or tokens per minute. ``x-ratelimit-*`` give the limit, the rest and the reset."""

    code = "rate_limit_exceeded"


class MemoryFull(Overloaded):
    """The memory for requests is exhausted; nothing was computed. Retry after the seconds in ``Retry-After``."""

    status, type, code = 503, "server_error", "memory_full"


class HeadersTooLarge(RequestError):
    """The request's headers are larger than the limit, or too many."""

    status, type, code = 431, "invalid_request_error", "headers_too_large"


class InternalError(RequestError):
    """The gateway itself failed. The message is fixed and contains the request id; the log has the traceback."""

    status, type, code = 500, "server_error", "internal_error"


class InferenceFailed(InternalError):
    """The model's forward pass raised; the next request is not affected."""

    code = "inference_failed"


class UpstreamFailed(InferenceFailed):
    """The server that runs the model failed, was too slow, or returned something other than vectors for these texts."""

    status, code = 502, "upstream_failed"


class OutOfMemory(InternalError):
    """A single text needs more memory than the device has left; the message gives its number of tokens."""

    code = "out_of_memory"


class InvalidVectors(InternalError):
    """The model returned vectors that are not finite or have the wrong width; the gateway withholds them."""

    code = "invalid_vectors"


class UnsupportedTransferCoding(RequestError):
    """`Transfer-Encoding` names a coding other than `chunked`. RFC 9112 demands a 501; it has `x-should-retry: false`."""

    status, type, code = 501, "invalid_request_error", "unsupported_transfer_encoding"


class ModelNotReady(RequestError):
    """The model is still loading, at the start or on demand. Retry after the seconds in ``Retry-After``."""

    status, type, code = 503, "server_error", "model_not_ready"


class ModelUnavailable(ModelNotReady):
    """The model failed to load; retries fail until an operator acts."""

    code = "model_unavailable"


class ModelRecovering(ModelNotReady):
    """The model hung or failed and is being reloaded, or the process restarts. Retry after the seconds in `Retry-After`."""

    code = "model_recovering"


class UpstreamUnavailable(ModelNotReady):
    """No server that runs the model can be reached. Retry after the seconds in ``Retry-After``."""

    code = "upstream_unavailable"


class ShuttingDown(ModelNotReady):
    """The gateway is stopping; another replica or the restarted one will answer."""

    code = "shutting_down"


class OutcomesUnavailable(RequestError):
    """The file of experiments is busy (retry after ``Retry-After`` seconds) or full; nothing was kept."""

    status, type, code = 503, "server_error", "outcomes_unavailable"


class DeadlineExceeded(RequestError):
    """The request exceeded its time limit; its queued texts were dropped."""

    status, type, code = 504, "server_error", "deadline_exceeded"


class ClientDisconnected(RequestError):
    """The client disconnected before the response was complete; its queued texts were dropped."""

    status, type, code = 499, "invalid_request_error", "client_disconnected"

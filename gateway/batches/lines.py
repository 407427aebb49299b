"""The lines of an input file: reading, validating and answering them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import orjson

from gateway.batches.values import MAX_LINES, Batch, LineError

_MAX_ERRORS = 100
# Lines including blank ones: a file of 200 MB of line breaks would keep a thread busy for half a minute.
_MAX_WITH_BLANKS = 4 * MAX_LINES
_MAX_OPTIONS = 256
# The codes of OpenAI's API for requests without an answer.
_UNANSWERED = {
    "batch_expired": "This request could not be executed before the completion window expired.",
    "batch_cancelled": "The batch was cancelled before this request was executed.",
}


class Interrupted(Exception):
    """The process is stopping, and the next process starts the work over."""


class TooManyLines(Exception):
    """The file has very many lines, most of them blank."""


class WrongLine(Exception):
    """A line is not a valid request for this batch. ``code`` and ``param`` are for the client.

    Args:
        custom_id: the line's ``custom_id``, if it could be read.
    """

    def __init__(self, code: str, message: str, param: str | None = None, custom_id: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.custom_id = custom_id


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a batch.

    Attributes:
        body: the body as JSON.
        weight: an estimate of the answer's size, in vectors of one text.
        options: the fields of the body on which the space of the answer depends, as JSON; empty without such fields.
        answered: the answer of a request that need not be sent, such as an error.
    """

    custom_id: str
    model: str | None
    body: bytes
    weight: int = 1
    options: str = ""
    answered: Answered | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer to a request.

    Attributes:
        body: the body as JSON, exactly as ``POST`` to the endpoint returns it.
        is_passing: another attempt may succeed, and the request did not cause the failure.
        retry_after_s: the seconds to wait before another attempt, if known.
        space: the space of its vectors; ``None`` if the batch may have vectors of several.
    """

    status: int
    request_id: str
    body: bytes
    num_tokens: int = 0
    is_passing: bool = False
    retry_after_s: int | None = None
    space: str | None = None


class Requests(Protocol):
    """Reads and answers the requests of a batch. The implementation knows HTTP."""

    @property
    def max_line_bytes(self) -> int:
        """The length limit of a line, in bytes."""

    @property
    def is_paused(self) -> bool:
        """Whether new requests should wait."""

    def read(self, endpoint: str, line: bytes) -> Line:
        """Read a line, in a thread.

        Raises:
            WrongLine: it is not a request for this endpoint.
        """

    def refusal(self, batch: Batch) -> LineError | None:
        """Return the reason why the owner may not use a batch or its model; ``None`` if the owner may."""

    async def answer(self, batch: Batch, line: Line) -> Answered:
        """Answer a request."""


class RawLine(NamedTuple):
    """A line.

    Attributes:
        number: the number of the line from 1, blank lines included, counted from the position where reading began.
        end: the offset of the next line in bytes.
    """

    content: bytes
    number: int
    end: int
    is_too_long: bool


def read_lines(file: BinaryIO, max_bytes: int) -> Iterator[RawLine]:
    """Yield the lines of a file that are not blank. Of a line that is too long, yield only the first bytes.

    Raises:
        TooManyLines: the file has more lines than a file of requests needs.
    """
    end = file.tell()
    number = 0
    while content := file.readline(max_bytes + 1):
        number += 1
        if number > _MAX_WITH_BLANKS:
            raise TooManyLines
        end += len(content)
        is_too_long = len(content) > max_bytes and not content.endswith(b"\n")
        if is_too_long:
            while (rest := file.readline(max_bytes)) and not rest.endswith(b"\n"):
                end += len(rest)
            end += len(rest)
        if is_too_long or content.strip():
            yield RawLine(content, number, end, is_too_long)


@dataclass(frozen=True, slots=True)
class Validated:
    """The result of validating all lines of a file.

    Attributes:
        model: the model of all requests.
        first_line: the number of the first request's line.
    """

    num_lines: int
    model: str | None
    first_line: int
    errors: tuple[LineError, ...]


def validate(path: Path, batch: Batch, requests: Requests, is_stopped: Callable[[], bool]) -> Validated:
    """Validate all lines of a batch's input. Up to 100 errors are returned.

    Raises:
        Interrupted: ``is_stopped`` returned ``True``.
    """
    seen = _Seen()
    errors: list[LineError] = []
    num_lines = first_line = 0
    try:
        with path.open("rb") as file:
            for num_lines, raw in enumerate(read_lines(file, requests.max_line_bytes), start=1):
                first_line = first_line or raw.number
                if is_stopped():
                    raise Interrupted
                if num_lines > MAX_LINES:
                    raise TooManyLines
                try:
                    seen.add(_read(raw, batch.endpoint, requests))
                except WrongLine as error:
                    errors.append(LineError(error.code, str(error), raw.number, error.param))
                    if len(errors) == _MAX_ERRORS:
                        break
    except TooManyLines:
        message = f"The file has more than {MAX_LINES:,} requests, which is the limit of a batch."
        if num_lines <= MAX_LINES:
            message = f"The file has more than {_MAX_WITH_BLANKS:,} lines, which is the limit with blank lines."
        errors = [LineError("too_many_requests", message)]
    if not num_lines and not errors:
        errors.append(LineError("empty_file", "The input file has no requests."))
    return Validated(num_lines, seen.model, first_line, tuple(errors))


def _read(raw: RawLine, endpoint: str, requests: Requests) -> Line:
    if raw.is_too_long:
        raise WrongLine("line_too_long", f"This line has more than {requests.max_line_bytes} bytes.")
    return requests.read(endpoint, raw.content)


def read_again(raw: RawLine, batch: Batch, requests: Requests) -> Line:
    """Read a line of a batch in progress. A line that is no longer valid gets the error as its answer.

    The batch was validated, but perhaps by a gateway with higher limits, and one line must not hold up the others.
    """
    try:
        return _read(raw, batch.endpoint, requests)
    except WrongLine as error:
        problem = {"message": str(error), "type": "invalid_request_error", "param": error.param, "code": error.code}
        return Line(error.custom_id, None, b"", answered=Answered(400, "", orjson.dumps({"error": problem})))


class _Seen:
    """The lines of a file so far."""

    def __init__(self) -> None:
        self._first: Line | None = None
        # The ids are hashed, so that 50,000 ids of any length take only a few MB.
        self._ids: set[bytes] = set()
        self._options: set[str] = set()

    @property
    def model(self) -> str | None:
        return None if self._first is None else self._first.model

    def add(self, line: Line) -> None:
        """Add a line.

        Raises:
            WrongLine: the line does not fit the lines before it.
        """
        self._first = self._first or line
        digest = hashlib.blake2b(line.custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in self._ids:
            shown = line.custom_id[:100]
            raise WrongLine(
                "duplicate_custom_id", f"The custom_id {shown!r} was already used by an earlier line.", "custom_id"
            )
        self._ids.add(digest)
        if line.model != self.model:
            raise WrongLine(
                "mismatched_model",
                f"The provided model {str(line.model)[:100]!r} does not match expected model {str(self.model)[:100]!r}. "
                "All requests of a batch must have the same model: use a separate batch for each model.",
                "body.model",
            )
        self._options.add(line.options)
        if len(self._options) > _MAX_OPTIONS:
            raise WrongLine(
                "too_many_options",
                f"The requests of this batch differ in their task, dimensions or encoding in more than {_MAX_OPTIONS} "
                "ways, which is the limit: use several batches.",
                "body",
            )


# --------------------------------------------------------------------------------------------------------- outputs


def output_line(number: int, batch: Batch, line: Line, answered: Answered) -> bytes:
    """Return the line for an answer, in the form of the output and error files."""
    response = b'{"status_code":%d,"request_id":%b,"body":%b}' % (
        answered.status,
        orjson.dumps(answered.request_id),
        answered.body,
    )
    return _output(number, batch, line.custom_id, response, b"null")


def in_one_space(spaces: Mapping[str, str], line: Line, answered: Answered) -> tuple[Answered, Mapping[str, str]]:
    """Return an answer, and the spaces of the batch with its own.

    If the model was changed since the batch began, by a reload, the answer is an error: a file with vectors of two spaces
    would look as if they could be compared.
    """
    if answered.space is None:
        return answered, spaces
    held = spaces.get(line.options)
    if held is None:
        return answered, {**spaces, line.options: answered.space}
    if held == answered.space:
        return answered, spaces
    message = (
        f"The vectors of this batch are in {held}, and this one would be in {answered.space}: the model was changed "
        "in the meantime. Make a new batch of all requests."
    )
    problem = {"message": message, "type": "invalid_request_error", "param": "model", "code": "space_mismatch"}
    return Answered(412, answered.request_id, orjson.dumps({"error": problem})), spaces


def unanswered_line(number: int, batch: Batch, custom_id: str, reason: str) -> bytes:
    """Return the line of the error file for a request without an answer; the reason is `batch_expired` or another."""
    return _output(number, batch, custom_id, b"null", orjson.dumps({"code": reason, "message": _UNANSWERED[reason]}))


def _output(number: int, batch: Batch, custom_id: str, response: bytes, error: bytes) -> bytes:
    request = f"batch_req_{batch.id.removeprefix('batch_')}_{number}"
    return b'{"id":%b,"custom_id":%b,"response":%b,"error":%b}\n' % (
        orjson.dumps(request),
        orjson.dumps(custom_id),
        response,
        error,
    )

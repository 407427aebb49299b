"""The values of files and batches, in storage and between modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from gateway.errors import RequestError

MAX_FILE_BYTES = 200 * 1024 * 1024
"""The size limit of an uploaded file in bytes, as in OpenAI's API."""

MAX_UPLOAD_BYTES = MAX_FILE_BYTES + 64 * 1024
"""The size limit of an upload's body in bytes: the file, and the other fields of the form."""

MAX_LINES = 50_000
"""The maximum number of requests in a file, as in OpenAI's API."""

WINDOW_S = 24 * 3600
"""The time limit of a batch, in seconds."""

KEPT_S = 30 * 24 * 3600
"""The seconds that a file is kept by default, and a batch after its end."""


class BatchesUnavailable(RequestError):
    """The files of batches cannot be read or written now."""

    status, type, code = 503, "server_error", "batches_unavailable"


class StorageFull(RequestError):
    """The folder of batches has reached its size limit, or its disk is full."""

    status, type, code = 507, "server_error", "storage_full"


class Purpose(StrEnum):
    """The purpose of a file."""

    BATCH = "batch"
    BATCH_OUTPUT = "batch_output"


class Status(StrEnum):
    """The state of a batch."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (Status.COMPLETED, Status.FAILED, Status.EXPIRED, Status.CANCELLED)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file.

    Attributes:
        owner: the client that owns the file.
        created_at, expires_at: times in seconds since the epoch.
    """

    id: str
    owner: str
    filename: str
    purpose: Purpose
    num_bytes: int
    created_at: int
    expires_at: int


@dataclass(frozen=True, slots=True)
class LineError:
    """A reason why a batch failed.

    Attributes:
        line: the number of the line, from 1; ``None`` if the error is not about a line.
    """

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch and its progress: everything that a restart needs.

    Attributes:
        owner: the client that owns the batch.
        output_id, error_id: the ids of the files with answers and errors, which clients see once the batch has ended.
        times: the time at which the batch entered each of its states, in seconds since the epoch.
        position: the input's offset of the first line without an answer, in bytes.
        output_bytes, error_bytes: the size of each file that counts. Anything after that was written before a crash.
        output_kept_s: the seconds that output and errors are kept.
        end: the state after finalizing.
        spaces: the space of the vectors so far, by the options of the request. Answers of experiments have no entry.
        headers: the headers of the request that made the batch that apply to each of its requests.
    """

    id: str
    owner: str
    endpoint: str
    input_id: str
    output_id: str
    error_id: str
    created_at: int
    expires_at: int
    metadata: Mapping[str, str] | None = None
    output_kept_s: int = KEPT_S
    status: Status = Status.VALIDATING
    times: Mapping[str, int] = field(default_factory=dict)
    errors: tuple[LineError, ...] = ()
    model: str | None = None
    num_total: int = 0
    num_completed: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    position: int = 0
    output_bytes: int = 0
    error_bytes: int = 0
    end: Status = Status.COMPLETED
    spaces: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_answered(self) -> int:
        """The number of lines, from the beginning of the file, that have an answer."""
        return self.num_completed + self.num_failed

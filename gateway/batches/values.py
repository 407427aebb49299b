"""The values of files and batches, as they are kept and as they pass between the parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from gateway.errors import RequestError

MAX_FILE_BYTES = 200 * 1024 * 1024
"""The largest file that can be uploaded, as in OpenAI's API."""

MAX_UPLOAD_BYTES = MAX_FILE_BYTES + 64 * 1024
"""The largest body of an upload: the file, and the other fields of the form."""

MAX_LINES = 50_000
"""The most requests in a file, as in OpenAI's API."""

WINDOW_S = 24 * 3600
"""Seconds that a batch may take."""

KEPT_S = 30 * 24 * 3600
"""Seconds for which a file is kept by default, and a batch after its end."""


class BatchesUnavailable(RequestError):
    """The files of batches cannot be read or written now."""

    status, type, code = 503, "server_error", "batches_unavailable"


class StorageFull(RequestError):
    """The folder of batches has the size that it may have, or its disk is full."""

    status, type, code = 507, "server_error", "storage_full"


class Purpose(StrEnum):
    """What a file is for."""

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
        owner: the client that it belongs to.
        created_at: in seconds since the epoch, as ``expires_at``.
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
    """Why a batch failed.

    Attributes:
        line: counted from 1; ``None`` if it is not about a line.
    """

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch, and how far it is: everything that a restart needs.

    Attributes:
        owner: the client that it belongs to.
        output_id: of the file with the answers, which exists for clients once the batch has ended; likewise ``error_id``.
        times: of each state that it has had, in seconds since the epoch.
        position: where the first line that has no answer yet begins in the input, in bytes.
        output_bytes: how much of the output counts; whatever is behind that was written before a crash. Likewise
            ``error_bytes``.
        output_kept_s: seconds for which output and errors are kept.
        end: the state that it gets once it is finalized.
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

    @property
    def num_answered(self) -> int:
        """How many lines have an answer, which are the first of the file."""
        return self.num_completed + self.num_failed

    def fields_unlike(self, other: Batch) -> dict[str, Any]:
        """Return the fields that another batch has other values of, with those of this one."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value != getattr(other, name)}

"""Record the progress of batches on disk.

Answers are written in the order of the input. They are first written and synced, and then the batch's row records the
sizes of the files that count. After a crash, the files are truncated to that size, and the requests after it are
computed again. So each line is answered exactly once in the output, and none is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias, TypeVar

import structlog

from gateway.batches.store import Store
from gateway.batches.values import Batch, StoredFile

log = structlog.get_logger(__name__)
T = TypeVar("T")
Change: TypeAlias = Callable[[Batch], Batch]

# The pause after a failure that no request caused, such as a full disk.
_PAUSE_S = 15.0


@dataclass(eq=False, slots=True)
class Run:
    """A batch that has not ended.

    Attributes:
        batch: its state on the disk; replaced only on the event loop.
        changing: held while the state is changed.
    """

    batch: Batch
    task: asyncio.Task[None] | None = None
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers to the next lines of a batch.

    Attributes:
        outputs, errors: the lines for the two files.
        position: the input's offset after the last of these lines, in bytes.
        spaces: the spaces of the batch including these answers.
    """

    outputs: Sequence[bytes]
    errors: Sequence[bytes]
    position: int
    spaces: Mapping[str, str]
    num_tokens: int = 0


class Recorder:
    """Changes batches in memory and on disk. An instance belongs to one event loop."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._thread = ThreadPoolExecutor(1, "batches")

    async def call(self, work: Callable[..., T], *values: object) -> T:
        """Call a method of the store, in its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *values)

    def close(self) -> None:
        """Close the store after the calls that have begun."""
        self._thread.submit(self.store.close).result()
        self._thread.shutdown()

    async def save(self, run: Run, change: Change, files: Sequence[StoredFile] = ()) -> None:
        """Change a batch on disk and then in memory, and add files, all or nothing. A batch has one change at a time.

        Args:
            change: may return the same batch, for no change.
        """
        async with run.changing:
            after = change(run.batch)
            if after is not run.batch:
                await self.call(self.store.save, after, *files)
                run.batch = after

    async def append(self, run: Run, answers: Answers) -> None:
        """Append answers to the files, and then record that they count."""
        batch = run.batch
        sizes = await self.call(self._append_now, batch, b"".join(answers.outputs), b"".join(answers.errors))
        change = partial(
            replace,
            output_bytes=sizes[0],
            error_bytes=sizes[1],
            num_completed=batch.num_completed + len(answers.outputs),
            num_failed=batch.num_failed + len(answers.errors),
            num_tokens=batch.num_tokens + answers.num_tokens,
            position=answers.position,
            spaces=answers.spaces,
        )
        await self.save(run, change)

    def _append_now(self, batch: Batch, outputs: bytes, errors: bytes) -> tuple[int, int]:
        sizes = [batch.output_bytes, batch.error_bytes]
        written = []
        for i, (file_id, data) in enumerate(((batch.output_id, outputs), (batch.error_id, errors))):
            if data:
                sizes[i] = self.store.write(file_id, sizes[i], data)
                written.append(file_id)
        self.store.sync(*written)
        return sizes[0], sizes[1]

    @staticmethod
    async def pause(batch: Batch, error: Exception) -> None:
        """Log why a batch cannot be recorded now, such as a full disk, and wait a while."""
        log.error("batch_waits", batch=batch.id, owner=batch.owner, reason=str(error), exc_info=error)
        await asyncio.sleep(_PAUSE_S)

"""The runner of batches, which answers one batch per client at a time and records its progress on disk.

Answers are written in the order of the input. The runner first writes and syncs them, and then records in the batch's
row how much of the files counts. After a crash, the files are truncated to that size, and the requests after it are
computed again. So each line is answered exactly once in the output, and none is lost.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

import structlog

from gateway.batches import lines as of_lines
from gateway.batches.lines import Answered, Line, RawLine, Requests, read_again, read_lines
from gateway.batches.store import Store
from gateway.batches.values import Batch, LineError, Purpose, Status, StoredFile
from gateway.telemetry import metrics

log = structlog.get_logger(__name__)
T = TypeVar("T")
Change: TypeAlias = Callable[[Batch], Batch]
Files: TypeAlias = Sequence[StoredFile]

# The limits of a batch's requests in flight: enough short ones to fill the engine's batches, and as memory allows.
_MAX_IN_FLIGHT = 64
_MAX_BYTES_IN_FLIGHT = 8 * 1024 * 1024
# Answers wait in memory until all earlier ones are written. Together they may be as large as one large response.
_MAX_WEIGHT_IN_FLIGHT = 2048
# How many batches, of different clients, are in progress; others wait.
_MAX_AT_ONCE = 16
# The pause after a failure that no request caused, such as a full disk.
_PAUSE_S = 15.0
_LONGEST_WAIT_S = 30.0
# How often to try a request whose failure may be temporary, but may also be its own fault.
_MAX_TRIES = 3
_SWEEP_EVERY_S = 600.0


@dataclass(eq=False, slots=True)
class _Run:
    """A batch that has not ended. ``batch`` is replaced only on the event loop."""

    batch: Batch
    task: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True)
class _InFlight:
    line: Line
    raw: RawLine
    task: asyncio.Task[Answered]


class Runner:
    """Runs all batches of a folder. An instance belongs to one event loop.

    Args:
        requests: reads and answers the requests.
        now: returns the time in seconds since the epoch.
    """

    def __init__(self, store: Store, requests: Requests, now: Callable[[], float] = time.time) -> None:
        self.store = store
        self._requests = requests
        self._now = now
        self._thread = ThreadPoolExecutor(1, "batches")
        # A separate thread from the store's: reading a large file must not hold up the store.
        self._reading = ThreadPoolExecutor(1, "batches-read")
        self._runs: dict[str, _Run] = {batch.id: _Run(batch) for batch in store.open_batches()}
        self._adding: dict[str, Batch] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._is_stopped = False

    async def call(self, work: Callable[..., T], *values: object) -> T:
        """Call a method of the store, in its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *values)

    def start(self) -> None:
        """Continue the batches that have not ended. Call it on the event loop; further calls do nothing."""
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep())
            if self._runs:
                log.info("batches_resumed", batches=len(self._runs))
            self._begin()

    async def stop(self) -> None:
        """Stop all batches where they are; the next start continues them from there."""
        self._is_stopped = True
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        tasks += [] if self._sweeper is None else [self._sweeper]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._reading.shutdown(wait=True, cancel_futures=True)
        self._thread.submit(self.store.close).result()
        self._thread.shutdown()

    # ------------------------------------------------------------------------------------------------ for the API

    async def add(self, batch: Batch) -> None:
        """Store a new batch and begin it when its turn comes, even if its client does not wait for the response."""
        self._adding[batch.id] = batch
        await asyncio.shield(asyncio.create_task(self._add(batch)))

    async def _add(self, batch: Batch) -> None:
        try:
            await self.call(self.store.add_batch, batch)
            self._runs[batch.id] = _Run(batch)
        finally:
            del self._adding[batch.id]
        self._begin()

    def _open_batches(self) -> list[Batch]:
        return [*self._adding.values(), *(run.batch for run in self._runs.values())]

    def num_open(self, owner: str) -> int:
        """Return the number of a client's batches that have not ended."""
        return sum(batch.owner == owner for batch in self._open_batches())

    def uses(self, file_id: str) -> str | None:
        """Return the batch that still reads or writes a file, if any."""
        for batch in self._open_batches():
            if file_id in (batch.input_id, batch.output_id, batch.error_id):
                return batch.id
        return None

    async def find(self, owner: str, batch_id: str) -> Batch | None:
        """Return a client's batch in its current state."""
        run = self._runs.get(batch_id)
        if run is not None:
            return run.batch if run.batch.owner == owner else None
        return await self.call(self.store.batch, owner, batch_id)

    async def cancel(self, batch: Batch) -> Batch:
        """Cancel a batch that has not ended, and return it."""
        run = self._runs.get(batch.id)
        if run is None or run.batch.status not in (Status.VALIDATING, Status.IN_PROGRESS):
            return batch if run is None else run.batch
        await self._become(run, Status.CANCELLING)
        return run.batch

    # ------------------------------------------------------------------------------------------------------ turns

    def _begin(self) -> None:
        """Begin the oldest batch of each client that has no batch in progress."""
        busy = {run.batch.owner for run in self._runs.values() if run.task is not None}
        for run in list(self._runs.values()):
            if self._is_stopped or self._sweeper is None or len(busy) >= _MAX_AT_ONCE:
                return
            if run.batch.owner not in busy:
                busy.add(run.batch.owner)
                run.task = asyncio.create_task(self._run(run))
        for status in Status:
            if not status.is_final:
                number = sum(run.batch.status is status for run in self._runs.values())
                metrics.BATCH_JOBS.labels(status).set(number)

    async def _run(self, run: _Run) -> None:
        """Run a batch to its end, through every failure that the batch did not cause."""
        while not run.batch.status.is_final:
            try:
                await self._advance(run)
            except Exception as error:  # usually a full or broken disk; the batch then continues where it stopped
                log.error("batch_waits", batch=run.batch.id, owner=run.batch.owner, reason=str(error), exc_info=True)
                await asyncio.sleep(_PAUSE_S)
        del self._runs[run.batch.id]
        batch = run.batch
        metrics.BATCH_JOBS_ENDED.labels(batch.status).inc()
        log.info(
            "batch_ended",
            batch=batch.id,
            owner=batch.owner,
            status=batch.status,
            completed=batch.num_completed,
            failed=batch.num_failed,
            total=batch.num_total,
            num_tokens=batch.num_tokens,
        )
        self._begin()

    async def _advance(self, run: _Run) -> None:
        try:
            await self._go_on(run)
        except FileNotFoundError as error:
            message = f"A file of this batch is missing from the gateway's disk: {Path(error.filename or '').name}"
            change = partial(replace, errors=(LineError("file_missing", message),), output_bytes=0, error_bytes=0)
            await self._become(run, Status.FAILED, change)

    async def _go_on(self, run: _Run) -> None:
        match run.batch.status:
            case Status.VALIDATING:
                await self._validate(run)
            case Status.IN_PROGRESS:
                await self._answer_all(run)
            case Status.CANCELLING:
                await self._finish(run, Status.CANCELLED)
            case _:
                await self._finish(run, run.batch.end)

    async def _become(self, run: _Run, status: Status, change: Change = lambda batch: batch, files: Files = ()) -> None:
        """Change the state of a batch in memory and on disk, and add files, all or nothing."""
        before = run.batch
        times = {**before.times, status.value: int(self._now())}
        run.batch = after = replace(change(before), status=status, times=times)
        try:
            await self.call(self.store.save, run.batch, *files)
        except BaseException:  # undo only this change: answers may have been recorded in the meantime
            run.batch = replace(run.batch, **before.fields_unlike(after))
            raise

    async def _validate(self, run: _Run) -> None:
        batch = run.batch
        path = self.store.path(batch.input_id)
        work = partial(of_lines.validate, path, batch, self._requests, lambda: self._is_stopped)
        found = await asyncio.get_running_loop().run_in_executor(self._reading, work)
        if run.batch.status is not Status.VALIDATING:  # it was canceled in the meantime
            return
        errors = found.errors
        if not errors and (refusal := self._requests.refusal(replace(batch, model=found.model))) is not None:
            errors = (refusal,)
        change = partial(replace, model=found.model, num_total=found.num_lines, errors=errors)
        await self._become(run, Status.FAILED if errors else Status.IN_PROGRESS, change)
        log.info("batch_validated", batch=batch.id, owner=batch.owner, lines=found.num_lines, errors=len(errors))

    async def _finish(self, run: _Run, end: Status) -> None:
        """Turn output and errors into files and end the batch, in one step."""
        batch, now = run.batch, int(self._now())
        sizes = {batch.output_id: batch.output_bytes, batch.error_id: batch.error_bytes}
        names = {batch.output_id: f"{batch.id}_output.jsonl", batch.error_id: f"{batch.id}_error.jsonl"}
        files = [
            StoredFile(file_id, batch.owner, names[file_id], Purpose.BATCH_OUTPUT, size, now, now + batch.output_kept_s)
            for file_id, size in sizes.items()
            if size
        ]
        for file in files:
            await self.call(self.store.cut, file.id, file.num_bytes)
        await self._become(run, end, files=files)

    # ------------------------------------------------------------------------------------------------------ lines

    async def _answer_all(self, run: _Run) -> None:
        """Answer the remaining lines until the file or the batch's time ends."""
        with self.store.path(run.batch.input_id).open("rb") as file:
            file.seek(run.batch.position)
            lines = read_lines(file, self._requests.max_line_bytes)
            waiting: deque[_InFlight] = deque()
            try:
                await self._answer_in_order(run, lines, waiting)
            finally:
                tasks = [one.task for one in waiting]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        if run.batch.status is Status.IN_PROGRESS:
            await self._become(run, Status.FINALIZING)

    async def _answer_in_order(self, run: _Run, lines: Iterator[RawLine], waiting: deque[_InFlight]) -> None:
        has_more = True
        while run.batch.status is Status.IN_PROGRESS:
            if self._now() >= run.batch.expires_at:
                await self._expire(run)
                return
            if (refusal := self._requests.refusal(run.batch)) is not None and refusal.code == "invalid_api_key":
                change = partial(replace, errors=(refusal,), end=Status.FAILED)
                await self._become(run, Status.FINALIZING, change)
                return
            has_more = has_more and await self._fill(run, lines, waiting)
            if not waiting:
                if not has_more:
                    return
                await asyncio.sleep(0.2)  # paused
                continue
            left_s = max(0.0, run.batch.expires_at - self._now())
            await asyncio.wait([waiting[0].task], timeout=min(1.0, left_s))  # or a timeout or cancelation
            done = list(itertools.takewhile(lambda one: one.task.done(), waiting))
            if done:
                await self._write(run, done)
                for _ in done:
                    waiting.popleft()

    async def _fill(self, run: _Run, lines: Iterator[RawLine], waiting: deque[_InFlight]) -> bool:
        """Begin as many further requests as may be in flight; return whether the file has more."""
        if self._requests.is_paused:
            return True
        num_bytes = sum(len(one.raw.content) for one in waiting)
        weight = sum(one.line.weight for one in waiting)
        while len(waiting) < _MAX_IN_FLIGHT and num_bytes < _MAX_BYTES_IN_FLIGHT and weight < _MAX_WEIGHT_IN_FLIGHT:
            found = await asyncio.get_running_loop().run_in_executor(self._reading, self._next, run.batch, lines)
            if found is None:
                return False
            raw, line = found
            num_bytes += len(raw.content)
            weight += line.weight
            waiting.append(_InFlight(line, raw, asyncio.create_task(self._answer(run, line))))
        return True

    def _next(self, batch: Batch, lines: Iterator[RawLine]) -> tuple[RawLine, Line] | None:
        raw = next(lines, None)
        return None if raw is None else (raw, read_again(raw, batch, self._requests))

    async def _answer(self, run: _Run, line: Line) -> Answered:
        """Answer a request, waiting for as long as a quota, a full queue or a model that is not ready requires."""
        if line.answered is not None:
            return line.answered
        for attempt in itertools.count(1):
            answered = await self._requests.answer(run.batch, line)
            is_patient = answered.status in (429, 503)
            if not answered.is_passing or (attempt >= _MAX_TRIES and not is_patient):
                break
            metrics.BATCH_LINES.labels("repeated").inc()
            await asyncio.sleep(min(_LONGEST_WAIT_S, answered.retry_after_s or 0.1 * 2 ** min(attempt, 8)))
        return answered

    async def _write(self, run: _Run, done: list[_InFlight]) -> None:
        """Append answers to the files, and then record that they count."""
        batch = run.batch
        outputs: list[bytes] = []
        errors: list[bytes] = []
        num_tokens = 0
        spaces = batch.spaces
        for number, one in enumerate(done, start=batch.num_answered + 1):
            answered, spaces = of_lines.in_one_space(spaces, one.line, one.task.result())
            num_tokens += answered.num_tokens
            row = of_lines.output_line(number, batch, one.line, answered)
            (outputs if answered.status == 200 else errors).append(row)
        run.batch = replace(run.batch, spaces=spaces)
        await self._append(run, outputs, errors, done[-1].raw.end, num_tokens)
        metrics.BATCH_LINES.labels("completed").inc(len(outputs))
        metrics.BATCH_LINES.labels("failed").inc(len(errors))

    async def _append(
        self, run: _Run, outputs: list[bytes], errors: list[bytes], position: int, num_tokens: int = 0
    ) -> None:
        batch = run.batch
        sizes = await self.call(self._append_now, batch, b"".join(outputs), b"".join(errors))
        change = partial(
            replace,
            output_bytes=sizes[0],
            error_bytes=sizes[1],
            num_completed=batch.num_completed + len(outputs),
            num_failed=batch.num_failed + len(errors),
            num_tokens=batch.num_tokens + num_tokens,
            position=position,
        )
        # The state may change in the meantime, on the event loop.
        run.batch = change(run.batch)
        await self.call(self.store.save, run.batch)

    def _append_now(self, batch: Batch, outputs: bytes, errors: bytes) -> tuple[int, int]:
        sizes = [batch.output_bytes, batch.error_bytes]
        written = []
        for i, (file_id, data) in enumerate(((batch.output_id, outputs), (batch.error_id, errors))):
            if data:
                sizes[i] = self.store.write(file_id, sizes[i], data)
                written.append(file_id)
        self.store.sync(*written)
        return sizes[0], sizes[1]

    async def _expire(self, run: _Run) -> None:
        """Write an expiry error for each line without an answer."""
        with self.store.path(run.batch.input_id).open("rb") as file:
            file.seek(run.batch.position)
            lines = read_lines(file, self._requests.max_line_bytes)
            loop = asyncio.get_running_loop()
            while group := await loop.run_in_executor(self._reading, self._expired, run.batch, lines):
                await self._append(run, [], [line for line, _end in group], group[-1][1])
                metrics.BATCH_LINES.labels("expired").inc(len(group))
        if run.batch.status is Status.IN_PROGRESS:
            await self._become(run, Status.FINALIZING, partial(replace, end=Status.EXPIRED))

    def _expired(self, batch: Batch, lines: Iterator[RawLine]) -> list[tuple[bytes, int]]:
        """Return the error lines of some unanswered requests, each with the input's offset after the request."""
        found = []
        for number, raw in enumerate(itertools.islice(lines, 100), start=batch.num_answered + 1):
            custom_id = read_again(raw, batch, self._requests).custom_id
            found.append((of_lines.expired_line(number, batch, custom_id), raw.end))
        return found

    async def _sweep(self) -> None:
        while True:
            with suppress(Exception):  # the next sweep removes the rest
                num_files = await self.call(self.store.sweep)
                if num_files:
                    log.info("batch_files_expired", files=num_files)
                metrics.BATCH_BYTES.set(self.store.num_bytes)
            await asyncio.sleep(_SWEEP_EVERY_S)

"""Answer the lines of a batch: several at once, in the order of the input, as memory, quotas and models allow."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from gateway.batches import lines as of_lines
from gateway.batches.lines import Answered, Line, RawLine, Requests, read_again, read_lines
from gateway.batches.recording import Answers, Change, Recorder, Run
from gateway.batches.values import Batch, BatchesUnavailable, LineError, Status, StorageFull
from gateway.telemetry import metrics

# The limits of a batch's requests in flight: enough short ones to fill the engine's batches, and as memory allows.
_MAX_IN_FLIGHT = 64
_MAX_BYTES_IN_FLIGHT = 8 * 1024 * 1024
# Answers wait in memory until all earlier ones are written. Together they may be as large as one large response.
_MAX_WEIGHT_IN_FLIGHT = 2048
_LONGEST_WAIT_S = 30.0
# The number of attempts for a request if its failure may be temporary or its own fault.
_MAX_TRIES = 3
# The number of lines without an answer that are written at once.
_GROUP = 500


@dataclass(frozen=True, slots=True)
class _InFlight:
    line: Line
    raw: RawLine
    task: asyncio.Task[Answered]


class Answering:
    """Answers the lines of batches.

    Args:
        now: returns the time in seconds since the epoch.
    """

    def __init__(self, recorder: Recorder, requests: Requests, now: Callable[[], float]) -> None:
        self._recorder = recorder
        self._requests = requests
        self._now = now
        # A separate thread from the store's: reading a large file must not hold up the store.
        self._reading = ThreadPoolExecutor(1, "batches-read")

    def close(self) -> None:
        """Wait for the line that is being read."""
        self._reading.shutdown(wait=True, cancel_futures=True)

    async def answer_all(self, run: Run) -> Change:
        """Answer the remaining lines until the file ends, the batch's time ends, or the batch is canceled.

        Returns the end of the batch, unless it was canceled.
        """
        with self._recorder.store.open(run.batch.input_id) as file:
            file.seek(run.batch.position)
            lines = read_lines(file, self._requests.max_line_bytes)
            waiting: deque[_InFlight] = deque()
            try:
                return await self._answer_in_order(run, lines, waiting)
            finally:
                tasks = [request.task for request in waiting]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def give_up(self, run: Run, reason: str) -> None:
        """Write an error for each line without an answer: `batch_expired` or `batch_cancelled`.

        Stop early if the state of the batch changes.
        """
        status = run.batch.status
        with self._recorder.store.open(run.batch.input_id) as file:
            file.seek(run.batch.position)
            lines = read_lines(file, self._requests.max_line_bytes)
            loop = asyncio.get_running_loop()
            while run.batch.status is status:
                group = await loop.run_in_executor(self._reading, self._unanswered, run.batch, lines, reason)
                if not group:
                    return
                errors = [line for line, _end in group]
                await self._recorder.append(run, Answers([], errors, group[-1][1], run.batch.spaces))
                metrics.BATCH_LINES.labels(reason.removeprefix("batch_")).inc(len(group))

    def _unanswered(self, batch: Batch, lines: Iterator[RawLine], reason: str) -> list[tuple[bytes, int]]:
        """Return the error lines of some unanswered requests, each with the input's offset after the request."""
        found = []
        for number, raw in enumerate(itertools.islice(lines, _GROUP), start=batch.num_answered + 1):
            custom_id = read_again(raw, batch, self._requests).custom_id
            found.append((of_lines.unanswered_line(number, batch, custom_id, reason), raw.end))
        return found

    async def _answer_in_order(self, run: Run, lines: Iterator[RawLine], waiting: deque[_InFlight]) -> Change:
        has_more = True
        while run.batch.status is Status.IN_PROGRESS:
            if self._now() >= run.batch.expires_at:
                with suppress(StorageFull):  # the batch ends even without room
                    await self.give_up(run, "batch_expired")
                return partial(replace, end=Status.EXPIRED)
            if (refusal := self._requests.refusal(run.batch)) is not None and refusal.code == "invalid_api_key":
                return partial(replace, errors=(refusal,), end=Status.FAILED)
            has_more = has_more and await self._fill(run, lines, waiting)
            if not waiting:
                if not has_more:
                    break
                await asyncio.sleep(0.2)  # paused
                continue
            left_s = max(0.0, run.batch.expires_at - self._now())
            await asyncio.wait([waiting[0].task], timeout=min(1.0, left_s))  # or a timeout or cancelation
            done = list(itertools.takewhile(lambda request: request.task.done(), waiting))
            try:
                await self._write(run, done)
            except (BatchesUnavailable, StorageFull) as error:
                # Keep the answers: computing them again would cost tokens.
                await self._recorder.pause(run.batch, error)
                continue
            for _ in done:
                waiting.popleft()
        return _end_of(run.batch)

    async def _fill(self, run: Run, lines: Iterator[RawLine], waiting: deque[_InFlight]) -> bool:
        """Begin as many further requests as may be in flight; return whether the file has more."""
        if self._requests.is_paused:
            return True
        num_bytes = sum(len(request.raw.content) for request in waiting)
        weight = sum(request.line.weight for request in waiting)
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

    async def _answer(self, run: Run, line: Line) -> Answered:
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

    async def _write(self, run: Run, done: list[_InFlight]) -> None:
        if not done:
            return
        batch = run.batch
        outputs: list[bytes] = []
        errors: list[bytes] = []
        num_tokens = 0
        spaces = batch.spaces
        for number, request in enumerate(done, start=batch.num_answered + 1):
            answered, spaces = of_lines.in_one_space(spaces, request.line, request.task.result())
            num_tokens += answered.num_tokens
            row = of_lines.output_line(number, batch, request.line, answered)
            (outputs if answered.status == 200 else errors).append(row)
        await self._recorder.append(run, Answers(outputs, errors, done[-1].raw.end, spaces, num_tokens))
        metrics.BATCH_LINES.labels("completed").inc(len(outputs))
        metrics.BATCH_LINES.labels("failed").inc(len(errors))


def _end_of(batch: Batch) -> Change:
    """Return the end of a batch whose file has no further lines."""
    if batch.num_answered == batch.num_total:
        return partial(replace, end=Status.COMPLETED)
    message = (
        f"The input file on the gateway's disk has changed since the batch began: it had {batch.num_total} requests, and "
        f"{batch.num_answered} could be read"
    )
    return partial(replace, errors=(LineError("file_changed", message),), end=Status.FAILED)

"""The runner of batches, which answers one batch per client at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from gateway.batches import lines as of_lines
from gateway.batches.answering import Answering
from gateway.batches.lines import Requests
from gateway.batches.recording import Change, Recorder, Run
from gateway.batches.store import Store
from gateway.batches.values import Batch, LineError, Purpose, Status, StorageFull, StoredFile
from gateway.telemetry import metrics

log = structlog.get_logger(__name__)
T = TypeVar("T")

# The number of batches, of different clients, that are in progress; others wait.
_MAX_AT_ONCE = 16
_SWEEP_EVERY_S = 600.0


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
        self._recorder = Recorder(store)
        self._answering = Answering(self._recorder, requests, now)
        # Checking a large file takes seconds, and must not hold up the batches of other clients.
        self._checking = ThreadPoolExecutor(1, "batches-check")
        self._runs: dict[str, Run] = {batch.id: Run(batch) for batch in store.open_batches()}
        self._adding: dict[str, Batch] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._is_stopped = False

    async def call(self, work: Callable[..., T], *values: object) -> T:
        """Call a method of the store, in its thread."""
        return await self._recorder.call(work, *values)

    def start(self) -> None:
        """Continue the batches that have not ended. Call it on the event loop; further calls do nothing."""
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep())
            if self._runs:
                log.info("batches_resumed", batches=len(self._runs))
            self._begin()

    async def stop(self) -> None:
        """Stop all batches; the next start continues them from there."""
        self._is_stopped = True
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        tasks += [] if self._sweeper is None else [self._sweeper]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._checking.shutdown(wait=True, cancel_futures=True)
        self._answering.close()
        self._recorder.close()

    # ------------------------------------------------------------------------------------------------ for the API

    async def add(self, batch: Batch) -> None:
        """Store a new batch and begin it when its turn comes, even if its client does not wait for the response."""
        self._adding[batch.id] = batch
        await asyncio.shield(asyncio.create_task(self._add(batch)))

    async def _add(self, batch: Batch) -> None:
        try:
            await self.call(self.store.add_batch, batch)
            self._runs[batch.id] = Run(batch)
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
        if run is None:
            return batch
        while run.batch.status in (Status.VALIDATING, Status.IN_PROGRESS):
            await self._become(run, Status.CANCELLING)
            self._begin()
        return run.batch

    # ------------------------------------------------------------------------------------------------------ turns

    def _begin(self) -> None:
        """Begin the oldest batch of each client that has no batch in progress, and end those that are canceled."""
        if self._is_stopped or self._sweeper is None:
            return
        busy = {run.batch.owner for run in self._runs.values() if run.task is not None}
        for run in self._runs.values():
            owner = run.batch.owner
            is_next = owner not in busy and len(busy) < _MAX_AT_ONCE
            if run.task is None and (is_next or run.batch.status is Status.CANCELLING):
                busy.add(owner)
                run.task = asyncio.create_task(self._run(run))
        self._count()

    def _count(self) -> None:
        for status in Status:
            if not status.is_final:
                number = sum(run.batch.status is status for run in self._runs.values())
                metrics.BATCH_JOBS.labels(status).set(number)

    async def _run(self, run: Run) -> None:
        """Run a batch to its end, through every failure that the batch did not cause."""
        while not run.batch.status.is_final:
            try:
                await self._advance(run)
            except Exception as error:  # usually a full or broken disk; the batch then continues where it stopped
                await self._recorder.pause(run.batch, error)
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

    async def _advance(self, run: Run) -> None:
        try:
            await self._continue(run)
        except FileNotFoundError as error:
            name = Path(error.filename or "").name
            message = f"A file of this batch, or a part of it, is missing from the gateway's disk: {name}"
            batch = run.batch
            sizes = {
                "output_bytes": min(batch.output_bytes, await self.call(self.store.size, batch.output_id)),
                "error_bytes": min(batch.error_bytes, await self.call(self.store.size, batch.error_id)),
            }
            change = partial(replace, errors=(LineError("file_missing", message),), end=Status.FAILED, **sizes)
            await self._become(run, Status.FINALIZING, change)

    async def _continue(self, run: Run) -> None:
        match run.batch.status:
            case Status.VALIDATING:
                await self._validate(run)
            case Status.IN_PROGRESS:
                end = await self._answering.answer_all(run)
                if run.batch.status is Status.IN_PROGRESS:
                    await self._become(run, Status.FINALIZING, end)
            case Status.CANCELLING:
                if run.batch.num_total:  # it was validated
                    with suppress(StorageFull):  # the batch ends even without room
                        await self._answering.give_up(run, "batch_cancelled")
                await self._finish(run, Status.CANCELLED)
            case _:
                await self._finish(run, run.batch.end)

    async def _become(
        self, run: Run, status: Status, change: Change = lambda batch: batch, files: Sequence[StoredFile] = ()
    ) -> None:
        """Change the state of a batch on disk and in memory, and add files, unless another change of its state is first."""
        before = run.batch.status

        def changed(batch: Batch) -> Batch:
            if batch.status is not before:
                return batch
            times = {**batch.times, status.value: int(self._now())}
            return replace(change(batch), status=status, times=times)

        await self._recorder.save(run, changed, files)
        self._count()

    async def _validate(self, run: Run) -> None:
        batch = run.batch
        path = self.store.path(batch.input_id)

        def is_stopped() -> bool:
            return self._is_stopped or run.batch.status is not Status.VALIDATING

        work = partial(of_lines.validate, path, batch, self._requests, is_stopped)
        with suppress(of_lines.Interrupted):
            found = await asyncio.get_running_loop().run_in_executor(self._checking, work)
        if is_stopped():  # it was canceled in the meantime
            return
        errors = found.errors
        if not errors and (refusal := self._requests.refusal(replace(batch, model=found.model))) is not None:
            errors = (refusal if refusal.param is None else replace(refusal, line=found.first_line),)
        # As OpenAI's, a batch that fails here has no requests.
        num_total = 0 if errors else found.num_lines
        change = partial(replace, model=found.model, num_total=num_total, errors=errors)
        await self._become(run, Status.FAILED if errors else Status.IN_PROGRESS, change)
        log.info("batch_validated", batch=batch.id, owner=batch.owner, lines=found.num_lines, errors=len(errors))

    async def _finish(self, run: Run, end: Status) -> None:
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

    async def _sweep(self) -> None:
        while True:
            with suppress(Exception):  # the next sweep removes the rest
                num_files = await self.call(self.store.sweep)
                if num_files:
                    log.info("batch_files_expired", files=num_files)
                metrics.BATCH_BYTES.set(self.store.num_bytes)
            await asyncio.sleep(_SWEEP_EVERY_S)

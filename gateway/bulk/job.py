"""The job: read ahead, embed, write a shard, commit it in the manifest; in bounded memory, each row exactly once."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import orjson

from gateway.bulk.blocks import Block, BlockReader, Expand, OnError, stopped_at
from gateway.bulk.embedder import BlockEmbedder, EmbeddedBlock, Embedder
from gateway.bulk.manifest import Counts, Manifest, Progress, Shard
from gateway.bulk.rows import (
    BadRow,
    BulkError,
    EmbeddedRows,
    Position,
    RowId,
    RowsRefused,
    RowValidator,
    Sink,
    Source,
    closing_readings,
    without_items,
)
from gateway.config.files import open_regular
from gateway.types import Vectors

SHARD_ROWS = 8192
# The limit for vectors, texts and payloads of a shard. Two are in memory: one fills while the other is written.
_SHARD_BYTES = 256 * 2**20
# A shard also ends after this time, so that an interruption costs a slow model little.
_SHARD_S = 60.0
# Blocks that are read or embedded while another block is.
_BLOCKS_AHEAD = 2
_FIRST_BYTES = b'{"place":'


class Reporter(Protocol):
    """Shows the progress of a job."""

    def start(self, done: int, total: int | None) -> None:
        """Begin.

        Args:
            done: items that earlier processes finished.
            total: the approximate number of all items, if known.
        """

    def advance(self, number: int) -> None:
        """Count items that were embedded or skipped."""


class Silent:
    """A reporter that shows nothing."""

    def start(self, done: int, total: int | None) -> None:
        pass

    def advance(self, number: int) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a job that do not change its vectors.

    Attributes:
        errors: the file that lists skipped items, as JSON lines.
        shard_rows: the maximum number of rows in a shard, unless rows are expanded; a large or slow shard ends earlier.
        expand: splits rows, such as into chunks.
    """

    errors: Path
    on_error: OnError = "stop"
    shard_rows: int = SHARD_ROWS
    expand: Expand | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one process that worked on a job.

    Attributes:
        done: the counts of this process.
        total: the counts of the job so far.
        seconds: the time that this process took, without loading the model.
        is_finished: nothing is left to do; ``False`` after an interruption.
    """

    done: Counts
    total: Counts
    seconds: float
    is_finished: bool


@dataclass(slots=True)
class _OpenShard:
    """A shard that is being filled."""

    began: float
    blocks: list[tuple[Block, EmbeddedBlock]] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    ids: list[RowId] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    position: Position | None = None
    num_bytes: int = 0

    def add(self, block: Block, embedded: EmbeddedBlock) -> None:
        self.blocks.append((block, embedded))
        bad = [*block.bad, *embedded.refused]
        self.bad += bad
        self.ids += block.ids
        self.position = block.position
        self.num_bytes += block.num_bytes + _vector_bytes(embedded.embedded)
        num_rows = len(embedded.embedded.rows)
        self.counts += Counts(block.num_items, num_rows, len(bad), embedded.num_tokens, embedded.num_truncated)

    def before(self, refused: Sequence[BadRow]) -> _OpenShard:
        """Return the blocks before the first that has a row of these items."""
        places = {row.place for row in refused}
        shard = _OpenShard(self.began)
        for block, embedded in self.blocks:
            if any(row.place in places for row in embedded.embedded.rows):
                break
            shard.add(block, embedded)
        return shard

    def without(self, refused: Sequence[BadRow], rows: EmbeddedRows) -> EmbeddedRows:
        """Count the items of rows that the sink refuses as bad, and return the rows of the others."""
        bad = {row.place: row for row in reversed(refused)}
        kept = without_items(rows, refused)
        self.bad += reversed(bad.values())
        self.counts += Counts(rows=len(kept.rows) - len(rows.rows), skipped=len(bad))
        return kept

    def rows(self) -> EmbeddedRows:
        parts = [embedded.embedded for _block, embedded in self.blocks if embedded.embedded.rows]
        dense = [part.dense for part in parts if part.dense is not None]
        sparse = [weights for part in parts if part.sparse is not None for weights in part.sparse]
        multivectors = [vectors for part in parts if part.multivectors is not None for vectors in part.multivectors]
        joined: Vectors | None = np.concatenate(dense) if dense else None
        return EmbeddedRows([row for part in parts for row in part.rows], joined, sparse or None, multivectors or None)


class Job:
    """Embeds a source into a sink."""

    def __init__(
        self,
        source: Source,
        sink: Sink,
        manifest: Manifest,
        embedder: Embedder,
        options: Options,
        reporter: Reporter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._sink = sink
        self._manifest = manifest
        self._embedder = embedder
        self._options = options
        self._reporter = reporter
        self._clock = clock
        self._blocks = BlockEmbedder(embedder, reporter.advance)
        self._errors = _ErrorsFile(options.errors)
        # A shard is a whole number of blocks, unless rows are skipped.
        num_blocks = math.ceil(options.shard_rows / embedder.block_texts)
        self._block_rows = options.shard_rows // num_blocks
        problem = sink.problem if isinstance(sink, RowValidator) else lambda _row: ""
        self._reader = BlockReader(source, manifest.seen, self._block_rows, options.on_error, options.expand, problem)
        self._writing: asyncio.Task[None] | None = None
        self._failure: BulkError | None = None

    async def run(self, progress: Progress, stop: asyncio.Event) -> Outcome:
        """Embed the remaining rows until all are done or ``stop`` is set. Rows that are embedded by then are written.

        Args:
            progress: the job's progress, from the manifest.

        Raises:
            BulkError: the source, the model, the sink or the manifest fails, or an item is bad and the job stops at bad
            items.
        """
        started = self._clock()
        self._number, self._part, self._planned = progress.number, progress.part, progress.planned_items
        self._sink.open(self._embedder.note)
        self._errors.go_to(progress.errors_bytes)
        total = None if self._options.expand is not None else self._source.count()
        self._reporter.start(progress.counts.items, total)
        waiting_for_stop = asyncio.create_task(stop.wait())
        reading = self._reader.read(progress.position, self._planned)
        try:
            with closing_readings(reading):
                is_at_end = await self._work(reading, waiting_for_stop)
        finally:
            waiting_for_stop.cancel()
            if self._writing is not None:
                await asyncio.wait((self._writing,))
        if self._writing is not None:
            self._writing.result()
        if self._failure is not None:
            raise self._failure
        if is_at_end:
            self._manifest.finish()
        after = self._manifest.progress()
        before = progress.counts
        done = Counts(*(now - then for now, then in zip(_numbers(after.counts), _numbers(before), strict=True)))
        return Outcome(done, after.counts, self._clock() - started, is_at_end)

    async def _work(self, reading: Iterator[Block], stopped: asyncio.Task[bool]) -> bool:
        """Embed and write until nothing is left; return whether the source has ended, as opposed to an interruption."""
        pending: deque[tuple[Block, asyncio.Task[EmbeddedBlock]]] = deque()
        shard = _OpenShard(self._clock())
        is_at_end = False
        try:
            while not stopped.done():
                while not is_at_end and self._failure is None and len(pending) < _BLOCKS_AHEAD:
                    block = await self._next(reading)
                    is_at_end = block is None and self._failure is None
                    if block is None:
                        break
                    pending.append((block, asyncio.create_task(self._embed(block))))
                if not pending:
                    break
                block, embedding = pending[0]
                await asyncio.wait((embedding, stopped), return_when=asyncio.FIRST_COMPLETED)
                if not embedding.done():
                    break
                pending.popleft()
                if not self._take(shard, block, embedding):
                    break
                if self._is_complete(shard):
                    await self._write(shard)
                    shard = _OpenShard(self._clock())
        finally:
            for _, embedding in pending:
                embedding.cancel()
            await asyncio.gather(*(embedding for _, embedding in pending), return_exceptions=True)
        is_at_end = is_at_end and not pending and self._failure is None
        # A shard that a killed process may have written must get the same rows again, or be left to the next process.
        if shard.counts.items and (is_at_end or not self._planned):
            await self._write(shard)
        return is_at_end

    async def _next(self, reading: Iterator[Block]) -> Block | None:
        try:
            return await asyncio.to_thread(lambda: next(reading, None))
        except BulkError as error:
            self._failure = error
            return None

    async def _embed(self, block: Block) -> EmbeddedBlock:
        embedded = await self._blocks.embed(block.rows)
        self._reporter.advance(len(block.bad))
        return embedded

    def _take(self, shard: _OpenShard, block: Block, embedding: asyncio.Task[EmbeddedBlock]) -> bool:
        """Add a block to the shard; return whether the job can continue after it."""
        try:
            embedded = embedding.result()
        except BulkError as error:
            self._failure = error
            return False
        if embedded.refused and self._options.on_error == "stop":
            self._failure = BulkError(stopped_at(embedded.refused[0], is_in_block=True))
            return False
        shard.add(block, embedded)
        return True

    def _is_complete(self, shard: _OpenShard) -> bool:
        if self._planned:
            return shard.counts.items == self._planned
        is_late = self._clock() - shard.began > _SHARD_S
        # Items that cannot be embedded take memory too, and a source may consist of them.
        num_kept = max(shard.counts.rows, len(shard.bad))
        is_full = num_kept + self._block_rows > self._options.shard_rows
        return is_full or shard.num_bytes >= _SHARD_BYTES or is_late

    async def _write(self, shard: _OpenShard) -> None:
        """Start to write a shard while the next one is embedded."""
        if self._writing is not None:
            await self._writing
        number, self._number = self._number, self._number + 1
        part = self._part if shard.counts.rows else None
        self._part += part is not None
        self._planned = 0
        self._writing = asyncio.create_task(asyncio.to_thread(self._store, shard, number, part))

    def _store(self, shard: _OpenShard, number: int, part: int | None) -> None:
        self._manifest.plan(number, shard.counts.items)
        rows = shard.rows()
        while part is not None and rows.rows:
            try:
                self._sink.write(part, rows)
                break
            except RowsRefused as error:
                if self._options.on_error == "stop":
                    if (before := shard.before(error.rows)).counts.items:
                        self._store(before, number, part)
                    raise
                num_before, rows = len(rows.rows), shard.without(error.rows, rows)
                if len(rows.rows) == num_before:
                    raise
        errors_bytes = self._errors.add(shard.bad)
        self._manifest.commit(number, Shard(part, shard.counts, shard.position, errors_bytes), shard.ids)
        self._reader.release(shard.ids)


class _ErrorsFile:
    """A file that lists the skipped items of committed shards, and no others."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = 0

    def go_to(self, size: int) -> None:
        """Truncate the file to a size: a killed process left the lines after it.

        Raises:
            BulkError: the file has other content, or cannot be written.
        """
        try:
            if self._path.exists():
                with open_regular(self._path) as file:
                    start = file.read(len(_FIRST_BYTES))
                if not _FIRST_BYTES.startswith(start):
                    raise BulkError(
                        f"the file of errors {self._path} has other content, which would be lost: name another file"
                    )
                self._size = min(size, self._path.stat().st_size)
                os.truncate(self._path, self._size)
        except OSError as error:
            raise BulkError(f"the file of errors {self._path} cannot be written: {error.strerror}") from error

    def add(self, bad: Sequence[BadRow]) -> int:
        """Write items, and return the size of the file after them."""
        if not bad:
            return self._size
        lines = b"".join(
            orjson.dumps(
                {"place": item.place, "id": _shown_id(item.id), "problem": item.problem},
                option=orjson.OPT_APPEND_NEWLINE,
            )
            for item in bad
        )
        try:
            with self._path.open("ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise BulkError(f"the file of errors {self._path} cannot be written: {error.strerror}") from error
        self._size += len(lines)
        return self._size


_INTEGERS = range(-(2**63), 2**64)
"""The integers that orjson writes."""


def _shown_id(row_id: RowId | None) -> RowId | None:
    """Return an id that can be written as JSON, which has integers of at most 64 bits here."""
    if isinstance(row_id, int) and row_id not in _INTEGERS:
        return str(row_id)
    return row_id.encode(errors="backslashreplace").decode() if isinstance(row_id, str) else row_id


def _vector_bytes(rows: EmbeddedRows) -> int:
    dense = 0 if rows.dense is None else rows.dense.nbytes
    sparse = sum(weights.indices.nbytes + weights.values.nbytes for weights in rows.sparse or ())
    return dense + sparse + sum(vectors.nbytes for vectors in rows.multivectors or ())


def _numbers(counts: Counts) -> list[int]:
    return list(asdict(counts).values())

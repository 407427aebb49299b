"""Keep the counts of the requests of experiments: latency and errors by unit survive a restart, and replicas add up.

The counts of a few seconds are written at once, in a thread. They are added to those in the file, so several processes
may share it.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import islice
from typing import TypeAlias, TypeVar

import numpy as np
import structlog

from gateway.config.files import why_other_tables
from gateway.errors import StartError
from gateway.experiments.arms import MAX_SUMS, NUM_SUMS, Generation, RequestRecord
from gateway.experiments.exposures import iso, now
from gateway.experiments.tally import Sums, Tally, add_tally, tally_of
from gateway.outcomes.store import Reader, Store, StoreBusy, StoreFull

log = structlog.get_logger(__name__)
T = TypeVar("T")

Key: TypeAlias = tuple[str, str]
"""An experiment and a generation."""

_WRITE_EVERY_S = 2.0
_SECONDS_BETWEEN_WARNINGS = 60.0
_MAX_AGE_S = 10.0
# What other processes wrote is read again after this many times the time that reading takes.
_AGE_PER_READING = 100

_COLUMNS = "requests, server_errors, timed, log_seconds, log_characters"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS traffic (
    branch INTEGER NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, num REAL NOT NULL,
    PRIMARY KEY (branch, kind, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS unit_sums (
    branch INTEGER NOT NULL, unit INTEGER NOT NULL, requests REAL NOT NULL, server_errors REAL NOT NULL,
    timed REAL NOT NULL, log_seconds REAL NOT NULL, log_characters REAL NOT NULL,
    PRIMARY KEY (branch, unit)) WITHOUT ROWID;
"""
# A row of no branch: the number of writes by all processes.
_WRITES = "SELECT ifnull((SELECT num FROM traffic WHERE branch = 0 AND kind = 'writes' AND name = ''), 0)"
_BRANCH = "(SELECT min(id) FROM branches WHERE experiment = ? AND generation = ? AND ? IN (arm, ''))"
_ADD_COUNT = (
    f"INSERT INTO traffic SELECT branch, ?, ?, ? FROM (SELECT {_BRANCH} AS branch) WHERE branch IS NOT NULL "  # noqa: S608
    "ON CONFLICT (branch, kind, name) DO UPDATE SET "
    "num = CASE kind WHEN 'since' THEN min(num, excluded.num) ELSE num + excluded.num END"
)
_ADD_SUMS = f"INSERT INTO unit_sums ({_COLUMNS}, branch, unit) VALUES (?, ?, ?, ?, ?, ?, ?) " + (  # noqa: S608
    "ON CONFLICT (branch, unit) DO UPDATE SET "
    + ", ".join(f"{name} = {name} + excluded.{name}" for name in _COLUMNS.split(", "))
)
_UPDATE_SUMS = (
    "UPDATE unit_sums SET "  # noqa: S608
    + ", ".join(f"{name} = {name} + ?" for name in _COLUMNS.split(", "))
    + " WHERE branch = ? AND unit = ?"
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The counts of a generation that a reader wants.

    Attributes:
        version: the version of the known counts; -1 if none are known.
        since: when this process began to count, ISO 8601.
    """

    key: Key
    since: str
    version: int = -1


class Traffic:
    """The counts of requests in a file of experiments, for one process.

    Args:
        thread: writes the file.
        declare: stores the arms that are served now.

    Raises:
        StartError: the file has other tables.
    """

    def __init__(self, store: Store, thread: ThreadPoolExecutor, declare: Callable[[], None]) -> None:
        self._store = store
        self._thread = thread
        self._declare = declare
        self._pending: dict[Key, Generation] = {}
        self._writing: asyncio.Task[None] | None = None
        self._one_at_a_time = asyncio.Lock()
        self._warned_at = -_SECONDS_BETWEEN_WARNINGS
        # Upper bounds of the numbers of units with sums, by generation, until another process writes.
        self._num_units: dict[Key, int] = {}
        # The last written generation of each experiment.
        self._last: dict[str, str] = {}
        self._is_ready = False
        self._num_writes = 0.0
        self._read_again_at: dict[Key, float] = {}
        # Changes when the file has counts of another process that are not among those read before.
        self.version = 0
        try:
            with store.writing() as db:
                self._prepare(db)
        except (StoreBusy, StoreFull) as error:  # a full file of an earlier version; the gateway serves anyway
            self._warn(error)

    def _prepare(self, db: sqlite3.Connection) -> None:
        """Create the tables, which a file of an earlier version lacks."""
        for statement in _SCHEMA.split(";"):
            db.execute(statement)
        if why := why_other_tables(db, _SCHEMA):
            raise StartError(f"GATEWAY_STATE_DIR: {self._store.path} cannot be opened as a file of experiments: {why}")
        self._is_ready = True

    def record(self, request: RequestRecord) -> None:
        """Count a request, to be written soon."""
        key = request.experiment, request.generation
        if (generation := self._pending.get(key)) is None:
            generation = self._pending[key] = Generation(now())
        if request.is_counted:
            generation.record(request, is_cut=request.is_cut)
        else:
            generation.uncounted[request.reason] += 1
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write_later())

    async def _write_later(self) -> None:
        while self._pending:
            # The first counts after a change of the weights at once: a reload may end these weights, and then their arms
            # are no longer known.
            await asyncio.sleep(_WRITE_EVERY_S if self._pending.keys() <= self._last.items() else 0)
            await self._exchange(None, None)

    async def refresh(self, wanted: Wanted, use: Callable[[Generation, int], None]) -> None:
        """Write the counts of this process, and call ``use`` with all counts of a generation unless they are known.

        Args:
            use: called with the counts of all processes and their version. No request is counted in the meantime.
        """
        is_known = wanted.version == self.version and wanted.key not in self._pending
        if is_known and time.monotonic() < self._read_again_at.get(wanted.key, 0.0):
            return
        exchange = asyncio.get_running_loop().create_task(self._exchange(wanted, use))
        await asyncio.shield(exchange)  # a client that disconnects must not end it between writing and counting

    async def _exchange(self, wanted: Wanted | None, use: Callable[[Generation, int], None] | None) -> None:
        """Write the pending counts, and read those of a generation."""
        async with self._one_at_a_time:
            taken, self._pending = self._pending, {}
            tallies = {key: tally_of(generation) for key, generation in taken.items()}
            self._last.update(taken.keys())
            try:
                await self._in_thread(partial(self._write, tallies, wanted))
            except (StoreBusy, StoreFull, RuntimeError) as error:  # RuntimeError: the thread has ended
                for key, tally in tallies.items():
                    add_tally(self._pending.setdefault(key, Generation(now())), tally)
                self._warn(error)
                return
            if wanted is None or use is None:
                return
            try:
                found = await self._in_thread(partial(self._read, wanted))
            except (sqlite3.Error, StartError) as error:
                self._warn(error)
                return
            if found is not None:
                if (pending := self._pending.get(wanted.key)) is not None:
                    add_tally(found, tally_of(pending))
                use(found, self.version)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._thread.submit(work))

    def _warn(self, error: Exception) -> None:
        if time.monotonic() - self._warned_at > _SECONDS_BETWEEN_WARNINGS:
            self._warned_at = time.monotonic()
            log.error("requests_not_kept", path=str(self._store.path), reason=str(error))

    def load(self, wanted: Wanted) -> Generation:
        """Return the counts of a generation in the file, before any request.

        Raises:
            StartError: the file cannot be read.
        """
        try:
            self._thread.submit(self._write, {}, wanted).result()
        except (StoreBusy, StoreFull) as error:
            self._warn(error)
        try:
            return self._thread.submit(self._read, wanted).result() or Generation(now())
        except sqlite3.Error as error:
            raise StartError(f"{self._store.path} cannot be read: {error}") from error

    def close(self) -> None:
        """Write the pending counts."""
        if self._writing is not None:
            self._writing.cancel()
        tallies = {key: tally_of(generation) for key, generation in self._pending.items()}
        self._pending = {}
        try:
            self._thread.submit(self._write, tallies, None).result()
        except (StoreBusy, StoreFull) as error:
            self._warn(error)

    # ------------------------------------------------------------------------------------------------- in a thread

    def _write(self, tallies: Mapping[Key, Tally], wanted: Wanted | None) -> None:
        """Write counts, and when this process began to count for a reader that knows no counts yet."""
        added = list(tallies.items())
        if wanted is not None and wanted.version < 0:
            added.append((wanted.key, Tally(wanted.since)))
        if added:
            self._declare()
        with self._store.writing() as db:
            if not self._is_ready:
                self._prepare(db)
            (num_writes,) = db.execute(_WRITES).fetchone()
            if num_writes != self._num_writes:
                self.version += 1
                self._num_units.clear()  # another process may have added units
            self._num_writes = num_writes
            if added:
                for key, tally in added:
                    self._add(db, key, tally)
                db.execute("INSERT OR REPLACE INTO traffic VALUES (0, 'writes', '', ?)", (num_writes + 1,))
        self._num_writes += bool(added)

    def _read(self, wanted: Wanted) -> Generation | None:
        """Return the counts of a generation; ``None`` if they are known, or were read a moment ago."""
        began = time.monotonic()
        is_recent = wanted.version >= 0 and began < self._read_again_at.get(wanted.key, 0.0)
        if wanted.version == self.version or is_recent:
            return None
        with Reader(self._store.path) as reader:
            found = Generation(now())
            add_tally(found, read_tally(reader, *wanted.key))
        took_s = time.monotonic() - began
        self._read_again_at[wanted.key] = began + took_s + min(_MAX_AGE_S, _AGE_PER_READING * took_s)
        return found

    def _add(self, db: sqlite3.Connection, key: Key, tally: Tally) -> None:
        counts = [(kind, name, num, *key, arm) for (arm, kind, name), num in tally.counts.items()]
        if tally.since:
            counts.append(("since", "", datetime.fromisoformat(tally.since).timestamp(), *key, ""))
        db.executemany(_ADD_COUNT, counts)
        branch_of = {arm: db.execute(f"SELECT {_BRANCH}", (*key, arm)).fetchone()[0] for arm in tally.sums}
        parts = [(sums, branch_of[arm]) for arm, sums in tally.sums.items() if branch_of[arm] is not None]
        if not parts:
            return
        units = np.concatenate([sums.units for sums, _ in parts])
        order = np.argsort(units)  # by hash: if there is room for some only, each arm gets its share
        columns = np.concatenate([sums.columns for sums, _ in parts], axis=1)[:, order].tolist()
        branches = np.repeat([branch for _, branch in parts], [len(sums.units) for sums, _ in parts])[order].tolist()
        # One row at a time: many rows at once would make the collection of garbage slow, while requests wait.
        rows = zip(*columns, branches, units.view(np.int64)[order].tolist(), strict=True)
        db.executemany(_ADD_SUMS, islice(rows, self._room(db, key, len(units))))
        db.executemany(_UPDATE_SUMS, rows)

    def _room(self, db: sqlite3.Connection, key: Key, num: int) -> int:
        """Return how many of the next ``num`` units of a generation may be new."""
        if key not in self._num_units or self._num_units[key] + num > MAX_SUMS:
            query = (
                "SELECT count(*) FROM unit_sums JOIN branches ON id = branch WHERE experiment = ? AND generation = ?"
            )
            (self._num_units[key],) = db.execute(query, key).fetchone()
        room = max(0, min(num, MAX_SUMS - self._num_units[key]))
        self._num_units[key] += room
        return room


def read_tally(reader: Reader, experiment: str, generation: str) -> Tally:
    """Return the counts of a generation in a file of experiments; empty for a file of an earlier version.

    Raises:
        sqlite3.Error: the file cannot be read.
    """
    if not reader.db.execute("PRAGMA table_info(traffic)").fetchall():
        return Tally()
    key = experiment, generation
    since: float | None = None
    counts: dict[tuple[str, str, str], float] = {}
    query = (
        "SELECT arm, kind, name, num FROM branches JOIN traffic ON branch = id WHERE experiment = ? AND generation = ?"
    )
    for arm, kind, name, num in reader.db.execute(query, key):
        if kind == "since":
            since = num
        else:
            counts["" if kind in ("uncounted", "source") else arm, kind, name] = num
    sums = {}
    branches = "SELECT id, arm FROM branches WHERE experiment = ? AND generation = ?"
    for branch, arm in reader.db.execute(branches, key).fetchall():
        query = f"SELECT unit, {_COLUMNS} FROM unit_sums WHERE branch = ?"  # noqa: S608  a constant
        unit, *columns = reader.columns(query, [branch], (np.int64, *[np.float64] * NUM_SUMS))
        if len(unit):
            sums[arm] = Sums(unit.view(np.uint64), np.array(columns))
    return Tally(None if since is None else iso(since), counts, sums)

"""Store exposures and outcomes in an SQLite file, written by one thread and read by others at the same time.

Several processes on one machine may share the file; WAL does not work across machines. Confirmed writes survive a
crash.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import numpy as np

from gateway.config.files import OpenFile, why_other_tables, why_unusable
from gateway.errors import StartError
from gateway.experiments.exposures import Exposure, iso
from gateway.outcomes.joining import Branch, Exposures, Outcomes, signed

FILE_NAME = "experiments.sqlite3"
MAX_PER_UNIT = 1_000
"""The maximum number of outcomes per name and unit: a client that repeats itself must not sway results or fill the disk."""

MAX_UNKNOWN = 100_000
"""The maximum number of outcomes of units without an exposure here: another replica's file may have the exposure."""

DECLARED = "declared"
"""The verdict of a row that says when a declaration of the outcome was first served."""

MAX_NAMES = 20
"""The most different names of outcomes of an experiment, besides the deciding one."""

_BUSY_S = 5.0
# If a unit's last exposure is later than its outcome by more than this, the clock was set back.
_CLOCK_S = 60.0
_PAGE_BYTES = 4096
_CHUNK = 50_000
_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS branches (
    id INTEGER PRIMARY KEY, experiment TEXT NOT NULL, generation TEXT NOT NULL, arm TEXT NOT NULL,
    model TEXT NOT NULL, task TEXT, share REAL NOT NULL, UNIQUE (experiment, generation, arm));
CREATE TABLE IF NOT EXISTS exposures (
    id INTEGER PRIMARY KEY, branch INTEGER NOT NULL, unit INTEGER NOT NULL, time REAL NOT NULL, answered INTEGER NOT NULL,
    model TEXT NOT NULL, space TEXT, source TEXT, UNIQUE (unit, branch));
CREATE TABLE IF NOT EXISTS names (
    id INTEGER PRIMARY KEY, experiment TEXT NOT NULL, name TEXT NOT NULL, unknown INTEGER NOT NULL DEFAULT 0,
    UNIQUE (experiment, name));
CREATE TABLE IF NOT EXISTS outcomes (
    id INTEGER PRIMARY KEY, name INTEGER NOT NULL, key BLOB NOT NULL, unit INTEGER NOT NULL, value REAL NOT NULL,
    of REAL NOT NULL, time REAL NOT NULL, is_before INTEGER NOT NULL, UNIQUE (name, key));
CREATE INDEX IF NOT EXISTS outcomes_of_unit ON outcomes (unit, name);
CREATE TABLE IF NOT EXISTS decisions (
    experiment TEXT NOT NULL, question TEXT NOT NULL, arm TEXT NOT NULL, verdict TEXT NOT NULL, time TEXT NOT NULL,
    PRIMARY KEY (experiment, question, arm));
"""


class StoreFull(Exception):
    """The file has reached its maximum size, or the disk is full."""


class StoreBusy(Exception):
    """The file cannot be written now: another process holds it, it was removed, or the disk fails."""


@dataclass(frozen=True, slots=True)
class NewOutcome:
    """One outcome to be kept.

    Attributes:
        key: identifies the outcome; a second outcome with the same key is the same outcome, sent again.
        unit: the hashed unit, as a signed 64-bit number.
    """

    name: str
    key: bytes
    unit: int
    value: float
    of: float
    time: float
    is_before: bool


@dataclass(slots=True)
class Kept:
    """The numbers of outcomes that were stored, and of outcomes that were not, by reason.

    Attributes:
        unseen: those among the stored whose unit has no exposure here so far.
    """

    stored: int = 0
    unseen: int = 0
    repeated: int = 0
    conflicting: int = 0
    too_many_of_unit: int = 0
    unknown_unit: int = 0
    too_many_names: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict of the first look that reached a decision."""

    verdict: str
    time: str


class Store:
    """One file of experiments. Every method waits for the disk, so call it outside the event loop.

    Args:
        max_bytes: the maximum size of the file.

    Raises:
        StartError: the file cannot be opened, or is not a file of experiments.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = _connect(path)
            self._file = OpenFile(path)
            with self.writing():
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                (version,) = self._db.execute("PRAGMA user_version").fetchone()
                if version not in (0, _VERSION):
                    raise StartError(f"{path} has version {version}, but this gateway reads version {_VERSION}")
                if why := why_other_tables(self._db, _SCHEMA):
                    raise StartError(
                        f"GATEWAY_STATE_DIR: {path} cannot be opened as a file of experiments: {why}; move it away to start "
                        "with a new one"
                    )
                self._db.execute(f"PRAGMA user_version = {_VERSION}")
            self._db.execute(f"PRAGMA max_page_count = {max_bytes // _PAGE_BYTES}")
        except (OSError, sqlite3.Error, StoreFull, StoreBusy) as error:
            raise StartError(
                f"GATEWAY_STATE_DIR: {path} cannot be opened as a file of experiments: {why_unusable(error)}"
            ) from error

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Write in one transaction.

        Raises:
            StoreFull: there is no room.
            StoreBusy: the file cannot be written now.
        """
        if self._file.is_lost:
            raise StoreBusy(f"{self.path.name} was removed or replaced while the gateway runs; restart the gateway")
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:  # the thread reuses the connection, so the transaction must end
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:  # any of its classes: a damaged file and a locked file raise different ones
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
                raise StoreFull(str(error)) from error
            raise StoreBusy(str(error)) from error

    def declare(self, experiment: str, branches: Iterable[Branch]) -> None:
        """Store the arms of an experiment under a set of weights.

        Raises:
            StoreFull, StoreBusy: they could not be written.
        """
        rows = [(experiment, b.generation, b.arm, b.model, b.task, b.share) for b in branches]
        with self.writing():
            self._db.executemany(
                "INSERT OR IGNORE INTO branches (experiment, generation, arm, model, task, share) VALUES (?, ?, ?, ?, ?, ?)",
                rows,
            )

    def expose(self, exposures: Sequence[tuple[Exposure, float]]) -> None:
        """Store exposures with their times, in seconds since the epoch. Exposures of undeclared arms are left out.

        Raises:
            StoreFull, StoreBusy: none could be written.
        """
        rows = [
            (signed(e.unit), seconds, e.answered, e.model, e.space, e.source, e.experiment, e.generation, e.arm)
            for e, seconds in exposures
        ]
        with self.writing():
            self._db.executemany(
                "INSERT INTO exposures (branch, unit, time, answered, model, space, source) "
                "SELECT id, ?, ?, ?, ?, ?, ? FROM branches WHERE experiment = ? AND generation = ? AND arm = ? "
                "ON CONFLICT (unit, branch) DO UPDATE SET answered = 1, space = excluded.space WHERE excluded.answered",
                rows,
            )

    def keep(self, experiment: str, outcomes: Sequence[NewOutcome], primary: str | None = None) -> Kept:
        """Store outcomes in one transaction.

        Args:
            primary: the name of the deciding outcome, which is stored however many other names there are.

        Raises:
            StoreFull, StoreBusy: they could not be written.
        """
        kept = Kept()
        with self.writing():
            names = self._names(experiment, [outcome.name for outcome in outcomes], primary)
            for outcome in outcomes:
                if (name := names.get(outcome.name)) is None:
                    kept.too_many_names += 1
                else:
                    self._keep_one(experiment, name, outcome, kept)
        return kept

    def _keep_one(self, experiment: str, name: int, outcome: NewOutcome, kept: Kept) -> None:
        known = "SELECT unit, value, of, is_before FROM outcomes WHERE name = ? AND key = ?"
        if found := self._db.execute(known, (name, outcome.key)).fetchone():
            if found == (outcome.unit, outcome.value, outcome.of, outcome.is_before):
                kept.repeated += 1
            else:
                kept.conflicting += 1
            return
        of_unit = "SELECT count(*) FROM outcomes WHERE unit = ? AND name = ?"
        (num,) = self._db.execute(of_unit, (outcome.unit, name)).fetchone()
        if num >= MAX_PER_UNIT:
            kept.too_many_of_unit += 1
            return
        last = "SELECT max(e.id), e.time FROM exposures e JOIN branches b ON b.id = branch WHERE unit = ? AND experiment = ?"
        _id, exposed = self._db.execute(last, (outcome.unit, experiment)).fetchone()
        if exposed is None:
            update = "UPDATE names SET unknown = unknown + 1 WHERE id = ? AND unknown < ?"
            if not self._db.execute(update, (name, MAX_UNKNOWN)).rowcount:
                kept.unknown_unit += 1
                return
            kept.unseen += not outcome.is_before
        elif exposed > outcome.time + _CLOCK_S:
            outcome = replace(outcome, time=exposed)
        self._db.execute(
            "INSERT INTO outcomes (name, key, unit, value, of, time, is_before) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (name, outcome.key, outcome.unit, outcome.value, outcome.of, outcome.time, outcome.is_before),
        )
        kept.stored += 1

    def _names(self, experiment: str, names: Iterable[str], primary: str | None) -> dict[str, int]:
        known = {
            name: id_
            for id_, name in self._db.execute("SELECT id, name FROM names WHERE experiment = ?", (experiment,))
        }
        for name in dict.fromkeys(names):
            num_others = len(known.keys() - {primary})
            if name not in known and (name == primary or num_others < MAX_NAMES):
                insert = "INSERT INTO names (experiment, name) VALUES (?, ?)"
                known[name] = int(self._db.execute(insert, (experiment, name)).lastrowid or 0)
        return known

    def decide(self, experiment: str, question: str, arm: str, decision: Decision) -> None:
        """Store the verdict of a look that reached a decision, unless an earlier look did.

        Args:
            question: identifies the outcome, its definition and the arms.

        Raises:
            StoreFull, StoreBusy: it could not be written.
        """
        with self.writing():
            self._db.execute(
                "INSERT OR IGNORE INTO decisions VALUES (?, ?, ?, ?, ?)",
                (experiment, question, arm, decision.verdict, decision.time),
            )

    def close(self) -> None:
        self._db.close()


class Reader:
    """Reads a file of experiments.

    Raises:
        StartError: the file cannot be opened, or is not a file of experiments.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.is_file():
            raise StartError(f"{path} cannot be read: no such file")
        try:
            uri = f"file:{quote(str(path.absolute()))}?mode=ro"
            self.db = sqlite3.connect(uri, timeout=_BUSY_S, isolation_level=None, check_same_thread=False, uri=True)
            (version,) = self.db.execute("PRAGMA user_version").fetchone()
            why = why_other_tables(self.db, _SCHEMA)
        except sqlite3.Error as error:
            raise StartError(f"{path} is not a file of experiments: {error}") from error
        if version not in (0, _VERSION):
            raise StartError(f"{path} has version {version}, but this gateway reads version {_VERSION}")
        if why:
            raise StartError(f"{path} is not a file of experiments: {why}")

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.db.close()

    def state(self) -> tuple[int, int, int]:
        """Return numbers that change when exposures or outcomes are added."""
        row: tuple[int, int, int] = self.db.execute(
            "SELECT (SELECT ifnull(max(id), 0) FROM exposures), (SELECT ifnull(max(id), 0) FROM outcomes), "
            "(SELECT ifnull(max(id), 0) FROM branches)"
        ).fetchone()
        return row

    def exposures(self, experiment: str) -> Exposures:
        """Return the units of an experiment under all of its weights, in order of arrival."""
        rows = self.db.execute(
            "SELECT id, generation, arm, model, task, share FROM branches WHERE experiment = ? ORDER BY id",
            (experiment,),
        ).fetchall()
        places = {row[0]: place for place, row in enumerate(rows)}
        branches = [Branch(*row[1:]) for row in rows]
        marks = ", ".join("?" * len(places))
        query = f"SELECT branch, unit, time FROM exposures WHERE branch IN ({marks}) ORDER BY id"  # noqa: S608  only marks
        branch, unit, seconds = self.columns(query, list(places), (np.int64, np.int64, np.float64))
        ids = np.array(list(places), np.int64)
        return Exposures(branches, unit, np.searchsorted(ids, branch), seconds)

    def names(self, experiment: str) -> list[str]:
        """Return the names of the outcomes of an experiment."""
        query = "SELECT name FROM names WHERE experiment = ? ORDER BY id"
        return [name for (name,) in self.db.execute(query, (experiment,))]

    def outcomes(self, experiment: str, name: str) -> tuple[Outcomes, list[bytes]]:
        """Return the outcomes of one name, and their keys, which identify outcomes that several replicas have."""
        query = (
            "SELECT unit, value, of, time, is_before, key FROM outcomes "
            "WHERE name = (SELECT id FROM names WHERE experiment = ? AND name = ?) ORDER BY id"
        )
        kinds = (np.int64, np.float64, np.float64, np.float64, np.bool_, object)
        unit, value, of, seconds, is_before, keys = self.columns(query, [experiment, name], kinds)
        return Outcomes(unit, value, of, seconds, is_before), keys.tolist()

    def log(self, after: int = 0) -> Iterator[tuple[int, Exposure]]:
        """Yield the exposures of all experiments as the exposure log writes them, each with its number.

        Args:
            after: the number of the last exposure that is already known.
        """
        rows = self.db.execute(
            "SELECT exposures.id, time, experiment, generation, arm, unit, exposures.model, space, share, source, answered "
            "FROM exposures JOIN branches ON branches.id = branch WHERE exposures.id > ? ORDER BY exposures.id",
            (after,),
        )
        for number, seconds, experiment, generation, arm, unit, model, space, share, source, answered in rows:
            yield (
                number,
                Exposure(
                    iso(seconds),
                    experiment,
                    generation,
                    arm,
                    unit.to_bytes(8, signed=True).hex(),
                    model,
                    space,
                    share,
                    source,
                    bool(answered),
                ),
            )

    def decisions(self, experiment: str, question: str) -> dict[str, Decision]:
        """Return the decision about each arm."""
        query = "SELECT arm, verdict, time FROM decisions WHERE experiment = ? AND question = ?"
        return {arm: Decision(verdict, when) for arm, verdict, when in self.db.execute(query, (experiment, question))}

    def declarations(self, experiment: str) -> list[tuple[str, str, str]]:
        """Return the texts of each declaration of an experiment's outcome, with the time when it was first served."""
        query = "SELECT question, arm, time FROM decisions WHERE experiment = ? AND verdict = ?"
        return self.db.execute(query, (experiment, DECLARED)).fetchall()

    def columns(self, query: str, values: Sequence[object], kinds: Sequence[type]) -> list[np.ndarray]:
        """Return the columns of a query, read in chunks: a list of all rows would take many times the memory."""
        cursor = self.db.execute(query, values)
        chunks: list[list[np.ndarray]] = []
        while rows := cursor.fetchmany(_CHUNK):
            chunks.append([np.array(column, kind) for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)])
        if not chunks:
            return [np.empty(0, kind) for kind in kinds]
        return [np.concatenate(parts) for parts in zip(*chunks, strict=True)]


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")  # a confirmed outcome survives a power failure
    return db

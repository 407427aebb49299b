"""The manifest of a job: its model, source and shards, and the ids that it has seen, in one SQLite file.

A shard counts once it is committed here, after the sink has stored it. The end of a shard is recorded before the sink
gets it, so that after a crash the next process writes the same rows as the same shard again. The file is locked while a
process works on the job.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from gateway.bulk.rows import BulkError, Json, Position, RowId

_VERSION = 1
_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE shards (
    number INTEGER PRIMARY KEY, part INTEGER, items INTEGER NOT NULL, rows INTEGER, skipped INTEGER, tokens INTEGER,
    truncated INTEGER, position TEXT, errors_bytes INTEGER, is_done INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE ids (id PRIMARY KEY) WITHOUT ROWID;
"""
_MAX_ID_CHARACTERS = 40
_INT64 = range(-(2**63), 2**63)
_ASKED_AT_ONCE = 500
_CACHE_KIB = 32 * 1024


@dataclass(frozen=True, slots=True)
class Counts:
    """The amount of work that was done.

    Attributes:
        items: items that were read from the source; a long item can become several rows.
        rows: rows that were embedded and written.
        skipped: items that could not be embedded.
        tokens: the tokens of all rows, as the model saw them.
        truncated: rows whose text was cut.
    """

    items: int = 0
    rows: int = 0
    skipped: int = 0
    tokens: int = 0
    truncated: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.items + other.items,
            self.rows + other.rows,
            self.skipped + other.skipped,
            self.tokens + other.tokens,
            self.truncated + other.truncated,
        )


@dataclass(frozen=True, slots=True)
class Earlier:
    """The rows of forgotten jobs.

    Attributes:
        rows: the number of these rows.
        count: the number of all rows of the sink at that time.
    """

    rows: int
    count: int

    def stale(self, rows: int, number: int) -> int:
        """Return the maximum number of these rows that a job has not written again.

        There are fewer if another program has added rows to the sink since, which the numbers cannot tell apart.

        Args:
            rows: the rows of the job.
            number: all rows of the sink after it.
        """
        return min(self.rows, max(0, min(self.rows + number - self.count, number) - rows))


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard that is complete.

    Attributes:
        part: its number in the sink, or ``None`` if no row of it could be embedded.
        position: the source's position after its last item.
        errors_bytes: the size of the error file after it.
    """

    part: int | None
    counts: Counts
    position: Position
    errors_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a job.

    Attributes:
        number: the number of the next shard.
        part: the number of the next shard in the sink.
        position: where reading continues; ``None`` for the beginning.
        planned_items: the number of items that the next shard must have, because a killed process may have written it;
            0 otherwise.
    """

    number: int
    part: int
    counts: Counts
    position: Position | None
    errors_bytes: int
    planned_items: int
    is_finished: bool


class Manifest:
    """An open and locked manifest.

    Args:
        path: the path of its file, whose folder must exist.

    Raises:
        BulkError: another process works on the job, or the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        with self._using():
            self._db = sqlite3.connect(path, timeout=0, check_same_thread=False, isolation_level=None)
        try:
            with self._using():
                self._db.execute(
                    "PRAGMA locking_mode = EXCLUSIVE"
                )  # until the file is closed, even by the process's death
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
                self._db.execute("BEGIN EXCLUSIVE")
                version = self._db.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    if self._db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
                        raise BulkError(f"{path}: is another program's database, not a manifest: name another file")
                    for statement in _SCHEMA.split(";\n"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {_VERSION}")
                self._db.execute("COMMIT")
            if version not in (0, _VERSION):
                raise BulkError(
                    f"{path}: was written by another version of the gateway (format {version}; this one reads "
                    f"{_VERSION})"
                )
        except BaseException:  # an open file would stay locked
            self._db.close()
            raise

    @contextmanager
    def _using(self) -> Iterator[None]:
        try:
            with self._lock:  # one thread reads ahead, and another one commits
                yield
        except UnicodeDecodeError as error:  # SQLite's message quotes damaged text
            raise self._damaged() from error
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                raise BulkError(f"{self.path}: another process works on this job; wait for it, or end it") from None
            hint = "; make room, and run the same command again" if "full" in str(error) else ""
            if not hint and self.path.parent.exists() and not os.access(self.path.parent, os.W_OK):
                hint = "; its folder cannot be written"
            raise BulkError(f"{self.path}: the manifest cannot be used: {error}{hint}") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._using():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:  # also Ctrl-C must end the transaction
                if self._db.in_transaction:  # a full disk has already ended it
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    # ------------------------------------------------------------------------------------------------------- the job

    def begin(self, identity: Mapping[str, Json]) -> Progress:
        """Begin a job, or continue it.

        Args:
            identity: everything that must be the same each time the job continues, by its name in messages.

        Raises:
            BulkError: the manifest belongs to another job.
        """
        known = self._fact("identity")
        if known is None:
            with self._transaction():
                self._set("identity", dict(identity))
        elif isinstance(known, Mapping):
            self._refuse(known, identity)
        else:
            raise self._damaged()
        return self.progress()

    def check(self, identity: Mapping[str, Json]) -> None:
        """Compare a part of the identity with the job's recorded identity, if the job has begun.

        Raises:
            BulkError: the manifest belongs to another job.
        """
        known = self._fact("identity")
        if isinstance(known, Mapping):
            self._refuse({name: known.get(name) for name in identity}, identity)

    def _refuse(self, known: Mapping[str, Json], identity: Mapping[str, Json]) -> None:
        if differences := list(_differences(known, identity)):
            raise BulkError(
                f"{self.path}: this manifest belongs to another job: {'; '.join(differences)}. Use the same options "
                "to continue that job. For a new job, choose another --to or --manifest, or add --restart, which "
                "forgets the old job"
            )

    def progress(self) -> Progress:
        """Return the job's progress."""
        with self._using():
            row = self._db.execute(
                "SELECT COUNT(*), COUNT(part), SUM(items), SUM(rows), SUM(skipped), SUM(tokens), SUM(truncated) "
                "FROM shards WHERE is_done"
            ).fetchone()
            last = self._db.execute(
                "SELECT position, errors_bytes FROM shards WHERE is_done ORDER BY number DESC LIMIT 1"
            ).fetchone()
            planned = self._db.execute("SELECT items FROM shards WHERE NOT is_done").fetchone()
        return Progress(
            number=row[0],
            part=row[1],
            counts=Counts(*(number or 0 for number in row[2:])),
            position=None if last is None else self._read(last[0]),
            errors_bytes=0 if last is None else last[1],
            planned_items=0 if planned is None else planned[0],
            is_finished=self._fact("is_finished") is True,
        )

    def plan(self, number: int, items: int) -> None:
        """Record the number of a shard's items, before its sink gets the shard."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO shards (number, items) VALUES (?, ?)", (number, items))

    def commit(self, number: int, shard: Shard, ids: Iterable[RowId]) -> None:
        """Commit a shard that its sink has stored, together with the ids of its rows."""
        counts = shard.counts
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO shards VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 1)",
                (
                    number, shard.part, counts.items, counts.rows, counts.skipped, counts.tokens, counts.truncated,
                    orjson.dumps(shard.position).decode(), shard.errors_bytes,
                ),
            )  # fmt: skip
            db.executemany("INSERT OR IGNORE INTO ids VALUES (?)", ((_key(row_id),) for row_id in ids))

    def finish(self) -> None:
        """Record that the source has no more rows."""
        with self._transaction():
            self._set("is_finished", True)

    def parts(self) -> list[tuple[int, int]]:
        """Return the number of each shard in the sink, and its number of rows."""
        with self._using():
            found: list[tuple[int, int]] = self._db.execute(
                "SELECT part, rows FROM shards WHERE is_done AND part IS NOT NULL ORDER BY number"
            ).fetchall()
        return found

    def written_to(self, sink: str) -> list[int] | None:
        """Return the numbers of the shards that the job may have written to this sink; ``None`` if its sink is another."""
        identity = self._fact("identity")
        if not isinstance(identity, Mapping) or identity.get("sink") != sink:
            return None
        progress = self.progress()
        return [*(part for part, _ in self.parts()), *([progress.part] if progress.planned_items else [])]

    def seen(self, ids: Sequence[RowId]) -> set[RowId]:
        """Return the subset of these ids that committed shards contain."""
        by_key = {_key(row_id): row_id for row_id in ids}
        keys = list(by_key)
        found: set[RowId] = set()
        with self._using():
            for first in range(0, len(keys), _ASKED_AT_ONCE):
                some = keys[first : first + _ASKED_AT_ONCE]
                marks = ",".join("?" * len(some))
                rows = self._db.execute(f"SELECT id FROM ids WHERE id IN ({marks})", some)  # noqa: S608  only marks
                found.update(by_key[row[0]] for row in rows)
        return found

    def forget(self, earlier: Earlier | None = None) -> None:
        """Forget the job, to make room for a new one.

        Args:
            earlier: the rows that stay in the sink.
        """
        with self._transaction() as db:
            for table in ("facts", "shards", "ids"):
                db.execute(f"DELETE FROM {table}")  # noqa: S608  of this module
            if earlier is not None:
                self._set("earlier", asdict(earlier))

    @property
    def earlier(self) -> Earlier | None:
        """The rows of forgotten jobs in the sink, when the present job began."""
        match self._fact("earlier"):
            case {"rows": int(rows), "count": int(number)}:
                return Earlier(rows, number)
        return None

    def close(self) -> None:
        """Close the file, so that other processes can open it."""
        self._db.close()

    def _fact(self, name: str) -> Json:
        with self._using():
            row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else self._read(row[0])

    def _read(self, text: object) -> Json:
        try:
            value: Json = orjson.loads(text)  # type: ignore[arg-type]
        except orjson.JSONDecodeError as error:
            raise self._damaged() from error
        return value

    def _damaged(self) -> BulkError:
        return BulkError(f"{self.path}: the manifest is damaged: start over with another --to, or with --restart")

    def _set(self, name: str, value: Json) -> None:
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, orjson.dumps(value).decode()))


def _key(row_id: RowId) -> int | str | bytes:
    """Return an id as stored in SQLite: ``1`` and ``"1"`` differ, and a long id takes 16 bytes."""
    if isinstance(row_id, int):
        return row_id if row_id in _INT64 else f"\0{row_id}".encode()
    return row_id if len(row_id) <= _MAX_ID_CHARACTERS else hashlib.blake2b(row_id.encode(), digest_size=16).digest()


def _differences(known: Mapping[str, Json], identity: Mapping[str, Json]) -> Iterator[str]:
    for name in dict.fromkeys((*known, *identity)):
        before, now = known.get(name), identity.get(name)
        if before == now:
            continue
        if name == "source hash":
            yield "the content of the source has changed since"
        else:
            yield f"its {name} is {_shown(before)}, but now it would be {_shown(now)}"


def _shown(value: Json) -> str:
    if value is None:
        return "not set"
    return value if isinstance(value, str) else orjson.dumps(value).decode()

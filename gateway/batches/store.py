"""Files and batches in a folder: content in files, everything else in SQLite. Survives a crash at any moment.

A file counts once its row is in the database, and the row of a batch has the size of the output that counts. The next
start removes everything else that a crash left behind. Only one process at a time may use a folder.
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from gateway.batches.contents import Contents, disk_full, quota_full
from gateway.batches.values import (
    KEPT_S,
    Batch,
    BatchesUnavailable,
    LineError,
    Purpose,
    Status,
    StoredFile,
)
from gateway.config.files import OpenFile, open_lock, why_other_tables, why_unusable
from gateway.config.wording import cut
from gateway.errors import BadInput, StartError

_BUSY_S = 5.0
_VERSION = 1
# The maximum number of batches per client. A batch can take up to 100 KiB in the database, for metadata and errors.
_MAX_KEPT = 10_000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, filename TEXT NOT NULL,
    purpose TEXT NOT NULL, num_bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS files_of_owner ON files (owner, seq);
CREATE TABLE IF NOT EXISTS batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, is_open INTEGER NOT NULL,
    ended_at INTEGER NOT NULL, data TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS batches_of_owner ON batches (owner, seq);
CREATE INDEX IF NOT EXISTS open_batches ON batches (is_open, seq);
"""


class Page(NamedTuple):
    """The start, length and order of a list; ``after`` is the id of the item before the list's first."""

    after: str | None = None
    limit: int = 20
    is_ascending: bool = False


class Store(Contents):
    """The folder. All methods block on the disk: call them in one thread, outside the event loop.

    Args:
        max_bytes: the limit of all files together, in bytes.

    Raises:
        StartError: the folder cannot be used.
    """

    def __init__(self, folder: Path, max_bytes: int, now: Callable[[], float] = time.time) -> None:
        super().__init__(folder / "files", max_bytes)
        self._now = now
        path = folder / "batches.sqlite3"
        try:
            self._files.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = open_lock(folder / "lock")
        except OSError as error:
            raise StartError(f"GATEWAY_BATCH_DIR: {folder} cannot be written: {why_unusable(error)}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise StartError(
                f"GATEWAY_BATCH_DIR: {folder} is in use by another process: each gateway needs a separate folder"
            ) from error
        try:
            self._db = self._open(path)
            self._file = OpenFile(path)
            known = self._known()
        except (
            OSError,
            sqlite3.Error,
            BatchesUnavailable,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
        ) as error:
            self._lock.close()
            raise StartError(
                f"GATEWAY_BATCH_DIR: {path} cannot be opened as a database of batches: {error}; move it away to start "
                "with a new one, which deletes all files of batches"
            ) from error
        try:
            self.keep_only(known)  # a crash may have left others behind
        except OSError as error:
            self.close()
            raise StartError(f"GATEWAY_BATCH_DIR: {error.filename} cannot be removed: {why_unusable(error)}") from error

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")  # an answer that is recorded as written survives a power failure
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise sqlite3.DatabaseError(f"it has version {version}, but this gateway reads version {_VERSION}")
        for statement in _SCHEMA.split(";"):
            db.execute(statement)
        if why := why_other_tables(db, _SCHEMA):
            raise sqlite3.DatabaseError(why)
        db.execute(f"PRAGMA user_version = {_VERSION}")
        return db

    def _known(self) -> set[str]:
        """Read the whole database, and return the ids of all files that it knows."""
        known = {_file_of(row).id for row in self._db.execute("SELECT * FROM files") if row["expires_at"] > 0}
        for row in self._db.execute("SELECT is_open, data FROM batches"):
            batch = _load(row["data"])
            known |= {batch.output_id, batch.error_id} if row["is_open"] else set()
        return known

    def close(self) -> None:
        """Close the database, and release the folder for other processes."""
        self._db.close()
        self._lock.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Write in one transaction.

        Raises:
            StorageFull: the disk is full.
            BatchesUnavailable: the database cannot be written now.
        """
        if self._file.is_lost:
            raise BatchesUnavailable(
                "the database of batches was removed or replaced while the gateway runs; the operator must restart it",
                is_permanent=True,
            )
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:  # the thread reuses the connection, so the transaction must end
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
                raise disk_full("its disk has no room for the database") from error
            raise BatchesUnavailable(
                f"the database of batches cannot be written at the moment: {error}", retry_after_s=5
            ) from error

    # ------------------------------------------------------------------------------------------------------ files

    def add_file(self, file: StoredFile) -> None:
        """Turn the written content of an upload into a file.

        Raises:
            StorageFull: the client's files would take more than remains free for other clients.
        """
        [row] = self._read("SELECT total(num_bytes) AS held FROM files WHERE owner = ? AND expires_at > 0", file.owner)
        held, free = int(row["held"]) + file.num_bytes, self._max_bytes - self.num_bytes
        if file.owner and held > free:  # without keys, all files have one owner, which is ""
            raise quota_full(
                f"the files of this key would take {held} bytes, and a key may take as much as remains free, {free}"
            )
        with self._writing() as db:
            self._insert(db, file)

    @staticmethod
    def _insert(db: sqlite3.Connection, file: StoredFile) -> None:
        db.execute(
            "INSERT OR IGNORE INTO files (id, owner, filename, purpose, num_bytes, created_at, expires_at) "
            "VALUES (:id, :owner, :filename, :purpose, :num_bytes, :created_at, :expires_at)",
            asdict(file),
        )

    def file(self, owner: str, file_id: str) -> StoredFile | None:
        """Return a client's file, unless it has expired."""
        rows = self._read(
            "SELECT * FROM files WHERE id = ? AND owner = ? AND expires_at > ?", file_id, owner, self._now()
        )
        return _file_of(rows[0]) if rows else None

    def files(self, owner: str, page: Page, purpose: str | None = None) -> list[StoredFile]:
        """Return a page of a client's files, with one more than ``limit`` if there are more."""
        condition, values = "owner = ? AND expires_at > ?", [owner, self._now()]
        if purpose is not None:
            condition, values = f"{condition} AND purpose = ?", [*values, purpose]
        return [_file_of(row) for row in self._list("files", condition, values, page)]

    def remove_file(self, file_id: str) -> None:
        """Remove a file and its content.

        Its row stays until the next sweep, so that a client that lists files page by page while deleting them keeps its
        place.
        """
        with self._writing() as db:
            db.execute("UPDATE files SET expires_at = 0 WHERE id = ?", (file_id,))
        self.discard(file_id)

    def abandon(self, file_id: str) -> None:
        """Remove the leftovers of an upload that failed or whose client went away."""
        self.discard(file_id)
        if self._read("SELECT id FROM files WHERE id = ?", file_id):
            with self._writing() as db:
                db.execute("DELETE FROM files WHERE id = ?", (file_id,))

    # ---------------------------------------------------------------------------------------------------- batches

    def add_batch(self, batch: Batch) -> None:
        """Store a new batch, and forget the oldest of its client that have ended if there are very many."""
        with self._writing() as db:
            db.execute(
                "DELETE FROM batches WHERE owner = :owner AND is_open = 0 AND seq <= "
                "(SELECT seq FROM batches WHERE owner = :owner ORDER BY seq DESC LIMIT 1 OFFSET :kept)",
                {"owner": batch.owner, "kept": _MAX_KEPT - 1},
            )
            db.execute(
                "INSERT INTO batches (id, owner, is_open, ended_at, data) VALUES (?, ?, 1, 0, ?)",
                (batch.id, batch.owner, _dump(batch)),
            )

    def save(self, batch: Batch, *files: StoredFile) -> None:
        """Store the state of a batch and add files, all or nothing."""
        with self._writing() as db:
            for file in files:
                self._insert(db, file)
            db.execute(
                "UPDATE batches SET is_open = ?, ended_at = ?, data = ? WHERE id = ?",
                (not batch.status.is_final, int(self._now()) if batch.status.is_final else 0, _dump(batch), batch.id),
            )

    def batch(self, owner: str, batch_id: str) -> Batch | None:
        """Return a batch of a client."""
        rows = self._read("SELECT data FROM batches WHERE id = ? AND owner = ?", batch_id, owner)
        return _load(rows[0]["data"]) if rows else None

    def batches(self, owner: str, page: Page) -> list[Batch]:
        """Return a page of a client's batches, with one more than ``limit`` if there are more."""
        return [_load(row["data"]) for row in self._list("batches", "owner = ?", [owner], page)]

    def open_batches(self) -> list[Batch]:
        """Return the unfinished batches of all clients, the oldest first."""
        return [_load(row["data"]) for row in self._read("SELECT data FROM batches WHERE is_open = 1 ORDER BY seq")]

    def sweep(self) -> int:
        """Remove expired files, and batches that ended long ago; return the number of removed files."""
        in_use = {batch.input_id for batch in self.open_batches()}
        expired = [row["id"] for row in self._read("SELECT id FROM files WHERE expires_at <= ?", self._now())]
        gone = [file_id for file_id in expired if file_id not in in_use]
        with self._writing() as db:
            db.executemany("DELETE FROM files WHERE id = ?", [(file_id,) for file_id in gone])
            db.execute("DELETE FROM batches WHERE is_open = 0 AND ended_at <= ?", (self._now() - KEPT_S,))
        for file_id in gone:
            self.discard(file_id)
        return len(gone)

    def _read(self, query: str, *values: object) -> list[sqlite3.Row]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise BatchesUnavailable(
                f"the database of batches cannot be read at the moment: {error}", retry_after_s=5
            ) from error

    def _list(self, table: str, condition: str, values: list[Any], page: Page) -> list[sqlite3.Row]:
        sign, order = (">", "ASC") if page.is_ascending else ("<", "DESC")
        if page.after is not None:
            if not self._read(f"SELECT id FROM {table} WHERE id = ? AND owner = ?", page.after, values[0]):  # noqa: S608
                raise BadInput(f"`after` must be the id of an item in this list, got {cut(page.after)}", param="after")
            condition += f" AND seq {sign} (SELECT seq FROM {table} WHERE id = ? AND owner = ?)"  # noqa: S608
            values = [*values, page.after, values[0]]
        query = f"SELECT * FROM {table} WHERE {condition} ORDER BY seq {order} LIMIT ?"  # noqa: S608  no value of a client
        return self._read(query, *values, page.limit + 1)


def _file_of(row: sqlite3.Row) -> StoredFile:
    fields = {name: row[name] for name in StoredFile.__slots__}
    return StoredFile(**{**fields, "purpose": Purpose(row["purpose"])})


def _dump(batch: Batch) -> str:
    return json.dumps(asdict(batch))


def _load(data: str) -> Batch:
    fields = json.loads(data)
    fields["status"], fields["end"] = Status(fields["status"]), Status(fields["end"])
    fields["errors"] = tuple(LineError(**error) for error in fields["errors"])
    return Batch(**fields)

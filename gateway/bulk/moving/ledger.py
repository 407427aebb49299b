"""The ledger of a move: the digests of the items that it wrote, in an SQLite file; the base of `decisions.decide`."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from gateway.bulk.moving.decisions import Base, Digest, SortKey
from gateway.bulk.rows import BulkError, RowId
from gateway.bulk.stores.protocol import Mark

_SCHEMA = """
CREATE TABLE IF NOT EXISTS items (
    key BLOB PRIMARY KEY, id TEXT NOT NULL, written BLOB, pending BLOB, is_doomed INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID
"""
_DIGEST_BYTES = 16
_PAGE = 1000
# Large enough for the integers of all stores.
_INTEGER_BYTES = 40


class Ledger:
    """An open and locked ledger.

    Args:
        path: the path of its file, whose folder must exist.
        sort_key: the order of the store's ids.

    Raises:
        BulkError: another process works on the move, or the file cannot be used.
    """

    def __init__(self, path: Path, sort_key: Callable[[RowId], SortKey]) -> None:
        self.path = path
        self._sort_key = sort_key
        self._lock = threading.RLock()
        with self._using():
            self._db = sqlite3.connect(path, timeout=0, check_same_thread=False, isolation_level=None)
        try:
            with self._using():
                self._db.execute("PRAGMA locking_mode = EXCLUSIVE")  # also released by the process's death
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("BEGIN EXCLUSIVE")
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute("COMMIT")
        except BaseException:  # an open file would stay locked
            self._db.close()
            raise

    @contextmanager
    def _using(self) -> Iterator[None]:
        try:
            with self._lock:  # one thread reads ahead while another one writes
                yield
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                raise BulkError(f"{self.path}: another process works on this move; wait for it, or end it") from None
            hint = "; make room, and run the same command again" if "full" in str(error) else ""
            raise BulkError(f"{self.path}: the ledger of the move cannot be used: {error}{hint}") from error

    def _key(self, row_id: RowId) -> bytes:
        """Return an id's sort key as bytes that SQLite compares in the same way."""
        kind, value = self._sort_key(row_id)
        if isinstance(value, int):
            encoded = (value + (1 << (8 * _INTEGER_BYTES - 1))).to_bytes(_INTEGER_BYTES)
        else:
            encoded = value.encode(errors="surrogatepass")
        return bytes([kind]) + encoded

    def bases(self) -> Iterator[tuple[RowId, Base]]:
        """Yield all items in the order of the store's ids. Items may be added during the iteration."""
        last = b""
        while True:
            with self._using():
                page = self._db.execute(
                    "SELECT key, id, written, pending FROM items WHERE key > ? ORDER BY key LIMIT ?", (last, _PAGE)
                ).fetchall()
            if not page:
                return
            last = page[-1][0]
            for _key, row_id, written, pending in page:
                yield json.loads(row_id), Base(written, _apart(pending or b""))

    def bases_of(self, ids: Iterable[RowId]) -> dict[RowId, Base]:
        """Return the bases of those of these items that the ledger has."""
        found = {}
        with self._using():
            for row_id in ids:
                query = "SELECT written, pending FROM items WHERE key = ?"
                row = self._db.execute(query, (self._key(row_id),)).fetchone()
                if row is not None:
                    found[row_id] = Base(row[0], _apart(row[1] or b""))
        return found

    def plan(self, digests: Mapping[RowId, Digest]) -> None:
        """Note the items that are about to be written, besides the versions that earlier processes may have written."""
        self._change(
            "INSERT INTO items (key, id, pending) VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET pending = "
            "CAST(coalesce(pending, x'') || excluded.pending AS BLOB) "
            "WHERE pending IS NULL OR NOT instr(pending, excluded.pending)",
            ((self._key(row_id), json.dumps(row_id), digest) for row_id, digest in digests.items()),
        )

    def record(self, digests: Mapping[RowId, Digest]) -> None:
        """Record the content that both collections now have for items."""
        self._change(
            "INSERT INTO items (key, id, written) VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE "
            "SET written = excluded.written, pending = NULL, is_doomed = 0",
            ((self._key(row_id), json.dumps(row_id), digest) for row_id, digest in digests.items()),
        )

    def doom(self, ids: Iterable[RowId]) -> None:
        """Mark items for deletion at the end of a pass."""
        self._change("UPDATE items SET is_doomed = 1 WHERE key = ?", ((self._key(row_id),) for row_id in ids))

    def num_doomed(self) -> int:
        """Return the number of marked items."""
        return self._count("is_doomed")

    def num_items(self) -> int:
        """Return the number of items that were certainly written."""
        return self._count("written IS NOT NULL")

    def _count(self, condition: str) -> int:
        with self._using():
            [number] = self._db.execute(f"SELECT COUNT(*) FROM items WHERE {condition}").fetchone()  # noqa: S608  above
        return int(number)

    def doomed(self) -> list[RowId]:
        """Return some of the marked items."""
        with self._using():
            rows = self._db.execute("SELECT id FROM items WHERE is_doomed LIMIT ?", (_PAGE,)).fetchall()
        return [json.loads(row_id) for (row_id,) in rows]

    def spare(self, ids: Iterable[RowId] | None = None) -> None:
        """Remove the marks of some items, or all marks, which a killed process may have left."""
        if ids is None:
            self._change("UPDATE items SET is_doomed = 0 WHERE is_doomed", [()])
        else:
            self._change("UPDATE items SET is_doomed = 0 WHERE key = ?", ((self._key(row_id),) for row_id in ids))

    def forget(self, ids: Iterable[RowId]) -> None:
        """Remove items that neither collection has."""
        self._change("DELETE FROM items WHERE key = ?", ((self._key(row_id),) for row_id in ids))

    @property
    def mark(self) -> Mark | None:
        """The moment at which the last complete pass began; the ledger has everything before it."""
        with self._using():
            row = self._db.execute("SELECT value FROM facts WHERE name = 'mark'").fetchone()
        return None if row is None else row[0]

    @mark.setter
    def mark(self, mark: Mark | None) -> None:
        if mark is not None:
            self._change("INSERT OR REPLACE INTO facts VALUES ('mark', ?)", [(mark,)])

    def copy_to(self, path: Path) -> None:
        """Write a copy of the present ledger, which replaces an older copy."""
        path.unlink(missing_ok=True)
        with self._using():
            self._db.execute("VACUUM INTO ?", (str(path),))

    def sample(self, number: int) -> dict[RowId, Digest]:
        """Return random items that were written, with their digests."""
        with self._using():
            rows = self._db.execute(
                "SELECT id, written FROM items WHERE written IS NOT NULL ORDER BY random() LIMIT ?", (number,)
            ).fetchall()
        return {json.loads(row_id): written for row_id, written in rows}

    def belong_to(self, target: str, *, former: str | None = None) -> None:
        """Forget everything if the ledger is that of an earlier move, which wrote elsewhere.

        Args:
            target: the collection and vector that this move writes.
            former: the same target in the form that an earlier version wrote.
        """
        with self._using():
            row = self._db.execute("SELECT value FROM facts WHERE name = 'target'").fetchone()
        if row == (target,):
            return
        if row not in (None, (former,)):
            self.clear()
        self._change("INSERT OR REPLACE INTO facts VALUES ('target', ?)", [(target,)])

    def clear(self) -> None:
        """Forget all items, and when the last pass began."""
        self._change("DELETE FROM items", [()])
        self._change("DELETE FROM facts WHERE name = 'mark'", [()])

    def _change(self, statement: str, values: Iterable[Sequence[object]]) -> None:
        with self._using():
            self._db.execute("BEGIN")
            try:
                self._db.executemany(statement, values)
                self._db.execute("COMMIT")
            except BaseException:  # also Ctrl-C must end the transaction
                if self._db.in_transaction:  # a full disk may have ended it already
                    self._db.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close the file, and let other processes open it."""
        self._db.close()


def _apart(joined: bytes) -> frozenset[Digest]:
    return frozenset(joined[start : start + _DIGEST_BYTES] for start in range(0, len(joined), _DIGEST_BYTES))

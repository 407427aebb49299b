"""Safe reads and writes of the gateway's own files: none hangs, and a write never leaves half a file behind."""

from __future__ import annotations

import os
import secrets
import sqlite3
import stat
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from fcntl import LOCK_EX, flock
from io import BufferedReader
from pathlib import Path

from gateway.errors import StartError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def user_folder(environ: Mapping[str, str], variable: str, default: str) -> Path:
    """Return the gateway's folder within one of the user's, such as ``~/.cache``.

    Args:
        variable: names the user's folder; a relative path in it is ignored, as the XDG specification demands.
        default: the user's folder without the variable.

    Raises:
        StartError: neither is known, because the user has no home folder.
    """
    folder = Path(environ.get(variable, ""))
    if not folder.is_absolute():
        try:
            folder = Path(default).expanduser()
        except RuntimeError:
            raise StartError(f"{default} is not known, because this user has no home folder: set {variable}") from None
    return folder / "embedding-gateway"


class UnsuitableFile(OSError):
    """The path exists, but is not a readable file: a folder, a pipe, or too large. ``strerror`` says which of these."""

    def __init__(self, reason: str) -> None:
        super().__init__(0, reason)

    def __str__(self) -> str:
        return str(self.strerror)


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading, also through links; refuse anything else without waiting.

    Raises:
        UnsuitableFile: the path is something else, such as a named pipe, whose reader would wait forever for a writer.
        OSError: the file cannot be opened.
    """
    return os.fdopen(_open(path, os.O_RDONLY), "rb")


def open_lock(path: Path) -> BufferedReader:
    """Open a regular file, which is made if it does not exist, for a lock; refuse anything else without waiting.

    Raises:
        UnsuitableFile, OSError: as :func:`open_regular`.
    """
    return os.fdopen(_open(path, os.O_RDWR | os.O_CREAT), "rb")


def open_to_append(path: Path, mode: int) -> int:
    """Open a regular file, which is made if it does not exist, and return its descriptor, whose writes go to the end.

    Args:
        mode: permissions of a new file, minus the process's umask.

    Raises:
        UnsuitableFile, OSError: as :func:`open_regular`.
    """
    # Also for reading: a pipe without a reader is then opened, and named.
    return _open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, mode)


def _open(path: Path, flags: int, mode: int = 0o666) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise UnsuitableFile(f"must be a regular file, but is {_KINDS.get(kind, 'something else')}")
    return descriptor


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Read a whole file of at most ``max_bytes``.

    Raises:
        UnsuitableFile: the file is larger, or not a regular file.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            size = os.fstat(file.fileno()).st_size
            raise UnsuitableFile(f"has {size:,} bytes; the limit is {max_bytes:,}")
    return content


_BEGINNINGS = {
    b"\x1f\x8b": "is compressed with gzip: unpack it",
    b"BZh91AY&SY": "is compressed with bzip2: unpack it",
    b"\xfd7zXZ": "is compressed with xz: unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: unpack it",
    b"PK\x03\x04": "is a zip archive or a spreadsheet: unpack it, or save it as text in UTF-8",
    b"PAR1\x15": "is a Parquet file: save it as text in UTF-8",
    b"\xff\xfe": "is UTF-16: save it as UTF-8",
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
}


def why_not_text(beginning: bytes) -> str | None:
    """Return why a file with this beginning, some bytes of it, is not text in UTF-8, and what to do; ``None`` if it may be.

    A BOM is optional in UTF-16, but texts of most languages have many zero bytes in it, and hardly any in UTF-8.
    """
    for known, reason in _BEGINNINGS.items():
        if beginning.startswith(known):
            return reason
    return "is UTF-16, or not a text: save it as UTF-8" if 4 * beginning.count(0) > len(beginning) else None


@dataclass(frozen=True, slots=True)
class Style:
    """The style of a text file: its line breaks, and whether it has a byte order mark."""

    mark: str = ""
    line_break: str = "\n"

    def dress(self, text: str) -> str:
        """Return a text without a mark as it is in the file."""
        return self.mark + text


def style_of(path: Path, max_bytes: int) -> Style:
    """Return the style of a file of at most ``max_bytes``, so that a change of the file can keep it.

    Raises:
        OSError: the file cannot be read.
    """
    content = read_bounded(path, max_bytes)
    mark = "\ufeff" if content.startswith(BOM_UTF8) else ""
    return Style(mark, "\r\n" if b"\r\n" in content else "\n")


def write_whole(path: Path, content: str | Iterable[bytes], mode: int = 0o666) -> None:
    """Write a temporary file and rename it, so that a reader, or a crash, sees either the old or the new file.

    The new file keeps the permissions and the owner of the old one. If the path is a link, the file behind it is replaced.

    Args:
        mode: permissions of a new file, minus the process's umask.

    Raises:
        OSError: the file cannot be written; the old file stays.
    """
    path = path.resolve()
    before = path.stat() if path.exists() else None
    if before is not None and not stat.S_ISREG(before.st_mode):
        raise UnsuitableFile(
            f"must be a regular file, but is {_KINDS.get(stat.S_IFMT(before.st_mode), 'something else')}"
        )
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if before is not None:
                with suppress(PermissionError):  # only the owner may change it
                    os.fchown(descriptor, before.st_uid, before.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(before.st_mode))
            file.writelines([content.encode()] if isinstance(content, str) else content)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:  # also a signal must not leave the file behind
        temporary.unlink(missing_ok=True)
        raise


def why_unusable(error: Exception) -> str:
    """Return the reason why a folder for the gateway's own files cannot be used, for a message that names the folder."""
    if isinstance(error, FileExistsError):
        return "a folder of its path is a file"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


class OpenFile:
    """A file that stays open, such as a database: whether its path still leads to it.

    Raises:
        OSError: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity = _identity(path)

    @property
    def is_lost(self) -> bool:
        """Whether the file was removed or replaced. Data that is written to it now is lost when the process ends."""
        try:
            return _identity(self._path) != self._identity
        except OSError:
            return True


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


@contextmanager
def one_writer(path: Path) -> Iterator[None]:
    """Let only one process at a time change a file, so that no change is lost.

    Raises:
        OSError: the file's folder cannot be opened.
    """
    folder = os.open(path.absolute().parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flock(folder, LOCK_EX)
        yield
    finally:
        os.close(folder)


def why_other_tables(db: sqlite3.Connection, schema: str) -> str | None:
    """Return the first table or column of a schema that an SQLite file lacks; ``None`` if it has all of them.

    ``CREATE TABLE IF NOT EXISTS`` leaves a table of another version as it is, and every later write would fail.

    Raises:
        sqlite3.Error: the file cannot be read.
    """
    with closing(sqlite3.connect(":memory:")) as model:
        model.executescript(schema)
        tables = [name for (name,) in model.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            query = f"PRAGMA table_info({table})"
            found = {row[1] for row in db.execute(query)}
            missing = [row[1] for row in model.execute(query) if row[1] not in found]
            if missing:
                return f"its table {table} has no column {missing[0]}" if found else f"it has no table {table}"
    return None

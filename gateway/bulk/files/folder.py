"""A folder of files as a sink: a file for each shard, which appears under its name when it is complete."""

from __future__ import annotations

import errno
import fcntl
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from gateway.bulk.files.columns import FlatRows
from gateway.bulk.files.paths import expanded, filesystem_of
from gateway.bulk.rows import BulkError, EmbeddedRows, SpaceNote
from gateway.config.files import write_whole
from gateway.config.wording import count
from gateway.routing.spaces import is_same_space

_FULL = (errno.ENOSPC, errno.EDQUOT)


class FolderSink(ABC):
    """A folder with a file for each shard, ``part-00000.parquet`` and so on.

    On this machine, a file is written under a hidden name, synced to disk and renamed. Elsewhere it is sent as a whole;
    object stores show it only once all of it has arrived.

    Args:
        place: a path, or a URL that fsspec knows.

    Attributes:
        folder: the path of the folder on this machine; ``None`` elsewhere.
    """

    ending: str

    def __init__(self, place: str, text_field: str | None) -> None:
        self.name = place
        self._flat = FlatRows(text_field)
        self._filesystem: Any = None
        self._inner = ""
        self.folder: Path | None = None
        if "://" in place and not place.startswith("file://"):
            self._filesystem, self._inner = filesystem_of(place)
        else:
            self.folder = expanded(place.removeprefix("file://"))
        self._note: SpaceNote | None = None
        self._lock: int | None = None
        self._own: set[int] | None = None

    def is_empty(self) -> bool:
        """Return whether the first file does not exist."""
        return not self._exists(0)

    def open(self, note: SpaceNote) -> None:
        """Create the folder if necessary, and check that its vectors are of this space."""
        self._create()
        self._note = note
        space = self._space_found() if self._exists(0) else None
        if space is not None and not is_same_space(space, note.space):
            raise BulkError(
                f"{self.name}: has vectors of space {space}, which cannot be compared with this job's vectors of "
                f"{note.space}; choose another folder"
            )

    def _create(self) -> None:
        with self._writing("the folder cannot be created"):
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
            else:
                self._filesystem.makedirs(self._inner, exist_ok=True)

    def write(self, shard: int, batch: EmbeddedRows) -> None:
        """Write the file of a shard, or replace it.

        Raises:
            BulkError: it cannot be written, or another job has written it since `check_files`.
        """
        name = self.file_name(shard)
        with self._writing(f"{name} cannot be written"):
            if self._own is not None and shard not in self._own and self._exists(shard):
                raise BulkError(
                    f"{self.name}: another job has written {name} in the meantime, so both write there: choose another "
                    "folder"
                )
            if self.folder is None:
                buffer = io.BytesIO()
                self._encode(shard, batch, buffer)
                self._filesystem.pipe_file(f"{self._inner}/{name}", buffer.getvalue())
                self._add_own(shard)
                return
            # The name is always the same, so writing a shard again overwrites the leftovers of a killed process.
            temporary = self.folder / f".{name}.tmp"
            try:
                with temporary.open("wb") as file:
                    self._encode(shard, batch, file)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.folder / name)
            except BaseException:  # also Ctrl-C must not leave the file behind
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise
            self._add_own(shard)
            _sync_folder(self.folder)

    def _add_own(self, shard: int) -> None:
        if self._own is not None:
            self._own.add(shard)

    @abstractmethod
    def _encode(self, shard: int, batch: EmbeddedRows, file: BinaryIO) -> None:
        """Write a shard in the sink's format."""

    @abstractmethod
    def _space_found(self) -> str | None:
        """Return the space of the first shard, if it can be read from the file."""

    def close(self) -> None:
        """Let other jobs write into the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _claim(self) -> None:
        """Keep other jobs from writing into the folder until the sink is closed, even if their manifests are elsewhere.

        Raises:
            BulkError: another one writes there.
        """
        if self.folder is None or self._lock is not None:
            return
        lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise BulkError(f"{self.name}: another job writes into this folder: choose another one") from None
        except OSError:  # a network file system without locks
            os.close(lock)
        else:
            self._lock = lock

    def write_file(self, name: str, content: bytes) -> None:
        """Write a file next to the shards, or replace it.

        Raises:
            BulkError: it cannot be written.
        """
        with self._writing(f"{name} cannot be written"):
            if self.folder is not None:
                write_whole(self.folder / name, [content])
            else:
                self._filesystem.pipe_file(f"{self._inner}/{name}", content)

    def remove(self, names: Sequence[str]) -> None:
        """Delete some files, in this order; missing files are ignored.

        Raises:
            BulkError: a file cannot be deleted.
        """
        with self._writing("the files cannot be deleted"):
            present = self._names("*")
            for name in names:
                if name not in present:
                    continue
                if self.folder is not None:
                    (self.folder / name).unlink()
                else:
                    self._filesystem.rm_file(f"{self._inner}/{name}")

    def check_files(self, shards: Iterable[int], unconfirmed: int | None) -> None:
        """Check that the folder has exactly the files of these shards.

        Args:
            unconfirmed: a shard that a killed process may have written.

        Raises:
            BulkError: a file is missing, or another job writes or has written there, so that its files would be
            replaced or mixed.
        """
        self._create()
        with self._writing("the folder cannot be read"):
            self._claim()
            names = self._names(f"part-*{self.ending}")
        expected = {self.file_name(shard) for shard in shards}
        if missing := sorted(expected - names):
            raise BulkError(
                f"{self.name}: {count(len(missing), 'file of this job is', 'files of this job are')} missing, such as "
                f"{missing[0]}: put them back, or embed everything again with --restart"
            )
        others = names - expected - ({self.file_name(unconfirmed)} if unconfirmed is not None else set())
        if others:
            raise BulkError(f"{self.name}: has {min(others)}, which this job did not write: choose another folder")
        self._own = set() if unconfirmed is None else {unconfirmed}

    def _names(self, pattern: str) -> set[str]:
        """Return the names of the files that match a pattern."""
        if self.folder is not None:
            return {path.name for path in self.folder.glob(pattern)}
        return {str(inner).rpartition("/")[2] for inner in self._filesystem.glob(f"{self._inner}/{pattern}")}

    def file_name(self, shard: int) -> str:
        """Return the name of a shard's file."""
        return f"part-{shard:05}{self.ending}"

    def _exists(self, shard: int) -> bool:
        name = self.file_name(shard)
        if self.folder is not None:
            return (self.folder / name).exists()
        self._filesystem.invalidate_cache(self._inner)  # otherwise it may answer from an old listing
        return bool(self._filesystem.exists(f"{self._inner}/{name}"))

    @contextmanager
    def _open_shard(self, shard: int) -> Iterator[BinaryIO]:
        name = self.file_name(shard)
        if self.folder is not None:
            with (self.folder / name).open("rb") as file:
                yield file
        else:
            with self._filesystem.open(f"{self._inner}/{name}", "rb") as file:
                yield file

    @contextmanager
    def _writing(self, problem: str) -> Iterator[None]:
        try:
            yield
        except BulkError:
            raise
        except OSError as error:
            hint = "; make room, and run the same command again" if error.errno in _FULL else ""
            raise BulkError(f"{self.name}: {problem}: {error.strerror or error}{hint}") from error
        except Exception as error:  # each filesystem raises its own library's errors
            if self._filesystem is None:
                raise
            raise BulkError(f"{self.name}: {problem}: {type(error).__name__}: {error}") from error


def _sync_folder(folder: Path) -> None:
    """Sync a rename to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

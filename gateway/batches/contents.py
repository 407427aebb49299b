"""The content of files in a folder, within a quota."""

from __future__ import annotations

import errno
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from gateway.batches.values import BatchesUnavailable, StorageFull

# The minimum size of a file on disk, and in the quota: a client must not create millions of empty files.
_LEAST_BYTES = 4096
_FREE_BYTES = 64 * 1024 * 1024
_OURS = re.compile(r"file-[0-9a-f]{24}")


class Contents:
    """The content of files. All methods block on the disk: call them in one thread, outside the event loop.

    Args:
        max_bytes: the limit of all files together, in bytes.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._files = folder
        self._max_bytes = max_bytes
        self._num_bytes = 0

    def keep_only(self, file_ids: set[str]) -> None:
        """Remove the gateway's other files, and count these. What has another name is not the gateway's.

        Raises:
            OSError: a file cannot be removed.
        """
        self._num_bytes = 0
        for path in self._files.iterdir():
            if path.name in file_ids:
                self._num_bytes += counted(path)
            elif _OURS.fullmatch(path.name) and (not path.is_dir() or path.is_symlink()):
                path.unlink()

    def path(self, file_id: str) -> Path:
        """Return the path of a file's content."""
        return self._files / file_id

    def open(self, file_id: str) -> BinaryIO:
        """Open the content of a file for reading."""
        return self.path(file_id).open("rb")

    def new_id(self) -> str:
        """Return the id for a new file."""
        return f"file-{secrets.token_hex(12)}"

    def write(self, file_id: str, offset: int, data: bytes) -> int:
        """Truncate a file to its first bytes, append data, and return its new size.

        Raises:
            FileNotFoundError: the file has fewer bytes: appending would leave a hole.
            StorageFull: the quota or the disk is full.
        """
        path = self.path(file_id)
        self._require_bytes(file_id, offset)
        before = counted(path)
        self.require_room(max(_LEAST_BYTES, offset + len(data)) - before)
        try:
            with path.open("r+b" if offset else "wb") as file:
                file.seek(offset)
                file.truncate()
                file.write(data)
        except OSError as error:
            raise _failure(error) from error
        finally:
            self._num_bytes += counted(path) - before
        return offset + len(data)

    def sync(self, *file_ids: str) -> None:
        """Sync the content of files to disk.

        Raises:
            StorageFull: the content cannot be written.
        """
        try:
            for path in (*map(self.path, file_ids), self._files):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise _failure(error) from error

    def cut(self, file_id: str, num_bytes: int) -> None:
        """Truncate a file to its first bytes, removing the leftovers of a crash.

        Raises:
            FileNotFoundError: the file has fewer bytes.
        """
        self._require_bytes(file_id, num_bytes)
        path = self.path(file_id)
        before = counted(path)
        os.truncate(path, num_bytes)
        self._num_bytes += counted(path) - before

    def _require_bytes(self, file_id: str, num_bytes: int) -> None:
        if self.size(file_id) < num_bytes:
            raise FileNotFoundError(errno.ENOENT, "a part of the file is missing", str(self.path(file_id)))

    def require_room(self, num_bytes: int) -> None:
        """Check that this number of additional bytes may be written.

        Raises:
            StorageFull: the quota or the disk would be full.
        """
        if self._num_bytes + num_bytes > self._max_bytes:
            raise quota_full(f"its files take {self._num_bytes} of GATEWAY_BATCH_MAX_BYTES={self._max_bytes} bytes")
        try:
            status = os.statvfs(self._files)
        except OSError as error:
            raise _failure(error) from error
        free = status.f_bavail * status.f_frsize
        if free < num_bytes + _FREE_BYTES:
            raise disk_full(f"its disk has {free} bytes left, of which {_FREE_BYTES} must stay free")

    def size(self, file_id: str) -> int:
        """Return the size of a file's content in bytes; 0 if it does not exist."""
        path = self.path(file_id)
        return path.stat().st_size if path.exists() else 0

    def discard(self, file_id: str) -> None:
        """Remove the content of a file. If the disk does not allow it, the next start removes it."""
        path = self.path(file_id)
        with suppress(OSError):
            num_bytes = counted(path)
            path.unlink(missing_ok=True)
            self._num_bytes -= num_bytes

    @property
    def num_bytes(self) -> int:
        """The bytes that count toward the quota."""
        return self._num_bytes


def counted(path: Path) -> int:
    """Return a file's share of the quota in bytes; 0 if it does not exist."""
    try:
        return max(_LEAST_BYTES, path.stat().st_size)
    except FileNotFoundError:
        return 0


def _failure(error: OSError) -> Exception:
    """Return the error for a client whose file cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return disk_full(str(error.strerror))
    if isinstance(error, FileNotFoundError):
        return error
    return BatchesUnavailable(
        f"the folder of batches cannot be written at the moment: {error.strerror}", retry_after_s=5
    )


def quota_full(reason: str) -> StorageFull:
    """Return the error of a folder that has reached the operator's limit."""
    return _storage_full(reason, "to raise GATEWAY_BATCH_MAX_BYTES")


def disk_full(reason: str) -> StorageFull:
    """Return the error of a folder whose disk has no room, whatever the limit is."""
    return _storage_full(reason, "for more room on the disk of GATEWAY_BATCH_DIR")


def _storage_full(reason: str, request: str) -> StorageFull:
    message = f"the folder of batches is full: {reason}. Delete files, or ask the operator {request}"
    return StorageFull(message, is_permanent=True)

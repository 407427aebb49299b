"""Keep compiled models on disk, so that a later start needs neither the torch model nor its trace.

What transformers reads from a checkpoint is kept as well, because transformers takes longer to import than a compiled
model to load.

An entry is a folder whose name is a key: a hash over everything that the result depends on. An entry is written next to its
final path and then renamed, so it is either complete or absent. Its files are hashed, so a damaged entry is noticed and
rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import structlog

from gateway.engine.checkpoint.sources import file_sha256
from gateway.errors import LoadError

T = TypeVar("T")

log = structlog.get_logger(__name__)

_ENTRY = "entry.json"
_TEXT = "text.json"
_READINGS = "read"
_NEW = ".new-"
# The operator chooses the folder, which may hold other files that must not be deleted.
_OURS = re.compile(rf"[0-9a-f]{{32}}|{re.escape(_NEW)}.*")
_UNUSED_S = 30 * 24 * 3600.0
# The space to leave free on the disk, which also covers an entry that two processes write at once.
_MIN_FREE_BYTES = 1 << 30
# Formats of weights, which may take gigabytes and do not affect sizes or tokens.
_WEIGHTS = frozenset(
    {
        *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".npz", ".gguf", ".ot"),
        *(".onnx", ".onnx_data", ".pb", ".tflite", ".mlmodel"),
    }
)


def key_of(parts: Mapping[str, object]) -> str:
    """Return the key of an entry: 32 hex digits over everything that it depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@cache
def describe_engine() -> Mapping[str, object]:
    """Return the versions of the code that reads and computes models, for a key."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return {
        "versions": [version(package) for package in ("torch", "transformers", "tokenizers")],
        "engine": [file_sha256(source) for source in sources],
    }


def describe_files(folder: Path) -> Mapping[str, str]:
    """Return the hex sha256 of each file in a checkpoint's folder, without the weights and subfolders, for a key.

    Raises:
        LoadError, OSError: a file, or the folder, cannot be read.
    """
    return {
        path.name: file_sha256(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix not in _WEIGHTS
    }


class CompiledCache:
    """A folder of compiled models. A disk error never aborts a start: the model is compiled again.

    Args:
        folder: the folder, created with the first entry; ``None`` keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @property
    def readings(self) -> CompiledCache:
        """The cache of what transformers has read from checkpoints; it has texts."""
        return CompiledCache(None if self._folder is None else self._folder / _READINGS)

    def reading(
        self,
        folder: Path,
        parts: Mapping[str, object],
        *,
        read: Callable[[], T],
        parse: Callable[[str], T],
        text: Callable[[T], str | None],
    ) -> T:
        """Read a checkpoint's folder and keep the result, or return the result of an earlier start.

        Args:
            parts: everything that the result depends on, besides the files of the folder and the versions of the code.
            read: reads the folder; its errors are passed on.
            parse: returns the result from its text.
            text: returns the text of a result; ``None`` if it cannot be kept.
        """
        if self._folder is None:
            return read()
        try:
            key = key_of({**parts, "files": describe_files(folder), **describe_engine()})
        except (OSError, LoadError):  # a file that is not needed may not be readable
            return read()
        if (known := self._recall(key, parse)) is not None:
            return known
        result = read()
        if (written := text(result)) is not None:
            self.store(key, len(written), lambda entry: _write(entry / _TEXT, written))
        return result

    def _recall(self, key: str, parse: Callable[[str], T]) -> T | None:
        entry = self.find(key)
        if entry is None:
            return None
        try:
            return parse((entry / _TEXT).read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises a bare Exception
            self._drop_damaged(entry, f"{type(error).__name__}: {error}")
            return None

    def find(self, key: str) -> Path | None:
        """Return the folder of an entry; ``None`` if it does not exist, or if its files have changed."""
        if self._folder is None:
            return None
        entry = self._folder / key
        try:
            if not entry.exists():
                return None
            files = json.loads((entry / _ENTRY).read_bytes())
            if all(file_sha256(entry / name) == digest for name, digest in files.items()):
                with suppress(OSError):  # of another user, or on a read-only disk
                    os.utime(entry)  # the time of its last use
                return entry
            reason = "its files were changed after they were written"
        except (OSError, ValueError, AttributeError, TypeError, LoadError) as error:
            reason = str(error)
        self._drop_damaged(entry, reason)
        return None

    @staticmethod
    def _drop_damaged(entry: Path, reason: str) -> None:
        log.warning("compiled_cache_damaged", entry=str(entry), reason=reason, consequence="it is made again")
        shutil.rmtree(entry, ignore_errors=True)

    def store(self, key: str, num_bytes: int, write: Callable[[Path], None]) -> None:
        """Store an entry, unless the disk is too full or read-only, and drop entries unused for 30 days.

        Args:
            num_bytes: the approximate size of the entry.
            write: writes the files of the entry into a given folder.
        """
        if self._folder is None:
            return
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._drop_unused()
            free = shutil.disk_usage(self._folder).free
            if free < num_bytes + _MIN_FREE_BYTES:
                log.info("compiled_cache_full", folder=str(self._folder), free_bytes=free, needed_bytes=num_bytes)
                return
            with tempfile.TemporaryDirectory(prefix=_NEW, dir=self._folder, ignore_cleanup_errors=True) as parent:
                new = Path(parent) / key
                new.mkdir()
                write(new)
                digests = {path.name: file_sha256(path) for path in sorted(new.iterdir())}
                (new / _ENTRY).write_text(json.dumps(digests), encoding="utf-8")
                new.rename(self._folder / key)
        except Exception as error:  # OpenVINO also raises other errors than OSError if it cannot write
            if not os.path.exists(self._folder / key):  # noqa: PTH110  Path.exists raises where a name is too long
                # Otherwise another process was faster.
                log.info("compiled_cache_off", folder=str(self._folder), error=str(error))

    def _drop_unused(self) -> None:
        assert self._folder is not None  # noqa: S101  the caller has checked
        before = time.time() - _UNUSED_S
        for entry in self._folder.iterdir():
            with suppress(OSError):  # another process may have dropped it
                if _OURS.fullmatch(entry.name) and entry.stat().st_mtime < before:
                    shutil.rmtree(entry)
                    log.info("compiled_cache_dropped", entry=str(entry), reason="not used for 30 days")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

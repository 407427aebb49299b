"""Entries in a folder, which survive a restart and may be more than fit into memory."""

from __future__ import annotations

import asyncio
import queue
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from gateway.cache.entries import Part, content_of, note_of, unnoted
from gateway.cache.files import CacheFolder, RowFile

T = TypeVar("T")
_LARGEST_ENTRY_BYTES = 8 * 2**20
_YOUNG, _OLD = "young", "old"


class DiskStore:
    """A :class:`~gateway.cache.stores.Store` in a folder, which only one process may use at a time.

    It has two generations. New entries go into the young generation. When that has half of the bytes, the old
    generation is deleted and the young one becomes old. An entry of the old generation that is used is copied to the
    young one. So used entries stay, and nothing is ever written in the middle of a file.

    All work is done in a separate thread, so a disk that hangs blocks only that thread. After an error the files are
    opened again.
    """

    name = "disk"

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._young: CacheFolder | None = None
        self._old: CacheFolder | None = None
        self._num_young_bytes = 0
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="vector-cache", daemon=True)
        self._thread.start()

    async def get(self, part: Part, keys: Sequence[bytes]) -> list[bytes | None]:
        return await self._in_thread(lambda: self._get(part, keys))

    async def put(self, part: Part, entries: Mapping[bytes, bytes]) -> None:
        await self._in_thread(lambda: self._put(part, entries))

    async def forget(self, part: Part) -> None:
        await self._in_thread(self._forget)

    async def close(self) -> None:
        self._work.put(self._close)
        self._work.put(None)

    # ------------------------------------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: Exception | None) -> None:
            if done.done():  # the caller has given up
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)  # type: ignore[arg-type]  # without an error there is a result

        def run() -> None:
            if done.cancelled():  # after a disk hung, the queue has work that no caller waits for
                return
            result, problem = None, None
            try:
                result = work()
            except Exception as error:  # the caller gets the error; the files may be in any state
                problem = error
                self._close()
            with suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(settle, result, problem)

        self._work.put(run)
        return await done

    def _get(self, part: Part, keys: Sequence[bytes]) -> list[bytes | None]:
        young, old = self._generations()
        found = _read(young.rows(part.identity, part.row), keys)
        missing = [i for i, entry in enumerate(found) if entry is None]
        if not missing or not (old.folder / f"{part.name}.index").exists():
            return found
        used = {}
        for i, entry in zip(missing, _read(old.rows(part.identity, part.row), [keys[i] for i in missing]), strict=True):
            if entry is not None:
                found[i] = used[keys[i]] = entry
        if used:
            self._put(part, used)
        return found

    def _put(self, part: Part, entries: Mapping[bytes, bytes]) -> None:
        young, _old = self._generations()
        file = young.rows(part.identity, part.row)
        known = [number >= 0 and file.get(number) is not None for number in file.find(list(entries))]
        new = [
            (key, note_of(entry), content_of(entry))
            for (key, entry), is_known in zip(entries.items(), known, strict=True)
            if not is_known and len(entry) <= _LARGEST_ENTRY_BYTES
        ]
        before = file.num_bytes
        file.add(new)
        self._num_young_bytes += file.num_bytes - before
        if self._num_young_bytes > self._max_bytes // 2:
            self._close()
            shutil.rmtree(self._folder / _OLD, ignore_errors=True)
            (self._folder / _YOUNG).rename(self._folder / _OLD)

    def _generations(self) -> tuple[CacheFolder, CacheFolder]:
        if self._young is None or self._old is None:
            self._young, self._old = (CacheFolder(self._folder / name) for name in (_YOUNG, _OLD))
            paths = self._young.folder.iterdir() if self._young.folder.is_dir() else ()
            self._num_young_bytes = sum(path.stat().st_size for path in paths)
        return self._young, self._old

    def _forget(self) -> None:
        self._close()
        for name in (_YOUNG, _OLD):
            if (folder := self._folder / name).exists():
                shutil.rmtree(folder)

    def _close(self) -> None:
        for folder in (self._young, self._old):
            if folder is not None:
                folder.close()
        self._young = self._old = None


def _read(file: RowFile, keys: Sequence[bytes]) -> list[bytes | None]:
    """Return the entries of keys; ``None`` for missing and damaged entries."""
    found: list[bytes | None] = []
    for number in file.find(keys):
        record = file.get(number) if number >= 0 else None
        found.append(None if record is None else unnoted(*record))
    return found

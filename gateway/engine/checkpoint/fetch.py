"""Download the missing files of a hub repository, and resume interrupted downloads.

Large files are fetched here, the others by ``snapshot_download``. That function gives each download a new temporary file
and deletes it when the process ends (huggingface_hub 2.4), so an interrupted download of gigabytes would start again from
zero. Here a partial file stays next to the blobs of the cache. The next attempt asks for the rest, and the complete file is
compared with the SHA-256 that the hub announced.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, cast

from gateway.engine.checkpoint.hub import (
    IGNORED,
    HubFile,
    Repository,
    cache_folder,
    cached_snapshot,
    explain,
    format_size,
    mark_begun,
    mark_complete,
    may_lack,
    patterns,
    size,
    snapshot_folder,
)
from gateway.errors import LoadError

Progress: TypeAlias = Callable[[int, int], None]
"""A callback that receives the number of bytes of a repository that are on this machine, and the number needed."""


def fetch(repository: Repository, report: Progress = lambda _done, _total: None) -> Path:
    """Download the missing files of a repository, and return its folder.

    Args:
        report: called from this thread, after each piece.

    Raises:
        LoadError: the disk has too little space, or the download failed; the message gives the reason and a remedy. The
            part of a large file that has arrived is kept for the next attempt.
    """
    from huggingface_hub import snapshot_download

    total, folder = repository.num_bytes, snapshot_folder(repository.name, repository.revision)
    if not _absent(repository, folder):  # another program has fetched it, perhaps into a cache that cannot be written
        with suppress(OSError):
            mark_complete(folder)
        report(total, total)
        return folder
    require_disk_space([repository])
    try:
        for file in repository.files:
            if file.sha256 and repository.present_bytes(file) < file.num_bytes:
                _fetch_large(repository, file, report)
        if cached_snapshot(repository.name, repository.revision) is None or may_lack(folder):
            mark_begun(folder)  # unless it can be used as it is, also if the hub stops answering now
        # Links the blobs into the snapshot, and fetches the small files.
        snapshot_download(
            repository.name,
            revision=repository.revision,
            allow_patterns=patterns(file.name for file in repository.files),
            ignore_patterns=list(IGNORED),
            tqdm_class=_no_bars(),
        )
        # The library returns the folder as it is if the hub does not answer any more.
        if absent := _absent(repository, folder):
            raise LoadError(f"{repository.name}: {absent[0]} was not downloaded: the hub did not answer to the end")
        mark_complete(folder)
    except LoadError:
        raise
    except Exception as error:  # a full disk, or an error of the hub's HTTP library
        raise explain(error, repository.name, repository.revision) from error
    report(total, total)
    return folder


def _absent(repository: Repository, folder: Path) -> list[str]:
    return [file.name for file in repository.files if not (folder / file.name).exists()]


def require_disk_space(repositories: Sequence[Repository]) -> None:
    """Refuse downloads that the disk has no room for.

    Raises:
        LoadError: too little space is free; the message gives the sizes and a remedy.
    """
    missing, free = sum(repository.missing_bytes for repository in repositories), free_bytes(cache_folder())
    if missing > free:
        raise LoadError(
            f"{format_size(missing)} would be downloaded, but only {format_size(free)} are free in {cache_folder()}: "
            "make room, or set HF_HOME to a folder on another disk"
        )


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that holds a folder, or would hold it."""
    for path in (folder, *folder.parents):
        if path.exists():
            return shutil.disk_usage(path).free
    return 0


def _fetch_large(repository: Repository, file: HubFile, report: Progress) -> None:
    """Download a large file into the cache's blobs, starting where the last attempt ended."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._fixes import WeakFileLock
    from huggingface_hub.utils._headers import build_hf_headers

    blob, partial = repository.blob(file), repository.partial(file)
    total = repository.num_bytes
    others = total - repository.missing_bytes - repository.present_bytes(file)
    lock = cache_folder() / ".locks" / blob.parent.parent.name / f"{blob.name}.lock"  # the one of `snapshot_download`
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():  # another process has fetched it in the meantime
            return
        if size(partial) > file.num_bytes:
            partial.unlink()
        with partial.open("ab") as target:

            def update() -> None:
                if target.tell() > file.num_bytes:  # an endless stream would fill the disk
                    target.truncate(0)
                    raise LoadError(
                        f"{file.name}: the hub announced {file.num_bytes:,} bytes but sends more: something on the way "
                        "changes them, such as a proxy or a mirror. They are deleted; try again, or set another HF_ENDPOINT"
                    )
                report(others + target.tell(), total)

            http_get(
                hf_hub_url(repository.name, file.name, revision=repository.revision),
                target,
                resume_size=target.tell(),
                headers={**build_hf_headers(), "accept-encoding": "identity"},
                expected_size=file.num_bytes,
                displayed_filename=file.name,
                tqdm_class=cast(Any, _Bar(update)),
            )
        _require_sha256(partial, file)
        partial.rename(blob)


@cache
def _no_bars() -> Any:
    """Return a class of progress bars that are never shown, because the caller shows the progress."""
    from huggingface_hub.utils.tqdm import tqdm

    class NoBar(tqdm):
        def __init__(self, *args: object, **how: object) -> None:
            super().__init__(*args, **{**how, "disable": True})  # type: ignore[no-untyped-call]

    return NoBar


class _Bar:
    """Replaces both the class of a progress bar and the bar itself, for huggingface_hub."""

    def __init__(self, on_update: Callable[[], None]) -> None:
        self._on_update = on_update

    def __call__(self, **_how: object) -> _Bar:
        return self

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def update(self, _number: int) -> None:
        self._on_update()


def _require_sha256(path: Path, file: HubFile) -> None:
    with path.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != file.sha256:
        path.unlink()
        raise LoadError(
            f"{file.name}: the downloaded bytes have the sha256 {found}, and the hub announced {file.sha256}: something on "
            "the way changes them, such as a proxy or a mirror. They are deleted; try again, or set another HF_ENDPOINT"
        )

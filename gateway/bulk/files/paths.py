"""Find the files that a user names: files, folders and patterns, on this machine or through fsspec."""

from __future__ import annotations

import errno
import glob
import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, cast

from gateway.bulk.rows import BulkError
from gateway.config.files import open_regular
from gateway.config.wording import count

_BUFFER_BYTES = 1 << 20
_PACKED = ".gz"


class Format(StrEnum):
    """The format of a file, from the end of its name."""

    JSONL = "JSON lines"
    CSV = "CSV"
    PARQUET = "Parquet"


_FORMATS = {
    ".jsonl": Format.JSONL,
    ".ndjson": Format.JSONL,
    ".json": Format.JSONL,
    ".csv": Format.CSV,
    ".tsv": Format.CSV,
    ".parquet": Format.PARQUET,
    ".pq": Format.PARQUET,
}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read.

    Attributes:
        path: the path in messages.
        name: the path relative to the folder that the user named; it stays the same if that folder moves or gets more files.
        format: the format, from the end of the name.
        filesystem: the fsspec filesystem of a file that is not on this machine.
        inner: the path in that filesystem.
    """

    path: str
    name: str
    format: Format
    filesystem: Any = None
    inner: str = ""

    @property
    def is_packed(self) -> bool:
        """Whether it is compressed as a whole."""
        return self.path.lower().endswith(_PACKED)

    @contextmanager
    def open_raw(self) -> Iterator[BinaryIO]:
        """Open the file as it is stored.

        Raises:
            BulkError: it cannot be opened.
        """
        with reading(self.path):
            if self.filesystem is None:
                file = cast(BinaryIO, open_regular(Path(self.path)))
            else:
                file = cast(BinaryIO, io.BufferedReader(self.filesystem.open(self.inner, "rb"), _BUFFER_BYTES))
        with file:
            yield file

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file's content, decompressed.

        Raises:
            BulkError: it cannot be opened.
        """
        with self.open_raw() as raw:
            if not self.is_packed:
                yield raw
                return
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield cast(BinaryIO, unpacked)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn errors of reading into a `BulkError`.

    Raises:
        BulkError: something within the context failed.
    """
    try:
        yield
    except FileNotFoundError:
        raise BulkError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise BulkError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def find_files(places: Sequence[str], without: Sequence[str] = ()) -> list[SourceFile]:
    """Return the files of all places, in the order of the places and sorted by name within each.

    Args:
        without: files and folders that the job writes. They are left out of the source, which would otherwise change
        with each shard.

    Raises:
        BulkError: a place has no file of a known format, a file is named twice, or a place has only files that the job
        writes.
    """
    is_written = _within(without)
    found: list[tuple[str, Any, str]] = []
    folders: list[str] = []
    for place in places:
        all_of_it = _find_remote(place) if "://" in place else [(path, None, "") for path in _find_local(place)]
        kept = [item for item in all_of_it if not is_written(item[0])]
        if not kept:
            raise BulkError(f"{place}: is also where this job would write: choose another --to, --manifest or --errors")
        found += kept
        folders.append(_folder_of(place, [path for path, _, _ in kept]))
    _check_names(found)
    _check_apart(found)
    folder = _common_folder(folders)
    return [
        SourceFile(path, path[len(folder) :], _format(path), filesystem, inner) for path, filesystem, inner in found
    ]


def _check_names(found: Sequence[tuple[str, Any, str]]) -> None:
    """Check that messages, ids and the list of errors can contain the names of all files.

    Raises:
        BulkError: a name is not UTF-8.
    """
    for path, _, _ in found:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        if shown != path:
            raise BulkError(f"{shown}: its name is not UTF-8: rename it")


def _check_apart(found: Sequence[tuple[str, Any, str]]) -> None:
    """Check that no file would be read twice, under one name or two.

    Raises:
        BulkError: a file would be read twice, for example because a link leads back to the folder that contains it.
    """
    seen: dict[str, str] = {}
    for path, filesystem, _ in found:
        real = path if filesystem is not None else os.path.realpath(path)
        if (other := seen.get(real)) is not None:
            twice = "is named twice in the sources" if other == path else f"is the same file as {other}"
            raise BulkError(f"{path}: {twice}, so each of its rows would be read twice: name it once")
        seen[real] = path


def _within(places: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that checks whether a path is one of some places, or inside one."""
    bare = [place.removeprefix("file://") for place in places]
    remote = [place.rstrip("/") for place in bare if "://" in place]
    # Not `Path.resolve`, which fails at links in a circle.
    local = [os.path.realpath(os.path.expanduser(place)) for place in bare if "://" not in place]  # noqa: PTH111

    def is_within(path: str) -> bool:
        if "://" in path:
            return any(path == place or path.startswith(f"{place}/") for place in remote)
        real = Path(os.path.realpath(path))
        return any(real.is_relative_to(place) for place in local)

    return is_within


def _find_local(place: str) -> list[str]:
    path = os.path.expanduser(place)  # noqa: PTH111  a pattern is not a path
    try:
        if os.path.isdir(path):  # noqa: PTH112  the method of a path raises for a name that is too long
            folder = str(Path(path))
            return _known(place, [str(Path(found)) for found in _files_below(folder)], folder)
        if not os.path.lexists(path) and glob.has_magic(path):
            return _known(place, list(_matches(path)), "")
    except OSError as error:
        raise BulkError(f"{error.filename or place}: cannot be read: {error.strerror}") from error
    if not os.path.lexists(path):
        raise BulkError(f"{place}: no such file or folder")
    if _format_of(path) is None:
        raise BulkError(f"{place}: its name must end in {_endings()}")
    return [path]


def _files_below(folder: str, above: Sequence[str] = ()) -> Iterator[str]:
    """Yield everything in a folder and its subfolders that is not a folder, except what is hidden.

    Links to folders are followed, unless they lead back to a folder around them. Broken links are yielded too, because the
    job must not silently leave out a file. Paths begin with ``folder`` as it is written, as those of `glob` do.

    Args:
        above: the real paths of the folders around this one.

    Raises:
        OSError: a folder cannot be read.
    """
    around = (*above, os.path.realpath(folder))
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            if not _is_folder(entry):
                yield entry.path
            elif os.path.realpath(entry.path) not in around:
                yield from _files_below(entry.path, around)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # links in a circle lead to no file, like a link whose target is gone
            return False
        raise


def _matches(pattern: str) -> Iterator[str]:
    """Yield the files of a pattern, also those in matching folders with a file's name, such as Spark's ``x.parquet/``."""
    found: set[str] = set()
    for path in glob.glob(pattern, recursive=True):  # noqa: PTH207
        if not os.path.isdir(path):  # noqa: PTH112
            found.add(path)
        elif _format_of(path) is not None:
            found.update(_files_below(path))
    yield from found


def _find_remote(place: str) -> list[tuple[str, Any, str]]:
    filesystem, inner = filesystem_of(place)
    if _is_on_this_machine(filesystem):
        return [(path, None, "") for path in _find_local(inner)]
    scheme = place.partition("://")[0]
    try:
        if glob.has_magic(inner):
            paths = _known(place, sorted(filesystem.glob(inner)), "")
        elif filesystem.isdir(inner):
            paths = _known(place, sorted(filesystem.find(inner)), inner)
        elif not filesystem.exists(inner):
            raise BulkError(f"{place}: no such file or folder")
        elif _format_of(inner) is None:
            raise BulkError(f"{place}: its name must end in {_endings()}")
        else:
            paths = [inner]
    except BulkError:
        raise
    except Exception as error:  # each filesystem raises its own library's errors
        raise BulkError(f"{place}: cannot be listed: {type(error).__name__}: {error}") from error
    return [(f"{scheme}://{path.lstrip('/')}", filesystem, path) for path in paths]


def filesystem_of(place: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of a URL, and the path in it.

    Raises:
        BulkError: the package for its scheme is not installed, or the URL is wrong.
    """
    from fsspec.core import url_to_fs

    try:
        filesystem, inner = url_to_fs(place)
    except ImportError as error:  # its message names the package
        raise BulkError(f"{place}: needs a package that is not installed: {error}") from error
    except Exception as error:  # each filesystem raises its own library's errors
        raise BulkError(f"{place}: cannot be opened: {type(error).__name__}: {error}") from error
    return filesystem, str(inner)


def expanded(place: str) -> Path:
    """Return a path with the home folder instead of ``~``.

    Raises:
        BulkError: there is no such home folder.
    """
    try:
        return Path(place).expanduser()
    except RuntimeError:
        raise BulkError(f"{place}: no such home folder; write the whole path, or ./~ for a name with a tilde") from None


def _is_on_this_machine(filesystem: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(filesystem, LocalFileSystem)


def _known(place: str, paths: Sequence[str], folder: str) -> list[str]:
    """Return the paths of known formats, in order, without hidden files and notes such as ``_manifest.json``."""

    def is_visible(path: str) -> bool:
        parts = path.removeprefix(folder).strip("/").split("/")
        return not any(map(_is_hidden, parts if folder else parts[-1:]))

    known = [path for path in sorted(paths) if is_visible(path) and _format_of(path) is not None]
    if not known:
        raise BulkError(f"{place}: no file name ends in {_endings()}; found {count(len(paths), 'other file')}")
    return known


def _is_hidden(name: str) -> bool:
    # The root of a disk has this folder for repairs, which only the system's administrator can read.
    return name.startswith((".", "_")) or name == "lost+found"


def _endings() -> str:
    return f"{', '.join(_FORMATS)}, optionally followed by {_PACKED}, except for Parquet"


def _format_of(path: str) -> Format | None:
    bare = path.lower().removesuffix(_PACKED)
    found = _FORMATS.get(os.path.splitext(bare)[1])  # noqa: PTH122  a remote path is not one of this machine
    # Parquet compresses its own columns, and is read from its end.
    return None if found is Format.PARQUET and bare != path.lower() else found


def _format(path: str) -> Format:
    found = _format_of(path)
    assert found is not None  # noqa: S101  others were not taken
    return found


def _folder_of(place: str, paths: Sequence[str]) -> str:
    """Return the folder that a place names, with its slash: itself, or that of a file, or that before a pattern."""
    is_local = "://" not in place or place.startswith("file://")
    if is_local:
        place = os.path.expanduser(place.removeprefix("file://"))  # noqa: PTH111  a pattern is not a path
    whole = f"{Path(place) if is_local else place.rstrip('/')}/"
    before = (place if place in paths else re.split(r"[*?[]", place)[0]).rpartition("/")[0]
    named = whole if all(path.startswith(whole) for path in paths) else f"{before}/" if before else ""
    return named if all(path.startswith(named) for path in paths) else _common_folder(paths)


def _common_folder(paths: Sequence[str]) -> str:
    """Return the common folder of all paths, including its slash; empty if they have none."""
    folders = [path.split("/")[:-1] for path in paths]
    common = list(takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False)))
    return "".join(f"{parts[0]}/" for parts in common)

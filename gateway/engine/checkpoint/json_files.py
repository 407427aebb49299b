"""Read the JSON files of a checkpoint; a file with an error raises a :class:`LoadError` that names it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from gateway.config.files import open_regular, read_bounded
from gateway.errors import LoadError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

_MAX_BYTES = 256 * 2**20  # the index of a large model's shards takes a few megabytes
_LFS_START = b"version https://git-lfs.github.com/spec/"


def read_json(path: Path) -> Json:
    try:
        content: Json = json.loads(read_bounded(path, _MAX_BYTES))
    except FileNotFoundError as error:
        raise LoadError(f"{path}: no such file; is this a checkpoint folder?") from error
    except (OSError, ValueError, RecursionError) as error:
        what = "a Git LFS pointer instead of the file" if is_lfs_pointer(path) else "not readable as JSON"
        raise LoadError(f"{path}: {what}: {error}") from error
    return content


def is_present(path: Path) -> bool:
    """Return whether a file that not every checkpoint has is there.

    Raises:
        LoadError: it is a link that leads nowhere, as after a part of a cache was deleted: without the file, the checkpoint
            would be read as another kind of model.
    """
    if path.exists():
        return True
    if path.is_symlink():
        raise LoadError(f"{path}: is a link to {path.readlink()}, which does not exist: get the file again")
    return False


def read_object(path: Path, *, optional: bool = False) -> dict[str, Json]:
    if optional and not is_present(path):
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise LoadError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def require_string(config: Mapping[str, Json], key: str, where: Path) -> str:
    value = config.get(key)
    if not isinstance(value, str):
        raise LoadError(f"{where}: {key} must be a string, got {value!r}")
    return value


def read_flag(config: Mapping[str, Json], key: str, where: Path, *, default: bool) -> bool:
    """Return a setting that is true or false, ``default`` if it is absent; null is false, as in Python.

    Raises:
        LoadError: the value is something else: libraries read a 0 as false, and the text "false" as true.
    """
    value = config.get(key, default)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise LoadError(f"{where}: {key} must be true or false, got {value!r}")
    return value


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file was checked out without Git LFS, and so holds only a reference to the content."""
    try:
        with open_regular(path) as file:
            return file.read(len(_LFS_START)) == _LFS_START
    except OSError:
        return False

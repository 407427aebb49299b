"""Folders of stores that need no server. A folder with other content is neither read nor written."""

from __future__ import annotations

from pathlib import Path

from gateway.bulk.rows import BulkError
from gateway.bulk.stores.protocol import Place


def check_folder(place: Place, marker: str, *, must_exist: bool) -> None:
    """Check that a folder contains a store of its kind, or can become one.

    Args:
        marker: a file that every store of this kind has.
        must_exist: require an existing store, which a source does.

    Raises:
        BulkError: the folder of a source contains no store, or the folder of a sink contains other files.
    """
    folder = Path(place.location)
    try:
        if (folder / marker).exists():
            return
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise BulkError(f"the folder {place.location} cannot be used: {error.strerror}") from error
    if must_exist:
        raise BulkError(
            f"the folder {place.location} does not contain a {place.kind} store"
            if names
            else f"there is no store in {place.location}"
        )
    if names:
        raise BulkError(
            f"the folder {place.location} contains other files, such as {names[0]}, and no {place.kind} store: choose "
            "a new folder"
        )

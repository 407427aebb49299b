"""Folders of stores that need no server: one that is another thing is neither read nor written."""

from __future__ import annotations

from pathlib import Path

from gateway.bulk.rows import BulkError
from gateway.bulk.stores.protocol import Place


def check_folder(place: Place, marker: str, *, must_exist: bool) -> None:
    """Check that a folder holds a store of its kind, or may become one.

    Args:
        marker: a file that every store of this kind has.
        must_exist: the store is a source.

    Raises:
        BulkError: it holds no store, or it is a sink and has other files.
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
            f"the folder {place.location} holds no store of {place.kind}"
            if names
            else f"there is no store in {place.location}"
        )
    if names:
        raise BulkError(
            f"the folder {place.location} has other files, such as {names[0]}, and no store of {place.kind}: name a new one"
        )

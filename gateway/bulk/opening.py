"""Open the sources and sinks that the user names: URLs of stores, or files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from gateway.bulk.fields import FieldNames
from gateway.bulk.places import open_store, read_place
from gateway.bulk.rows import BulkError, Sink, Source
from gateway.bulk.stores.protocol import Place, SinkOptions


def open_source(places: Sequence[str], names: FieldNames, without: Sequence[str] = ()) -> Source:
    """Open one collection of a store, or any number of files, folders and patterns.

    Args:
        without: files and folders that the job writes, which are not read.

    Raises:
        BulkError: the place does not exist or cannot be read.
    """
    stores = [place for place in places if read_place(place) is not None]
    if not stores:
        from gateway.bulk.files.source import open_files

        return open_files(places, names, without)
    place = read_place(stores[0])
    if len(places) > 1 or place is None:
        raise BulkError(f"{stores[0]}: a collection of a store must be the only source; got {len(places)} sources")
    if "vector" in place.options:
        raise BulkError(f"{stores[0]}: the texts are read, but no vectors: leave out ?vector=, which is for --to")
    store = open_store(place)
    try:
        return store.source(place.collection, names)
    finally:
        store.close()


def check_apart(places: Sequence[str], sink: str, read: Sequence[str] = ("",), written: Sequence[str] = ("",)) -> None:
    """Check that a job does not write into the collection that it reads.

    Args:
        read, written: the names of both, once they are open: those behind an alias or a view.

    Raises:
        BulkError: it would replace each item, with all of its vectors.
    """
    for url, name, target in product(places, read, written):
        place, into = _behind(read_place(url), name), _behind(read_place(sink), target)
        if place is not None and into is not None and place.is_same_collection(into):
            raise BulkError(
                f"--to {sink}: is the collection that is read, whose items would be replaced with all of their vectors. "
                "`gateway move` changes the model of a collection, and with --into-vector NAME it adds a vector to its items"
            )


def _behind(place: Place | None, name: str) -> Place | None:
    return replace(place, collection=name.removeprefix(place.named(""))) if place is not None and name else place


def open_sink(url: str, text_field: str | None, *, adopts: bool = False) -> Sink:
    """Return the sink at a URL or path, which need not exist.

    Args:
        text_field: the path of the text in the source; ``None`` keeps no text.
        adopts: trust the user that vectors in a collection without a note are of the job's space.

    Raises:
        BulkError: the URL is wrong, or its package is not installed.
    """
    place = read_place(url)
    if place is None:
        from gateway.bulk.files.sinks import open_folder

        return open_folder(url, text_field)
    store = open_store(place)
    try:
        return store.sink(place.collection, SinkOptions(text_field, place.options.get("vector"), adopts=adopts))
    finally:
        store.close()

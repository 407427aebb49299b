"""Plan a move from the options of its first step: the store, its collections, and the names of the new ones."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Final
from urllib.parse import quote as quote_url
from urllib.parse import urlencode

from gateway.bulk.fields import FieldNames, has, paths_of
from gateway.bulk.moving.mem0 import Mem0, read_mem0
from gateway.bulk.moving.state import Move, Pair, Stage, lock_move, name_move, new_name, read_moves
from gateway.bulk.moving.work import Work
from gateway.bulk.places import read_place
from gateway.bulk.rows import BulkError, Row
from gateway.bulk.stores.protocol import CollectionInfo, MovableStore, Place
from gateway.bulk.stores.reading import SAMPLE
from gateway.config.wording import did_you_mean, enumerate_names, quote
from gateway.routing.spaces import is_same_space

_SAME_WORD: Final = 0.9  # the likeness of a misspelled word to the word


@dataclass(frozen=True, slots=True)
class StartRequest:
    """The options of the first step.

    Attributes:
        collection: a collection, an alias, or the URL of a collection; ``None`` with ``mem0``.
        store: the URL of the store, if ``collection`` is not a URL.
        text: the path of the text in an item; ``None`` to look for the usual names.
        into: the name of the new collection; ``None`` for a name made of the model and the hash of its space.
        into_vector: the name of a new vector next to the old one, in the same collection.
        changed_at: the field with the time of each item's last change.
        without_auto_id: applications will give ids to new items, which the store has made until now.
    """

    collection: str | None
    store: str | None
    model: str
    text: str | None
    into: str | None
    into_vector: str | None
    alias: str | None
    mem0: Path | None
    url: str | None
    models: Path | None
    api_key_env: str
    skips: bool
    changed_at: str | None = None
    without_auto_id: bool = False


def places_of(request: StartRequest) -> tuple[Mem0 | None, Place]:
    """Return Mem0's configuration, if the move has one, and the place of the collection.

    Raises:
        BulkError: the options name no collection, or contradict each other.
    """
    if request.into_vector is not None and (request.into or request.alias or request.mem0):
        raise BulkError(
            "--into-vector keeps the collection, so it cannot be combined with --into, --alias or --mem0 (Mem0 has no "
            "setting for the name of a vector)"
        )
    if request.mem0 is not None:
        if request.collection is not None or request.store is not None:
            raise BulkError("--mem0 already determines the store and the collection: leave out COLLECTION and --from")
        mem0 = read_mem0(request.mem0)
        return mem0, mem0.place
    if request.collection is None:
        raise BulkError("no collection was named: pass COLLECTION --from URL, or --mem0 FILE for Mem0's collections")
    if request.store is not None:
        place = read_place(request.store, has_collection=False)
        if place is None:
            raise BulkError(f"--from {request.store}: is not the URL of a store, such as qdrant://localhost:6333")
        if place.collection:
            raise BulkError(
                f"--from {request.store}: must name a store without a collection: leave out `#{place.collection}`"
            )
        return None, replace(place, collection=request.collection)
    place = read_place(request.collection)
    if place is None:
        raise BulkError(
            f"{request.collection}: no store was named: pass its URL with --from, such as --from "
            "qdrant://localhost:6333"
        )
    return None, place


def plan(
    request: StartRequest, mem0: Mem0 | None, place: Place, store: MovableStore, folder: Path, locks: ExitStack
) -> Move:
    """Return the move, without the names of its new collections unless it was started before.

    Args:
        locks: gets the lock of the move, which must be held until its state is written.

    Raises:
        BulkError: the collection cannot be moved, or another move of it is in progress.
    """
    requested = mem0.collection if mem0 else place.collection
    info = store.describe(requested)
    alias = request.alias or (requested if info.name != requested and request.into_vector is None else None)
    if alias is not None and (reason := store.why_not_flip(alias)):
        raise BulkError(f"--alias {alias}: {reason}")
    if info.has_auto_id and not request.without_auto_id:
        raise BulkError(
            f"{info.name} has auto_id, so Milvus makes the ids of new items. The copy keeps all ids, and so has no auto_id: "
            "after the flip, Milvus rejects items without an id. Add --without-auto-id, and let applications give each new "
            "item an id from the flip on, not before; after `gateway move back`, let them leave out the ids again"
        )
    vector = mem0.vector if mem0 else place.options.get("vector")
    vector = _old_vector(request.into_vector, vector, info, store.name)
    text = mem0.text if mem0 else request.text
    if text is None:
        source = store.source(info.name, FieldNames())
        try:
            text = source.text_field
        finally:
            source.close()
    if request.changed_at is not None:
        _check_changed_at(store, info.name, text, request.changed_at)
    others = [(mem0.entities, "entities.sqlite3")] if mem0 and mem0.entities in store.collections() else []
    url = _url(place)
    name = name_move(folder, info.name, url)
    locks.enter_context(lock_move(folder, name))
    move = Move(
        name=name,
        place=url,
        pairs=[
            Pair(info.name, "", "ledger.sqlite3", request.changed_at or (mem0.changed_at if mem0 else None)),
            *(Pair(old, "", ledger) for old, ledger in others),
        ],
        model=request.model,
        text=text,
        vector=vector,
        into_vector=request.into_vector,
        flattens=mem0 is not None,
        has_default_task=mem0 is not None,
        alias=alias,
        mem0=None if request.mem0 is None else request.mem0.resolve(),
        url=request.url,
        models=None if request.models is None else request.models.resolve(),
        api_key_env=request.api_key_env,
    )
    return _continued(move, folder)


def _check_changed_at(store: MovableStore, collection: str, text: str, field: str) -> None:
    """Check that the field with the times of changes is not misspelled: each pass would read all items without a word.

    Items that have not changed need not have the field.

    Raises:
        BulkError: the first items do not have the field, but one of a similar name.
    """
    with closing(store.source(collection, FieldNames(text=text))) as source:
        payloads = [row.payload for row in islice(source.read(), SAMPLE) if isinstance(row, Row)]
    if any(has(payload, field) for payload in payloads):
        return
    names = {path.rpartition(".")[2].casefold(): path for payload in payloads for path in paths_of(payload)}
    # `created_at` is not a misspelling of `updated_at`.
    for close in get_close_matches(field.rpartition(".")[2].casefold(), names, 1, _SAME_WORD):
        raise BulkError(
            f"--changed-at {field}: the first items have no such field; did you mean {quote(names[close])}?"
        )


def _continued(move: Move, folder: Path) -> Move:
    """Return a move with its earlier state, if it was started before.

    Raises:
        BulkError: another move of the collection is in progress.
    """
    before = read_moves(folder).get(move.name)
    if before is None:
        return move
    is_other = (before.model, before.text, before.into_vector) != (move.model, move.text, move.into_vector)
    if before.stage is Stage.FINISHED:  # its new collection may exist, with items that applications wrote
        return replace(move, was_flipped=before.was_flipped and not is_other)
    if is_other or before.stage is Stage.FLIPPED or before.is_redirecting:
        raise BulkError(
            f"a move of {move.pairs[0].old} to {before.model} is already in progress: `gateway move status {before.name}` "
            f"shows it, and `gateway move finish {before.name}` ends it"
        )
    first, *others = before.pairs
    return replace(
        move,
        pairs=[replace(first, changed_at=move.pairs[0].changed_at or first.changed_at), *others],
        space=before.space,
        was_flipped=before.was_flipped,
        is_returning=before.is_returning,
        left_behind=before.left_behind,
        refused=before.refused,
        problems=before.problems,
        log=before.log,
    )


def _old_vector(new: str | None, requested: str | None, info: CollectionInfo, store: str) -> str | None:
    """Return the name of the old vector; ``None`` if it is the only one, and the new vector goes into a second collection.

    Args:
        new: the name of the new vector in the same collection.

    Raises:
        BulkError: the collection does not have the vector, or has several and none was named, or the new vector has the
            old one's name.
    """
    others = [name for name in info.widths if name != new]
    if requested is not None and requested == new:
        raise BulkError(f"--into-vector {new}: is the old vector itself: choose another name")
    if requested in others:
        return requested
    if requested is None and len(others) == 1:
        return None if new is None else others[0]
    names = enumerate_names(name or "one without a name" for name in others)
    if requested is not None:
        hint = did_you_mean(requested, others) or ";"
        raise BulkError(f"{store}: {info.name} has no vector {quote(requested)}{hint} it has {names or 'none'}")
    if not others:
        raise BulkError(f"{store}: {info.name} has no {'other ' if info.widths else ''}dense vector")
    raise BulkError(
        f"{store}: which vector of {info.name} is the old one? It has {names}; name it at the end of --from: ?vector=NAME"
    )


_QUOTED: Final = str.maketrans({character: quote_url(character) for character in "%#?"})
"""The characters of a path that mean something else in a URL."""


def _url(place: Place) -> str:
    """Return the URL of a store in a form that is valid in any working directory, for the next steps."""
    if place.location and "://" not in place.location:
        place = replace(place, location=os.path.realpath(place.location).translate(_QUOTED))
    options = {**place.options, **({"key_env": place.key} if place.key else {})}
    return place.store + (f"?{urlencode(options)}" if options else "")


def real_name(store: MovableStore, collection: str) -> str:
    """Return the name by which a store lists a collection; the name itself if the collection does not exist."""
    with suppress(BulkError):  # if the store is unreachable, the next request fails
        return store.describe(collection).name
    return collection


def target_of(store: MovableStore, alias: str) -> str:
    """Return the collection that an alias points to; the alias itself if it does not exist.

    Raises:
        BulkError: the store cannot be read.
    """
    return store.aliases().get(alias) or real_name(store, alias)


def check_alias(store: MovableStore, move: Move) -> None:
    """Check that the alias of a move points to one of its collections, or does not exist.

    Raises:
        BulkError: it points elsewhere, so redirecting it would take that collection away from applications.
    """
    pair = move.pairs[0]
    if move.alias is not None and (target := target_of(store, move.alias)) not in (move.alias, pair.old, pair.new):
        raise BulkError(
            f"the alias {move.alias} points to {target}, which is not part of this move: point it to {pair.old} first, or "
            "choose another alias"
        )


def _check_free(new: str, move: Move, folder: Path) -> None:
    """Check that no other move in progress writes into a new collection, whose items would be mixed."""
    for other in read_moves(folder).values():
        is_open = other.stage is not Stage.FINISHED and other.name != move.name
        if is_open and any(_is_same(move.place, new, other.place, pair.new) for pair in other.pairs):
            raise BulkError(
                f"the move {other.name} writes into {new}: continue that move, or choose another name with --into"
            )


def _is_same(store: str, collection: str, other_store: str, other: str) -> bool:
    """Return whether two collections are one, however the URLs of their stores are written."""
    if collection != other or store == other_store:
        return collection == other
    with suppress(BulkError):  # the URL of a store that only Mem0's configuration knows completely
        one, two = (read_place(url, has_collection=False) for url in (store, other_store))
        return one is not None and two is not None and one.is_same_collection(two)
    return False


def name_copies(move: Move, work: Work, into: str | None) -> Move:
    """Return the move with the names of its new collections, after checking that they can hold its vectors.

    Raises:
        BulkError: the old collection already has vectors of the new model, or a name is in use.
    """
    note = work.embedder.note
    pairs = []
    for pair in move.pairs:
        old = work.reading.describe(pair.old)
        old_notes = [old_note for name, old_note in old.notes.items() if name != move.into_vector]
        if any(is_same_space(old_note.space, note.space) for old_note in old_notes):
            raise BulkError(f"{pair.old} already has vectors of {note.space}: there is nothing to move")
        if move.into_vector is not None:
            pairs.append(replace(pair, new=pair.old))
            continue
        base = into if into is not None and pair == move.pairs[0] else None
        new = real_name(work.reading, base or pair.new or new_name(pair.old, note.space))
        if new == pair.old:
            raise BulkError(f"--into {new}: is the old collection itself: choose another name")
        _check_free(new, move, work.folder)
        pairs.append(replace(pair, new=new))
    if move.mem0 is not None and len(pairs) > 1:  # Mem0 names the second after the first
        pairs[1] = replace(pairs[1], new=f"{pairs[0].new}_entities")
    move = replace(move, pairs=pairs, space=note.space, dimensions=note.dimensions)
    target = pairs[0].new if move.into_vector is None else f"its vector {move.into_vector}"
    return move if move.log else move.at(Stage.COPYING, f"started: {pairs[0].old} to {target}, {note.space}")

"""The note of the space in a store, and its comparison with the job's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Final

from gateway.bulk.rows import BulkError, Json, SpaceNote
from gateway.config.wording import count
from gateway.routing.spaces import is_same_space

NOTE: Final = "embedding_gateway"
"""The key of notes in the metadata of a collection or table."""


def note_to_json(note: SpaceNote) -> dict[str, Json]:
    """Return a note as a JSON object with the field names of `SpaceNote`."""
    return asdict(note)


def note_from_json(value: object, where: str) -> SpaceNote:
    """Parse a note, ignoring fields that a newer version may have added.

    Raises:
        BulkError: it is not a note.
    """
    match value:
        case {
            "space": str() as space,
            "model": str() as model,
            "task": (str() | None) as task,
            "dimensions": int() as dimensions,
            "is_normalized": bool() as is_normalized,
            "token_width": int() as token_width,
            "has_sparse": bool() as has_sparse,
        }:
            return SpaceNote(space, model, task, dimensions, is_normalized, token_width, has_sparse)
    raise BulkError(
        f"the note {NOTE!r} in the metadata of {where} cannot be read, because a person or another program changed it"
    )


def check_note(held: SpaceNote | None, note: SpaceNote, where: str, num_items: int, *, adopts: bool = False) -> None:
    """Check that a store is empty, or that its vectors can be compared with those of a job.

    Args:
        held: the store's note, if it has one.
        where: the collection, for messages.
        adopts: trust the user that vectors without a note are of the same space.

    Raises:
        BulkError: the store has vectors of another space or an unknown model.
    """
    if held is None:
        if num_items and not adopts:
            raise BulkError(
                f"{where} has {count(num_items, 'item')} and no note of their space, so their vectors may be of "
                f"another model. Embed into a new one, or add --adopt if you know that the vectors are of {note.space}"
            )
        return
    if problem := _difference(held, note):
        raise BulkError(
            f"{where} {problem}. Embed into a new one; `gateway move` changes the model of one that applications use"
        )


def _difference(held: SpaceNote, note: SpaceNote) -> str:
    if not is_same_space(held.space, note.space):
        return f"has vectors of {held.space}, which cannot be compared with those of {note.space}"
    if held.task != note.task:
        return f"has vectors {_for_task(held)}, but this job embeds {_for_task(note)}"
    if held.dimensions != note.dimensions:
        return f"has vectors of {held.dimensions} dimensions, but this job's have {note.dimensions}"
    if held.token_width != note.token_width:
        return f"has {_outputs(held)}, but this job has {_outputs(note)}"
    if held.has_sparse != note.has_sparse:
        return f"has {_outputs(held)}, but this job has {_outputs(note)}"
    return ""


def _for_task(note: SpaceNote) -> str:
    return f"for the task {note.task!r}" if note.task else "without a task"


def _outputs(note: SpaceNote) -> str:
    parts = [
        f"dense vectors of {note.dimensions}" if note.dimensions else "",
        "sparse vectors" if note.has_sparse else "",
        f"multi-vectors of {note.token_width}" if note.token_width else "",
    ]
    return " and ".join(part for part in parts if part) or "no vectors"


def read_notes(metadata: Mapping[str, object] | None, where: str) -> dict[str, SpaceNote]:
    """Return the notes in a collection's metadata, by the names of the vectors.

    Raises:
        BulkError: they cannot be read.
    """
    value = (metadata or {}).get(NOTE)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BulkError(
            f"the note {NOTE!r} in the metadata of {where} cannot be read, because a person or another program "
            "changed it"
        )
    return {str(name): note_from_json(note, where) for name, note in value.items()}


def write_notes(notes: Mapping[str, SpaceNote]) -> dict[str, Json]:
    """Return notes, by the names of their vectors, in the form that `read_notes` reads."""
    return {NOTE: {name: note_to_json(note) for name, note in notes.items()}}


def replaced(where: str) -> str:
    """Return the message of a job whose collection is no longer the one that it opened."""
    return (
        f"{where} was deleted and created again, or got another note, while this job wrote into it, so rows of this job may "
        "be missing: run the same command again, which checks it"
    )

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
    """Return a note as a JSON object, with the names of `SpaceNote`."""
    return asdict(note)


def note_from_json(value: object, where: str) -> SpaceNote:
    """Read a note, ignoring fields that a newer version may have added.

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
    raise BulkError(f"the note {NOTE!r} in the metadata of {where} cannot be read; a person or program has changed it")


def check_note(held: SpaceNote | None, note: SpaceNote, where: str, num_items: int, *, adopts: bool = False) -> None:
    """Check that a store holds nothing, or vectors that can be compared with those of a job.

    Args:
        held: the store's note, if it has one.
        where: the collection, for messages.
        adopts: the user says that vectors without a note are of the same space.

    Raises:
        BulkError: it holds others, or vectors of an unknown model.
    """
    if held is None:
        if num_items and not adopts:
            raise BulkError(
                f"{where} has {count(num_items, 'item')} and no note of their space: their vectors may be of another model. "
                f"Embed into a new one, or add --adopt if you know that they are vectors of {note.space}"
            )
        return
    if problem := _difference(held, note):
        raise BulkError(
            f"{where} {problem}. Embed into a new one; `gateway move` changes the model of one that applications use"
        )


def _difference(held: SpaceNote, note: SpaceNote) -> str:
    if not is_same_space(held.space, note.space):
        return f"holds vectors of {held.space}, which cannot be compared with those of {note.space}"
    if held.task != note.task:
        return f"holds vectors {_for_task(held)}, and this job embeds {_for_task(note)}"
    if held.dimensions != note.dimensions:
        return f"holds vectors of {held.dimensions} dimensions, and this job makes {note.dimensions}"
    if held.token_width != note.token_width:
        return f"holds {_outputs(held)}, and this job makes {_outputs(note)}"
    if held.has_sparse != note.has_sparse:
        return f"holds {_outputs(held)}, and this job makes {_outputs(note)}"
    return ""


def _for_task(note: SpaceNote) -> str:
    return f"for the task {note.task!r}" if note.task else "for no task"


def _outputs(note: SpaceNote) -> str:
    parts = [
        f"dense vectors of {note.dimensions}" if note.dimensions else "",
        "sparse vectors" if note.has_sparse else "",
        f"multi-vectors of {note.token_width}" if note.token_width else "",
    ]
    return " and ".join(part for part in parts if part) or "no vectors"


def read_notes(metadata: Mapping[str, object] | None, where: str) -> dict[str, SpaceNote]:
    """Return the notes in a collection's metadata, by the names of its vectors.

    Raises:
        BulkError: they cannot be read.
    """
    value = (metadata or {}).get(NOTE)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BulkError(
            f"the note {NOTE!r} in the metadata of {where} cannot be read; a person or program has changed it"
        )
    return {str(name): note_from_json(note, where) for name, note in value.items()}


def write_notes(notes: Mapping[str, SpaceNote]) -> dict[str, Json]:
    """Return notes by the names of their vectors, as the metadata that `read_notes` reads."""
    return {NOTE: {name: note_to_json(note) for name, note in notes.items()}}

"""Spaces: the identity of the vectors that a target returns.

Two vectors can be compared if, and only if, their spaces have the same hash. Jina v3 and BGE-M3 both have 1,024
dimensions, so no check of sizes would notice if one answered for the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache

from gateway.types import ModelInfo, Output

# Raise it when the gateway's own treatment of a text changes the vectors: then every space is a new one.
PREPROCESSING_VERSION = 1

# A query and a passage are meant to be compared with each other: their tasks share a space.
_FAMILIES = {"retrieval.query": "retrieval", "retrieval.passage": "retrieval"}


def space_id(
    info: ModelInfo, task: str | None, dimensions: int, *, is_normalized: bool, output: Output = Output.DENSE
) -> str:
    """Return the space of vectors: ``<model id>@<12 hex>``.

    The hash is over everything that must be equal for vectors to be comparable: the checkpoint's fingerprint (weights,
    tokenizer, pooling), normalization, dimensions, the family of the task with its exact instructions, and the version
    of the gateway's preprocessing. Device, dtype and engine are left out: they change a vector by less than what
    comparing it with another one could notice. The part before ``@`` is for people.

    Sparse weights and multi-vectors go by the space of the dense vector that they stand beside; token states stand alone,
    and have one of their own.
    """
    family = _FAMILIES.get(task, task) if task is not None else None
    instructions = (
        {name: text for name, text in sorted(info.tasks.items()) if _FAMILIES.get(name, name) == family}
        if task is not None
        else {"": info.instruction}
    )
    states = {"output": output.value} if output is Output.STATES else {}
    return _digest(
        info.id.replace("/", "-"),
        json.dumps(
            states
            | {
                "fingerprint": info.fingerprint,
                "is_normalised": is_normalized,  # the spelling is part of every id that has been stored
                "dimensions": dimensions,
                "family": family,
                "instructions": instructions,
                "preprocessing": PREPROCESSING_VERSION,
            },
            sort_keys=True,
        ),
    )


def is_same_space(one: str, other: str) -> bool:
    """Tell whether two space ids name the same space, whatever stands before the ``@``."""
    return one.rpartition("@")[2] == other.rpartition("@")[2]


def spaces_by_task(info: ModelInfo) -> dict[str | None, str]:
    """Return the space of each task of a model, with native dimensions; of ``None`` for a model without tasks."""
    tasks: list[str | None] = list(info.tasks) or [None]
    if info.default_task not in tasks:
        tasks.append(info.default_task)
    return {task: space_id(info, task, info.width, is_normalized=info.is_normalized) for task in tasks}


def why_no_stand_in(info: ModelInfo, other: ModelInfo) -> str:
    """Say why another model cannot answer for a model with the very same vectors; empty if it can."""
    return next(_differences(info, other), "")


def _differences(info: ModelInfo, other: ModelInfo) -> Iterator[str]:
    spaces, others = spaces_by_task(info), spaces_by_task(other)
    for task, space in spaces.items():
        if task not in others:
            yield f"{other.id} has no task {task!r}" if task else f"{other.id} has tasks, and {info.id} has none"
        elif not is_same_space(space, others[task]):
            yield f"{info.id} is in space {space}, and {other.id} in {others[task]}" + (f" ({task})" if task else "")
    if info.default_task != other.default_task:
        yield f"the default task of {info.id} is {info.default_task}, and that of {other.id} is {other.default_task}"
    if other.max_tokens < info.max_tokens:
        yield f"{other.id} would cut texts to {other.max_tokens} tokens, and {info.id} to {info.max_tokens}"
    if missing := [str(size) for size in info.dimensions if size not in other.dimensions]:
        yield f"{other.id} does not allow vectors of {', '.join(missing)} dimensions"
    if missing := [output.value for output in info.outputs if output not in other.outputs]:
        yield f"{other.id} does not return {', '.join(missing)}"


@lru_cache(maxsize=1024)
def _digest(slug: str, content: str) -> str:
    return f"{slug}@{hashlib.sha256(content.encode()).hexdigest()[:12]}"

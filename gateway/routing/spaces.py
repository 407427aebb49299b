"""Spaces: the identity of the vectors that a target returns.

Two vectors can be compared if, and only if, their spaces have the same hash. Jina v3 and BGE-M3 both have 1,024
dimensions, so no check of sizes would notice if one answered for the other.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache

from gateway.embedding import ModelInfo

# Raise it when the gateway's own treatment of a text changes the vectors: then every space is a new one.
PREPROCESSING_VERSION = 1

# A query and a passage are meant to be compared with each other: their tasks share a space.
_FAMILIES = {"retrieval.query": "retrieval", "retrieval.passage": "retrieval"}


def space_id(info: ModelInfo, task: str | None, dimensions: int, *, is_normalised: bool) -> str:
    """Return the space of vectors: ``<model id>@<12 hex>``.

    The hash is over everything that must be equal for vectors to be comparable: the checkpoint's fingerprint (weights,
    tokenizer, pooling), normalisation, dimensions, the family of the task with its exact instructions, and the version
    of the gateway's preprocessing. Device, dtype and engine are left out: they change a vector by less than what
    comparing it with another one could notice. The part before ``@`` is for people.
    """
    family = _FAMILIES.get(task, task) if task is not None else None
    instructions = (
        {name: text for name, text in sorted(info.tasks.items()) if _FAMILIES.get(name, name) == family}
        if task is not None
        else {"": info.instruction}
    )
    return _digest(
        info.id.replace("/", "-"),
        json.dumps(
            {
                "fingerprint": info.fingerprint,
                "is_normalised": is_normalised,
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


@lru_cache(maxsize=1024)
def _digest(slug: str, content: str) -> str:
    return f"{slug}@{hashlib.sha256(content.encode()).hexdigest()[:12]}"

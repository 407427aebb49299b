"""The keys of the cache, derived from everything that vectors depend on. ``gateway compare`` uses the same keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TypeAlias

from gateway.types import Output

KEY_BYTES = 16

Identity: TypeAlias = Mapping[str, object]
"""Everything that vectors depend on, except the text."""


def key_of(text: str) -> bytes:
    """Return the key of a text: the first 16 bytes of its sha256, so that the text itself is not stored."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:KEY_BYTES]


def name_of(identity: Identity) -> str:
    """Return the name of an identity: 24 hex digits."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


def identity_of(
    space: str, task: str | None, output: Output, *, dtype: str | None, device: str | None, max_tokens: int | None
) -> dict[str, object]:
    """Return the identity of one output of a model for one task.

    Args:
        space: the space of the task with native dimensions, which covers weights, tokenizer, pooling and instructions.
        task: the task, because two tasks of one space, such as query and passage, give a text different vectors.
        dtype: the precision and kind of device of the computation, which change the last bits.
        max_tokens: the length at which texts are cut.
    """
    return {
        "space": space,
        "task": task,
        "output": output.value,
        "dtype": dtype,
        "device": (device or "").partition(":")[0],
        "max_tokens": max_tokens,
    }

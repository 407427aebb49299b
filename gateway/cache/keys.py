"""The keys of the cache: of everything that vectors depend on, and of a text. ``gateway compare`` uses the same ones."""

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
    """Return the key of a text: the first 16 bytes of its sha256, so that no text is kept."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:KEY_BYTES]


def name_of(identity: Identity) -> str:
    """Return the name of an identity: 24 hex digits."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


def identity_of(
    space: str, task: str | None, output: Output, *, dtype: str | None, device: str | None, max_tokens: int | None
) -> dict[str, object]:
    """Return the identity of one output of a model for one task.

    Args:
        space: of the task, with native dimensions: it has the weights, the tokenizer, the pooling and the instructions.
        task: two tasks of one space, such as a query's and a passage's, give a text different vectors.
        dtype: computing in other precisions, or on another kind of device, gives other last bits.
        max_tokens: where a long text is cut.
    """
    return {
        "space": space,
        "task": task,
        "output": output.value,
        "dtype": dtype,
        "device": (device or "").partition(":")[0],
        "max_tokens": max_tokens,
    }

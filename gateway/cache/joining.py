"""Combine cached entries and computed outputs into an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gateway.cache.entries import Part, answers, is_cut, num_tokens_of, rows_of, sparse_of
from gateway.types import Embeddings, ModelInfo, MultiVector, Output, SparseVector, Truncate


def complete(
    key: bytes, parts: Sequence[Part], truncate: Truncate, get: Callable[[bytes], bytes | None]
) -> list[bytes] | None:
    """Return the entries of a text, in the order of the parts, if all exist and can serve the request."""
    entries = []
    for part in parts:
        entry = get(part.prefix + key)
        if entry is None or not answers(entry, truncate):
            return None
        entries.append(entry)
    return entries


def joined(
    found: Sequence[list[bytes] | None],
    missing: Sequence[int],
    result: Embeddings,
    parts: Sequence[Part],
    info: ModelInfo,
) -> Embeddings:
    """Return the embeddings of all texts, both cached and computed.

    Args:
        missing: the indexes of the computed texts.
    """
    num_tokens, truncated = [0] * len(found), []
    vectors = np.empty((len(found), info.width), np.float32)
    sparse: list[SparseVector] = []
    multivectors: list[MultiVector] = []
    computed = iter(range(len(missing)))
    for i, entries in enumerate(found):
        if entries is None:
            at = next(computed)
            vectors[i] = result.vectors[at]
            num_tokens[i] = result.num_tokens[at]
            sparse += [result.sparse[at]] if result.sparse else []
            multivectors += [result.multivectors[at]] if result.multivectors else []
            continue
        num_tokens[i] = num_tokens_of(entries[0])
        truncated += [i] if is_cut(entries[0]) else []
        for part, entry in zip(parts, entries, strict=True):
            match part.output:
                case Output.SPARSE:
                    sparse.append(sparse_of(entry, part))
                case Output.MULTIVECTOR:
                    multivectors.append(rows_of(entry, part))
                case _:
                    vectors[i] = rows_of(entry, part)[0]
    outputs = {part.output for part in parts}
    return Embeddings(
        vectors=vectors,
        num_tokens=num_tokens,
        truncated=sorted([*truncated, *(missing[at] for at in result.truncated)]),
        timings=result.timings,
        sparse=sparse if Output.SPARSE in outputs else None,
        multivectors=multivectors if Output.MULTIVECTOR in outputs else None,
        num_cached=len(found) - len(missing),
    )

"""The cached entry of a text: one output, as the backend computed it, and the text's number of tokens.

An entry is ``uint32, rows``, little-endian: the lower 30 bits are the number of tokens, and the upper two say how the
text was cut. Outputs are stored as the model returns them, not normalized and with full width. So one computation
serves requests for any ``dimensions``, precision, normalization and form, and the code after it is the same with and
without a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gateway.cache.files import WEIGHT, weight_rows
from gateway.cache.keys import Identity, identity_of, name_of
from gateway.types import Embeddings, EmbedJob, ModelInfo, Output, SparseVector, Truncate

_HEADER_BYTES = 4
_CUT_BITS = 30
_NUM_TOKENS = (1 << _CUT_BITS) - 1
# The entry of a text that was cut serves only requests that cut at the same end; if the text fitted, it serves any.
_CUTS = {Truncate.END: 1, Truncate.START: 2, Truncate.REFUSE: 3}


@dataclass(frozen=True, slots=True)
class Part:
    """One output of a model for one task.

    Attributes:
        identity: everything that the output depends on, except the text.
        name: the name of the identity.
        group: the name of all parts with the same weights.
        row: the data type of its rows.
        prefix: the prefix of its keys in memory.
    """

    output: Output
    identity: Identity
    name: str
    group: str
    row: np.dtype[Any]
    prefix: bytes


def part_of(info: ModelInfo, job: EmbedJob, output: Output, *, is_remote: bool, is_per_client: bool) -> Part:
    """Return the part that one output of a job belongs to.

    Args:
        is_remote: other servers compute the output, and do not report the texts that they cut.
        is_per_client: keys depend on the client and the text, and must differ from keys of a text alone.
    """
    rows = {
        Output.DENSE: np.dtype(("<f4", (info.width,))),
        Output.SPARSE: WEIGHT,
        Output.MULTIVECTOR: np.dtype(("<f4", (info.token_width,))),
    }
    identity = identity_of(
        info.space(job.task), job.task, output, dtype=info.dtype, device=info.device, max_tokens=info.max_tokens
    ) | {
        "state": "as computed",
        "engine": info.engine,
        "instruction": info.instruction if job.task is None else info.tasks.get(job.task, ""),
    }
    if is_remote:
        identity["truncate"] = job.truncate.value
    if is_per_client:
        identity["keys"] = "of a client"
    row = rows[output]
    name = name_of(identity | {"row": str(row)})
    return Part(output, identity, name, info.fingerprint[:24], row, bytes.fromhex(name[:16]))


def pack(num_tokens: int, cut: Truncate | None, content: bytes) -> bytes:
    """Return an entry.

    Args:
        cut: the end at which the text was cut; ``None`` if it was not cut.
    """
    header = num_tokens | (0 if cut is None else _CUTS[cut] << _CUT_BITS)
    return header.to_bytes(_HEADER_BYTES, "little") + content


def note_of(entry: bytes) -> int:
    """Return the number in front of an entry's rows."""
    return int.from_bytes(entry[:_HEADER_BYTES], "little")


def content_of(entry: bytes) -> bytes:
    """Return the bytes of an entry's rows."""
    return entry[_HEADER_BYTES:]


def unnoted(note: int, content: bytes) -> bytes:
    """Build an entry from its number and the bytes of its rows."""
    return note.to_bytes(_HEADER_BYTES, "little") + content


def answers(entry: bytes, truncate: Truncate) -> bool:
    """Return whether an entry can serve a request with this treatment of long texts."""
    cut = note_of(entry) >> _CUT_BITS
    return not cut or cut == _CUTS[truncate]


def num_tokens_of(entry: bytes) -> int:
    """Return the number of tokens of an entry's text after cutting."""
    return note_of(entry) & _NUM_TOKENS


def is_cut(entry: bytes) -> bool:
    """Return whether an entry's text was cut."""
    return bool(note_of(entry) >> _CUT_BITS)


def is_usable(entry: bytes, part: Part) -> bool:
    """Return whether an entry from elsewhere is valid: complete rows, the right number of rows, finite numbers.

    Its checksum only shows that it is unchanged since it was written, and any program with access to Redis can write
    one.
    """
    size, rest = divmod(len(entry) - _HEADER_BYTES, part.row.itemsize)
    if size < 0 or rest or (part.output is Output.DENSE and size != 1):
        return False
    rows = rows_of(entry, part)
    return _is_finite(rows, part) and (part.output is not Output.DENSE or bool(rows.any()))


def _is_finite(rows: np.ndarray[Any, Any], part: Part) -> bool:
    return bool(np.isfinite(rows["value"] if part.output is Output.SPARSE else rows).all())


def rows_of(entry: bytes, part: Part) -> np.ndarray[Any, Any]:
    """Return the rows of an entry, as a view of it."""
    return np.frombuffer(entry, dtype=part.row.base, offset=_HEADER_BYTES).reshape(-1, *part.row.shape)


def sparse_of(entry: bytes, part: Part) -> SparseVector:
    """Return the token weights of an entry."""
    rows = rows_of(entry, part)
    return SparseVector(rows["index"].astype(np.int64), rows["value"].copy())


def entries_of(
    result: Embeddings, job: EmbedJob, parts: Sequence[Part], *, is_remote: bool
) -> list[list[bytes] | None]:
    """Return the entries of each text of a job, in the order of the parts; ``None`` for a text that must not be cached.

    Numbers that are not finite, and vectors of zeros, fail their request later. They are not cached, because the next
    computation may succeed.
    """
    num_texts = len(job.texts)
    is_good = np.asarray(np.isfinite(result.vectors).all(axis=1))
    if result.vectors.shape[1]:
        is_good &= result.vectors.any(axis=1)
    rows: list[Sequence[np.ndarray[Any, Any]] | np.ndarray[Any, Any]] = []
    for part in parts:
        match part.output:
            case Output.SPARSE:
                rows.append([weight_rows(weights) for weights in result.sparse or ()])
            case Output.MULTIVECTOR:
                rows.append(result.multivectors or ())
            case _:
                rows.append(result.vectors)
    # Servers may report any number of tokens, even one that an entry has no bits for.
    if any(len(some) != num_texts for some in rows) or sum(result.num_tokens) > _NUM_TOKENS:
        return [None] * num_texts
    for part, some in zip(parts, rows, strict=True):
        if part.output is not Output.DENSE:
            is_good &= [_is_finite(row, part) for row in some]
    num_tokens = _shares(result, job) if is_remote else result.num_tokens
    cut = set(result.truncated)
    return [
        [
            pack(
                num_tokens[i],
                job.truncate if i in cut else None,
                np.ascontiguousarray(some[i], part.row.base).tobytes(),
            )
            for part, some in zip(parts, rows, strict=True)
        ]
        if is_good[i]
        else None
        for i in range(num_texts)
    ]


def _shares(result: Embeddings, job: EmbedJob) -> list[int]:
    """Estimate the tokens of each text of a request by its characters, because servers report only the request's total.

    Their sum is the reported total.
    """
    total, lengths = sum(result.num_tokens), np.array([len(text) + 1 for text in job.texts])
    ends = total * np.cumsum(lengths) // lengths.sum()
    return [int(share) for share in np.diff(ends, prepend=0)]

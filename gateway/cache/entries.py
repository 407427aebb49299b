"""What is kept of a text: one output, as the backend computed it, and the number of its tokens.

An entry is ``uint32, rows``, little-endian: the lower 30 bits are the number of tokens, the upper two say how the text was
cut. Outputs are kept as they come out of the model, not normalized and of full width: so one computation answers requests
for any ``dimensions``, precision, normalization and form, and everything after it is the same code with and without a cache.
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
# An entry of a text that was cut answers only requests that have it cut at the same end; of one that fitted, any.
_CUTS = {Truncate.END: 1, Truncate.START: 2, Truncate.REFUSE: 3}


@dataclass(frozen=True, slots=True)
class Part:
    """One output of a model for one task.

    Attributes:
        identity: everything that it depends on, except the text.
        name: of the identity.
        group: the name of all parts with the same weights.
        row: the kind of its rows.
        prefix: of its keys in memory.
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
        is_remote: other servers compute it, which do not say what they have cut.
        is_per_client: its keys are those of a client and a text, which a text alone may spell.
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
        cut: how the text was cut; ``None`` if it was not.
    """
    header = num_tokens | (0 if cut is None else _CUTS[cut] << _CUT_BITS)
    return header.to_bytes(_HEADER_BYTES, "little") + content


def note_of(entry: bytes) -> int:
    """Return the number in front of an entry's rows."""
    return int.from_bytes(entry[:_HEADER_BYTES], "little")


def content_of(entry: bytes) -> bytes:
    """Return the rows' bytes of an entry."""
    return entry[_HEADER_BYTES:]


def unnoted(note: int, content: bytes) -> bytes:
    """Return an entry from its number and its rows' bytes."""
    return note.to_bytes(_HEADER_BYTES, "little") + content


def answers(entry: bytes, truncate: Truncate) -> bool:
    """Return whether an entry is the answer to a request that treats long texts in a certain way."""
    cut = note_of(entry) >> _CUT_BITS
    return not cut or cut == _CUTS[truncate]


def num_tokens_of(entry: bytes) -> int:
    """Return the number of tokens of an entry's text, after it was cut."""
    return note_of(entry) & _NUM_TOKENS


def is_cut(entry: bytes) -> bool:
    """Return whether an entry's text was cut."""
    return bool(note_of(entry) >> _CUT_BITS)


def is_usable(entry: bytes, part: Part) -> bool:
    """Return whether an entry from elsewhere can be an answer: whole rows, one where a text has one, finite numbers.

    Its checksum says that it is as it was written. But a program with access to Redis can write anything.
    """
    size, rest = divmod(len(entry) - _HEADER_BYTES, part.row.itemsize)
    if size < 0 or rest or (part.output is Output.DENSE and size != 1):
        return False
    rows = rows_of(entry, part)
    numbers = rows["value"] if part.output is Output.SPARSE else rows
    return bool(np.isfinite(numbers).all()) and (part.output is not Output.DENSE or bool(rows.any()))


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
    """Return the entries of each text of a job, in the order of the parts; ``None`` for a text that is not worth keeping.

    Numbers that are not finite, and vectors of zeros, fail their request later on. The next one may have better luck.
    """
    num_texts = len(job.texts)
    is_good = np.asarray(np.isfinite(result.vectors).all(axis=1))
    if result.vectors.shape[1]:
        is_good &= result.vectors.any(axis=1)
    rows: list[Sequence[np.ndarray[Any, Any]] | np.ndarray[Any, Any]] = []
    for part in parts:
        match part.output:
            case Output.SPARSE:
                rows.append([weight_rows(one) for one in result.sparse or ()])
            case Output.MULTIVECTOR:
                rows.append(result.multivectors or ())
            case _:
                rows.append(result.vectors)
    if any(len(some) != num_texts for some in rows):
        return [None] * num_texts
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
    """Return tokens of each text of a request, by its characters: servers say how many a request had, not each text.

    Together they are as many as the servers said.
    """
    total, lengths = sum(result.num_tokens), np.array([len(text) + 1 for text in job.texts])
    ends = total * np.cumsum(lengths) // lengths.sum()
    return [int(share) for share in np.diff(ends, prepend=0)]

"""Finish vectors: check, slice, normalize, encode. Pure functions on numpy arrays."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from gateway.errors import InvalidVectors
from gateway.types import MultiVector, SparseVector, States, Vectors


class Encoding(StrEnum):
    """How a vector is written into the answer."""

    FLOAT = "float"
    """A list of float32 numbers in their shortest form that reads back exactly."""
    BASE64 = "base64"
    """Base64 of the little-endian float32 bytes."""
    BINARY = "binary"
    """One bit per dimension (1 where positive), eight bits per signed byte: the unsigned byte minus 128."""
    UBINARY = "ubinary"
    """One bit per dimension (1 where positive), eight bits per unsigned byte, the first in the highest bit."""


def finish(vectors: Vectors, shape: tuple[int, int], dimensions: int, *, normalize: bool) -> Vectors:
    """Check pooled vectors, keep the first ``dimensions`` of each, and normalize what is left.

    A Matryoshka vector must be normalized after it is cut: a cut unit vector is shorter than 1.

    Args:
        shape: the shape that ``vectors`` must have: one row per text, of the model's width.

    Returns:
        ``(n, dimensions)`` float32, C-contiguous; each row of L2 norm 1 if ``normalize``.

    Raises:
        InvalidVectors: the shape is wrong, a number is not finite, or a vector cannot be normalized.
    """
    if vectors.shape != shape:
        raise _invalid(f"vectors of shape {vectors.shape} instead of {shape[0]} vectors of {shape[1]} dimensions")
    with np.errstate(over="ignore"):  # reported by an error below
        kept = np.ascontiguousarray(vectors[:, :dimensions], dtype=np.float32)
        norms: Vectors = np.linalg.norm(kept, axis=1, keepdims=True)
    is_finite = np.logical_and(np.isfinite(vectors).all(axis=1), np.isfinite(kept).all(axis=1))
    if not is_finite.all():
        raise _invalid("a vector that is not finite (NaN or infinity)", is_finite)
    if not normalize:
        return kept
    has_length = np.logical_and(norms > 0, np.isfinite(norms))[:, 0]
    if not has_length.all():
        raise _invalid("a vector that cannot be normalized: its length is zero or overflows", has_length)
    unit: Vectors = kept / norms
    return unit


def cosine(one: Vectors, other: Vectors) -> float:
    """Return the cosine of two vectors, ``(width,)`` each; -1 where their widths differ or it is not a number."""
    if one.shape != other.shape:
        return -1.0
    with np.errstate(all="ignore"):  # the result says what is not finite
        similarity = float(np.dot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other)))
    return similarity if np.isfinite(similarity) else -1.0


def require_finite(
    sparse: Sequence[SparseVector], multivectors: Sequence[MultiVector], states: Sequence[States] = ()
) -> None:
    """Check the outputs other than dense vectors.

    Raises:
        InvalidVectors: a number is not finite.
    """
    for arrays in ([weights.values for weights in sparse], multivectors, states):
        is_finite = np.array([np.isfinite(array).all() for array in arrays], dtype=np.bool_)
        if not is_finite.all():
            raise _invalid(
                "a sparse, multi-vector or token state output that is not finite (NaN or infinity)", is_finite
            )


def _invalid(what: str, is_good: npt.NDArray[np.bool_] | None = None) -> InvalidVectors:
    place = "" if is_good is None else f"input[{int(np.argmin(is_good))}]: "
    # The same texts would give the same vectors.
    return InvalidVectors(f"{place}the model returned {what}", is_permanent=True)


def encode(vectors: Vectors, encoding: Encoding) -> Sequence[npt.NDArray[np.float32 | np.int8 | np.uint8] | str]:
    """Return each vector encoded for the answer: an array, which becomes a JSON list, or a base64 string."""
    match encoding:
        case Encoding.FLOAT:
            return list(vectors)
        case Encoding.BASE64:
            return [base64.b64encode(row.astype("<f4", copy=False).tobytes()).decode("ascii") for row in vectors]
        case Encoding.UBINARY:
            return list(_pack_signs(vectors))
        case Encoding.BINARY:
            return list((_pack_signs(vectors).astype(np.int16) - 128).astype(np.int8))


def _pack_signs(vectors: Vectors) -> npt.NDArray[np.uint8]:
    return np.packbits(vectors > 0, axis=1)

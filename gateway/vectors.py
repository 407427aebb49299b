"""Finish vectors: check, slice, normalize, encode. Pure functions on numpy arrays."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from enum import StrEnum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gateway.errors import InvalidVectors
from gateway.precision import Precision, Ranges
from gateway.types import MultiVector, SparseVector, States, Vectors

Quantized: TypeAlias = npt.NDArray[np.int8] | npt.NDArray[np.uint8]
"""The vectors of one request in fewer bits: one byte per dimension, or per eight dimensions; rows in input order."""


class Encoding(StrEnum):
    """How a vector is written into the answer."""

    LIST = "list"
    """A list of numbers; float32 in the shortest form that reads back exactly."""
    BASE64 = "base64"
    """Base64 of the bytes of the numbers; float32 is little-endian."""


def finish(vectors: Vectors, shape: tuple[int, int], dimensions: int, *, normalize: bool) -> Vectors:
    """Check pooled vectors, keep the first ``dimensions`` of each, and normalize the result.

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
    """Return the cosine of two vectors, ``(width,)`` each; -1 if their widths differ or the result is not finite."""
    if one.shape != other.shape:
        return -1.0
    with np.errstate(all="ignore"):  # the result shows which numbers are not finite
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


def quantize(vectors: Vectors, precision: Precision, ranges: Ranges | None = None) -> Vectors | Quantized:
    """Return vectors in another precision: ``(n, d)``, or ``(n, ceil(d / 8))`` for the binary ones.

    The rules are those of sentence-transformers (``util/quantization.py``), bit for bit.

    Args:
        ranges: the ranges of the dimensions, for int8 and uint8. Each is divided into 255 steps; numbers outside are
            clipped.

    Raises:
        ValueError: the precision needs ranges.
    """
    match precision:
        case Precision.FLOAT:
            return vectors
        case Precision.UBINARY:
            return _pack_signs(vectors)
        case Precision.BINARY:
            return (_pack_signs(vectors).astype(np.int16) - 128).astype(np.int8)
        case Precision.INT8 | Precision.UINT8:
            if ranges is None:
                raise ValueError(f"{precision} needs ranges")
            steps = (ranges.high - ranges.low) / 255
            place = np.floor((vectors - ranges.low) / np.where(steps == 0, 1, steps)).clip(0, 255)
            return place.astype(np.uint8) if precision is Precision.UINT8 else (place - 128).astype(np.int8)


def encode(vectors: Vectors | Quantized, encoding: Encoding) -> Sequence[npt.NDArray[np.generic] | str]:
    """Return each vector encoded for the answer: an array, which becomes a JSON list, or a base64 string."""
    if encoding is Encoding.LIST:
        return list(vectors)
    ordered = vectors.astype("<f4", copy=False) if vectors.dtype == np.float32 else vectors
    return [base64.b64encode(row.tobytes()).decode("ascii") for row in ordered]


def _pack_signs(vectors: Vectors) -> npt.NDArray[np.uint8]:
    return np.packbits(vectors > 0, axis=1)

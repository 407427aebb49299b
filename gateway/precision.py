"""The kinds of numbers in dense vectors, and the ranges that some of them need. Pure values."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt


class Precision(StrEnum):
    """The kind of numbers in the dense vectors of an answer."""

    FLOAT = "float"
    INT8 = "int8"
    """A signed byte per dimension: the number's step, out of 256 in the range of the dimension, minus 128."""
    UINT8 = "uint8"
    """An unsigned byte per dimension: the step itself."""
    BINARY = "binary"
    """One bit per dimension (1 where positive), eight bits per signed byte: the unsigned byte minus 128."""
    UBINARY = "ubinary"
    """One bit per dimension (1 where positive), eight bits per unsigned byte, the first in the highest bit."""


CALIBRATED = frozenset({Precision.INT8, Precision.UINT8})
"""Precisions that need the range of each dimension."""


@dataclass(frozen=True, slots=True)
class Ranges:
    """The range of each dimension of a model's vectors, measured on texts.

    Attributes:
        low, high: the ends of the ranges, ``(d,)`` float32.
        digest: hex sha256 over both ends; ranges are compared by it.
    """

    low: npt.NDArray[np.float32] = field(compare=False)
    high: npt.NDArray[np.float32] = field(compare=False)
    digest: str

"""Ranges of a model's dimensions, measured on the user's texts; int8 and uint8 vectors divide them into steps.

The ends of a range are the smallest and the largest value of a dimension over the texts, as in sentence-transformers
(``util/quantization.py``). A file belongs to one checkpoint, and has the ranges for each size of its vectors: a vector
that is cut is normalized again, which makes its numbers larger.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gateway.config.files import read_bounded, write_whole
from gateway.errors import LoadError, StartError
from gateway.precision import Ranges
from gateway.types import Vectors
from gateway.vectors import finish

_MAX_BYTES = 16 * 2**20
_VERSION = 1
_ADVICE = "Measure them with `gateway calibrate MODEL --texts FILE`"


class Meter:
    """Measures the ranges of vectors for each size that they can be cut to.

    Args:
        sizes: accepted dimensions.
        is_normalized: whether cut vectors are normalized again.
    """

    def __init__(self, sizes: Sequence[int], *, is_normalized: bool) -> None:
        self._is_normalized = is_normalized
        self._low = {size: np.full(size, np.inf, np.float32) for size in sizes}
        self._high = {size: np.full(size, -np.inf, np.float32) for size in sizes}

    def add(self, vectors: Vectors) -> None:
        """Measure vectors of the native size, ``(n, width)``, of at least one text."""
        for size in self._low:
            cut = finish(vectors, vectors.shape, size, normalize=self._is_normalized)
            self._low[size] = np.minimum(self._low[size], cut.min(axis=0))
            self._high[size] = np.maximum(self._high[size], cut.max(axis=0))

    def ranges(self) -> dict[int, Ranges]:
        """Return the ranges of all vectors so far, by size."""
        return {size: between(low, self._high[size]) for size, low in self._low.items()}


def between(low: Vectors, high: Vectors) -> Ranges:
    """Return the ranges with these ends, ``(d,)`` float32 each."""
    ends = b"".join(end.astype("<f4").tobytes() for end in (low, high))
    return Ranges(low, high, hashlib.sha256(ends).hexdigest())


def write(path: Path, fingerprint: str, ranges: Mapping[int, Ranges], *, is_normalized: bool, num_texts: int) -> None:
    """Store ranges atomically: even after a crash, the file is either the old one or the new one.

    Raises:
        StartError: the file cannot be written; the old file stays.
    """
    content = {
        "version": _VERSION,
        "fingerprint": fingerprint,
        "normalized": is_normalized,
        "num_texts": num_texts,
        "ranges": {
            str(size): {"low": _text(values.low), "high": _text(values.high)} for size, values in ranges.items()
        },
    }
    make_folder(path)
    try:
        write_whole(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise _not_writable(path, error) from error


def make_folder(path: Path) -> None:
    """Make the folder for a file of ranges.

    Raises:
        StartError: the folder cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: Path, error: OSError) -> StartError:
    return StartError(f"{path}: ranges cannot be written: {error.strerror or error}")


def read(file: str | None, fingerprint: str, sizes: Sequence[int], *, is_normalized: bool) -> dict[int, Ranges]:
    """Read the ranges of a model by the size of its vectors; return no ranges without a file.

    Args:
        sizes: accepted dimensions; each must have ranges.
        is_normalized: the model's vectors are normalized by default.

    Raises:
        LoadError: the file is missing, malformed, or was measured on other vectors.
    """
    if file is None:
        return {}
    path = Path(file)
    try:
        content = json.loads(read_bounded(path, _MAX_BYTES))
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']!r}; this gateway reads version {_VERSION}")
        found = {int(size): _ranges(int(size), row) for size, row in content["ranges"].items()}
        recorded, was_normalized = str(content["fingerprint"]), bool(content["normalized"])
    except FileNotFoundError as error:
        raise LoadError(f"{path}: there is no such file. {_ADVICE}") from error
    except OSError as error:
        raise LoadError(f"{path}: ranges cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoadError(f"{path}: not ranges that can be read: {error!r}") from error
    if recorded != fingerprint:
        raise LoadError(
            f"{path}: measured on another checkpoint (fingerprint {recorded[:12]}, this one has {fingerprint[:12]}). "
            f"{_ADVICE} again"
        )
    if was_normalized != is_normalized:
        raise LoadError(
            f"{path}: measured on vectors that were {'' if was_normalized else 'not '}normalized. {_ADVICE} again"
        )
    if missing := [str(size) for size in sizes if size not in found]:
        raise LoadError(f"{path}: has no ranges for vectors of {', '.join(missing)} dimensions. {_ADVICE} again")
    return {size: found[size] for size in sizes}


def _text(end: Vectors) -> str:
    return base64.b64encode(end.astype("<f4").tobytes()).decode()


def _ranges(size: int, row: Mapping[str, str]) -> Ranges:
    low, high = (np.frombuffer(base64.b64decode(row[end], validate=True), dtype="<f4") for end in ("low", "high"))
    if low.shape != (size,) or high.shape != (size,) or (low > high).any():
        raise ValueError(f"no ranges of {size} dimensions")
    with np.errstate(all="ignore"):  # NaN and infinity are refused here, and a width that overflows
        widths = high - low
    if not np.isfinite([low, high, widths]).all():
        raise ValueError(f"ranges of {size} dimensions that are not finite")
    return between(low, high)

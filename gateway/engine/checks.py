"""Check the result that a model has computed for a text before the text's request gets it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gateway.engine.model.items import Encoded, Item
from gateway.errors import InvalidVectors, RequestError
from gateway.types import Output


def checked(item: Item, encoded: Encoded, width: int) -> Encoded | RequestError:
    """Return the result of a text, or its score if the request wants one; or an error if the result cannot be used.

    Args:
        width: dimensions of the model's dense vectors.
    """
    expected = (item.tokens.num_vectors, width)
    if encoded.dense.shape != expected:
        return _invalid(f"the model returned vectors of shape {encoded.dense.shape} instead of {expected}")
    finite = np.isfinite(encoded.dense).all(axis=1)
    if not finite.all():
        chunk = "" if item.tokens.spans is None else f"input[{int(np.argmin(finite))}]: "
        return _invalid(f"{chunk}the model returned a vector that is not finite (NaN or infinity)")
    others = {
        Output.SPARSE: None if encoded.sparse is None else encoded.sparse.values,
        Output.MULTIVECTOR: encoded.multivector,
        Output.STATES: encoded.states,
    }
    for output, numbers in others.items():
        if numbers is not None and not np.isfinite(numbers).all():
            return _invalid(f"the model returned a {output} output that is not finite (NaN or infinity)")
    return encoded if item.scorer is None else _scored(item.scorer, encoded)


def _scored(scorer: Callable[..., float], encoded: Encoded) -> Encoded | RequestError:
    score = scorer(encoded.dense, encoded.sparse, encoded.multivector)
    if not np.isfinite(score):
        return _invalid("the score of its vectors is not finite (NaN or infinity)")
    return Encoded(np.array([[score]], np.float32))


def is_finite(encoded: Encoded) -> bool:
    """Return whether all numbers of a result are finite."""
    sparse = None if encoded.sparse is None else encoded.sparse.values
    outputs = (encoded.dense, sparse, encoded.multivector, encoded.states)
    return all(bool(np.isfinite(numbers).all()) for numbers in outputs if numbers is not None)


def _invalid(message: str) -> InvalidVectors:
    return InvalidVectors(message, is_permanent=True)  # the same text would give the same vector

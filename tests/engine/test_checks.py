"""A result that cannot be used is an error that names the problem; any other reaches the request."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gateway.engine.checks import checked, is_finite
from gateway.engine.model.items import Encoded, Item, Tokens
from gateway.errors import InvalidVectors
from gateway.types import SparseVector

TEXT = Item(Tokens([5, 6, 7]))
DOCUMENT = Item(Tokens([5, 6, 7], spans=((0, 1), (1, 3))))
DENSE = np.array([[3.0, 4.0]], np.float32)


def sparse(weight: float) -> SparseVector:
    return SparseVector(np.array([2, 9]), np.array([0.5, weight], np.float32))


def rows(*first_numbers: float) -> np.ndarray:
    return np.array([[number, 1.0] for number in first_numbers], np.float32)


WHOLE = Encoded(DENSE, sparse(0.25), rows(1, 2, 3), rows(4, 5, 6))


def problem(item: Item, encoded: Encoded, width: int = 2) -> str:
    error = checked(item, encoded, width)
    assert isinstance(error, InvalidVectors)
    assert error.is_permanent
    return error.message


def test_a_result_that_can_be_used_is_returned() -> None:
    assert checked(TEXT, WHOLE, 2) is WHOLE
    assert is_finite(WHOLE)
    document = Encoded(rows(1, 2))
    assert checked(DOCUMENT, document, 2) is document


@pytest.mark.parametrize(
    ("item", "encoded", "width", "shapes"),
    [
        (TEXT, Encoded(DENSE), 3, "(1, 2) instead of (1, 3)"),
        (TEXT, Encoded(rows(1, 2)), 2, "(2, 2) instead of (1, 2)"),
        (DOCUMENT, Encoded(DENSE), 2, "(1, 2) instead of (2, 2)"),
        (TEXT, Encoded(DENSE[0]), 2, "(2,) instead of (1, 2)"),
    ],
)
def test_vectors_of_another_shape_are_an_error_with_both(item: Item, encoded: Encoded, width: int, shapes: str) -> None:
    assert problem(item, encoded, width) == f"the model returned vectors of shape {shapes}"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_is_an_error_and_names_its_chunk(number: float) -> None:
    text, document = Encoded(rows(number)), Encoded(rows(1, number))

    assert problem(TEXT, text) == "the model returned a vector that is not finite (NaN or infinity)"
    assert problem(DOCUMENT, document).startswith("input[1]: the model returned a vector")
    assert not is_finite(text)
    assert not is_finite(document)


@pytest.mark.parametrize(
    ("encoded", "output"),
    [
        (Encoded(DENSE, sparse=sparse(math.nan)), "sparse"),
        (Encoded(DENSE, multivector=rows(1, math.inf)), "multivector"),
        (Encoded(DENSE, states=rows(math.nan, 1)), "states"),
    ],
)
def test_another_output_that_is_not_finite_is_named(encoded: Encoded, output: str) -> None:
    assert f"a {output} output that is not finite" in problem(TEXT, encoded)
    assert not is_finite(encoded)


def test_a_request_for_a_score_gets_the_score_of_all_outputs() -> None:
    given: list[object] = []

    def scorer(*outputs: object) -> float:
        given.extend(outputs)
        return 0.75

    scored = checked(Item(TEXT.tokens, scorer=scorer), WHOLE, 2)

    assert isinstance(scored, Encoded)
    assert list(map(id, given)) == list(map(id, (WHOLE.dense, WHOLE.sparse, WHOLE.multivector)))
    assert scored.dense.tolist() == [[0.75]]
    assert scored.dense.dtype == np.float32
    assert (scored.sparse, scored.multivector, scored.states) == (None, None, None)


def test_a_score_that_is_not_finite_is_an_error() -> None:
    item = Item(TEXT.tokens, scorer=lambda *_outputs: math.nan)

    assert problem(item, WHOLE) == "the score of its vectors is not finite (NaN or infinity)"

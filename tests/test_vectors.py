"""Vectors are checked, cut, normalized and written without losing a bit."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gateway.errors import InvalidVectors
from gateway.precision import Precision, Ranges
from gateway.types import SparseVector
from gateway.vectors import Encoding, encode, finish, quantize, require_finite

RANDOM = np.random.default_rng(7).standard_normal((5, 20)).astype(np.float32)

# ----------------------------------------------------------------------------------------------------------- finish


def test_vectors_of_the_native_width_keep_their_direction() -> None:
    unit = finish(RANDOM, (5, 20), 20, normalize=True)

    np.testing.assert_allclose(unit, RANDOM / np.linalg.norm(RANDOM, axis=1, keepdims=True), rtol=1e-6)


def test_a_cut_vector_is_normalized_after_the_cut() -> None:
    unit = finish(RANDOM, (5, 20), 8, normalize=True)

    head = RANDOM[:, :8].astype(np.float64)
    np.testing.assert_allclose(unit, head / np.linalg.norm(head, axis=1, keepdims=True), rtol=1e-6)


def test_without_normalizing_the_numbers_are_untouched() -> None:
    kept = finish(RANDOM, (5, 20), 8, normalize=False)

    np.testing.assert_array_equal(kept, RANDOM[:, :8])


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_result_is_contiguous_native_float32(dtype: str, normalize: bool) -> None:
    result = finish(RANDOM.astype(dtype), (5, 20), 8, normalize=normalize)

    assert result.dtype == np.dtype("float32")
    assert result.dtype.isnative
    assert result.flags.c_contiguous


def test_the_model_s_own_array_is_not_changed() -> None:
    before = RANDOM.copy()

    finish(RANDOM, (5, 20), 20, normalize=True)

    np.testing.assert_array_equal(RANDOM, before)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "vectors",
    [
        pytest.param(np.ones((5, 19), np.float32), id="too narrow"),
        pytest.param(np.ones((5, 21), np.float32), id="too wide"),
        pytest.param(np.ones((4, 20), np.float32), id="a vector too few"),
        pytest.param(np.ones((6, 20), np.float32), id="a vector too many"),
        pytest.param(np.ones(100, np.float32), id="one dimension"),
        pytest.param(np.ones((5, 20, 1), np.float32), id="three dimensions"),
        pytest.param(np.ones((0, 20), np.float32), id="none"),
    ],
)
def test_vectors_of_another_shape_are_refused(vectors: np.ndarray, normalize: bool) -> None:
    with pytest.raises(
        InvalidVectors, match=r"^the model returned vectors of shape .* instead of 5 vectors of 20 dimensions"
    ):
        finish(vectors, (5, 20), 20, normalize=normalize)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 19])
def test_one_number_that_is_not_finite_refuses_all(bad: float, column: int, normalize: bool) -> None:
    vectors = RANDOM.copy()
    vectors[3, column] = bad

    with pytest.raises(InvalidVectors, match="not finite"):
        finish(vectors, (5, 20), 8, normalize=normalize)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_number_beyond_float32_is_not_finite(normalize: bool) -> None:
    vectors = np.full((5, 20), 1e300, np.float64)

    with pytest.raises(InvalidVectors, match="not finite"):
        finish(vectors, (5, 20), 20, normalize=normalize)


@pytest.mark.parametrize(
    "number", [pytest.param(0.0, id="zero"), pytest.param(1e-40, id="underflow"), pytest.param(3e38, id="overflow")]
)
def test_a_vector_without_a_usable_length_cannot_be_normalized(number: float) -> None:
    vectors = RANDOM.copy()
    vectors[2] = number

    with pytest.raises(InvalidVectors, match=r"input\[2\]: the model returned a vector that cannot be normalized"):
        finish(vectors, (5, 20), 20, normalize=True)


def test_a_vector_whose_kept_part_is_zero_cannot_be_normalized() -> None:
    vectors = RANDOM.copy()
    vectors[2, :8] = 0

    with pytest.raises(InvalidVectors, match=r"input\[2\]: the model returned a vector that cannot be normalized"):
        finish(vectors, (5, 20), 8, normalize=True)


def test_a_zero_vector_passes_where_nothing_is_normalized() -> None:
    assert not finish(np.zeros((1, 4), np.float32), (1, 4), 4, normalize=False).any()


def test_a_retry_does_not_fix_invalid_vectors() -> None:
    with pytest.raises(InvalidVectors) as caught:
        finish(np.zeros((1, 4), np.float32), (1, 4), 4, normalize=True)

    assert caught.value.is_permanent


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_a_vector_of_any_length_is_normalized(factor: float) -> None:
    unit = finish(RANDOM * np.float32(factor), (5, 20), 20, normalize=True)

    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("output", ["sparse", "multivectors", "states"])
def test_other_outputs_must_be_finite_too(output: str, bad: float) -> None:
    outputs: dict[str, list[Any]] = {
        "sparse": [SparseVector(np.arange(3), np.ones(3, np.float32)) for _ in range(2)],
        "multivectors": [np.ones((2, 4), np.float32) for _ in range(2)],
        "states": [np.ones((2, 4), np.float32) for _ in range(2)],
    }
    require_finite(**outputs)
    numbers = outputs[output][1]
    (numbers.values if output == "sparse" else numbers).flat[-1] = bad

    with pytest.raises(
        InvalidVectors,
        match=r"input\[1\]: the model returned a sparse, multi-vector or token state output that is not finite",
    ):
        require_finite(**outputs)


@given(arrays(np.float32, (3, 16), elements=st.floats(-1e6, 1e6, width=32).filter(lambda x: abs(x) > 1e-6)))
def test_a_finished_vector_has_length_one(vectors: np.ndarray) -> None:
    unit = finish(vectors, (3, 16), 4, normalize=True)

    np.testing.assert_allclose(np.linalg.norm(unit.astype(np.float64), axis=1), 1, rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------- encode


@given(arrays(np.float32, (2, 5), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)))
def test_floats_read_back_exactly(vectors: np.ndarray) -> None:
    rows = orjson.loads(orjson.dumps(encode(vectors, Encoding.LIST), option=orjson.OPT_SERIALIZE_NUMPY))

    np.testing.assert_array_equal(np.array(rows, np.float32), vectors)


def test_floats_are_written_in_their_shortest_form() -> None:
    rows = encode(np.array([[0.1, -2.0, 1e-7]], np.float32), Encoding.LIST)

    assert orjson.dumps(rows, option=orjson.OPT_SERIALIZE_NUMPY) == b"[[0.1,-2.0,1e-7]]"


def test_base64_is_little_endian_float32() -> None:
    rows = encode(RANDOM, Encoding.BASE64)

    np.testing.assert_array_equal([np.frombuffer(base64.b64decode(row), "<f4") for row in rows], RANDOM)
    assert encode(np.array([[1.0, -2.0]], np.float32), Encoding.BASE64) == ["AACAPwAAAMA="]


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_base64_of_small_numbers_has_a_byte_for_each(dtype: str) -> None:
    rows = encode(np.array([[1, 255], [128, 0]], np.uint8).view(dtype), Encoding.BASE64)

    assert [base64.b64decode(row) for row in rows] == [b"\x01\xff", b"\x80\x00"]


# --------------------------------------------------------------------------------------------------------- quantize


def test_float_returns_the_models_numbers() -> None:
    assert quantize(RANDOM, Precision.FLOAT) is RANDOM


def test_ubinary_has_a_bit_for_each_sign_the_first_highest() -> None:
    vector = np.array([[1, -1, 1, 1, -1, -1, -1, 1, 0, 2, -2, -2, -2, -2, -2, -2]], np.float32)

    rows = quantize(vector, Precision.UBINARY)

    assert rows.tolist() == [[0b10110001, 0b01000000]]
    assert rows.dtype == np.uint8


def test_binary_is_ubinary_less_128() -> None:
    unsigned = quantize(RANDOM, Precision.UBINARY).astype(np.int16)

    signed = quantize(RANDOM, Precision.BINARY)

    assert signed.dtype == np.int8
    np.testing.assert_array_equal(signed, unsigned - 128)


def test_signs_that_do_not_fill_a_byte_are_padded_with_zeros() -> None:
    assert quantize(np.ones((1, 10), np.float32), Precision.UBINARY).tolist() == [[0b11111111, 0b11000000]]


def test_a_range_is_divided_into_steps_and_values_outside_count_as_its_ends() -> None:
    ranges = Ranges(np.array([0, 0, 1], np.float32), np.array([255, 255, 1], np.float32), "digest")
    vectors = np.array([[0, 254.9, 1], [-7, 999, 1], [255, 128, 0.5]], np.float32)

    unsigned, signed = (quantize(vectors, precision, ranges) for precision in (Precision.UINT8, Precision.INT8))

    assert unsigned.tolist() == [[0, 254, 0], [0, 255, 0], [255, 128, 0]]
    assert signed.tolist() == [[-128, 126, -128], [-128, 127, -128], [127, 0, -128]]
    assert (unsigned.dtype, signed.dtype) == (np.uint8, np.int8)


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.UINT8])
def test_steps_need_ranges(precision: Precision) -> None:
    with pytest.raises(ValueError, match="needs ranges"):
        quantize(RANDOM, precision)

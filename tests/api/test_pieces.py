"""Large answers are written as small ones are, but in pieces."""

from __future__ import annotations

from base64 import b64encode

import numpy as np
import orjson
import pytest

from gateway.api import pieces
from gateway.api.openai import answer_parts
from gateway.requests import EmbedAnswer
from gateway.types import SparseVector, Timings
from gateway.vectors import Encoding


@pytest.mark.parametrize("width", [1, 8, 1024, 300_000])
@pytest.mark.parametrize("length", [0, 1, 3, 700])
def test_vectors_read_back_exactly(width: int, length: int) -> None:
    vectors = np.random.default_rng(5).standard_normal((min(length, 1_000_000 // width), width)).astype(np.float32)

    written = orjson.loads(b"".join(pieces.vector_list(vectors)))

    np.testing.assert_array_equal(np.array(written, np.float32).reshape(-1, width), vectors)


def test_many_vectors_are_not_a_large_piece() -> None:
    vectors = np.random.default_rng(5).standard_normal((4_096, 1_024)).astype(np.float32)

    sizes = [len(piece) for piece in pieces.in_pieces(pieces.vector_list(vectors))]

    assert sum(sizes) > 40_000_000
    assert max(sizes) < 2_000_000
    assert len(sizes) > 20


def test_small_parts_are_put_together() -> None:
    written = list(pieces.in_pieces(pieces.value_list(range(300_000))))

    assert orjson.loads(b"".join(written)) == list(range(300_000))
    assert 3 <= len(written) <= 5
    assert list(pieces.in_pieces(pieces.value_list(()))) == [b"[]"]


def test_a_piece_is_not_written_before_it_is_asked_for() -> None:
    taken: list[int] = []

    def items() -> object:
        for i in range(1_000_000):
            taken.append(i)
            yield "x" * 100

    next(pieces.in_pieces(pieces.value_list(items())))

    assert len(taken) < 10_000


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize("has_dense", [True, False])
@pytest.mark.parametrize("others", [(), ("sparse",), ("multivector",), ("sparse", "multivector")])
def test_the_pieces_of_an_answer_equal_the_answer_in_one_piece(
    encoding: Encoding, has_dense: bool, others: tuple[str, ...]
) -> None:
    rng = np.random.default_rng(7)
    vectors = rng.standard_normal((3, 16)).astype(np.float32)
    sparse = [SparseVector(np.array([1, i + 2]), np.array([0.5, 0.25], np.float32)) for i in range(3)]
    multi = [rng.standard_normal((i, 4)).astype(np.float32) for i in range(3)]
    answer = EmbedAnswer(
        vectors=vectors,
        name="mini",
        model="mini",
        task=None,
        space="s",
        num_tokens=9,
        truncated=(),
        timings=Timings(0, 0, 0),
        has_dense=has_dense,
        sparse=sparse if "sparse" in others else None,
        multivectors=multi if "multivector" in others else None,
    )

    written = orjson.loads(b"".join(answer_parts(answer, encoding)))

    assert list(written) == ["object", "data", "model", "usage"]
    assert written["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    names = ["object", "index", *(["embedding"] if has_dense else []), *others]
    for i, row in enumerate(written["data"]):
        assert list(row) == names
        assert row["index"] == i
        if encoding is Encoding.LIST and has_dense:
            np.testing.assert_array_equal(np.array(row["embedding"], np.float32), vectors[i])
        if "sparse" in others:
            assert row["sparse"] == {"indices": [1, i + 2], "values": [0.5, 0.25]}
        if "multivector" in others:
            np.testing.assert_array_equal(np.array(row["multivector"], np.float32).reshape(-1, 4), multi[i])
    held = answer.num_bytes
    assert held == vectors.nbytes + sum(
        a.nbytes
        for a in (*(answer.multivectors or ()), *(x for s in answer.sparse or () for x in (s.indices, s.values)))
    )


@pytest.mark.parametrize("num_texts", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("encoding", list(Encoding))
def test_rows_that_are_written_together_are_those_of_each_text(encoding: Encoding, num_texts: int) -> None:
    vectors = np.random.default_rng(3).standard_normal((num_texts, 1024)).astype(np.float32)
    answer = EmbedAnswer(
        vectors=vectors,
        name="mini",
        model="mini",
        task=None,
        space="s",
        num_tokens=1,
        truncated=(),
        timings=Timings(0, 0, 0),
        has_dense=True,
    )

    parts = list(answer_parts(answer, encoding))
    rows = orjson.loads(b"".join(parts))["data"]

    assert [row["index"] for row in rows] == list(range(num_texts))
    if encoding is Encoding.LIST:
        np.testing.assert_array_equal(np.array([row["embedding"] for row in rows], np.float32), vectors)
    else:
        assert [row["embedding"] for row in rows] == [b64encode(row).decode() for row in vectors]
    assert sum(len(part) > 1000 for part in parts) == -(-num_texts // 64)  # 64 rows of 1,024 numbers make a piece

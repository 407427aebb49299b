"""The texts that a model reads for a request, and the memory of an answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gateway.requests import (
    ClassifyAnswer,
    ClassifyRequest,
    EmbedAnswer,
    EmbedRequest,
    Request,
    RerankAnswer,
    RerankRequest,
)
from gateway.routing.names import GATEWAY
from gateway.types import LabelFunction, SparseVector, Timings

TEXTS = ["a", "bcd", ""]
FIELDS: dict[str, Any] = {"model": "mini", "timeout_s": 5.0, "caller": "me", "client": GATEWAY}
ANSWERED: dict[str, Any] = {"num_tokens": 3, "truncated": [], "timings": Timings(0, 0, 0)}


@pytest.mark.parametrize(
    ("request_", "lengths"),
    [
        (EmbedRequest(TEXTS, **FIELDS), [1, 3, 0]),
        (RerankRequest(TEXTS, query="four", **FIELDS), [5, 7, 4]),
        (ClassifyRequest(TEXTS, **FIELDS), [1, 3, 0]),
        (ClassifyRequest(TEXTS, firsts=["12345", None, "1"], **FIELDS), [6, 3, 1]),
    ],
    ids=["embed", "rerank", "classify", "classify pairs"],
)
def test_the_characters_that_a_model_reads_are_counted(request_: Request, lengths: list[int]) -> None:
    assert request_.lengths == lengths


def embedded(**outputs: Any) -> EmbedAnswer:
    fields = {"model": "mini", "name": "mini", "task": None, "space": "s", **ANSWERED, **outputs}
    return EmbedAnswer(vectors=np.zeros((3, 5), np.float32), has_dense=True, **fields)


def test_the_memory_of_an_answer_is_that_of_all_of_its_arrays() -> None:
    rows = [np.zeros((n, 2), np.float32) for n in (1, 2, 4)]
    sparse = [SparseVector(np.zeros(n, np.int32), np.zeros(n, np.float32)) for n in (1, 2, 3)]

    assert embedded().num_bytes == 60
    assert embedded(multivectors=rows).num_bytes == 60 + 56
    assert embedded(states=rows[:1]).num_bytes == 60 + 8
    assert embedded(sparse=sparse).num_bytes == 60 + 48
    assert embedded(sparse=sparse, multivectors=rows, states=rows).num_bytes == 60 + 48 + 2 * 56


def test_the_memory_of_scores_has_the_names_that_are_repeated_with_them() -> None:
    fields = {"model": "mini", "name": "mini", "task": None, "space": None, **ANSWERED}
    scores = RerankAnswer(scores=np.zeros(4, np.float32), **fields)
    labels = ClassifyAnswer(
        logits=np.zeros((4, 2), np.float32), labels=("good", "bad"), function=LabelFunction.SOFTMAX, **fields
    )

    assert scores.num_bytes == 16
    assert labels.num_bytes == 32 + 4 * 7

"""Heads follow their formulas, on states that can be checked by eye; weights that do not fit are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gateway.engine.checkpoint.classifier import Activation, Classifier, Linear, Norm
from gateway.engine.checkpoint.modules import Pooling
from gateway.engine.checkpoint.read import Checkpoint, read_checkpoint
from gateway.engine.model.heads import DenseHead, MultiVectorHead, ScoreHead, SparseHead
from gateway.engine.model.items import Item, Tokens
from gateway.engine.model.states import TokenStates
from gateway.errors import LoadError

MakeCheckpoint = Callable[..., Path]


def states(*texts: list[list[float]]) -> TokenStates:
    """Return the states of texts, each a list of its tokens' states."""
    return TokenStates(torch.tensor([token for text in texts for token in text]), [len(text) for text in texts])


def linear(weight: list[list[float]], bias: list[float] | None = None) -> dict[str, torch.Tensor]:
    return {"weight": torch.tensor(weight)} | ({} if bias is None else {"bias": torch.tensor(bias)})


@pytest.fixture
def checkpoint(make_checkpoint: MakeCheckpoint) -> Checkpoint:
    """Return a checkpoint that declares states of two numbers."""
    return replace(read_checkpoint(make_checkpoint()), hidden_width=2, width=2, pooling=Pooling.MEAN)


def items(*ids: list[int]) -> list[Item]:
    return [Item(Tokens(row)) for row in ids]


# -------------------------------------------------------------------------------------------------------------- sparse


def test_a_sparse_vector_has_the_largest_weight_of_each_token_that_is_not_special(tmp_path: Path) -> None:
    torch.save(linear([[1.0, 0.0]], [-1.0]), tmp_path / "head.pt")
    head = SparseHead(tmp_path / "head.pt", 2, frozenset({0, 2}))
    text = [[9.0, 0.0], [3.0, 0.0], [5.0, 0.0], [1.0, 0.0], [0.5, 0.0], [2.0, 0.0], [9.0, 0.0]]
    other = [[9.0, 0.0], [7.0, 0.0]]

    first, second = head(states(text, other), items([0, 8, 8, 7, 6, 5, 2], [0, 4]), [0, 1])

    # Weight 0 of token 7 and below 0 of token 6 are left out, as the special tokens 0 and 2 are.
    assert (first.indices.tolist(), first.values.tolist()) == ([5, 8], [1.0, 4.0])
    assert (second.indices.tolist(), second.values.tolist()) == ([4], [6.0])
    assert (first.indices.dtype, first.values.dtype) == (np.int64, np.float32)


def test_only_the_texts_that_want_it_have_a_sparse_vector(tmp_path: Path) -> None:
    torch.save(linear([[1.0, 0.0]]), tmp_path / "head.pt")
    head = SparseHead(tmp_path / "head.pt", 2, frozenset())

    [only] = head(states([[1.0, 0.0]], [[2.0, 0.0]]), items([3], [4]), [1])

    assert (only.indices.tolist(), only.values.tolist()) == ([4], [2.0])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (linear([[1.0, 0.0], [0.0, 1.0]]), "must give 1 number per token, gives 2"),
        (linear([[1.0, 0.0, 0.0]]), "expects 3 numbers, but its input has 2"),
        ({"bias": torch.zeros(1)}, "cannot read a linear layer"),
    ],
)
def test_a_sparse_head_that_does_not_fit_is_refused(
    weights: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    torch.save(weights, tmp_path / "head.pt")

    with pytest.raises(LoadError, match=message):
        SparseHead(tmp_path / "head.pt", 2, frozenset())


# -------------------------------------------------------------------------------------------------------- multi-vector


def test_a_multi_vector_has_a_vector_of_norm_1_for_each_token_but_the_first(tmp_path: Path) -> None:
    torch.save(linear([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]], [0.0, 0.0, 0.0]), tmp_path / "head.pt")
    head = MultiVectorHead(tmp_path / "head.pt", 2)

    _skipped, [vectors] = (
        head(states([[1.0, 0.0]], [[7.0, 7.0]]), [], [0]),
        head(states([[1.0, 0.0]], [[7.0, 7.0], [3.0, 4.0], [0.0, 2.0]]), [], [1]),
    )

    np.testing.assert_allclose(vectors, [[0.8, 0.6, 0.0], [1.0, 0.0, 0.0]], atol=1e-6)
    assert vectors.dtype == np.float32


def test_a_multi_vector_head_for_another_width_is_refused(tmp_path: Path) -> None:
    torch.save(linear([[1.0, 0.0, 0.0]]), tmp_path / "head.pt")

    with pytest.raises(LoadError, match="expects 3 numbers, but its input has 2"):
        MultiVectorHead(tmp_path / "head.pt", 2)


# --------------------------------------------------------------------------------------------------------------- dense


@pytest.mark.parametrize(("width", "expected"), [(2, [[2.0, 3.0], [5.0, 6.0]]), (1, [[2.0], [5.0]])])
def test_vectors_are_pooled_and_cut(checkpoint: Checkpoint, width: int, expected: list[list[float]]) -> None:
    head = DenseHead(replace(checkpoint, width=width))

    vectors = head(states([[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]]), [None, None])

    assert vectors.tolist() == expected
    assert vectors.dtype == torch.float32


@pytest.mark.parametrize(("width", "expected"), [(2, [[1.0, 2.0], [4.0, 5.0], [6.0, 7.0]]), (1, [[1.0], [4.0], [6.0]])])
def test_chunks_of_a_document_are_cut_as_well(checkpoint: Checkpoint, width: int, expected: list[list[float]]) -> None:
    head = DenseHead(replace(checkpoint, width=width))

    vectors = head(states([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[6.0, 7.0]]), [[(0, 1), (1, 3)], None])

    assert vectors.tolist() == expected


WriteDense = Callable[..., Path]


@pytest.fixture
def write_dense(tmp_path: Path) -> WriteDense:
    """Return a function that writes a `Dense` module, by default one that doubles two numbers and adds one."""

    def write(
        name: str = "2_Dense",
        tensors: dict[str, torch.Tensor] | None = None,
        activation: str = "Identity",
        **config: object,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        settings = {"in_features": 2, "out_features": 2, "bias": True, **config}
        settings["activation_function"] = f"torch.nn.modules.activation.{activation}"
        (folder / "config.json").write_text(json.dumps(settings))
        known = {"linear.weight": 2 * torch.eye(2), "linear.bias": torch.ones(2)}
        save_file(known if tensors is None else tensors, folder / "model.safetensors")
        return folder

    return write


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("Identity", [3.0, -3.0]),
        ("ReLU", [3.0, 0.0]),
        ("Tanh", [math.tanh(3.0), math.tanh(-3.0)]),
        ("GELU", [3 * (1 + math.erf(3 / math.sqrt(2))) / 2, -3 * (1 + math.erf(-3 / math.sqrt(2))) / 2]),
    ],
)
def test_a_dense_layer_follows_the_pooling(
    checkpoint: Checkpoint, write_dense: WriteDense, activation: str, expected: list[float]
) -> None:
    head = DenseHead(replace(checkpoint, dense_layers=(write_dense(activation=activation),)))

    [vector] = head(states([[0.0, -4.0], [2.0, 0.0]]), [None]).tolist()

    assert vector == pytest.approx(expected, rel=1e-3)


def test_dense_layers_follow_each_other(checkpoint: Checkpoint, write_dense: WriteDense) -> None:
    without_bias = {"linear.weight": torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.0, 1.0]])}
    layers = (write_dense(), write_dense("3_Dense", without_bias, out_features=3, bias=False))

    [vector] = DenseHead(replace(checkpoint, width=3, dense_layers=layers))(states([[1.0, 2.0]]), [None]).tolist()

    assert vector == [8.0, -2.0, 5.0]


WEIGHT, BIAS = {"linear.weight": torch.ones(2, 2)}, {"linear.bias": torch.ones(2)}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (WEIGHT, {}, "holds linear.weight, but its configuration linear.bias, linear.weight"),
        (WEIGHT | BIAS, {"bias": False}, "holds linear.bias, linear.weight, but its configuration linear.weight"),
        (WEIGHT | BIAS | {"norm": torch.ones(2)}, {}, "holds linear.bias, linear.weight, norm, but its configuration"),
        (BIAS, {}, "cannot read a Dense layer: KeyError: 'linear.weight'"),
        ({"linear.weight": torch.ones(2, 3)} | BIAS, {}, "expects 3 numbers, but its input has 2"),
        (WEIGHT | BIAS, {"out_features": 3}, "the vectors have 2 dimensions, expected 3"),
        (WEIGHT | BIAS, {"activation": "SiLU"}, "SiLU is not supported; supported: Identity, Tanh, GELU, ReLU"),
    ],
)
def test_a_dense_layer_that_does_not_fit_is_refused(
    checkpoint: Checkpoint,
    write_dense: WriteDense,
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    message: str,
) -> None:
    folder = write_dense(tensors=tensors, **config)

    with pytest.raises(LoadError, match=message):
        DenseHead(replace(checkpoint, dense_layers=(folder,)))


# --------------------------------------------------------------------------------------------------------------- score

HEAD = Classifier(
    "BertForSequenceClassification",
    Pooling.CLS,
    (Linear("dense"), Activation("tanh"), Norm("norm", eps=0.5), Linear("out")),
)
TENSORS = {
    "dense.weight": torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
    "dense.bias": torch.tensor([0.0, 1.0]),
    "norm.weight": torch.tensor([1.0, 2.0]),
    "norm.bias": torch.tensor([0.5, 0.0]),
    "out.weight": torch.tensor([[1.0, 10.0]]),
    "out.bias": torch.tensor([100.0]),
}


@pytest.fixture
def reranker(checkpoint: Checkpoint, tmp_path: Path) -> Callable[..., Checkpoint]:
    """Return a function that writes the tensors of a head, and returns the checkpoint that has them."""

    def write(**changes: torch.Tensor | None) -> Checkpoint:
        changed = {name.replace("_", "."): tensor for name, tensor in changes.items()}
        kept = {name: tensor for name, tensor in {**TENSORS, **changed}.items() if tensor is not None}
        save_file(kept, tmp_path / "head.safetensors")
        return replace(checkpoint, weights=(tmp_path / "head.safetensors",), pooling=Pooling.CLS, width=1)

    return write


@pytest.mark.parametrize("without", [(), ("norm.bias",), ("dense.bias",), ("out.bias",)])
def test_a_score_is_the_head_of_the_first_state(without: tuple[str, ...], reranker: Callable[..., Checkpoint]) -> None:
    made = ScoreHead(reranker(**{name.replace(".", "_"): None for name in without}), HEAD)
    tensors = {name: torch.zeros_like(t) if name in without else t for name, t in TENSORS.items()}

    [[score]] = made(states([[0.3, -0.2], [9.0, 9.0]]), [None]).tolist()

    first = torch.tanh(tensors["dense.weight"] @ torch.tensor([0.3, -0.2]) + tensors["dense.bias"])
    normed = (first - first.mean()) / (first.var(unbiased=False) + 0.5).sqrt()
    normed = normed * tensors["norm.weight"] + tensors["norm.bias"]
    assert score == pytest.approx(float(tensors["out.weight"][0] @ normed + tensors["out.bias"][0]), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_weight": None}, "cannot read a head of BertForSequenceClassification: KeyError: 'dense.weight'"),
        ({"norm_weight": None}, "cannot read a head of BertForSequenceClassification: KeyError: 'norm.weight'"),
        (
            {"out_weight": torch.ones(2, 2), "out_bias": torch.ones(2)},
            "the head gives 2 numbers, expected 1 for its labels",
        ),
        ({"out_weight": torch.ones(1, 3)}, "expects 3 numbers, but its input has 2"),
        ({"dense_weight": torch.ones(2, 3)}, "expects 3 numbers, but its input has 2"),
        ({"norm_bias": torch.ones(3)}, "cannot read a head of BertForSequenceClassification: RuntimeError"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(
    changes: dict[str, torch.Tensor | None], message: str, reranker: Callable[..., Checkpoint]
) -> None:
    with pytest.raises(LoadError, match=message):
        ScoreHead(reranker(**changes), replace(HEAD))

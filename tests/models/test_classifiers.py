"""A model with several labels gives the numbers of sentence-transformers and the scores of transformers' own pipeline."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from gateway.cli.verify import record_golden
from gateway.engine.devices import CpuThreads
from gateway.engine.loading import plan_load
from gateway.engine.model.build import BuildOptions, build_encoders
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.items import Item
from gateway.engine.model.tokenizer import at_once
from gateway.errors import ContextLengthExceeded, LoadError
from gateway.types import EmbedJob, LabelFunction, ModelKind, Truncate
from tests.models.checkpoints import MAX_TOKENS, TEXTS
from tests.models.plain import assert_same_logits, entry

EditJson = Callable[..., None]
Copy = Callable[[Path], Path]
MakeReranker = Callable[..., Path]

PAIRS = [("fox", "Berlin is the capital of Germany."), ("a query", ""), ("near vectors " * 60, "again and again " * 40)]
LABELS = {"id2label": {0: "contradiction", 1: "entailment", 2: "neutral"}}


def load(folder: Path) -> Encoder:
    plan = plan_load(entry(folder))
    options = BuildOptions("cpu", "float32", "torch", plan.max_tokens, CpuThreads(1, 1), plan.tasks, plan.instruction)
    return build_encoders(plan.checkpoint, options)[0]


def numbers(
    encoder: Encoder, texts: Sequence[str], firsts: Sequence[str | None] | None, truncate: Truncate = Truncate.END
) -> np.ndarray:
    """Return the numbers of texts, or of pairs, in one batch."""
    job = EmbedJob(texts, None, truncate, 0.0, caller="test", firsts=firsts)
    tokens = at_once(encoder.read(job, 0, texts, None))
    return np.concatenate([one.dense for one in encoder.encode([Item(row) for row in tokens])])


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra", "modernbert", "gte", "qwen3"])
def test_numbers_are_sentence_transformers_own(model_type: str, make_reranker: MakeReranker) -> None:
    folder = make_reranker(model_type, num_labels=3)
    theirs = CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    expected = theirs.predict(PAIRS, activation_fn=nn.Identity())
    encoder = load(folder)

    batched = numbers(encoder, [text for _first, text in PAIRS], [first for first, _text in PAIRS])
    alone = np.concatenate([numbers(encoder, [text], [first]) for first, text in PAIRS])

    assert encoder.width == 3
    assert np.ptp(expected, axis=0).min() > 0.05  # otherwise, any two numbers would pass
    assert_same_logits(batched, expected)
    assert_same_logits(alone, expected)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert"])
def test_texts_alone_have_transformers_own_numbers(model_type: str, make_reranker: MakeReranker) -> None:
    folder = make_reranker(model_type, num_labels=3)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        rows = [tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt") for text in TEXTS]
        expected = torch.cat([model(**row).logits for row in rows]).numpy()
    encoder = load(folder)

    assert_same_logits(numbers(encoder, TEXTS, None), expected)
    mixed = numbers(encoder, [TEXTS[0], TEXTS[2], TEXTS[1]], [None, "fox", None])
    assert_same_logits(mixed[[0, 2]], expected[[0, 1]])


def test_a_pair_that_may_not_be_cut_is_named(make_reranker: MakeReranker) -> None:
    encoder = load(make_reranker("bert", num_labels=3))

    with pytest.raises(ContextLengthExceeded, match=r"however the two texts of input\[2\] have \d+ tokens together"):
        numbers(encoder, ["a", "b", "fox " * 40], [None, "b", "fox " * 40], Truncate.REFUSE)
    with pytest.raises(ContextLengthExceeded, match=r"however input\[1\] has \d+ tokens"):
        numbers(encoder, ["a", "fox " * 80], ["b", None], Truncate.REFUSE)


# ---------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    ("changes", "function"),
    [
        ({}, LabelFunction.SOFTMAX),
        ({"problem_type": "single_label_classification"}, LabelFunction.SOFTMAX),
        ({"problem_type": "multi_label_classification"}, LabelFunction.SIGMOID),
        ({"problem_type": "regression"}, LabelFunction.NONE),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, LabelFunction.SIGMOID),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, LabelFunction.SOFTMAX),
        (
            {"problem_type": "regression", "sbert_ce_default_activation_function": "torch.nn.Softmax"},
            LabelFunction.SOFTMAX,
        ),
        ({"sbert_ce_default_activation_function": "package.Function"}, LabelFunction.SOFTMAX),
    ],
)
def test_the_checkpoint_says_how_numbers_become_scores(
    changes: dict[str, object], function: LabelFunction, make_reranker: MakeReranker, copy: Copy, edit_json: EditJson
) -> None:
    folder = copy(make_reranker("bert", num_labels=3))
    edit_json(folder / "config.json", **LABELS, **changes)

    info = plan_load(entry(folder)).info

    assert (info.kind, info.width, info.label_function) == (ModelKind.CLASSIFY, 3, function)
    assert info.labels == ("contradiction", "entailment", "neutral")
    assert not info.can_chunk_late
    assert not info.has_states


@pytest.mark.parametrize("problem_type", [None, "regression", "multi_label_classification"])
def test_one_label_is_a_score_for_every_problem_type(
    problem_type: str | None, make_reranker: MakeReranker, copy: Copy, edit_json: EditJson
) -> None:
    folder = copy(make_reranker("bert"))
    edit_json(folder / "config.json", problem_type=problem_type)

    info = plan_load(entry(folder)).info

    assert (info.kind, info.width, info.labels) == (ModelKind.RERANK, 1, ())


@pytest.mark.parametrize("changes", [{"num_labels": 2}, {}])
def test_labels_without_names_have_transformers_own(
    changes: dict[str, object], make_reranker: MakeReranker, copy: Copy
) -> None:
    folder = copy(make_reranker("bert", num_labels=2))
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("id2label", "label2id", "num_labels")}
    (folder / "config.json").write_text(json.dumps({**kept, **changes}))

    assert plan_load(entry(folder)).info.labels == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id2label": {"0": "a", "2": "b", "3": "c"}}, "id2label must have a name for each number from 0 on"),
        ({"id2label": ["a", "b", "c"]}, "id2label must have a name for each number from 0 on"),
        ({"num_labels": 2}, "num_labels is 2, but id2label has 3 names"),
        ({"id2label": None, "num_labels": "many"}, "num_labels must be a positive integer, got 'many'"),
        ({"problem_type": "something"}, "problem_type 'something' is not supported"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}}, "activation_fn .*Tanh"),
    ],
)
def test_labels_that_make_no_sense_are_refused(
    changes: dict[str, object], reason: str, make_reranker: MakeReranker, copy: Copy, edit_json: EditJson
) -> None:
    folder = copy(make_reranker("bert", num_labels=3))
    edit_json(folder / "config.json", **changes)

    with pytest.raises(LoadError, match=reason):
        plan_load(entry(folder))


def test_a_softmax_of_one_label_is_refused(make_reranker: MakeReranker, copy: Copy, edit_json: EditJson) -> None:
    folder = copy(make_reranker("bert"))
    edit_json(folder / "config.json", sentence_transformers={"activation_fn": "torch.nn.modules.activation.Softmax"})

    with pytest.raises(LoadError, match="Softmax of several labels"):
        plan_load(entry(folder))


def test_labels_that_the_weights_do_not_have_are_refused(
    make_reranker: MakeReranker, copy: Copy, edit_json: EditJson
) -> None:
    folder = copy(make_reranker("bert", num_labels=3))
    edit_json(folder / "config.json", id2label={"0": "a", "1": "b"})

    with pytest.raises(LoadError, match="the head gives 3 numbers, expected 2 for its labels"):
        load(folder)


def test_a_classifier_has_no_vectors(make_reranker: MakeReranker, tmp_path: Path) -> None:
    folder = make_reranker("bert", num_labels=3)

    with pytest.raises(LoadError, match="tiny scores texts: it has no vectors"):
        record_golden(entry(folder), tmp_path / "golden.json")
    with pytest.raises(LoadError, match=r"^dimensions cannot be set: this model scores texts"):
        plan_load(entry(folder, dimensions=(2,)))


# -------------------------------------------------------------------------------------------------------------- HTTP


async def test_over_http_the_scores_are_those_of_transformers_own_pipeline(
    connect: Callable[..., Awaitable[httpx.AsyncClient]], make_reranker: MakeReranker, copy: Copy, edit_json: EditJson
) -> None:
    folder = copy(make_reranker("bert", num_labels=3))
    edit_json(folder / "config.json", problem_type="multi_label_classification", **LABELS)
    client = await connect(entry(folder, id="nli"))
    theirs = pipeline("text-classification", model=str(folder), top_k=None, device="cpu", truncation=True)
    pair = {"text": PAIRS[0][0], "text_pair": PAIRS[0][1]}

    answers: list[Any] = [
        (await client.post("/classify", json={"input": list(TEXTS), "raw_scores": False})).json()["data"],
        [(await client.post("/predict", json={"inputs": text})).json() for text in TEXTS],
        [(await client.post("/predict", json={"inputs": list(PAIRS[0])})).json()],
    ]

    for answer, expected in zip(answers, [theirs(list(TEXTS)), theirs(list(TEXTS)), [theirs(pair)]], strict=True):
        for row, known in zip(answer, expected, strict=True):
            assert {one["label"]: one["score"] for one in row} == pytest.approx(
                {one["label"]: one["score"] for one in known}, abs=1e-3
            )
            assert [one["score"] for one in row] == sorted((one["score"] for one in row), reverse=True)

"""Checkpoints that are not embedders, as published, are refused and named; those that only look like that are served."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from gateway.engine.loading import plan_load
from gateway.errors import LoadError
from tests.models.checkpoints import TEXTS
from tests.models.plain import add_tensor, entry, load_whole, save_modules

Copy = Callable[[Path], Path]
Cosines = Callable[[np.ndarray, np.ndarray], np.ndarray]
EditJson = Callable[..., None]
Load = Callable[..., Any]
MakeFamily = Callable[..., Path]
MakePlain = Callable[..., Path]


# ------------------------------------------------------------ classes without a Pooling in modules.json

NO_EMBEDDERS = [
    ("t5", "SequenceClassification", {"num_labels": 1}, "a reranker (cross-encoder) of a class"),
    ("t5", "SequenceClassification", {"num_labels": 3}, "a classifier with 3 labels"),
    ("bert", "TokenClassification", {"num_labels": 9}, "labels each token"),
    ("distilbert", "QuestionAnswering", {}, "finds an answer in a text"),
    (
        "bert",
        "MaskedLM",
        {},
        "predicts masked words: a sparse encoder (set `outputs: [sparse]` if it is a SPLADE model)",
    ),
    (
        "distilbert",
        "MaskedLM",
        {},
        "predicts masked words: a sparse encoder (set `outputs: [sparse]` if it is a SPLADE model)",
    ),
    (
        "modernbert",
        "MaskedLM",
        {},
        "predicts masked words: a sparse encoder (set `outputs: [sparse]` if it is a SPLADE model)",
    ),
    ("qwen3", "CausalLM", {}, "writes text: an LLM reranker"),
    ("qwen3", "CausalLM", {"is_causal": False}, "writes text: an LLM reranker"),
    *((name, "CausalLM", {}, "writes text") for name in ("gemma3_text", "gemma2", "mistral", "llama", "qwen2", "lfm2")),
    ("albert", "MaskedLM", {}, "predicts masked words"),
    ("deberta-v2", "TokenClassification", {"num_labels": 9}, "labels each token"),
    ("bert", "CausalLM", {"is_decoder": True}, "writes text: a model that was not trained to embed"),
]


@pytest.mark.parametrize(("model_type", "head", "changes", "what"), NO_EMBEDDERS)
def test_a_model_with_another_head_is_refused_and_named(
    model_type: str, head: str, changes: Mapping[str, object], what: str, make_plain: MakePlain
) -> None:
    folder = make_plain(model_type, head, **changes)
    name = json.loads((folder / "config.json").read_text())["architectures"][0]

    with pytest.raises(LoadError, match=re.escape(what)) as caught:
        plan_load(entry(folder))

    assert str(caught.value).startswith(f"{folder}: {name} ")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("ColBERT", "a multi-vector model (ColBERT)"),
        ("JinaForRanking", "a reranker of a kind that is not supported"),
        ("BertForPreTraining", "a pretrained model that was not trained to embed"),
        ("BertForNextSentencePrediction", "a pretrained model that was not trained to embed"),
        ("BertForMultipleChoice", "chooses among texts"),
        ("RobertaModel", "it is not the class of transformers for 'bert'"),
        ("Qwen3ForEmbedding", "it is not the class of transformers for 'bert'"),
        ("SomethingModel", "it is not the class of transformers for 'bert'"),
    ],
)
def test_a_class_of_another_kind_is_refused_and_named(
    name: str, what: str, make_plain: MakePlain, edit_json: EditJson
) -> None:
    folder = make_plain("bert")
    edit_json(folder / "config.json", architectures=[name])

    with pytest.raises(LoadError, match=re.escape(f"{name} is not a model that embeds: {what}")):
        plan_load(entry(folder))


@pytest.mark.parametrize("architectures", [None, [], ["BertModel"], ["Contriever"], [None], ""])
def test_a_model_without_a_head_is_pooled_by_the_mean_as_sentence_transformers_does(
    architectures: object, make_plain: MakePlain, edit_json: EditJson, load: Load, cosines: Cosines
) -> None:
    folder = make_plain("bert")
    theirs = SentenceTransformer(str(folder), device="cpu").encode(list(TEXTS))
    edit_json(folder / "config.json", architectures=architectures)

    assert cosines(load(folder, "torch").vectors(TEXTS), theirs).min() > 0.99999


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_decoder_without_a_head_is_pooled_as_sentence_transformers_does(
    is_causal: bool, make_plain: MakePlain, load: Load, cosines: Cosines
) -> None:
    folder = make_plain("qwen3", is_causal=is_causal)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(list(TEXTS))

    assert cosines(load(folder, "torch").vectors(TEXTS), theirs).min() > 0.99999


@pytest.mark.parametrize(
    ("model_type", "head", "pooling"),
    [
        ("qwen3", "CausalLM", "lasttoken"),
        ("bert", "MaskedLM", "mean"),
        ("modernbert", "MaskedLM", "cls"),
        ("distilbert", "MaskedLM", "mean"),
        ("electra", "MaskedLM", "mean"),
        ("xlm-roberta", "MaskedLM", "cls"),
        ("bert", "SequenceClassification", "mean"),
        ("distilbert", "SequenceClassification", "mean"),
        ("qwen3", "SequenceClassification", "lasttoken"),
        ("bert", "QuestionAnswering", "mean"),
    ],
)
def test_with_a_pooling_any_head_is_left_out_as_sentence_transformers_does(
    model_type: str, head: str, pooling: str, make_plain: MakePlain, load: Load, cosines: Cosines
) -> None:
    folder = make_plain(model_type, head)
    save_modules(folder, pooling=pooling)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(list(TEXTS))

    assert cosines(load(folder, "torch").vectors(TEXTS), theirs).min() > 0.99999


# ------------------------------------------------------------ code of the checkpoint's own


@pytest.mark.parametrize(
    ("model_type", "architecture", "auto_model"),
    [
        ("qwen3", "Qwen3ForEmbedding", "modeling_voyage.Qwen3ForEmbedding"),
        ("qwen3", "JinaForRanking", "modeling.JinaForRanking"),
        ("bert", "BertModel", "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"),
        ("xlm-roberta", "XLMRobertaModel", "modeling.XLMRobertaLoRA"),
        ("nomic_bert", "NomicBertModel", "modeling.AnotherModel"),
    ],
)
@pytest.mark.parametrize("has_modules", [True, False])
def test_code_that_would_compute_something_else_is_refused(
    model_type: str, architecture: str, auto_model: str, has_modules: bool, make_plain: MakePlain, edit_json: EditJson
) -> None:
    folder = make_plain(model_type)
    if has_modules:
        save_modules(folder)
    edit_json(folder / "config.json", architectures=[architecture], auto_map={"AutoModel": auto_model})

    with pytest.raises(LoadError, match=rf"its own code \({auto_model.rpartition('.')[2]}, in auto_map\)"):
        plan_load(entry(folder))


@pytest.mark.parametrize(
    ("model_type", "auto_model"),
    [
        ("nomic_bert", "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel"),
        ("gte", "modeling_hf_alibaba_nlp_gte.GteModel"),
    ],
)
def test_code_that_is_known_to_compute_the_same_need_not_run(
    model_type: str,
    auto_model: str,
    make_family: MakeFamily,
    copy: Copy,
    edit_json: EditJson,
    load: Load,
    cosines: Cosines,
) -> None:
    folder = copy(make_family(model_type))
    theirs = SentenceTransformer(str(folder), device="cpu").encode(list(TEXTS), normalize_embeddings=True)
    edit_json(folder / "config.json", auto_map={"AutoModel": auto_model})

    assert cosines(load(folder, "torch").vectors(TEXTS), theirs).min() > 0.99999


def test_jina_v2_is_refused_for_its_kind_of_positions(make_plain: MakePlain, edit_json: EditJson) -> None:
    folder = make_plain("bert")
    edit_json(
        folder / "config.json",
        position_embedding_type="alibi",
        auto_map={"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"},
    )

    with pytest.raises(
        LoadError, match=r"position_embedding_type 'alibi' \(ALiBi, as Jina v2 has it\) .* its own code"
    ):
        plan_load(entry(folder))


def test_a_reranker_with_its_own_code_is_refused(make_plain: MakePlain, edit_json: EditJson) -> None:
    folder = make_plain("bert", "SequenceClassification", num_labels=1)
    edit_json(
        folder / "config.json",
        auto_map={"AutoModelForSequenceClassification": "modeling.BertForSequenceClassification"},
    )

    for trust in (False, True):
        with pytest.raises(LoadError, match="has its own code"):
            plan_load(entry(folder, trust_remote_code=trust))


# ------------------------------------------------------------ tensors that nothing uses


@pytest.mark.parametrize("has_modules", [True, False])
@pytest.mark.parametrize(
    "name",
    ["linear.weight", "projector.0.weight", "bert.linear.weight", "vision_model.weight", "encoder.layer.0.gate.weight"],
)
def test_a_tensor_that_nothing_uses_is_refused_and_named(name: str, has_modules: bool, make_plain: MakePlain) -> None:
    folder = make_plain("bert")
    if has_modules:
        save_modules(folder)
    add_tensor(folder, name, torch.ones(8, 64))

    with pytest.raises(
        LoadError, match=rf"the weights hold \['{re.escape(name)}'\] \(1 in all\), which BertModel does not use"
    ):
        load_whole(folder)


@pytest.mark.parametrize("names", [None, []])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert", "distilbert"])
def test_a_model_that_predicts_words_and_names_no_class_is_refused(
    model_type: str, names: list[str] | None, make_plain: MakePlain, edit_json: EditJson
) -> None:
    folder = make_plain(model_type, "MaskedLM")
    edit_json(folder / "config.json", architectures=names)

    with pytest.raises(LoadError, match=r"which .* does not use: the checkpoint computes something different"):
        load_whole(folder)
    save_modules(folder)
    load_whole(folder)


@pytest.mark.parametrize("name", ["classifier.weight", "score.weight", "qa_outputs.weight"])
def test_a_head_without_its_class_is_refused_unless_a_pooling_defines_the_vector(
    name: str, make_plain: MakePlain
) -> None:
    folder = make_plain("bert")
    add_tensor(folder, name, torch.ones(1, 64))

    with pytest.raises(LoadError, match=f"the weights hold .'{name}'"):
        load_whole(folder)
    save_modules(folder)
    load_whole(folder)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("cls.predictions.bias", torch.ones(224)),
        ("lm_head.weight", torch.ones(224, 64)),
        ("embeddings.position_ids", torch.arange(64)[None]),
        ("embeddings.token_type_ids", torch.zeros(1, 64, dtype=torch.long)),
        ("layer.0.rotary.inv_freq", torch.ones(8)),
        ("vocab_projector.bias", torch.ones(224)),
        ("discriminator_predictions.dense.weight", torch.ones(64, 64)),
    ],
)
def test_tensors_that_no_embedding_needs_are_passed_over(
    name: str, tensor: torch.Tensor, make_plain: MakePlain, load: Load, cosines: Cosines
) -> None:
    folder = make_plain("bert")
    before = load(folder, "torch").vectors(TEXTS)
    add_tensor(folder, name, tensor)
    load_whole(folder)

    load.cache_clear()
    np.testing.assert_array_equal(load(folder, "torch").vectors(TEXTS), before)

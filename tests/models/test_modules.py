"""sentence-transformers' files are read as it reads them, or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from gateway.engine.loading import plan_load
from gateway.errors import LoadError
from tests.models.checkpoints import MAX_TOKENS, TEXTS
from tests.models.plain import entry, load_whole

Copy = Callable[[Path], Path]
Cosines = Callable[[np.ndarray, np.ndarray], np.ndarray]
EditJson = Callable[..., None]
Load = Callable[..., Any]
MakeFamily = Callable[..., Path]
MakePlain = Callable[..., Path]


# ------------------------------------------------------------ sentence-transformers' files


@pytest.fixture
def dense(make_family: MakeFamily, copy: Copy) -> Path:
    return copy(make_family("distilbert"))


@pytest.mark.parametrize(("width", "expected"), [(32, 32), (48, 48), (500, 48)])
@pytest.mark.parametrize("name", ["distilbert", "bert"])
def test_vectors_are_cut_where_the_checkpoint_says_so(
    name: str,
    width: int,
    expected: int,
    make_family: MakeFamily,
    copy: Copy,
    edit_json: EditJson,
    load: Load,
    cosines: Cosines,
) -> None:
    folder = copy(make_family(name))
    expected = expected if name == "distilbert" else min(width, 64)
    before = plan_load(entry(folder)).checkpoint.fingerprint
    edit_json(folder / "config_sentence_transformers.json", truncate_dim=width)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(list(TEXTS))

    plan = plan_load(entry(folder))
    vectors = load(folder, "torch").vectors(TEXTS)

    assert plan.info.width == plan.info.dimensions[0] == expected == theirs.shape[1]
    assert cosines(vectors, theirs).min() > 0.99999
    assert plan.checkpoint.fingerprint != before


@pytest.mark.parametrize("width", [0, -1, "32", 3.5, True])
def test_an_invalid_width_is_refused(width: object, dense: Path, edit_json: EditJson) -> None:
    edit_json(dense / "config_sentence_transformers.json", truncate_dim=width)

    with pytest.raises(LoadError, match="truncate_dim must be a positive integer, got "):
        plan_load(entry(dense))


@pytest.mark.parametrize("is_pickled", [False, True])
def test_a_transformer_may_have_a_folder(
    is_pickled: bool, make_family: MakeFamily, copy: Copy, load: Load, cosines: Cosines
) -> None:
    """The layout of sentence-transformers before release 2."""
    folder = copy(make_family("distilbert"))
    theirs = SentenceTransformer(str(folder), device="cpu").encode(list(TEXTS), normalize_embeddings=True)
    (folder / "0_Transformer").mkdir()
    for path in [*folder.iterdir()]:
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(folder / "0_Transformer" / path.name)
    rows = json.loads((folder / "modules.json").read_text())
    rows[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(rows))
    if is_pickled:
        weights = folder / "0_Transformer" / "model.safetensors"
        torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
        weights.unlink()

    plan = plan_load(entry(folder))

    assert plan.max_tokens == MAX_TOKENS
    assert cosines(load(folder, "torch").vectors(TEXTS), theirs).min() > 0.99999


@pytest.mark.parametrize("path", ["../other", "/etc", "a/../../b"])
def test_modules_stay_in_the_folder_of_their_checkpoint(path: str, dense: Path) -> None:
    rows = json.loads((dense / "modules.json").read_text())
    rows[1]["path"] = path
    (dense / "modules.json").write_text(json.dumps(rows))

    with pytest.raises(LoadError, match="leads out of the checkpoint's folder"):
        plan_load(entry(dense))


TRANSFORMER_SETTINGS = [
    ({"query_length": 32}, "query_length 32 is not supported"),
    ({"document_length": 32}, "document_length 32 is not supported"),
    ({"query_expansion": {"strategy": "fixed", "length": 32}}, "query_expansion is not supported"),
    ({"transformer_task": "fill-mask"}, "transformer_task 'fill-mask' is not supported"),
    ({"module_output_name": "scores"}, "module_output_name 'scores' is not supported"),
    ({"model_args": {"rope_scaling": {"factor": 2}}}, "model_kwargs: rope_scaling is not supported"),
    ({"config_kwargs": {"num_hidden_layers": 1}}, "config_kwargs: num_hidden_layers is not supported"),
    ({"tokenizer_args": {"do_lower_case": True}}, "processor_kwargs: do_lower_case is not supported"),
    ({"tokenizer_name_or_path": "other"}, "tokenizer_name_or_path is not supported"),
    ({"query_prefix": "q: "}, "query_prefix is not supported"),
    ({"of_a_later_release": 1}, "of_a_later_release is not supported"),
    ({"modality_config": {"text": {"method": "encode", "method_output_name": "last_hidden_state"}}}, "method 'encode'"),
    (
        {
            "modality_config": {
                key: {"method": "forward", "method_output_name": "last_hidden_state"} for key in ("text", "message")
            }
        },
        "each text is put into the chat template",
    ),
]


@pytest.mark.parametrize(("change", "reason"), TRANSFORMER_SETTINGS)
def test_a_setting_that_would_change_vectors_is_refused(
    change: dict[str, object], reason: str, dense: Path, edit_json: EditJson
) -> None:
    edit_json(dense / "sentence_bert_config.json", **change)

    with pytest.raises(LoadError, match=re.escape(reason)):
        plan_load(entry(dense))


@pytest.mark.parametrize(
    ("change", "max_tokens"),
    [
        ({"max_seq_length": None, "query_length": None, "document_length": None, "query_expansion": None}, MAX_TOKENS),
        ({"max_seq_length": 32, "query_length": 32}, 32),
        ({"unpad_inputs": False, "model_args": {"attn_implementation": "sdpa"}, "config_args": {}}, MAX_TOKENS),
        ({f"{name}_args": {"trust_remote_code": True} for name in ("model", "tokenizer", "config")}, MAX_TOKENS),
        ({"processor_kwargs": {"model_max_length": 20}, "max_seq_length": 32}, 20),
    ],
)
def test_a_setting_that_changes_no_vector_is_passed_over(
    change: dict[str, object],
    max_tokens: int,
    dense: Path,
    edit_json: EditJson,
    load: Load,
    cosines: Cosines,
) -> None:
    edit_json(dense / "sentence_bert_config.json", **change)
    edit_json(dense / "config_sentence_transformers.json", similarity_fn_name="dot", prompts=None, requirements={})

    assert plan_load(entry(dense)).max_tokens == max_tokens
    edit_json(dense / "config_sentence_transformers.json", prompts={})  # they cannot read null
    theirs = SentenceTransformer(str(dense), device="cpu").encode(list(TEXTS))
    assert cosines(load(dense, "torch").vectors(TEXTS), theirs).min() > 0.99999


@pytest.mark.parametrize(
    ("path", "change", "reason"),
    [
        ("1_Pooling", {"of_a_later_release": 1}, "of_a_later_release is not supported"),
        ("2_Dense", {"of_a_later_release": 1}, "of_a_later_release is not supported"),
        (
            "2_Dense",
            {"activation_function": "my.own.Tanh"},
            "activation_function must be a class of torch's, got 'my.own.Tanh'",
        ),
        ("2_Dense", {"activation_function": None}, "activation_function must be a class of torch's, got None"),
        ("2_Dense", {"bias": False}, "holds linear.bias, linear.weight, but its configuration linear.weight"),
    ],
)
def test_a_module_with_settings_that_are_not_known_is_refused(
    path: str, change: dict[str, object], reason: str, dense: Path, edit_json: EditJson
) -> None:
    edit_json(dense / path / "config.json", **change)

    with pytest.raises(LoadError, match=re.escape(reason)):
        load_whole(dense)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        # Read as false, the mean would be taken where sentence-transformers takes the first token.
        ("1_Pooling/config.json", "pooling_mode_cls_token", "true"),
        ("1_Pooling/config.json", "include_prompt", 0),
        ("1_Pooling/config.json", "include_prompt", "false"),
        ("2_Dense/config.json", "bias", "false"),
        ("2_Dense/config.json", "use_residual", "false"),
        ("sentence_bert_config.json", "do_lower_case", "true"),
        ("sentence_bert_config.json", "do_lower_case", 1),
    ],
)
def test_a_flag_is_true_or_false(file: str, key: str, value: object, dense: Path, edit_json: EditJson) -> None:
    """sentence-transformers tests such a value as Python does: a 0 is false, and the text "false" is true."""
    edit_json(dense / file, **{key: value})

    with pytest.raises(LoadError, match=rf"{key} must be true or false, got {value!r}|no use_residual"):
        load_whole(dense)


def test_a_prompt_that_is_not_pooled_is_refused_if_the_setting_is_null(dense: Path, edit_json: EditJson) -> None:
    edit_json(dense / "1_Pooling" / "config.json", include_prompt=None)

    with pytest.raises(LoadError, match="include_prompt: false is not supported"):
        plan_load(entry(dense))


@pytest.mark.parametrize(
    ("length", "prompts", "taken"),
    [
        (1, {}, "the special tokens take 2"),
        (2, {}, "the special tokens take 2"),
        (
            8,
            {"query": "Berlin is the capital of Germany.", "document": ""},
            "the special tokens and the instruction 'Berlin is the capital of Germany.' take ",
        ),
    ],
)
@pytest.mark.parametrize("place", ["checkpoint", "registry"])
def test_a_length_that_leaves_no_token_of_a_text_is_refused(
    place: str, length: int, prompts: dict[str, str], taken: str, dense: Path, edit_json: EditJson
) -> None:
    """Otherwise all texts would have the same vector."""
    edit_json(dense / "config_sentence_transformers.json", prompts=prompts)
    if place == "checkpoint":
        edit_json(dense / "sentence_bert_config.json", max_seq_length=length)

    with pytest.raises(LoadError, match=rf"texts are cut at {length} tokens, and {taken}"):
        load_whole(dense, max_tokens=length if place == "registry" else None)


def test_a_length_that_leaves_one_token_of_a_text_is_served(dense: Path) -> None:
    load_whole(dense, max_tokens=3)


@pytest.mark.parametrize("type_", ["models.Dropout", "sentence_transformer.modules.dropout.Dropout"])
def test_a_dropout_does_nothing(type_: str, dense: Path, load: Load) -> None:
    before = load(dense, "torch").vectors(TEXTS)
    rows = json.loads((dense / "modules.json").read_text())
    rows.insert(2, {"idx": 2, "name": "2", "path": "2_Dropout", "type": f"sentence_transformers.{type_}"})
    (dense / "modules.json").write_text(json.dumps(rows))
    load.cache_clear()  # type: ignore[attr-defined]

    np.testing.assert_array_equal(load(dense, "torch").vectors(TEXTS), before)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json"])
def test_a_text_that_is_cut_at_its_beginning_is_refused(file: str, dense: Path, edit_json: EditJson) -> None:
    """sentence-transformers keeps the end of a long text then."""
    truncation = {"direction": "Left", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    edit_json(dense / file, **({"truncation": truncation} if file == "tokenizer.json" else {"truncation_side": "left"}))

    with pytest.raises(
        LoadError, match="truncation_side 'left' is not supported: a text that is too long is cut at its end"
    ):
        load_whole(dense)


def test_a_residual_layer_is_not_passed_over(dense: Path) -> None:
    path = dense / "2_Dense" / "model.safetensors"
    save_file({**load_file(path), "residual.weight": torch.ones(48, 64)}, path)

    with pytest.raises(LoadError, match=r"holds linear\.bias, linear\.weight, residual\.weight, but"):
        load_whole(dense)


def test_a_normalization_of_token_vectors_is_refused(make_family: MakeFamily, copy: Copy) -> None:
    folder = copy(make_family("bert"))
    (folder / "2_Normalize").mkdir(exist_ok=True)
    (folder / "2_Normalize" / "config.json").write_text(json.dumps({"module_input_name": "token_embeddings"}))

    with pytest.raises(
        LoadError, match="normalizes 'token_embeddings', not the vector of a text: a multi-vector model"
    ):
        plan_load(entry(folder))


# ------------------------------------------------------------ modules of other models

MODULES = "sentence_transformers.models"
OTHER_MODULES = {
    "router": ([f"{MODULES}.Pooling", f"{MODULES}.Router"], "a router with different modules"),
    "multi-vector, release 6": (
        [
            f"{MODULES}.Transformer",
            f"{MODULES}.Dense",
            "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",
        ],
        "a multi-vector model (ColBERT)",
    ),
    "Dense without Pooling": ([f"{MODULES}.Transformer", f"{MODULES}.Dense"], "a multi-vector model (ColBERT)"),
    "static": ([f"{MODULES}.StaticEmbedding", f"{MODULES}.Dense"], "static embeddings"),
    "CLIP": ([f"{MODULES}.CLIPModel"], "a model of images and texts (CLIP)"),
    "words": ([f"{MODULES}.WordEmbeddings", f"{MODULES}.Pooling"], "word embeddings without a transformer"),
}


@pytest.mark.parametrize("name", OTHER_MODULES)
@pytest.mark.parametrize("has_config", [True, False])
def test_modules_of_another_kind_of_model_are_named(name: str, has_config: bool, dense: Path) -> None:
    types, what = OTHER_MODULES[name]
    rows = [{"idx": i, "name": str(i), "path": f"{i}_x" if i else "", "type": type_} for i, type_ in enumerate(types)]
    (dense / "modules.json").write_text(json.dumps(rows))
    if not has_config:  # some have no transformer, and no configuration of one
        (dense / "config.json").unlink()

    with pytest.raises(LoadError, match=re.escape(f" are not supported: {what}")):
        plan_load(entry(dense))


def test_a_reranker_of_modules_needs_the_weights_of_each(dense: Path) -> None:
    """Ettin's layout: the layers behind the pooling give a score."""
    kinds = ["Transformer", "Pooling", "Dense", "LayerNorm", "Dense"]
    rows = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"{MODULES}.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (dense / "modules.json").write_text(json.dumps(rows))
    (dense / "4_Dense").mkdir()
    config = {"in_features": 48, "out_features": 1, "module_output_name": "scores"}
    (dense / "4_Dense" / "config.json").write_text(json.dumps(config))

    with pytest.raises(LoadError, match="3_LayerNorm: no weights"):
        plan_load(entry(dense))


@pytest.mark.parametrize(
    ("model_type", "what"),
    [
        ("SparseEncoder", "a sparse"),
        ("CrossEncoder", "a reranker"),
    ],
)
def test_what_sentence_transformers_calls_otherwise_is_refused(
    model_type: str, what: str, dense: Path, edit_json: EditJson
) -> None:
    edit_json(dense / "config_sentence_transformers.json", model_type=model_type)

    with pytest.raises(LoadError, match=f"model_type '{model_type}': {what}"):
        plan_load(entry(dense))


def test_a_module_with_its_own_code_is_refused(dense: Path) -> None:
    rows = json.loads((dense / "modules.json").read_text())
    rows[0]["type"] = "custom_st.Transformer"
    (dense / "modules.json").write_text(json.dumps(rows))

    with pytest.raises(LoadError, match=r"modules.json: custom_st.Transformer is the checkpoint's own code"):
        plan_load(entry(dense))


def test_modules_without_a_pooling_make_no_vector(dense: Path) -> None:
    rows = json.loads((dense / "modules.json").read_text())
    (dense / "modules.json").write_text(json.dumps(rows[:1]))

    with pytest.raises(LoadError, match=r"lists a Transformer and no Pooling"):
        plan_load(entry(dense))


def test_a_reranker_with_a_prompt_is_refused(make_plain: MakePlain) -> None:
    folder = make_plain("bert", "SequenceClassification", num_labels=1)
    plan_load(entry(folder))
    config = {"model_type": "CrossEncoder", "prompts": {"query": "Find: "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))

    with pytest.raises(
        LoadError, match="default_prompt_name 'query' is not supported: a model that scores has no prompts"
    ):
        plan_load(entry(folder))

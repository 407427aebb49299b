"""GTE as published, `model_type: new`, gives the numbers of its publisher's formulas; variants are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, processors
from torch.nn import functional

from gateway.engine.loading import plan_load
from gateway.engine.model.items import Item
from gateway.engine.model.tokenizer import at_once
from gateway.errors import LoadError
from gateway.types import Output, Truncate
from tests.models.checkpoints import MAX_TOKENS, TEXTS, unigram_tokenizer
from tests.models.plain import entry
from tests.models.published import (
    GTE_CONFIG,
    WIDTH,
    gte_frequencies,
    gte_states,
    gte_tensors,
    layer_norm,
    linear,
    normalized,
    plain_frequencies,
    random_tensors,
    token_ids,
    write,
    write_modules,
)

Cosines = Callable[[np.ndarray, np.ndarray], np.ndarray]
Copy = Callable[[Path], Path]
EditJson = Callable[..., None]
Load = Callable[..., Any]

SPARSE_MODULES = "sentence_transformers.sparse_encoder.models"
LONG = "near vectors mean near texts "


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a gte-multilingual-base: scaled positions, a prefix to the names, a head for tokens that nothing here uses."""
    folder = tmp_path_factory.mktemp("gte-multilingual")
    tokenizer = unigram_tokenizer()
    tensors = gte_tensors(len(tokenizer), 1, "new.")
    tensors |= random_tensors({"classifier.weight": (1, WIDTH), "classifier.bias": (1,)})
    architectures = ["NewModel", "NewForTokenClassification"]
    write(folder, {**GTE_CONFIG, "architectures": architectures, "vocab_size": len(tokenizer)}, tensors, tokenizer)
    write_modules(folder, "cls", max_tokens=8192)
    return folder


@pytest.fixture(scope="module")
def stella(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a stella_en_400M_v5: two segments, no prefix, mean, a wider vector."""
    folder = tmp_path_factory.mktemp("stella")
    tokenizer = unigram_tokenizer()
    changes = {"type_vocab_size": 2, "rope_theta": 160000, "rope_scaling": None, "vocab_size": len(tokenizer)}
    write(folder, {**GTE_CONFIG, **changes}, gte_tensors(len(tokenizer), 2, ""), tokenizer)
    dense = random_tensors({"linear.weight": (2 * WIDTH, WIDTH), "linear.bias": (2 * WIDTH,)})
    prompts = {
        "s2p_query": "Instruct: Given a web search query, retrieve relevant passages that answer the query Query: "
    }
    write_modules(folder, "mean", dense=dense, is_normalized=False, prompts=prompts)
    return folder


def states(folder: Path, text: str, frequencies: torch.Tensor, max_tokens: int = 8192) -> torch.Tensor:
    return gte_states(load_file(folder / "model.safetensors"), token_ids(folder, text, max_tokens), frequencies)


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_multilingual_gte_gives_its_publishers_numbers(
    runtime: str, multilingual: Path, load: Load, cosines: Cosines
) -> None:
    """Also for a text of some hundred tokens: the scaling of the positions shows there."""
    texts = [*TEXTS[2:5], "", LONG * 60]
    frequencies = gte_frequencies(20000, 8.0)
    theirs = normalized([states(multilingual, text, frequencies)[0] for text in texts])
    model = load(multilingual, runtime)

    assert plan_load(entry(multilingual)).max_tokens == 8192
    assert cosines(model.vectors(texts), theirs).min() > 0.99999
    assert cosines(model.alone(texts), theirs).min() > 0.99999


@pytest.mark.parametrize("other", [plain_frequencies(20000), plain_frequencies(160000)])
def test_the_scaling_of_positions_can_be_seen(other: torch.Tensor, multilingual: Path, cosines: Cosines) -> None:
    """Otherwise, the test above would prove nothing about it."""
    vectors = [
        normalized([states(multilingual, LONG * 6, frequencies)[0]])
        for frequencies in (gte_frequencies(20000, 8.0), other)
    ]

    assert cosines(*vectors).max() < 0.9995


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_sparse_encoder_gives_its_publishers_numbers(is_tied: bool, tmp_path: Path, load: Load) -> None:
    """As opensearch-neural-sparse-encoding-doc-v3-gte: `NewForMaskedLM`, whose decoder may be the table of words."""
    tokenizer = unigram_tokenizer()
    size = len(tokenizer)
    shapes: dict[str, tuple[int, ...]] = {f"lm_head.norm.{part}": (WIDTH,) for part in ("weight", "bias")}
    shapes |= {"lm_head.dense.weight": (WIDTH, WIDTH), "lm_head.dense.bias": (WIDTH,), "lm_head.decoder.bias": (size,)}
    shapes |= {} if is_tied else {"lm_head.decoder.weight": (size, WIDTH)}
    tensors = {**gte_tensors(size, 1, "new."), **random_tensors(shapes)}
    write(tmp_path, {**GTE_CONFIG, "architectures": ["NewForMaskedLM"], "vocab_size": size}, tensors, tokenizer)
    rows = [{"idx": 0, "name": "0", "path": "", "type": f"{SPARSE_MODULES}.MLMTransformer"}]
    rows += [{"idx": 1, "name": "1", "path": "1_SpladePooling", "type": f"{SPARSE_MODULES}.SpladePooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(rows))
    (tmp_path / "1_SpladePooling").mkdir()
    pooling = {"pooling_strategy": "max", "activation_function": "log1p_relu", "word_embedding_dimension": size}
    (tmp_path / "1_SpladePooling" / "config.json").write_text(json.dumps(pooling))
    table = tensors["new.embeddings.word_embeddings.weight" if is_tied else "lm_head.decoder.weight"]

    encoded = load(tmp_path, "torch").encode(TEXTS, outputs=[(Output.SPARSE,)] * len(TEXTS))

    for text, one in zip(TEXTS, encoded, strict=True):
        tokens = states(tmp_path, text, gte_frequencies(20000, 8.0), MAX_TOKENS)
        hidden = functional.gelu(linear(tensors, "lm_head.dense", tokens))
        logits = layer_norm(tensors, "lm_head.norm", hidden, 1e-12) @ table.T + tensors["lm_head.decoder.bias"]
        right = logits.amax(0).relu().log1p().log1p().numpy()
        ours = np.zeros(size)
        ours[one.sparse.indices] = one.sparse.values
        assert (right > 0).mean() > 0.05
        np.testing.assert_allclose(ours, right, atol=2e-5)


def test_stella_gives_its_publishers_numbers(stella: Path, load: Load, cosines: Cosines) -> None:
    dense = load_file(stella / "2_Dense" / "model.safetensors")
    theirs = np.stack(
        [
            functional.linear(
                states(stella, text, plain_frequencies(160000), MAX_TOKENS).mean(0),
                dense["linear.weight"],
                dense["linear.bias"],
            ).numpy()
            for text in TEXTS
        ]
    )

    plan, vectors = plan_load(entry(stella)), load(stella, "torch").vectors(TEXTS)

    assert (plan.max_tokens, plan.info.width, plan.info.is_normalized) == (MAX_TOKENS, 2 * WIDTH, False)
    assert "s2p_query" in plan.tasks
    np.testing.assert_allclose(vectors, theirs, atol=1e-4)


def test_a_model_without_segments_and_missing_keys_of_a_file(tmp_path: Path, load: Load, cosines: Cosines) -> None:
    """gte-base-en-v1.5 has no segments. The publisher's defaults are not transformers'."""
    tokenizer = unigram_tokenizer()
    left_out = ("layer_norm_eps", "rope_scaling", "rope_theta", "hidden_act", "pack_qkv", "max_position_embeddings")
    kept = {key: value for key, value in GTE_CONFIG.items() if key not in left_out}
    config = {**kept, "type_vocab_size": 0, "vocab_size": len(tokenizer)}
    write(tmp_path, config, gte_tensors(len(tokenizer), 0, "new."), tokenizer)
    write_modules(tmp_path, "cls", max_tokens=8192)
    theirs = normalized([states(tmp_path, text, plain_frequencies(10000))[0] for text in TEXTS[:7]])

    assert plan_load(entry(tmp_path)).max_tokens == 2048
    assert cosines(load(tmp_path, "torch").vectors(TEXTS[:7]), theirs).min() > 0.99999


def test_a_published_reranker_gives_its_publishers_scores(tmp_path: Path, load: Load) -> None:
    """gte-multilingual-reranker-base: the same body, a pooler over the first token, and one label."""
    tokenizer = unigram_tokenizer()
    template = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.backend_tokenizer.post_processor = template
    tensors = gte_tensors(len(tokenizer), 1, "new.") | random_tensors(
        {
            "new.pooler.dense.weight": (WIDTH, WIDTH),
            "new.pooler.dense.bias": (WIDTH,),
            "classifier.weight": (1, WIDTH),
            "classifier.bias": (1,),
        }
    )
    changes = {"architectures": ["NewForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    write(tmp_path, {**GTE_CONFIG, **changes, "vocab_size": len(tokenizer)}, tensors, tokenizer)
    query, documents = "a query", ["", "near vectors", "Berlin is the capital of Germany."]
    body = {name: tensor for name, tensor in tensors.items() if "pooler" not in name and "classifier" not in name}
    theirs = []
    for document in documents:
        first = gte_states(
            body,
            Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(query, document).ids,
            gte_frequencies(20000, 8.0),
        )[0]
        theirs.append(linear(tensors, "classifier", linear(tensors, "new.pooler.dense", first).tanh()).item())
    encoder = load(tmp_path, "torch").encoder
    row = at_once(encoder.read_query(query))
    tokens = at_once(encoder.tokenizer.read_pairs(row, documents, Truncate.END))

    scores = [encoded.dense[0, 0] for encoded in encoder.encode([Item(one, None) for one in tokens])]

    np.testing.assert_allclose(scores, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"layer_norm_type": "rms_norm"}, "with layer_norm_type 'rms_norm' is not supported"),
        ({"logn_attention_scale": True}, "with logn_attention_scale True is not supported"),
        ({"pack_qkv": False, "position_embedding_type": "absolute"}, "with pack_qkv False, position_embedding_type"),
        ({"rope_theta": "large"}, "rope_theta must be a number, got 'large'"),
        ({"rope_scaling": "ntk"}, "rope_scaling must be an object, got 'ntk'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling {'type': 'dynamic', 'factor': 2.0} is"),
        ({"rope_scaling": {"type": "ntk", "factor": 0.5}}, "with a factor of at least 1"),
        ({"rope_scaling": {"type": "ntk", "factor": True}}, "with a factor of at least 1"),
        ({"rope_scaling": {"type": "ntk"}}, "with a factor of at least 1"),
        ({"rope_scaling": {"type": "ntk", "factor": 8.0, "mixed_b": 0.6}}, "and no mixed_b"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 do not fit each other"),
        ({"hidden_size": "wide"}, "hidden_size 'wide' and"),
        ({"auto_map": {"AutoModel": "modeling.OtherModel"}}, "with the code of OtherModel is not supported"),
        ({"auto_map": {"AutoTokenizer": "own.Tokenizer"}}, "its tokenizer has its own code (Tokenizer, in auto_map)"),
    ],
)
def test_another_model_of_the_same_type_is_refused(
    changes: Mapping[str, object], what: str, multilingual: Path, copy: Copy, edit_json: EditJson
) -> None:
    folder = copy(multilingual)
    edit_json(folder / "config.json", **changes)

    with pytest.raises(LoadError, match=re.escape(what)):
        plan_load(entry(folder))


def test_a_factor_of_one_scales_nothing(
    multilingual: Path, copy: Copy, edit_json: EditJson, load: Load, cosines: Cosines
) -> None:
    folder = copy(multilingual)
    edit_json(folder / "config.json", rope_scaling={"rope_type": "ntk", "factor": 1})
    theirs = normalized([states(folder, LONG * 6, plain_frequencies(20000))[0]])

    assert cosines(load(folder, "torch").vectors([LONG * 6]), theirs).min() > 0.99999


def test_a_layer_that_is_missing_is_noticed(multilingual: Path, copy: Copy, load: Load) -> None:
    folder = copy(multilingual)
    tensors = load_file(folder / "model.safetensors")
    del tensors["new.encoder.layer.1.mlp.up_gate_proj.weight"]
    write(folder, {**GTE_CONFIG, "vocab_size": len(unigram_tokenizer())}, tensors, None)

    with pytest.raises(LoadError, match="missing"):
        load(folder, "torch")

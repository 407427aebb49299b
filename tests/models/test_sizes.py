"""Sizes in ``config.json`` are those of the weights, under any name that the publisher uses."""

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
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig

from gateway.engine.loading import plan_load
from gateway.errors import LoadError
from tests.models.checkpoints import FAMILIES, SIZES, TEXTS
from tests.models.family_layouts import PUBLISHED
from tests.models.plain import entry

Copy = Callable[[Path], Path]
Cosines = Callable[[np.ndarray, np.ndarray], np.ndarray]
EditJson = Callable[..., None]
Load = Callable[..., Any]
MakeFamily = Callable[..., Path]
MakePlain = Callable[..., Path]


# ------------------------------------------------------------ sizes


# ALBERT repeats one layer: its weights do not show how often.
LAYERED = [model_type for model_type in FAMILIES if model_type != "albert"]


@pytest.mark.parametrize("model_type", LAYERED)
@pytest.mark.parametrize("is_pickled", [False, True])
def test_a_number_of_layers_that_the_weights_do_not_have_is_refused_before_anything_is_built(
    model_type: str, is_pickled: bool, make_plain: MakePlain, edit_json: EditJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_plain(model_type)
    name = {"distilbert": "n_layers", "t5": "num_layers"}.get(model_type, "num_hidden_layers")
    if is_pickled:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    plan_load(entry(folder))
    monkeypatch.setattr(AutoConfig, "from_pretrained", None)  # a configuration of a million layers takes minutes

    for num in (1_000_000, 4, 2):
        edit_json(folder / "config.json", **{name: num})
        with pytest.raises(
            LoadError, match=f"{name} is {num}, but the weights hold {SIZES['num_hidden_layers']} layers"
        ):
            plan_load(entry(folder))


@pytest.mark.parametrize("model_type", LAYERED)
def test_a_default_number_of_layers_is_compared_with_the_weights_too(model_type: str, make_plain: MakePlain) -> None:
    folder = make_plain(model_type)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(
            {
                key: value
                for key, value in config.items()
                if key not in ("n_layers", "num_layers", "num_hidden_layers", "layer_types")
            }
        )
    )

    with pytest.raises(LoadError, match=r"num_hidden_layers is \d+, but the weights hold 3 layers"):
        plan_load(entry(folder))


# Sizes of tables that not every architecture has, with a part of the table's name and those that have none.
NO_TABLES = {"modernbert", "qwen3"} | (set(PUBLISHED) - {"albert"})
TABLES = {
    "max_position_embeddings": ("position_embeddings.weight", {"nomic_bert", "gte"} | NO_TABLES),
    "type_vocab_size": ("token_type_embeddings.weight", {"mpnet", "distilbert"} | NO_TABLES),
}
NAMES = {
    "distilbert": {"hidden_size": "dim", "intermediate_size": "hidden_dim"},
    "t5": {"hidden_size": "d_model", "intermediate_size": "d_ff"},
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_tables_of_an_architecture_are_those_that_are_tested(model_type: str, make_plain: MakePlain) -> None:
    tensors = load_file(make_plain(model_type) / "model.safetensors")

    for part, without in TABLES.values():
        assert any(part in name for name in tensors) == (model_type not in without)


@pytest.mark.parametrize(
    ("model_type", "size"),
    [
        (model_type, size)
        for model_type in FAMILIES
        for size in ("vocab_size", "hidden_size", "intermediate_size", *TABLES)
        if size not in TABLES or model_type not in TABLES[size][1]
    ],
)
@pytest.mark.parametrize("factor", [2, 10**9])
def test_sizes_that_the_weights_do_not_bear_out_are_refused(
    model_type: str, size: str, factor: int, make_plain: MakePlain, edit_json: EditJson
) -> None:
    folder = make_plain(model_type)
    size = NAMES.get(model_type, {}).get(size, size)
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", **{size: config[size] * factor})

    with pytest.raises(
        LoadError, match=r"is \d+, but the weights do not belong to this configuration: .* has the shape"
    ):
        plan_load(entry(folder))


@pytest.mark.parametrize("pad_token_id", [0, 1, 3])
@pytest.mark.parametrize("runtime", ["torch", "packed"])
def test_positions_are_counted_from_behind_any_padding_id(
    pad_token_id: int, runtime: str, make_plain: MakePlain, load: Load, cosines: Cosines
) -> None:
    folder = make_plain("roberta", pad_token_id=pad_token_id, max_position_embeddings=50)
    plan = plan_load(entry(folder))
    assert plan.max_tokens == plan.checkpoint.position_limit == 50 - pad_token_id - 1
    theirs = SentenceTransformer(str(folder), device="cpu")
    theirs.max_seq_length = plan.max_tokens

    assert cosines(load(folder, runtime).vectors(TEXTS), theirs.encode(list(TEXTS))).min() > 0.99999


# ------------------------------------------------------------ Nomic's published names


def publish_nomic(folder: Path, **changes: object) -> None:
    """Write the configuration of a Nomic model as its publisher does."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    names = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "n_inner",
        "layer_norm_eps": "layer_norm_epsilon",
    }
    kept = ("architectures", "model_type", "vocab_size", "type_vocab_size", "pad_token_id")
    published = {
        **{key: config[key] for key in kept},
        **{new: config[old] for old, new in names.items()},
        "activation_function": "swiglu",
        "auto_map": {"AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel"},
        "causal": False,
        "n_positions": 8192,
        "prenorm": False,
        "qkv_proj_bias": False,
        "rotary_emb_base": config["rope_parameters"]["rope_theta"],
        "rotary_emb_fraction": 1.0,
        "rotary_scaling_factor": None,
        **changes,
    }
    path.write_text(json.dumps(published))


def test_nomics_published_names_are_read_and_its_length_is_the_publishers(
    make_family: MakeFamily, copy: Copy, edit_json: EditJson, load: Load, cosines: Cosines
) -> None:
    folder = copy(make_family("nomic_bert"))
    texts = [*TEXTS, "near vectors mean near texts " * 500]
    edit_json(folder / "config.json", max_position_embeddings=8192)
    edit_json(folder / "tokenizer_config.json", model_max_length=8192)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts, normalize_embeddings=True)
    publish_nomic(folder)

    plan = plan_load(entry(folder))
    vectors = load(folder, "torch").vectors(texts)

    assert plan.max_tokens == 8192
    assert cosines(vectors, theirs).min() > 0.99999


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_experts": 0, "moe_every_n_layers": 2}, "moe_every_n_layers 2"),
        ({"rotary_emb_fraction": 0.5}, "rotary_emb_fraction 0.5"),
        ({"rotary_scaling_factor": 2}, "rotary_scaling_factor 2"),
        ({"activation_function": "gelu"}, "activation_function 'gelu'"),
        ({"prenorm": True}, "prenorm True"),
    ],
)
def test_another_model_under_nomics_names_is_refused(
    changes: Mapping[str, object], what: str, make_family: MakeFamily, copy: Copy
) -> None:
    folder = copy(make_family("nomic_bert"))
    publish_nomic(folder, **changes)

    with pytest.raises(LoadError, match=re.escape(f"nomic_bert with {what}")):
        plan_load(entry(folder))


def test_sizes_in_nomics_names_are_compared_with_the_weights(make_family: MakeFamily, copy: Copy) -> None:
    folder = copy(make_family("nomic_bert"))
    publish_nomic(folder, n_layer=12)

    with pytest.raises(LoadError, match="n_layer is 12, but the weights hold 3 layers"):
        plan_load(entry(folder))

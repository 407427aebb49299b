"""Nomic's mixture of experts, as published, gives the numbers of its publisher's formulas; variants are refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gateway.engine.loading import plan_load
from gateway.errors import LoadError
from tests.models.checkpoints import TEXTS, unigram_tokenizer
from tests.models.plain import entry
from tests.models.published import (
    MOE_CONFIG,
    WIDTH,
    moe_states,
    moe_tensors,
    normalized,
    token_ids,
    write,
    write_modules,
)

Copy = Callable[[Path], Path]
Cosines = Callable[[np.ndarray, np.ndarray], np.ndarray]
EditJson = Callable[..., None]
Load = Callable[..., Any]

PROMPTS = {"query": "search_query: ", "passage": "search_document: "}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a nomic-embed-text-v2-moe."""
    folder = tmp_path_factory.mktemp("nomic-moe")
    tokenizer = unigram_tokenizer()
    write(folder, {**MOE_CONFIG, "vocab_size": len(tokenizer)}, moe_tensors(len(tokenizer)), tokenizer)
    write_modules(folder, "mean", prompts=PROMPTS)
    return folder


def states(folder: Path, text: str) -> torch.Tensor:
    return moe_states(load_file(folder / "model.safetensors"), token_ids(folder, text))


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
@pytest.mark.parametrize("task", [None, "retrieval.query"])
def test_vectors_are_the_publishers(task: str | None, runtime: str, moe: Path, load: Load, cosines: Cosines) -> None:
    prompt = "" if task is None else PROMPTS["query"]
    theirs = normalized([states(moe, prompt + text).mean(0) for text in TEXTS])
    model = load(moe, runtime)

    assert cosines(model.vectors(TEXTS, [task] * len(TEXTS)), theirs).min() > 0.99999
    assert cosines(model.alone(TEXTS[:4], [task] * 4), theirs[:4]).min() > 0.99999


def test_it_has_the_publishers_description(moe: Path) -> None:
    plan = plan_load(entry(moe))

    assert (plan.info.width, plan.info.max_tokens, plan.checkpoint.position_limit) == (WIDTH, 64, 2048)
    assert dict(plan.tasks) == {"retrieval.query": "search_query: ", "retrieval.passage": "search_document: "}


def test_each_expert_is_chosen_by_some_token(moe: Path) -> None:
    """Otherwise the comparison would prove nothing of some of them: each changes the states."""
    tensors = load_file(moe / "model.safetensors")
    ids = token_ids(moe, " ".join(TEXTS))
    before = moe_states(tensors, ids)
    w1 = tensors["encoder.layers.1.mlp.experts.mlp.w1"]

    for rows in w1.chunk(MOE_CONFIG["num_experts"]):
        kept = rows.clone()
        rows.zero_()
        assert (moe_states(tensors, ids) - before).abs().max() > 0.01
        rows.copy_(kept)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"activation_function": "swiglu"}, "nomic_bert with activation_function 'swiglu' is not supported"),
        ({"moe_normalize_expert_weights": True}, "nomic_bert with moe_normalize_expert_weights True is not supported"),
        ({"num_shared_experts": 1, "qkv_proj_bias": False}, "with num_shared_experts 1, qkv_proj_bias False is not"),
        ({"rotary_scaling_factor": 2}, "nomic_bert with rotary_scaling_factor 2 is not supported"),
        ({"moe_top_k": 5}, "the second at most the first, and the last at least 2; got 4, 5, 2"),
        ({"moe_top_k": None}, "must be integers"),
        ({"num_experts": "many"}, "must be integers"),
        ({"num_experts": True}, "must be integers"),
        ({"moe_every_n_layers": 1}, "the last at least 2; got 4, 2, 1"),
    ],
)
def test_another_mixture_is_refused(
    changes: Mapping[str, object], what: str, moe: Path, copy: Copy, edit_json: EditJson
) -> None:
    folder = copy(moe)
    edit_json(folder / "config.json", **changes)

    with pytest.raises(LoadError, match=re.escape(what)):
        plan_load(entry(folder))


def test_other_layers_than_the_configuration_says_are_noticed(
    moe: Path, copy: Copy, edit_json: EditJson, load: Load
) -> None:
    folder = copy(moe)
    edit_json(folder / "config.json", num_experts=2)

    with pytest.raises(LoadError, match="the weights cannot be loaded"):
        load(folder, "torch")

"""voyage-4-nano as published: Qwen3 whose tokens read both ways, and whose states are widened before the pooling."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch.nn import functional
from transformers import Qwen3Config, Qwen3Model

from gateway.engine.loading import plan_load
from gateway.errors import LoadError
from gateway.types import Output
from tests.models.checkpoints import TEXTS, bpe_tokenizer, make_transformer
from tests.models.plain import entry
from tests.models.published import random_tensors, token_ids, write_modules

Cosines = Callable[[np.ndarray, np.ndarray], np.ndarray]
Copy = Callable[[Path], Path]
EditJson = Callable[..., None]
Load = Callable[..., Any]
States = Callable[[str], torch.Tensor]

HIDDEN, WIDE = 64, 96
PROMPTS = {
    "query": "Represent the query for retrieving supporting documents: ",
    "document": "Represent the document for retrieval: ",
}
SOME_TEXTS = [text for text in TEXTS if text]


@pytest.fixture(scope="module")
def voyage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a voyage-4-nano. Its tokenizer adds nothing to a text, and its configuration names the class without code."""
    folder = tmp_path_factory.mktemp("voyage")
    tokenizer = bpe_tokenizer(None, "<|endoftext|>", "<|pad|>")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    make_transformer(folder, "qwen3", tokenizer, num_key_value_heads=2, head_dim=16)
    tensors = {f"model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors |= random_tensors({"linear.weight": (WIDE, HIDDEN)})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    published = {
        **{key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")},
        "architectures": ["Qwen3ForCausalLM"],
        "auto_map": {"AutoModel": "modeling_qwen3_bidirectional.Qwen3BidirectionalModel"},
        "max_position_embeddings": 64,
        "num_labels": WIDE,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_bidirectional_attention": True,
        "use_sliding_window": False,
    }
    (folder / "config.json").write_text(json.dumps(published))
    write_modules(folder, "mean", width=WIDE, prompts=PROMPTS)
    return folder


@pytest.fixture(scope="module")
def states(voyage: Path) -> States:
    """Return the function that computes the token states of one text as the published code does: with its own mask."""
    config = json.loads((voyage / "config.json").read_text())
    tensors = load_file(voyage / "model.safetensors")
    model = Qwen3Model(Qwen3Config.from_dict({key: value for key, value in config.items() if key != "auto_map"})).eval()
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items() if "model." in name})

    @torch.inference_mode()
    def states(text: str) -> torch.Tensor:
        ids = torch.tensor([token_ids(voyage, text)])
        nothing_hidden = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
        read = model(input_ids=ids, attention_mask={"full_attention": nothing_hidden}).last_hidden_state[0]
        return functional.linear(read, tensors["linear.weight"])

    return states


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
@pytest.mark.parametrize("task", [None, "retrieval.query", "retrieval.passage"])
def test_vectors_are_the_publishers(
    task: str | None, runtime: str, voyage: Path, load: Load, states: States, cosines: Cosines
) -> None:
    prompt = {None: "", "retrieval.query": PROMPTS["query"], "retrieval.passage": PROMPTS["document"]}[task]
    theirs = functional.normalize(torch.stack([states(prompt + text).mean(0) for text in SOME_TEXTS]), dim=-1).numpy()
    model, tasks = load(voyage, runtime), [task] * len(SOME_TEXTS)

    assert cosines(model.vectors(SOME_TEXTS, tasks), theirs).min() > 0.99999
    assert cosines(model.alone(SOME_TEXTS[:3], tasks[:3]), theirs[:3]).min() > 0.99999


def test_each_text_reads_both_ways(states: States) -> None:
    """Otherwise the test above would prove nothing: the first token's state depends on the last one."""
    assert not torch.allclose(states("near vectors mean near texts")[0], states("near vectors mean near")[0], atol=0.1)


def test_states_are_those_that_are_pooled(voyage: Path, load: Load, states: States) -> None:
    [encoded] = load(voyage, "torch").encode(["near vectors"], outputs=[[Output.STATES]])

    assert encoded.states is not None
    np.testing.assert_allclose(encoded.states, states("near vectors").numpy(), atol=1e-3)


def test_the_width_is_the_layers(voyage: Path) -> None:
    plan = plan_load(entry(voyage, dimensions=(WIDE, 32)))

    assert (plan.info.width, plan.dimensions, plan.info.is_normalized) == (WIDE, (WIDE, 32), True)
    assert dict(plan.tasks) == {"retrieval.query": PROMPTS["query"], "retrieval.passage": PROMPTS["document"]}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"num_labels": None},
            "num_labels, the width of Qwen3BidirectionalModel's vectors, must be a positive integer",
        ),
        ({"num_labels": True}, "must be a positive integer, got True"),
        (
            {"num_labels": 2 * WIDE},
            f"linear.weight has the shape [{WIDE}, {HIDDEN}], its configuration says [{2 * WIDE}",
        ),
        ({"use_sliding_window": True}, "with use_sliding_window True is not supported"),
        ({"auto_map": {"AutoModel": "own.OtherModel"}}, "it has its own code (OtherModel, in auto_map)"),
    ],
)
def test_another_model_is_refused(
    changes: Mapping[str, object], what: str, voyage: Path, copy: Copy, edit_json: EditJson, load: Load
) -> None:
    folder = copy(voyage)
    edit_json(folder / "config.json", **changes)

    with pytest.raises(LoadError, match=re.escape(what)):
        load(folder, "torch")


def test_a_checkpoint_without_the_layer_is_refused(voyage: Path, copy: Copy, load: Load) -> None:
    folder = copy(voyage)
    tensors = load_file(folder / "model.safetensors")
    del tensors["linear.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(LoadError, match=r"linear\.weight is missing, its configuration says \[96, 64\]"):
        load(folder, "torch")

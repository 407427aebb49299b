"""Jina v5 as published: a base and LoRA adapters. Each task gives the vectors of PEFT and the publisher's rules."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModel

from gateway.engine.checkpoint.read import read_checkpoint
from gateway.engine.devices import CpuThreads
from gateway.engine.loading import plan_load
from gateway.engine.model.build import build_encoders
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.items import Item
from gateway.errors import LoadError
from gateway.types import Truncate
from tests.models.checkpoints import TEXTS, bpe_tokenizer, make_transformer, save_adapters
from tests.models.plain import entry
from tests.models.published import token_ids

Copy = Callable[[Path], Path]
Cosines = Callable[[np.ndarray, np.ndarray], np.ndarray]
EditJson = Callable[..., None]
Reference = Callable[[str, str], np.ndarray]

# For each task: the adapter, and the publisher's prefix of a text.
TASKS = {
    "retrieval.query": ("retrieval", "Query: "),
    "retrieval.passage": ("retrieval", "Document: "),
    "text-matching": ("text-matching", "Document: "),
    "separation": ("clustering", "Document: "),
    "classification": ("classification", "Document: "),
}
ADAPTERS = ("retrieval", "text-matching", "clustering", "classification")
MIXED = [(text, list(TASKS)[i % 5]) for i, text in enumerate((*TEXTS, *TEXTS[2:6]))]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def publish(folder: Path, model_type: str, **changes: object) -> None:
    """Write a checkpoint as Jina does: its type, its module of sentence-transformers, and the adapters in a folder below."""
    make_transformer(folder, model_type, bpe_tokenizer(None, "<|endoftext|>", "<|pad|>"), **changes)
    save_adapters(folder, ADAPTERS, target_modules=list(PROJECTIONS), lora_alpha=4, init_lora_weights="gaussian")
    for name in ADAPTERS:
        shutil.move(folder / name, folder / "adapters" / name)
    config = json.loads((folder / "config.json").read_text())
    own = {
        "architectures": ["JinaEmbeddingsV5Model"],
        "auto_map": {
            "AutoConfig": "configuration_jina_embeddings_v5.JinaEmbeddingsV5Config",
            "AutoModel": "modeling_jina_embeddings_v5.JinaEmbeddingsV5Model",
        },
        "model_type": "jina_embeddings_v5",
        "task_names": list(ADAPTERS),
    }
    (folder / "config.json").write_text(json.dumps({**config, **own}))
    module = {"idx": 0, "name": "transformer", "path": "", "type": "custom_st.Transformer"}
    (folder / "modules.json").write_text(json.dumps([{**module, "kwargs": ["task", "truncate_dim"]}]))
    prompts = {"query": "Query: ", "document": "Document: "}
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": prompts, "default_prompt_name": "document", "similarity_fn_name": "cosine"})
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a jina-embeddings-v5-text-small."""
    folder = tmp_path_factory.mktemp("jina-v5-small")
    publish(folder, "qwen3", num_key_value_heads=2, head_dim=16, max_position_embeddings=64)
    return folder


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a jina-embeddings-v5-text-nano, whose tokenizer has the class that Jina's file names."""
    folder = tmp_path_factory.mktemp("jina-v5-nano")
    publish(folder, "eurobert", num_key_value_heads=4, max_position_embeddings=64)
    for name, changes in {
        "config.json": {"is_decoder": False},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizer", "model_max_length": 10**30},
    }.items():
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))
    return folder


def reference(folder: Path, model_type: str, base: Path) -> Reference:
    """Return the function that embeds a text for a task as the published code does: PEFT, the last token, normalized.

    Args:
        base: an empty folder for the checkpoint without adapters.
    """
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("auto_map", "task_names", "architectures")}
    (base / "config.json").write_text(json.dumps({**kept, "model_type": model_type}))
    shutil.copy(folder / "model.safetensors", base)
    first, *others = ADAPTERS
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder / "adapters" / first, adapter_name=first)
    for name in others:
        model.load_adapter(folder / "adapters" / name, adapter_name=name)
    model.eval()

    @torch.inference_mode()
    def vector(text: str, task: str) -> np.ndarray:
        adapter, instruction = TASKS[task]
        model.set_adapter(adapter)
        ids = torch.tensor([token_ids(folder, instruction + text)])
        last = model(input_ids=ids).last_hidden_state[0, -1]
        return functional.normalize(last, dim=0).numpy()

    return vector


@pytest.fixture(scope="module")
def theirs(small: Path, nano: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Compute the vectors of :data:`MIXED` for each base."""
    bases = {"small": (small, "qwen3"), "nano": (nano, "eurobert")}
    vectors = {}
    for name, (folder, model_type) in bases.items():
        embed_one = reference(folder, model_type, tmp_path_factory.mktemp("base"))
        vectors[name] = np.stack([embed_one(text, task) for text, task in MIXED])
    return vectors


def build(folder: Path, runtime: str) -> Encoder:
    plan = plan_load(entry(folder, runtime=runtime, default_task="text-matching"))
    return build_encoders(plan.checkpoint, plan.build_options("cpu", CpuThreads(1, 1)))[0]


def embed(encoder: Encoder, texts: list[tuple[str, str]]) -> np.ndarray:
    items = [Item(encoder.tokenize([text], task, Truncate.END)[0], task) for text, task in texts]
    return np.concatenate([encoded.dense for encoded in encoder.encode(items)])


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
@pytest.mark.parametrize("name", ["small", "nano"])
def test_each_task_is_the_publishers_mixed_in_a_batch_and_alone(
    name: str, runtime: str, theirs: Mapping[str, np.ndarray], cosines: Cosines, request: pytest.FixtureRequest
) -> None:
    encoder = build(request.getfixturevalue(name), runtime)

    assert cosines(embed(encoder, MIXED), theirs[name]).min() > 0.99999
    alone = np.concatenate([embed(encoder, [one]) for one in MIXED[:5]])
    assert cosines(alone, theirs[name][:5]).min() > 0.99999


@pytest.mark.parametrize(("name", "model_type"), [("small", "qwen3"), ("nano", "eurobert")])
def test_adapters_differ_by_far_more_than_the_tolerance(
    name: str, model_type: str, tmp_path: Path, cosines: Cosines, request: pytest.FixtureRequest
) -> None:
    """Otherwise the test above would prove nothing."""
    embed_one = reference(request.getfixturevalue(name), model_type, tmp_path)
    vectors = np.stack([embed_one("near vectors", task) for task in TASKS if task != "retrieval.query"])

    for shift in range(1, 4):
        assert cosines(vectors, np.roll(vectors, shift, axis=0)).max() < 0.99


def test_the_description_is_the_publishers(small: Path) -> None:
    plan = plan_load(entry(small, default_task="clustering", dimensions=(64, 32)))

    info = plan.info
    assert dict(info.tasks) == {task: instruction for task, (_adapter, instruction) in TASKS.items()}
    assert (info.pooling, info.is_normalized, info.max_tokens) == ("lasttoken", True, 64)
    assert (info.default_task, info.width, info.dimensions) == ("separation", 64, (64, 32))
    assert [path.name for path in plan.checkpoint.adapter_folders] == list(ADAPTERS)
    assert info.space("retrieval.query") == info.space("retrieval.passage") != info.space("text-matching")


def test_without_a_default_task_it_is_refused(small: Path) -> None:
    with pytest.raises(LoadError, match="default_task must be set: Jina v5 has no vectors without a task"):
        plan_load(entry(small))


def test_instructions_of_the_code_apply_where_the_files_have_none(small: Path, copy: Copy) -> None:
    folder = copy(small)
    (folder / "config_sentence_transformers.json").unlink()
    (folder / "modules.json").unlink()

    assert dict(read_checkpoint(folder).prompts) == dict(read_checkpoint(small).prompts)


def test_an_instruction_of_the_files_is_taken(small: Path, copy: Copy, edit_json: EditJson) -> None:
    folder = copy(small)
    edit_json(folder / "config_sentence_transformers.json", prompts={"query": "Q: ", "document": "D: "})

    prompts = read_checkpoint(folder).prompts

    assert (prompts["retrieval.query"], prompts["separation"]) == ("Q: ", "D: ")


@pytest.mark.parametrize("names", [None, [], "retrieval", [1]])
def test_task_names_that_make_no_sense_are_refused(names: object, small: Path, copy: Copy, edit_json: EditJson) -> None:
    folder = copy(small)
    edit_json(folder / "config.json", task_names=names)

    with pytest.raises(LoadError, match=re.escape("task_names must be a list of the adapters' names")):
        read_checkpoint(folder)


def test_an_adapter_that_is_missing_is_named(small: Path, copy: Copy) -> None:
    folder = copy(small)
    shutil.rmtree(folder / "adapters" / "clustering")

    with pytest.raises(LoadError, match=r"config\.json names the task 'clustering'"):
        read_checkpoint(folder)


def test_further_modules_are_refused(small: Path, copy: Copy) -> None:
    folder = copy(small)
    rows = json.loads((folder / "modules.json").read_text())
    pooling = {"idx": 1, "name": "pooling", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    (folder / "modules.json").write_text(json.dumps([*rows, pooling]))

    with pytest.raises(LoadError, match="lists more than the Transformer"):
        read_checkpoint(folder)


def test_weights_of_another_base_are_refused(small: Path, copy: Copy) -> None:
    """What tells the bases apart is one word of the configuration."""
    folder = copy(small)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "q_norm" not in name and "k_norm" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(LoadError, match=r"missing .*_norm"):
        build(folder, "torch")

"""Errors describe a folder without a model: adapters, pointers, other forms of weights, incomplete files."""

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

from gateway.engine.loading import plan_load
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.items import Encoded
from gateway.errors import LoadError
from tests.models.checkpoints import TEXTS
from tests.models.plain import entry, load_whole, save_modules

Copy = Callable[[Path], Path]
EditJson = Callable[..., None]
Load = Callable[..., Any]
MakeFamily = Callable[..., Path]
MakePlain = Callable[..., Path]


@pytest.fixture
def dense(make_family: MakeFamily, copy: Copy) -> Path:
    return copy(make_family("distilbert"))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 133466304\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "2_Dense/model.safetensors"])
def test_a_git_lfs_pointer_is_named(name: str, dense: Path) -> None:
    (dense / name).write_bytes(LFS)

    with pytest.raises(LoadError, match=rf"{re.escape(name)}: a Git LFS pointer instead of the file"):
        plan_load(entry(dense))


JINA_V3 = {
    "architectures": ["XLMRobertaModel"],
    "auto_map": {
        "AutoConfig": "jinaai/xlm-roberta-flash-implementation--configuration_xlm_roberta.XLMRobertaFlashConfig",
        "AutoModel": "jinaai/xlm-roberta-flash-implementation--modeling_lora.XLMRobertaLoRA",
    },
    "hidden_act": "gelu",
    "lora_adaptations": ["retrieval.query", "retrieval.passage"],
    "position_embedding_type": "rotary",
}


def only(folder: Path, **files: str) -> Path:
    """Make a folder with nothing but these files."""
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (
            {"adapter_config_dot_json": '{"base_model_name_or_path": "org/base"}'},
            "contains a PEFT adapter .* of org/base: merge it",
        ),
        (
            {"adapter_config_dot_json": "{}", "config_dot_json": "{}"},
            "contains a PEFT adapter .* of a model that it does not name",
        ),
        (
            {"model-Q4_K_M_dot_gguf": "GGUF"},
            "config.json: no such file.* GGUF, llama.cpp's form of a model is not supported",
        ),
        ({"onnx__model_dot_onnx": ""}, "It holds onnx/model.onnx: ONNX is not supported"),
        (
            {"config_dot_json": '{"model_type": "bert"}', "model_dot_onnx": ""},
            "no weights: .* It holds model.onnx: ONNX is not",
        ),
        (
            {"config_dot_json": '{"model_type": "bert"}', "openvino__openvino_model_dot_xml": ""},
            "no weights: .*OpenVINO's form",
        ),
        (
            {"config_dot_json": '{"model_type": "bert"}', "tf_model_dot_h5": ""},
            "no weights: .* TensorFlow's form of a model",
        ),
        (
            {"config_dot_json": '{"model_type": "bert"}', "pt__model_dot_safetensors": ""},
            "no weights: .* There is one in pt/",
        ),
        ({"0_Transformer__config_dot_json": "{}"}, "config.json: no such file.* There is one in 0_Transformer/"),
        ({"snapshots__abc__config_dot_json": "{}"}, "entry of the hub's cache: take .*/snapshots/abc"),
        ({"README_dot_md": ""}, "config.json: no such file; is this a checkpoint folder\\?$"),
        (
            {"config_dot_json": json.dumps(JINA_V3)},
            "lora_adaptations .*not supported. Jina v3 is supported as jinaai/jina-embeddings-v3-hf, the same model",
        ),
        ({"config_dot_json": '{"model_type": 5}'}, "model_type must be a string, got 5"),
        ({"config_dot_json": "[1]"}, "must hold a JSON object, got list"),
        ({"config_dot_json": '{"a":' * 100_000}, "config.json: not readable as JSON"),
    ],
)
def test_files_instead_of_a_model_are_named(files: dict[str, str], reason: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=reason):
        plan_load(entry(only(tmp_path / "model", **files)))


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_a_missing_part_of_the_weights_is_named(form: str, make_plain: MakePlain, load: Load) -> None:
    folder = make_plain("bert")
    tensors = load_file(folder / "model.safetensors")
    before = load(folder, "torch").vectors(TEXTS)
    (folder / "model.safetensors").unlink()
    stem, _, ending = form.partition(".")
    parts = {f"{stem}-{i}-of-2.{ending}": dict(sorted(tensors.items())[i - 1 :: 2]) for i in (1, 2)}
    for name, part in parts.items():
        if ending == "bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {tensor: name for name, part in parts.items() for tensor in part}}
    (folder / f"{form}.index.json").write_text(json.dumps(index))
    load.cache_clear()
    np.testing.assert_array_equal(load(folder, "torch").vectors(TEXTS), before)
    last = [*parts][1]
    (folder / last).unlink()

    with pytest.raises(LoadError, match=re.escape(f"lists 2 files with weights, but 1 are missing: {last}")):
        plan_load(entry(folder))


@pytest.mark.parametrize("num_bytes", [0, 100, -100])
@pytest.mark.parametrize("is_zip", [True, False])
def test_pickled_weights_that_were_cut_short_are_refused(num_bytes: int, is_zip: bool, make_plain: MakePlain) -> None:
    folder = make_plain("bert")
    path = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), path, _use_new_zipfile_serialization=is_zip)
    (folder / "model.safetensors").unlink()
    load_whole(folder)
    path.write_bytes(path.read_bytes()[:num_bytes])

    with pytest.raises(LoadError, match=r"pytorch_model\.bin: (corrupt or cut short|the weights cannot be loaded): "):
        load_whole(folder)


def test_weights_that_transformers_would_not_read_are_not_taken_for_the_models(make_plain: MakePlain) -> None:
    folder = make_plain("bert")
    before = plan_load(entry(folder)).checkpoint.fingerprint
    save_file({"other": torch.ones(3)}, folder / "consolidated.safetensors")
    assert plan_load(entry(folder)).checkpoint.fingerprint == before
    (folder / "model.safetensors").unlink()

    with pytest.raises(LoadError, match=r"no weights: neither model\.safetensors"):
        plan_load(entry(folder))


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors", "of a later release"])
def test_quantized_weights_are_named(method: str, make_plain: MakePlain, edit_json: EditJson) -> None:
    """transformers asks for a package, or ignores unknown methods."""
    folder = make_plain("qwen3")
    save_modules(folder, pooling="lasttoken")
    edit_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})

    with pytest.raises(LoadError, match=rf"quantized weights \(quantization_config, {method}\) are not supported"):
        plan_load(entry(folder))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("is_pickled", [False, True])
def test_weights_without_their_scales_are_refused(dtype: torch.dtype, is_pickled: bool, make_plain: MakePlain) -> None:
    folder = make_plain("bert")
    path = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) if "dense.weight" in name else tensor for name, tensor in load_file(path).items()}
    if is_pickled:
        path.unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, path)

    with pytest.raises(LoadError, match=r"dense\.weight is quantized \(.*8.*\), which is not supported"):
        plan_load(entry(folder))


@pytest.mark.parametrize(
    "how",
    [
        {"return_dict": False},
        {"chunk_size_feed_forward": 7},
        {"_attn_implementation": "flash_attention_2"},
        {"output_attentions": True},
        {"torchscript": True},
    ],
)
def test_how_a_model_was_run_by_its_trainer_does_not_matter(
    how: dict[str, object], make_plain: MakePlain, edit_json: EditJson, load: Load
) -> None:
    folder = make_plain("bert")
    before = load(folder, "torch").vectors(TEXTS)
    edit_json(folder / "config.json", **how)
    load.cache_clear()  # type: ignore[attr-defined]

    np.testing.assert_array_equal(load(folder, "torch").vectors(TEXTS), before)


def test_a_model_of_zeros_is_refused(make_plain: MakePlain) -> None:
    folder = make_plain("bert")
    path = folder / "model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path)

    with pytest.raises(LoadError, match="the model returns vectors of zeros"):
        load_whole(folder)


def test_a_model_that_cannot_be_run_says_why(make_plain: MakePlain, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(self: Encoder, items: object) -> list[Encoded]:
        raise ValueError("the dimension to be chunked 7 has to be a multiple of 2")

    monkeypatch.setattr(Encoder, "encode", encode)

    with pytest.raises(LoadError, match="the model cannot be run: ValueError: the dimension to be chunked"):
        load_whole(make_plain("bert"))

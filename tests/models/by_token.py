"""Tiny sparse encoders and multi-vector models, in the layouts of their publishers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling
from transformers import PreTrainedTokenizerFast

from tests.models.checkpoints import FAMILIES, make_transformer
from tests.models.plain import make_plain

Make = Callable[..., Path]


def save(model: SparseEncoder, folder: Path) -> Path:
    model.save(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="session")
def make_masked_lm(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function that makes a masked language model without sentence-transformers' files."""

    @cache
    def make(model_type: str) -> Path:
        folder = make_plain(tmp_path_factory.mktemp(model_type) / "lm", model_type, "MaskedLM", num_hidden_layers=2)
        path = folder / "model.safetensors"
        torch.manual_seed(9)
        tensors = load_file(path)
        for name, tensor in tensors.items():  # biases are 0 at first, which would hide mistakes
            tensors[name] = tensor + torch.randn_like(tensor) * 0.3 if tensor.ndim == 1 else tensor
        save_file(tensors, path, {"format": "pt"})
        return folder

    return make


@pytest.fixture(scope="session")
def inference_free(make_masked_lm: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a sparse encoder whose queries have fixed weights."""
    document = Transformer(str(make_masked_lm("bert")), transformer_task="fill-mask")
    torch.manual_seed(2)
    weights = torch.rand(len(document.tokenizer)) * (torch.rand(len(document.tokenizer)) > 0.2)
    router = Router.for_query_document(
        query_modules=[SparseStaticEmbedding(document.tokenizer, weights, frozen=True)],
        document_modules=[document, SpladePooling("max", activation_function="log1p_relu")],
        default_route="query",
    )
    return save(SparseEncoder(modules=[router], device="cpu"), tmp_path_factory.mktemp("free") / "free")


def tokenizer_with_marks(model_type: str) -> PreTrainedTokenizerFast:
    """Return the architecture's tokenizer with a mask token, and what Stanford's and PyLate's checkpoints use as markers."""
    tokenizer = FAMILIES[model_type].tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.add_tokens(["[unused0]", "[unused1]", "[Q] ", "[D] "])
    return tokenizer


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function that makes a transformer, without sentence-transformers' files."""

    @cache
    def make(model_type: str) -> Path:
        folder = tmp_path_factory.mktemp(model_type) / "base"
        sizes = {**FAMILIES[model_type].changes, "num_hidden_layers": 2}
        if "layer_types" in sizes:
            sizes["layer_types"] = sizes["layer_types"][:2]  # type: ignore[index]
        make_transformer(folder, model_type, tokenizer_with_marks(model_type), **sizes)
        return folder

    return make


@pytest.fixture(scope="session")
def stanford(make_base: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a checkpoint as Stanford's ColBERT saves it: the projection among the weights, and its settings in a file."""
    folder = tmp_path_factory.mktemp("stanford") / "stanford"
    folder.mkdir()
    for path in make_base("bert").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", **{**config, "architectures": ["HF_ColBERT"]})
    weights = {f"bert.{name}": part for name, part in load_file(folder / "model.safetensors").items()}
    torch.manual_seed(8)
    save_file({**weights, "linear.weight": torch.randn(24, 64) * 0.3}, folder / "model.safetensors", {"format": "pt"})
    write(
        folder / "artifact.metadata",
        query_token_id="[unused0]",
        doc_token_id="[unused1]",
        query_maxlen=12,
        doc_maxlen=28,
        dim=24,
        mask_punctuation=True,
        attend_to_mask_tokens=False,
        similarity="cosine",
    )
    return folder


def write(path: Path, **content: object) -> None:
    path.write_text(json.dumps(content))

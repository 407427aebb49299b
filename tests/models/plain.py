"""Plain checkpoints of transformers' classes, and sentence-transformers' files around them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from gateway.config.registry import ModelEntry
from gateway.config.settings import Settings
from gateway.engine.loading import load_engine, plan_load
from tests.models.checkpoints import FAMILIES, MAX_TOKENS, SIZES, make_transformer

HEADS = {
    "SequenceClassification": AutoModelForSequenceClassification,
    "TokenClassification": AutoModelForTokenClassification,
    "QuestionAnswering": AutoModelForQuestionAnswering,
    "MaskedLM": AutoModelForMaskedLM,
    "CausalLM": AutoModelForCausalLM,
}


def entry(folder: Path, **changes: object) -> ModelEntry:
    fields = {"id": "tiny", "source": str(folder), "device": "cpu", "dtype": "float32", "enabled": True, **changes}
    return ModelEntry(**fields)


def assert_same_logits(found: np.ndarray, expected: np.ndarray) -> None:
    """Assert that two libraries computed the same numbers in float32.

    A logit has no bound, and float32 rounds in proportion: sums in another order differ from one processor to the next by
    some units in the sixth digit of the largest terms, which a limit for probabilities does not allow.
    """
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, 2 * float(np.abs(expected).max())))


def load_whole(folder: Path, **changes: object) -> None:
    load_engine(plan_load(entry(folder, **{"runtime": "torch", **changes})), Settings(cpu_threads=1))


def add_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), name: tensor}, path)


def save_modules(folder: Path, *, pooling: str = "mean", is_normalized: bool = True) -> None:
    """Let sentence-transformers write its files for a transformer, over its folder; the weights and configuration stay."""
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    modules = [Transformer(str(folder)), Pooling(64, pooling_mode=pooling)] + [Normalize()] * is_normalized
    SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    for name, content in kept.items():
        (folder / name).write_bytes(content)


def make_plain(folder: Path, model_type: str, head: str | None, **changes: object) -> Path:
    """Write a checkpoint of one of transformers' classes, without sentence-transformers' files."""
    family = FAMILIES[model_type]
    tokenizer = family.tokenizer()
    if head is None:
        make_transformer(folder, model_type, tokenizer, **{**family.changes, **changes})
        return folder
    torch.manual_seed(5)
    config = AutoConfig.for_model(
        model_type,
        **{
            **SIZES,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "max_position_embeddings": MAX_TOKENS + 2,
            **family.changes,
            **changes,
        },
    )
    HEADS[head].from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

"""The planned memory of texts fits a forward pass: it is not less, and not many times as much."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel, T5EncoderModel

from gateway.engine.checkpoint.sizes import Attention
from gateway.engine.memory import Shape, estimate_memory
from gateway.engine.model.runtimes.padded import PaddedRuntime
from tests.models.checkpoints import FAMILIES, SIZES

# One of each kind of attention: in one kernel both ways and one way, with windows, written out, with convolutions.
MODEL_TYPES = ["bert", "nomic_bert", "qwen3", "eurobert", "lfm2", "modernbert", "gemma3_text", "mistral"]
MODEL_TYPES += ["gemma2", "mpnet", "deberta-v2", "t5"]
LENGTHS = [(512,), (256, 200)]


def make_model(model_type: str, dtype: str, longest: int) -> PreTrainedModel:
    changes = {key: value for key, value in FAMILIES[model_type].changes.items() if key != "max_position_embeddings"}
    own = {
        "vocab_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    }
    if model_type != "t5":
        own["max_position_embeddings"] = longest + 2
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes, **own})
    model = T5EncoderModel(config) if model_type == "t5" else AutoModel.from_config(config, dtype=torch.float32)
    model.config.use_cache = False
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model.eval().requires_grad_(False).to(getattr(torch, dtype))


def measured_bytes(model: PreTrainedModel, lengths: Sequence[int]) -> int:
    """Return the peak memory of a forward, as torch's allocator reports it, including the buffers of kernels."""
    runtime = PaddedRuntime(model, None)
    features = runtime.prepare([[3 + i % 60 for i in range(length)] for length in lengths], [-1] * len(lengths))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.inference_mode(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        runtime.forward(features)
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def planned_bytes(model: PreTrainedModel, dtype: str, lengths: Sequence[int]) -> int:
    config = model.config
    shape = Shape(0, config.hidden_size, SIZES["intermediate_size"], Attention.of(config), config.model_type)
    return estimate_memory(shape, dtype, "torch", max(lengths), len(lengths) * max(lengths)).batch_bytes


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        *((name, "float32") for name in MODEL_TYPES),
        ("bert", "bfloat16"),
        ("nomic_bert", "bfloat16"),
        ("t5", "bfloat16"),
    ],
)
def test_a_forward_takes_the_planned_memory(model_type: str, dtype: str) -> None:
    model = make_model(model_type, dtype, max(map(max, LENGTHS)))

    for lengths in LENGTHS:
        taken, planned = measured_bytes(model, lengths), planned_bytes(model, dtype, lengths)

        assert taken > 100_000
        assert taken <= planned <= 4 * taken, (lengths, taken, planned)


# Published sizes: weights, width, feed-forward, heads, their width.
QWEN3_EMBEDDING = {
    "0.6B": Shape(596_000_000, 1024, 3072, Attention(16, 2048), "qwen3"),
    "8B": Shape(7_570_000_000, 4096, 12288, Attention(32, 4096), "qwen3"),
}


@pytest.mark.parametrize(
    ("name", "dtype", "runtime", "max_batch_tokens", "most"),
    [
        ("0.6B", "bfloat16", "torch", 2048, 3),
        ("0.6B", "bfloat16", "openvino", 2048, 9),
        ("0.6B", "float16", "torch", 16384, 4),
        ("8B", "float16", "torch", 16384, 24),
    ],
)
def test_qwen3_embedding_fits_at_its_published_length(
    name: str, dtype: str, runtime: str, max_batch_tokens: int, most: int
) -> None:
    plan = estimate_memory(QWEN3_EMBEDDING[name], dtype, runtime, 32_768, max_batch_tokens)

    assert most / 2 < plan.total_bytes / 2**30 < most

"""The memory that a model needs is known before it is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from gateway.engine import memory
from gateway.engine.checkpoint.read import Checkpoint, read_checkpoint
from gateway.engine.checkpoint.sizes import Attention
from gateway.engine.memory import (
    MemoryPlan,
    Shape,
    available_host_bytes,
    estimate_memory,
    format_bytes,
    plan_memory,
    require_memory,
)
from gateway.errors import LoadError


@pytest.fixture
def checkpoint(bundled_folder: Path) -> Checkpoint:
    return read_checkpoint(bundled_folder)


@pytest.mark.parametrize(("dtype", "num_bytes"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_the_weights_are_counted_from_the_files_header(checkpoint: Checkpoint, dtype: str, num_bytes: int) -> None:
    assert plan_memory(checkpoint, dtype, "torch", 256, 2048).weights_bytes == 22_713_728 * num_bytes


@pytest.mark.parametrize(("dtype", "num_bytes"), [("float32", 4 + 4), ("bfloat16", 4 + 2)])
def test_openvino_needs_the_float32_weights_as_well_as_its_own(
    checkpoint: Checkpoint, dtype: str, num_bytes: int
) -> None:
    plain, compiled = (plan_memory(checkpoint, dtype, runtime, 256, 2048) for runtime in ("torch", "openvino"))

    assert compiled.weights_bytes == 22_713_728 * num_bytes
    assert plain.weights_bytes == 22_713_728 * (num_bytes - 4)


def test_adapters_layers_and_heads_are_counted(checkpoint: Checkpoint, tmp_path: Path) -> None:
    adapter, layer, head = tmp_path / "separation", tmp_path / "2_Dense", tmp_path / "sparse_linear.pt"
    for path in (adapter / "adapter_model.safetensors", layer / "model.safetensors"):
        path.parent.mkdir()
        safetensors.numpy.save_file({"w": np.zeros((10, 10), np.float32)}, path)
    torch.save({"w": torch.zeros(10, 10)}, head)
    with_all = replace(checkpoint, adapters={"separation": adapter}, dense_layers=(layer,), sparse_head=head)

    more, less = (plan_memory(one, "float32", "torch", 256, 2048).weights_bytes for one in (with_all, checkpoint))

    assert more - less == 3 * 400


def test_a_batch_is_as_wide_as_the_states_not_as_the_vectors(checkpoint: Checkpoint) -> None:
    narrow = replace(checkpoint, width=8)

    assert plan_memory(narrow, "float32", "torch", 256, 2048) == plan_memory(checkpoint, "float32", "torch", 256, 2048)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_in_a_pickle_are_counted(checkpoint: Checkpoint, tmp_path: Path, dtype: torch.dtype) -> None:
    weights = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.zeros(10, 100, dtype=dtype)}, weights)

    assert plan_memory(replace(checkpoint, weights=(weights,)), "bfloat16", "torch", 256, 2048).weights_bytes == 2000


def test_a_broken_pickle_is_counted_by_its_size(checkpoint: Checkpoint, tmp_path: Path) -> None:
    weights = tmp_path / "pytorch_model.bin"
    weights.write_bytes(b"x" * 2000)

    assert plan_memory(replace(checkpoint, weights=(weights,)), "bfloat16", "torch", 256, 2048).weights_bytes == 2000


def test_all_shards_are_counted(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shards = tuple(tmp_path / f"{i}.safetensors" for i in range(3))
    for shard in shards:
        safetensors.numpy.save_file({"w": np.zeros((10, 10), np.float16)}, shard)

    assert plan_memory(replace(checkpoint, weights=shards), "float32", "torch", 256, 2048).weights_bytes == 1200


def test_the_memory_of_a_batch_is_that_of_its_tokens(checkpoint: Checkpoint) -> None:
    small, large = (
        plan_memory(checkpoint, "float32", "torch-packed", 256, tokens).batch_bytes for tokens in (2048, 4096)
    )

    assert large - small == 2048 * (6 * 384 + 2 * 1536 + 3 * 384) * 4


def test_a_text_longer_than_the_budget_is_a_separate_batch(checkpoint: Checkpoint) -> None:
    assert (
        plan_memory(checkpoint, "float32", "torch-packed", 512, 100).batch_bytes
        == plan_memory(checkpoint, "float32", "torch-packed", 512, 512).batch_bytes
    )


@pytest.mark.parametrize("content", [b"", b"1234", b"\xff" * 100], ids=["empty", "short", "nonsense"])
def test_a_corrupt_weights_file_is_refused(checkpoint: Checkpoint, tmp_path: Path, content: bytes) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(content)

    with pytest.raises(LoadError, match=r"model\.safetensors: corrupt or cut short: "):
        plan_memory(replace(checkpoint, weights=(weights,)), "float32", "torch", 256, 2048)


def test_a_weights_file_that_was_cut_short_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    with checkpoint.weights[0].open("rb") as file:
        weights.write_bytes(file.read(1_000_000))

    with pytest.raises(LoadError, match="corrupt or cut short"):
        plan_memory(replace(checkpoint, weights=(weights,)), "float32", "torch", 256, 2048)


def test_a_card_needs_more() -> None:
    """Jina v3 at 16,384 tokens: 517 MiB by the live tensors of transformers' forward with five adapters."""
    shape = Shape(572_000_000, 1024, 4096, Attention(16, 1024), "jina_embeddings_v3")
    here, there = (
        estimate_memory(shape, "float16", "torch-packed", 8192, 16_384, device) for device in ("cpu", "cuda:0")
    )

    assert 517 * 2**20 <= there.batch_bytes == here.batch_bytes <= 700 * 2**20
    assert (here.card_bytes, there.card_bytes) == (0, 512 * 2**20)
    assert there.total_bytes == there.weights_bytes + there.batch_bytes + there.card_bytes


@pytest.mark.parametrize(("runtime", "num_bytes"), [("torch-packed", 0), ("openvino", 3)])
def test_windows_of_a_long_text_need_a_second_mask(runtime: str, num_bytes: int) -> None:
    """With three bytes for each pair of tokens, where the runtime has masks at all."""
    shapes = [Shape(10**6, 64, 128, Attention(4, 64, has_windows)) for has_windows in (False, True)]

    plain, windows = (estimate_memory(shape, "float32", runtime, 8192, 2048, "cpu").batch_bytes for shape in shapes)

    assert windows - plain == num_bytes * 8192**2


def test_a_full_card_names_who_is_on_it() -> None:
    plan = MemoryPlan(2 * 2**30, 100 * 2**20, 512 * 2**20)

    with pytest.raises(LoadError) as caught:
        require_memory(plan, 2**30, "cuda:0", "ollama (pid 7) 20,480 MiB")

    assert str(caught.value) == (
        "too little memory on cuda:0: needs 2.6 GiB (2.0 GiB weights + 100 MiB for the largest batch + 512 MiB for CUDA "
        "itself), 1.0 GiB are free next to ollama (pid 7) 20,480 MiB. Lower max_batch_tokens or max_tokens, use a 16-bit "
        "dtype, or disable another model, or end one of those processes"
    )


PLAN = MemoryPlan(weights_bytes=2 * 2**30, batch_bytes=100 * 2**20)


def test_a_model_that_just_fits_is_taken_and_one_byte_less_is_too_little() -> None:
    require_memory(PLAN, PLAN.total_bytes, "cpu")

    with pytest.raises(LoadError, match="too little memory on cpu"):
        require_memory(PLAN, PLAN.total_bytes - 1, "cpu")


def test_a_model_that_does_not_fit_is_refused_with_the_sizes_and_the_remedy() -> None:
    with pytest.raises(LoadError) as caught:
        require_memory(PLAN, PLAN.total_bytes - 1, "cuda:0")

    assert str(caught.value) == (
        "too little memory on cuda:0: needs 2.1 GiB (2.0 GiB weights + 100 MiB for the largest batch), 2.1 GiB are free. "
        "Lower max_batch_tokens or max_tokens, use a 16-bit dtype, or disable another model"
    )


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [
        pytest.param("5000", "2000", 3000, id="limited"),
        pytest.param("2000", "5000", 0, id="over its limit"),
        pytest.param("max", "2000", None, id="unlimited"),
        pytest.param(None, None, None, id="no container"),
    ],
)
def test_the_limit_of_a_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, used: str | None, expected: int | None
) -> None:
    for name, text in (("_CGROUP_LIMIT", limit), ("_CGROUP_USED", used), ("_CGROUP_STAT", None)):
        path = tmp_path / name
        monkeypatch.setattr(memory, name, path)
        if text is not None:
            path.write_text(text + "\n")

    available = available_host_bytes()

    assert available == expected if expected is not None else available > 10**6


def test_files_that_a_container_would_evict_count_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that were read from checkpoints stay in memory until it is needed."""
    stat = "anon 1000\ninactive_anon 700\ninactive_file 2500\nactive_file 300\n"
    for name, text in (("_CGROUP_LIMIT", "5000"), ("_CGROUP_USED", "4000"), ("_CGROUP_STAT", stat)):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(memory, name, tmp_path / name)

    assert available_host_bytes() == 3500


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 MiB"), (91 * 2**20, "91 MiB"), (2**30, "1.0 GiB"), (1288490189, "1.2 GiB")]
)
def test_sizes_are_printed_for_people(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_packed_texts_need_no_room_for_masks(checkpoint: Checkpoint) -> None:
    padded, packed = (plan_memory(checkpoint, "float16", name, 256, 2048) for name in ("torch", "torch-packed"))

    assert padded.batch_bytes - packed.batch_bytes == 2048 * 256 * (1 + 2)
    assert padded.weights_bytes == packed.weights_bytes


@pytest.mark.parametrize("model_type", ["mpnet", "t5", "gemma2", "deberta-v2"])
@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_attention_that_writes_its_scores_out_takes_the_square_of_a_length_for_each_head(
    checkpoint: Checkpoint, model_type: str, runtime: str
) -> None:
    fused, written = (
        plan_memory(replace(checkpoint, model_type=name), "float32", runtime, 4096, 2048).batch_bytes
        for name in ("bert", model_type)
    )

    assert written - fused >= 4 * checkpoint.attention.num_heads * 4096**2

"""The packed forward: merged weights give the same vectors, and one that computes something else is not served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from gateway.config.registry import ModelEntry
from gateway.engine.devices import CpuThreads
from gateway.engine.loading import plan_load
from gateway.engine.model import build
from gateway.engine.model.build import BuildOptions, build_encoders
from gateway.engine.model.choose import choose_runtime
from gateway.engine.model.runtimes import flash, low_rank, network, packed
from gateway.engine.model.runtimes.attention import packed_positions, positions
from gateway.engine.model.runtimes.flash import Texts
from gateway.errors import LoadError
from tests.models.checkpoints import JINA_TASKS, TEXTS, make_transformer, save_adapters, unigram_tokenizer
from tests.models.conftest import Loaded

Load = Callable[..., Any]
Cosines = Callable[[np.ndarray, np.ndarray], np.ndarray]

TASKS = [None, "retrieval.query", "retrieval.passage", "separation", "classification", "text-matching"]
MIXED = [TASKS[i % 6] for i in range(len(TEXTS))]


def build_packed(folder: Path, setting: str = "packed") -> Loaded:
    plan = plan_load(ModelEntry(id="tiny", source=str(folder), device="cpu", enabled=True))
    options = replace(plan.build_options("cpu", CpuThreads(1, 1)), dtype="float32", runtime=setting)
    return Loaded(build_encoders(plan.checkpoint, options)[0])


# ------------------------------------------------------------------------------------------------------ merged weights


@pytest.fixture(scope="module")
def merged(jina: Path) -> Loaded:
    """Load a Jina v3 with weights for each task."""
    loaded = build_packed(jina)
    loaded.encoder.runtime.merge()
    return loaded


@pytest.mark.parametrize("task", TASKS)
def test_a_task_s_merged_weights_give_its_vectors(jina: Path, load: Load, merged: Loaded, task: str | None) -> None:
    tasks = [task] * len(TEXTS)

    expected = load(jina, "reference").vectors(TEXTS, tasks)

    np.testing.assert_allclose(merged.vectors(TEXTS, tasks), expected, atol=2e-4)


@pytest.mark.parametrize("least", [1, 75, 10**9], ids=["each task", "large tasks", "one row"])
def test_a_mixed_batch_is_split_by_task_where_the_parts_are_large(
    jina: Path, load: Load, merged: Loaded, monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    monkeypatch.setattr(packed.PackedRuntime, "least_part_tokens", least)
    runtime, lengths, adapters = merged.encoder.runtime, [40, 9, 35, 2], [1, 0, 1, -1]

    groups = [list(group) for group in runtime.groups(lengths, adapters)]

    assert groups == {1: [[0, 2], [1], [3]], 75: [[0, 2], [1, 3]]}.get(least, [[0, 1, 2, 3]])
    for one_task in (None, [1] * 4, [-1] * 4):
        assert [list(group) for group in runtime.groups(lengths, one_task)] == [[0, 1, 2, 3]]
    expected = load(jina, "reference").vectors(TEXTS, MIXED)
    np.testing.assert_allclose(merged.vectors(TEXTS, MIXED), expected, atol=2e-4)


@pytest.mark.parametrize(
    "layers", [["q_proj", "fc2"], ["v_proj"], ["word_embeddings"], ["token_type_embeddings"]], ids=str
)
@pytest.mark.parametrize("merges", [False, True])
def test_adapters_may_leave_layers_as_they_are(tmp_path: Path, layers: list[str], merges: bool) -> None:
    """An index beyond a table that was not expanded would not be an error on a card, but the end of its context."""
    make_transformer(tmp_path, "jina_embeddings_v3", unigram_tokenizer(), type_vocab_size=1)
    save_adapters(tmp_path, JINA_TASKS, target_modules=layers, r=1, use_rslora=True)
    packing, reference = build_packed(tmp_path), build_packed(tmp_path, "reference")
    if merges:
        packing.encoder.runtime.merge()

    for tasks in (MIXED, ["separation"] * len(TEXTS)):
        np.testing.assert_allclose(packing.vectors(TEXTS, tasks), reference.vectors(TEXTS, tasks), atol=2e-4)


def test_merged_weights_count_as_memory(jina: Path, merged: Loaded) -> None:
    runtime = build_packed(jina).encoder.runtime

    # Five tasks; three layers of four products, 64 and 96 wide.
    assert runtime.merged_bytes == 5 * 3 * (4 * 64 * 64 + 2 * 64 * 96) * 4
    assert (runtime.extra_bytes, merged.encoder.runtime.extra_bytes) == (0, runtime.merged_bytes)
    assert [list(group) for group in runtime.groups([5000, 5000], [0, 1])] == [[0, 1]]


@pytest.mark.parametrize(
    ("setting", "device", "free_bytes", "merges"),
    [
        (None, "cuda:0", 400, True),
        (None, "cuda:0", 399, False),
        (None, "cpu", 400, False),
        (True, "cuda:0", 0, True),
        (False, "cuda:0", 10**12, False),
    ],
)
def test_tasks_are_merged_where_memory_allows_or_as_the_registry_says(
    monkeypatch: pytest.MonkeyPatch, setting: bool | None, device: str, free_bytes: int, merges: bool
) -> None:
    monkeypatch.setattr(build, "available_bytes", lambda _device: free_bytes)
    options = BuildOptions(device, "float16", "auto", 512, CpuThreads(1, 1), {}, merges_adapters=setting)

    assert build._should_merge(options, 100) is merges


def test_the_registry_s_choice_reaches_the_runtime(jina: Path) -> None:
    plan = plan_load(ModelEntry(id="tiny", source=str(jina), device="cpu", enabled=True, merge_adapters=True))
    options = replace(plan.build_options("cpu", CpuThreads(1, 1)), dtype="float32", runtime="packed")
    runtime = build_encoders(plan.checkpoint, options)[0].runtime

    assert runtime.extra_bytes == runtime.merged_bytes > 0


# ------------------------------------------------------------------------------------------ checked before it serves


def turn_the_other_way(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.cat((x.chunk(2, dim=-1)[1], x.chunk(2, dim=-1)[0]), dim=-1) * torch.cat((cos, cos), dim=-1)


def add_the_next_adapter(self: Any, y: torch.Tensor, x: torch.Tensor, choice: Any) -> None:
    choice = (choice + 1) % 5 if isinstance(choice, int) else choice.roll(1, dims=1)
    ADD(self, y, x, choice)


def add_the_first_adapter_to_a_text_alone(self: Any, y: torch.Tensor, x: torch.Tensor, choice: Any) -> None:
    ADD(self, y, x, 0 if isinstance(choice, int) else choice)


def attend_to_all(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, texts: Texts, keys: Texts, scale: float):
    whole = Texts(texts.boundaries, [len(query)])
    return ATTEND(query, key, value, whole, Texts(keys.boundaries, [len(key)]), scale)


def attend_to_64_texts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, texts: Texts, keys: Texts, scale: float
) -> torch.Tensor:
    attended = ATTEND(query, key, value, texts, keys, scale)
    attended[sum(texts.lengths[:64]) :] = 0
    return attended


def scale_wrongly(*args: Any) -> torch.Tensor:
    return ATTEND(*args[:-1], args[-1] * 1.5)


ADD, ATTEND = low_rank.LowRank.add, flash.attend
BROKEN = [
    pytest.param(network, "rotate", turn_the_other_way, id="halves swapped"),
    pytest.param(low_rank.LowRank, "add", add_the_next_adapter, id="another adapter"),
    pytest.param(low_rank.LowRank, "add", add_the_first_adapter_to_a_text_alone, id="another adapter, one task"),
    pytest.param(network, "attend", attend_to_all, id="texts see each other"),
    pytest.param(network, "attend", scale_wrongly, id="scale"),
    pytest.param(network, "attend", attend_to_64_texts, id="many texts"),
]


@pytest.mark.parametrize(("where", "name", "wrong"), BROKEN)
def test_a_forward_that_computes_something_else_is_not_served(
    jina: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, wrong: Callable[..., Any]
) -> None:
    monkeypatch.setattr(where, name, wrong)

    with pytest.raises(LoadError, match=r"packed vectors have a cosine of .* to those of padded texts; the minimum"):
        build_packed(jina)


def fail(*_args: Any) -> torch.Tensor:
    raise NotImplementedError("no kernel image is available for execution on the device")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [(attend_to_all, "the minimum is 0.99999"), (fail, "cannot be computed: NotImplementedError: no kernel")],
)
def test_the_padded_forward_serves_instead_and_a_warning_says_why(
    jina: Path, load: Load, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any], reason: str
) -> None:
    monkeypatch.setattr(network, "attend", wrong)
    monkeypatch.setattr(build, "choose_runtime_of", lambda *_: "torch-packed")

    with capture_logs() as logs:
        loaded = build_packed(jina, "auto")

    [warning] = [line for line in logs if line["event"] == "packed_refused"]
    assert reason in warning["reason"]
    assert loaded.encoder.runtime.name == "torch"
    np.testing.assert_array_equal(loaded.vectors(TEXTS, MIXED), load(jina, "reference").vectors(TEXTS, MIXED))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: an illegal memory access")]
)
def test_a_full_or_lost_card_is_not_taken_for_a_broken_forward(
    jina: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def give_out(*_args: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(network, "attend", give_out)
    monkeypatch.setattr(build, "is_card_lost", lambda error, _device: "illegal memory access" in str(error))

    with pytest.raises(type(error)) as raised:
        build_packed(jina)

    assert raised.value is error


def test_the_reference_shares_the_weights(jina: Path) -> None:
    runtime = build_packed(jina).encoder.runtime
    model, layer = runtime._model, runtime.network._layers[1]

    assert model.layers[1].self_attn.k_proj.weight.data_ptr() == layer.qkv.weight[64:].data_ptr()
    assert model.layers[1].mlp.fc1.weight.data_ptr() == layer.up.weight.data_ptr()


# ------------------------------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize(
    ("setting", "device", "dtype", "capability", "expected"),
    [
        ("auto", "cuda:0", "float16", (8, 6), "torch-packed"),
        ("auto", "cuda:0", "bfloat16", (9, 0), "torch-packed"),
        ("auto", "cuda:0", "float32", (8, 6), "torch"),
        ("auto", "cuda:0", "float16", (7, 5), "torch"),
        ("torch", "cuda:0", "float16", (8, 6), "torch"),
        ("reference", "cuda:0", "float16", (8, 6), "torch"),
        ("torch", "cpu", "float32", None, "torch"),
        ("auto", "cpu", "float32", None, "openvino"),
    ],
)
def test_a_card_packs_16_bits_and_only_where_the_kernel_runs(
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    device: str,
    dtype: str,
    capability: tuple[int, int] | None,
    expected: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)

    assert choose_runtime(setting, device, dtype, "bert") == expected
    assert choose_runtime(setting, device, dtype, "modernbert") == expected.replace("torch-packed", "torch")


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=6), st.sampled_from([None, 1])
)
def test_positions_of_packed_texts_are_those_of_each(rows: Sequence[Sequence[int]], uncounted: int | None) -> None:
    ids = np.array([id_ for row in rows for id_ in row], np.int32)

    found = packed_positions(ids, np.array([len(row) for row in rows]), uncounted)

    assert found.dtype == np.int32
    assert found.tolist() == np.concatenate([positions(row, uncounted) for row in rows]).tolist()

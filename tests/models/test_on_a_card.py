"""The packed forward pass of a card: at full size on fake tensors, and its numbers with the kernel's checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, JinaEmbeddingsV3Config, PreTrainedConfig

from bench.emulated_card import Launches, PeakMemory, fake_card, fake_model, kernel_on_the_cpu, to_card
from gateway.engine.checkpoint.modules import Pooling
from gateway.engine.checkpoint.sizes import Attention
from gateway.engine.memory import Shape, estimate_memory
from gateway.engine.model import heads
from gateway.engine.model.heads import MultiVectorHead, SparseHead
from gateway.engine.model.items import Item, Tokens
from gateway.engine.model.runtimes.base import PACKED_MODEL_TYPES
from gateway.engine.model.runtimes.flash import Texts, attend
from gateway.engine.model.runtimes.packed import PackedRuntime
from gateway.engine.model.runtimes.padded import PaddedRuntime
from gateway.engine.model.states import TokenStates
from gateway.types import Output
from tests.models.checkpoints import TEXTS
from tests.models.conftest import assert_outputs_agree

Load = Callable[..., Any]
MakeFamily = Callable[..., Path]
Cosines = Callable[[np.ndarray, np.ndarray], np.ndarray]

HALF = torch.float16
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
ROBERTA = {"max_position_embeddings": 514, "pad_token_id": 1, "type_vocab_size": 1}


@cache
def config_of(model_type: str) -> PreTrainedConfig:
    """Return the full-size configuration of the best-known model of a family."""
    match model_type:
        case "jina_embeddings_v3":
            return JinaEmbeddingsV3Config()
        case "xlm-roberta":  # BGE-M3
            changes = {**LARGE, **ROBERTA, "vocab_size": 250_002, "max_position_embeddings": 8194}
        case "bert":
            changes = {**BASE, "vocab_size": 30_522, "pad_token_id": 0}
        case _:
            changes = {**BASE, **ROBERTA, "vocab_size": 50_265}
    return AutoConfig.for_model(model_type, **changes)


# ----------------------------------------------------------------------------------------------- full size, no numbers


@pytest.mark.parametrize(
    ("model_type", "merges"), [*((name, False) for name in PACKED_MODEL_TYPES), ("jina_embeddings_v3", True)]
)
def test_the_whole_way_of_a_batch_fits_a_card(model_type: str, merges: bool) -> None:
    """Devices, dtypes and shapes, from the tokens to the vectors on the host, and the checks of the attention kernel."""
    num_adapters = 5 if model_type == "jina_embeddings_v3" else 0
    lengths = [16, 1, 300, 40]
    rows = [[5 + i] * length for i, length in enumerate(lengths)]
    with fake_card():
        model, mask = fake_model(config_of(model_type), HALF, num_adapters)
        runtime = PackedRuntime(model, mask)
        if merges:
            runtime.merge()
        seconds = [8, None, 100, None] if model_type == "bert" else None
        for adapters in [[0, -1, 4, 2], [3] * 4, [-1] * 4] if num_adapters else [[-1] * 4]:
            for attended in (None, [12, 1, 300, 8]):
                features = runtime.prepare(rows, adapters, seconds, attended)
                assert {one.device.type for one in (features.row.ids, features.row.texts.boundaries)} == {"cuda"}
                with Launches() as launches:
                    states = runtime.forward(features)
                assert launches.kernels["aten::_flash_attention_forward"] == len(list(layers(model)))
                assert (states.flat.shape, states.flat.dtype) == ((357, model.config.hidden_size), HALF)
                assert states.flat.device.type == "cuda"
        for pooling in Pooling:
            assert on_host(states.pool(pooling)) == (4, model.config.hidden_size)
        spans = [[(0, 8), (8, 16)], [(0, 1)], [(5, 300)], [(0, 2), (2, 3), (3, 40)]]
        assert on_host(states.pool_spans(spans)) == (7, model.config.hidden_size)


# Models that are not packed: transformers' own code, padded. The best-known models, with few layers.
PADDED = {
    "modernbert": {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1152},
    "qwen3": {"hidden_size": 1024, "num_hidden_layers": 2, "intermediate_size": 3072, "head_dim": 128},
    "gemma3_text": {"hidden_size": 768, "num_hidden_layers": 6, "head_dim": 256, "use_bidirectional_attention": True},
    "mpnet": {"hidden_size": 768, "num_hidden_layers": 2},
    "deberta-v2": {"hidden_size": 768, "num_hidden_layers": 2},
    "xlm-roberta": {**ROBERTA, "num_hidden_layers": 2},  # with `runtime: torch`
    "jina_embeddings_v3": {"num_hidden_layers": 2},
}


@pytest.mark.parametrize("model_type", PADDED)
@pytest.mark.parametrize("lengths", [[16, 1, 300, 40], [12]], ids=["a batch", "a text"])
def test_padded_models_fit_a_card_too(model_type: str, lengths: Sequence[int]) -> None:
    changes = {"pad_token_id": 0, **PADDED[model_type]}
    with fake_card():
        attention = None if model_type in ("mpnet", "deberta-v2") else "sdpa"
        model, mask = fake_model(AutoConfig.for_model(model_type, **changes), HALF, attention=attention)
        runtime = PaddedRuntime(model, mask)
        features = runtime.prepare([[5 + i] * length for i, length in enumerate(lengths)], [-1] * len(lengths))
        assert features.input_ids.device.type == "cuda"
        assert features.attention_mask is None or features.attention_mask.device.type == "cuda"

        states = runtime.forward(features)

        assert (states.flat.device.type, states.flat.dtype) == ("cuda", HALF)
        assert states.flat.shape[1] == model.config.hidden_size
        for pooling in Pooling:
            assert on_host(states.pool(pooling)) == (len(lengths), model.config.hidden_size)


def layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for name, module in model.named_modules():
        if name.rpartition(".")[2].isdigit():
            yield module


def on_host(pooled: torch.Tensor) -> tuple[int, ...]:
    """Copy pooled states to the host as the encoder does, and return their shape."""
    assert pooled.device.type == "cuda"
    copied = pooled.to("cpu", torch.float32)
    assert copied.device.type == "cpu"
    return tuple(copied.shape)


# The number of kernels is the time of a short text; transformers' own code takes 319, and 1,151 with adapters.
@pytest.mark.parametrize(
    ("model_type", "adapters", "merges", "most"),
    [
        ("xlm-roberta", [-1, -1], False, 8 * 24 + 5),
        ("jina_embeddings_v3", [-1, -1], False, 12 * 24 + 5),
        ("jina_embeddings_v3", [2, 2], True, 12 * 24 + 8),
        ("jina_embeddings_v3", [2, 2], False, 20 * 24 + 8),
        ("jina_embeddings_v3", [2, 4], False, 24 * 24 + 8),
    ],
)
def test_a_forward_launches_few_kernels(model_type: str, adapters: Sequence[int], merges: bool, most: int) -> None:
    with fake_card():
        model, mask = fake_model(config_of(model_type), HALF, 5 if model_type == "jina_embeddings_v3" else 0)
        runtime = PackedRuntime(model, mask)
        if merges:
            runtime.merge()
        features = runtime.prepare([[5] * 9, [6] * 7], adapters)
        with Launches() as launches:
            runtime.forward(features)

    assert launches.total <= most, launches.kernels


@pytest.mark.parametrize(("model_type", "adapters"), [("xlm-roberta", [-1, -1]), ("jina_embeddings_v3", [0, 1])])
def test_the_largest_batch_takes_no_more_memory_than_planned(model_type: str, adapters: Sequence[int]) -> None:
    config = config_of(model_type)
    shape = Shape(0, config.hidden_size, config.intermediate_size, Attention.of(config), model_type)
    planned = estimate_memory(shape, "float16", "torch-packed", 8192, 16_384).batch_bytes
    with fake_card():
        runtime = PackedRuntime(*fake_model(config, HALF, 5 if max(adapters) >= 0 else 0))
        with PeakMemory() as memory:
            states = runtime.forward(runtime.prepare([[5] * 8192] * 2, adapters))
            states.pool(Pooling.MEAN)

    assert planned / 3 < memory.peak_bytes < planned


@pytest.mark.parametrize("kind", [SparseHead, MultiVectorHead])
def test_a_head_reads_a_whole_batch_in_one_go(kind: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many kernels and transfers for a hundred texts as for one."""
    width = {SparseHead: 1, MultiVectorHead: 1024}[kind]
    torch.save(torch.nn.Linear(1024, width).state_dict(), tmp_path / "head.pt")
    head = kind(tmp_path / "head.pt", 1024, *[frozenset({0, 2})] * (kind is SparseHead))
    copied: list[tuple[tuple[int, ...], str, torch.dtype]] = []

    def copy(tensor: torch.Tensor) -> np.ndarray:
        copied.append((tuple(tensor.shape), tensor.device.type, tensor.dtype))
        return np.ones(tensor.shape, np.float32)

    monkeypatch.setattr(heads, "to_host", copy)
    counts = []
    with fake_card():
        to_card(head)
        for number in (1, 100):
            items = [Item(Tokens([0, 5, 6, 5, 2]))] * number
            states = TokenStates(torch.empty(5 * number, 1024, dtype=HALF, device="cuda"), [5] * number)
            with Launches() as launches:
                outputs = head(states, items, range(number))
            counts.append(launches.total)
            assert len(outputs) == number

    assert counts[0] == counts[1] <= 8
    shapes = [(5,), (500,)] if kind is SparseHead else [(5, 1024), (500, 1024)]
    assert copied == [(shape, "cuda", torch.float32) for shape in shapes]


@pytest.mark.parametrize("kind", [SparseHead, MultiVectorHead])
def test_a_head_is_launched_without_waiting(kind: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card computes the batch before: no number may be needed on the host, and no copy may block."""
    torch.save(torch.nn.Linear(1024, {SparseHead: 1, MultiVectorHead: 1024}[kind]).state_dict(), tmp_path / "head.pt")
    head = kind(tmp_path / "head.pt", 1024, *[frozenset({0, 2})] * (kind is SparseHead))
    copied: list[str] = []

    def start_copy(tensor: torch.Tensor) -> Any:
        copied.append(tensor.device.type)
        return lambda: np.ones(tensor.shape, np.float32)

    monkeypatch.setattr(heads, "start_copy", start_copy)
    items = [Item(Tokens([0, 5, 6, 5, 2]))] * 100
    with fake_card():
        to_card(head)
        states = TokenStates(torch.empty(500, 1024, dtype=HALF, device="cuda"), [5] * 100)
        with Launches() as launches:
            read = head.begin(states, items, range(100))

    waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::copy_"}
    assert not waits & set(launches.kernels)
    assert copied == ["cuda"]
    assert len(read()) == 100


# ---------------------------------------------------------------------------------------- tiny models, the kernel's numbers


@pytest.fixture
def on_the_card(load: Load) -> Iterator[Load]:
    """Return a function that loads a model as a card would run it: 16 bits, and the attention kernel's branch."""
    with kernel_on_the_cpu():
        yield lambda folder, dtype: load.__wrapped__(folder, "packed", dtype)  # type: ignore[attr-defined]


LIMITS = {"float16": 0.99999, "bfloat16": 0.999}


@pytest.mark.parametrize("dtype", LIMITS)
def test_jina_s_tasks_mixed(jina: Path, load: Load, on_the_card: Load, cosines: Cosines, dtype: str) -> None:
    tasks = [None, "retrieval.query", "retrieval.passage", "separation", "classification", "text-matching"]
    mixed = [tasks[i % 6] for i in range(len(TEXTS))]

    vectors = on_the_card(jina, dtype).vectors(TEXTS, mixed)

    assert cosines(vectors, load(jina, "reference").vectors(TEXTS, mixed)).min() > LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS)
def test_all_outputs_of_bge_m3(m3: Path, load: Load, on_the_card: Load, dtype: str) -> None:
    wanted = [[Output.DENSE, Output.SPARSE, Output.MULTIVECTOR]] * len(TEXTS)
    ours, theirs = (model.encode(TEXTS, outputs=wanted) for model in (on_the_card(m3, dtype), load(m3, "reference")))

    assert_outputs_agree(ours, theirs, LIMITS[dtype])


@pytest.mark.parametrize("model_type", [name for name in PACKED_MODEL_TYPES if name != "jina_embeddings_v3"])
def test_every_packed_family(
    make_family: MakeFamily, load: Load, on_the_card: Load, cosines: Cosines, model_type: str
) -> None:
    folder = make_family(model_type)

    vectors = on_the_card(folder, "float16").vectors(TEXTS)

    assert cosines(vectors, load(folder, "reference").vectors(TEXTS)).min() > LIMITS["float16"]


def test_the_kernel_does_not_accept_float32() -> None:
    """Otherwise the tests above would not show that the kernel's checks are made."""
    texts = Texts(torch.tensor([0, 2], dtype=torch.int32), [2])
    with kernel_on_the_cpu():
        for dtype in (torch.float16, torch.bfloat16):
            qkv = torch.randn(2, 3, 1, 8).to(dtype)
            assert attend(*qkv.unbind(1), texts, texts, 1.0).shape == (2, 1, 8)
        with pytest.raises(AssertionError, match="only supports fp16 and bf16"):
            attend(*qkv.float().unbind(1), texts, texts, 1.0)
        with pytest.raises(AssertionError, match="at least the longest of the texts"):
            attend(*qkv.unbind(1), replace(texts, lengths=[1]), texts, 1.0)

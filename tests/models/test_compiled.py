"""Compiled models that are kept on disk give the vectors that they gave when they were compiled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import structlog
from structlog.testing import capture_logs

from gateway.config.registry import ModelEntry
from gateway.engine.devices import CpuThreads
from gateway.engine.loading import plan_load
from gateway.engine.model import load_model
from gateway.engine.model.build import build_encoders
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.items import Item
from gateway.types import Truncate
from tests.engine.model.reading import tokenize_pairs
from tests.models.checkpoints import JINA_TASKS, SENTENCES
from tests.models.conftest import Loaded

Start = Callable[..., Encoder]
# Saving folds some constants, which moves the last bits.
ROUNDING = 1e-5


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "compiled"


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the list of the checkpoints whose torch model has been loaded since."""
    folders: list[Path] = []
    original = load_model.load_model

    def load(checkpoint, *arguments, **options):  # type: ignore[no-untyped-def]
        folders.append(checkpoint.folder)
        return original(checkpoint, *arguments, **options)

    monkeypatch.setattr(load_model, "load_model", load)
    return folders


@pytest.fixture
def start(cache: Path) -> Start:
    """Return a function that builds an encoder as a start of the gateway does, with the cache."""

    def start(folder: Path, dtype: str = "float32", max_tokens: int | None = None, runtime: str = "auto") -> Encoder:
        entry = ModelEntry(id="tiny", source=str(folder), device="cpu", dtype=dtype, enabled=True)
        entry = entry.model_copy(update={"max_tokens": max_tokens, "runtime": runtime})
        plan = plan_load(entry)
        return build_encoders(plan.checkpoint, plan.build_options("cpu", CpuThreads(1, 1), cache))[0]

    return start


@pytest.fixture
def bert(make_family: Callable[..., Path], copy: Callable[[Path], Path]) -> Path:
    return copy(make_family("bert"))


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "mpnet"])
def test_the_second_start_needs_no_torch_model_and_gives_the_same_vectors(
    name: str, make_family: Callable[..., Path], start: Start, traces: list[Path]
) -> None:
    folder = make_family(name)
    first = start(folder)
    assert traces == [folder]
    second = start(folder)
    assert traces == [folder]
    assert first.runtime.name == second.runtime.name == "openvino"
    np.testing.assert_allclose(Loaded(first).vectors(SENTENCES), Loaded(second).vectors(SENTENCES), atol=ROUNDING)


def test_adapters_are_kept(jina: Path, start: Start, traces: list[Path]) -> None:
    tasks = [*JINA_TASKS.values()]
    texts = [SENTENCES[0]] * len(tasks)
    first, second = (Loaded(start(jina)).vectors(texts, tasks) for _ in range(2))
    assert len(traces) == 1
    np.testing.assert_allclose(first, second, atol=ROUNDING)
    assert len(np.unique(second.round(4), axis=0)) == len(tasks)


def test_segments_are_kept(make_reranker: Callable[..., Path], start: Start, traces: list[Path]) -> None:
    folder = make_reranker("bert")

    def scores() -> np.ndarray:
        encoder = start(folder)
        rows = tokenize_pairs(encoder.tokenizer, "a query", SENTENCES, Truncate.END)
        return np.concatenate([encoded.dense for encoded in encoder.encode([Item(row) for row in rows])])

    np.testing.assert_allclose(scores(), scores(), atol=ROUNDING)
    assert len(traces) == 1


def test_the_head_is_the_checkpoints_at_each_start(bert: Path, start: Start, edit_json: Callable[..., None]) -> None:
    """Only the transformer is kept: pooling and the later layers are read again."""
    first = Loaded(start(bert)).vectors(SENTENCES)
    edit_json(bert / "1_Pooling" / "config.json", pooling_mode="cls")
    second = Loaded(start(bert)).vectors(SENTENCES)
    assert not np.allclose(first, second)


@pytest.mark.parametrize("change", ["config.json", "max_tokens", "dtype"])
def test_everything_that_the_numbers_depend_on_makes_another_entry(
    change: str, bert: Path, start: Start, traces: list[Path], edit_json: Callable[..., None], cache: Path
) -> None:
    if change == "dtype" and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    before = Loaded(start(bert)).vectors(SENTENCES)
    match change:
        case "config.json":
            edit_json(bert / "config.json", hidden_act="relu")
            after = Loaded(start(bert)).vectors(SENTENCES)
            assert not np.allclose(before, after)
        case "max_tokens":
            start(bert, max_tokens=9)
        case "dtype":
            start(bert, dtype="bfloat16")
    assert traces == [bert, bert]
    assert len(list(cache.iterdir())) == 2


@pytest.fixture
def logs() -> Iterator[list[dict[str, object]]]:
    structlog.reset_defaults()
    with capture_logs() as events:
        yield events  # type: ignore[misc]


@pytest.mark.parametrize("damage", ["weights", "graph", "inputs", "consistent nonsense"])
def test_a_damaged_entry_is_logged_and_made_again(
    damage: str, bert: Path, start: Start, traces: list[Path], cache: Path, logs: list[dict[str, object]]
) -> None:
    before = Loaded(start(bert)).vectors(SENTENCES)
    [entry] = cache.iterdir()
    match damage:
        case "weights":
            content = bytearray((entry / "model.bin").read_bytes())
            content[100] ^= 1
            (entry / "model.bin").write_bytes(content)
        case "graph":
            (entry / "model.xml").write_text("<net/>")
        case "inputs":
            (entry / "inputs.json").unlink()
        case "consistent nonsense":  # as another program could have written it
            (entry / "inputs.json").unlink()
            digests = json.loads((entry / "entry.json").read_text())
            del digests["inputs.json"]
            (entry / "entry.json").write_text(json.dumps(digests))
    np.testing.assert_allclose(Loaded(start(bert)).vectors(SENTENCES), before, atol=ROUNDING)
    assert traces == [bert, bert]
    assert {event["event"] for event in logs} & {"compiled_cache_damaged", "compiled_cache_unusable"}


def test_only_compiled_models_are_kept(bert: Path, start: Start, cache: Path) -> None:
    start(bert, runtime="torch")
    assert not cache.exists()

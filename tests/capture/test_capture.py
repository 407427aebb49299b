"""Captured queries: the texts that are kept, their format, and that no request waits or fails because of the capture."""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from gateway.app import create_app
from gateway.backends.fake import FakeBackend, fake_info
from gateway.capture import writer as writing
from gateway.capture.captures import Captures
from gateway.capture.scrubbing import mask
from gateway.capture.writer import Captured, CaptureWriter
from gateway.cli.in_process import _narrowed
from gateway.config.capture import Capture, dated, dated_files
from gateway.config.registry import load_registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import ConfigError, ReloadRefused, StartError
from gateway.fleet import Fleet
from gateway.telemetry import metrics
from gateway.types import ModelKind

REGISTRY = """
version: 1
models:
  - {{id: mini, source: owner/mini, revision: {revision}, enabled: true}}
  - {{id: jina, source: owner/jina, revision: {revision}, enabled: true}}
  - {{id: ranker, source: owner/ranker, revision: {revision}, enabled: true}}
aliases:
  search: {{model: jina, capture: {capture}}}
  questions: {{model: mini, task: retrieval.query, capture: {{queries: 1.0, to: questions.jsonl}}}}
  plain: jina
  ranked: {{model: ranker, capture: {{queries: 1.0, to: ranked.jsonl}}}}
experiments:
  - id: exp
    kind: cross_space
    unit: {{from: [model, "header:x-unit"]}}
    capture: {{queries: 1.0, to: exp.jsonl}}
    arms: [{{model: jina, weight: 1}}, {{model: mini, weight: 1}}]
"""
ALL = "{queries: 1.0, to: kept/search.jsonl}"
TASKS = {"retrieval.query": "q: ", "retrieval.passage": "p: "}

Serve = Callable[..., Awaitable[httpx.AsyncClient]]


def today() -> date:
    """Return the day of the files; not once for all tests, which may run across midnight."""
    return datetime.now(UTC).date()


def written(folder: Path, name: str) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for file in dated_files(folder / name).values():
        lines += map(json.loads, file.read_text().splitlines())
    return lines


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """Return a function that serves a registry with captures, and returns a client; ``finish`` waits for the files."""
    async with AsyncExitStack() as stack:

        async def serve(capture: str = ALL, **settings: object) -> httpx.AsyncClient:
            path = tmp_path / "models.yaml"
            path.write_text(REGISTRY.format(revision="a" * 40, capture=capture))
            infos = {
                "mini": fake_info("mini"),
                "jina": fake_info("jina", tasks=TASKS, default_task="retrieval.passage"),
                "ranker": fake_info("ranker", kind=ModelKind.RERANK, width=1),
            }
            deployment = Deployment(
                load_registry(path, {}),
                Settings(console="public", **settings),
                read_registry=lambda: load_registry(path, {}),
                make_backend=lambda entry: FakeBackend(infos[entry.id]),
            )
            stack.push_async_callback(deployment.stop)
            await deployment.start()
            client = httpx.AsyncClient(transport=httpx.ASGITransport(create_app(deployment)), base_url="http://gateway")
            client.deployment = deployment  # type: ignore[attr-defined]
            return await stack.enter_async_context(client)

        yield serve


async def embed(client: httpx.AsyncClient, model: str, text: str | list[str], **fields: object) -> None:
    headers = {"authorization": "Bearer key-of-ada", **fields.pop("headers", {})}  # type: ignore[dict-item]
    answer = await client.post("/v1/embeddings", json={"model": model, "input": text, **fields}, headers=headers)
    assert answer.status_code == 200, answer.text


async def finish(client: httpx.AsyncClient) -> None:
    await asyncio.to_thread(client.deployment.captures.stop)  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------ which texts are kept


async def test_queries_under_a_name_are_kept_and_passages_are_not(serve: Serve, tmp_path: Path) -> None:
    client = await serve()

    await embed(client, "search", "a question", task="query")
    await embed(client, "search", "a passage", task="passage")
    await embed(client, "search", "a passage by default")
    await embed(client, "plain", "under another name", task="query")
    await embed(client, "jina", "under the model's name", task="query")
    await embed(client, "questions", "a question by the alias")
    await finish(client)

    assert [line["text"] for line in written(tmp_path, "kept/search.jsonl")] == ["a question"]
    assert [line["text"] for line in written(tmp_path, "questions.jsonl")] == ["a question by the alias"]


async def test_passages_are_kept_where_the_entry_asks_for_them(serve: Serve, tmp_path: Path) -> None:
    client = await serve("{queries: 1.0, to: all.jsonl, passages: true}")

    await embed(client, "search", ["one", "two"])
    await finish(client)

    assert [(line["text"], line["task"]) for line in written(tmp_path, "all.jsonl")] == [
        ("one", "retrieval.passage"),
        ("two", "retrieval.passage"),
    ]


async def test_a_request_that_fails_is_not_kept(serve: Serve, tmp_path: Path) -> None:
    client = await serve()

    answer = await client.post(
        "/v1/embeddings", json={"model": "search", "input": "a", "task": "query", "dimensions": 7}
    )
    await finish(client)

    assert answer.status_code == 400
    assert written(tmp_path, "kept/search.jsonl") == []


async def test_the_query_of_a_rerank_request_is_kept(serve: Serve, tmp_path: Path) -> None:
    client = await serve()

    answer = await client.post("/v1/rerank", json={"model": "ranked", "query": "a question", "documents": ["b", "c"]})
    await finish(client)

    assert answer.status_code == 200, answer.text
    assert [line["text"] for line in written(tmp_path, "ranked.jsonl")] == ["a question"]


async def test_a_fraction_is_kept(serve: Serve, tmp_path: Path) -> None:
    client = await serve("{queries: 0.2, to: some.jsonl}")

    for _ in range(4):
        await embed(client, "search", [f"text {i}" for i in range(200)], task="query")
    await finish(client)

    # 160 expected of 800; 6 standard deviations of 11.3 on each side.
    assert 92 < len(written(tmp_path, "some.jsonl")) < 228


def test_without_a_capture_its_package_is_not_imported() -> None:
    code = "import gateway.app, gateway.service, gateway.deployment, sys; sys.exit('gateway.capture' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --------------------------------------------------------------------------------------------------- the written lines


async def test_a_line_has_the_text_and_a_keyed_hash_of_the_unit(serve: Serve, tmp_path: Path) -> None:
    client = await serve()
    for unit, text in (("lovelace", "first"), ("lovelace", "second"), ("bob", "third")):
        await embed(client, f"exp/{unit}", text, task="query")
    await finish(client)

    lines = written(tmp_path, "exp.jsonl")
    content = (tmp_path / f"exp-{today()}.jsonl").read_text()

    assert [line["text"] for line in lines] == ["first", "second", "third"]
    assert lines[0]["group"] == lines[1]["group"] != lines[2]["group"]
    assert re.fullmatch("[0-9a-f]{16}", lines[0]["group"])
    assert "lovelace" not in content
    assert len({line["_id"] for line in lines}) == 3
    assert {line["name"] for line in lines} == {"exp"}
    assert {line["model"] for line in lines} <= {"jina", "mini"}


async def test_the_hash_of_a_unit_depends_on_a_key_next_to_the_file(tmp_path: Path) -> None:
    def group(folder: Path) -> str:
        folder.mkdir(exist_ok=True)
        writer = CaptureWriter("search", Capture(queries=1, to="q.jsonl"), folder / "q.jsonl")
        writer.offer(Captured("text", "search", "mini", None, "ada"))
        writer.stop()
        return str(written(folder, "q.jsonl")[-1]["group"])

    first, again, other = group(tmp_path / "one"), group(tmp_path / "one"), group(tmp_path / "two")

    assert first == again != other
    assert (tmp_path / "one" / "q.jsonl.key").stat().st_size == 32
    for file in (tmp_path / "one").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


async def test_the_sender_without_an_experiment_is_the_user_or_the_key(serve: Serve, tmp_path: Path) -> None:
    client = await serve()

    await embed(client, "search", "by key", task="query")
    await embed(client, "search", "by user", task="query", user="ada")
    await embed(client, "search", "by user again", task="query", user="ada", headers={"authorization": "Bearer other"})
    await finish(client)

    groups = {line["text"]: line["group"] for line in written(tmp_path, "kept/search.jsonl")}
    assert groups["by user"] == groups["by user again"] != groups["by key"]
    assert "key-of-ada" not in str(groups)


def test_texts_are_scrubbed_before_they_are_written(tmp_path: Path) -> None:
    capture = Capture(queries=1, to="q.jsonl", scrub="gateway.capture.scrubbing:mask")
    writer = CaptureWriter("search", capture, tmp_path / "q.jsonl")

    writer.offer(
        Captured("write to ada@example.com about https://x.y/z?a=1 or 0171 234 56 78 in 2026", "s", "m", None, None)
    )
    writer.stop()

    [line] = written(tmp_path, "q.jsonl")
    assert line["text"] == "write to [email] about [link] or [number] in 2026"
    assert "group" not in line


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("What cost 1,250 euros in 2025?", "What cost 1,250 euros in 2025?"),
        ("card 4111 1111 1111 1111", "card [number]"),
        ("+49 (171) 2345678, please", "[number], please"),
        ("ftp://host/a b", "[link] b"),
        ("Zoë.O'Neil+x@mail.example.co.uk!", "[email]!"),
        ("no secrets here", "no secrets here"),
    ],
)
def test_the_mask_replaces_addresses_links_and_long_numbers(text: str, masked: str) -> None:
    assert mask(text) == masked


HOOKS = """
def keep(text):
    return True

def blank(text):
    return text.replace("a secret", " ")

def drop(text):
    return None if "secret" in text else text

def fail(text):
    raise ValueError(text)
"""


def test_a_hook_may_drop_a_text_and_one_that_fails_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hooks_of_the_test.py").write_text(HOOKS)
    monkeypatch.syspath_prepend(tmp_path)
    for hook, outcome in (("drop", "scrubbed"), ("blank", "scrubbed"), ("fail", "failed"), ("keep", "failed")):
        before = count(hook, outcome)
        capture = Capture(queries=1, to=f"{hook}.jsonl", scrub=f"hooks_of_the_test:{hook}")
        writer = CaptureWriter(hook, capture, tmp_path / f"{hook}.jsonl")
        with capture_logs() as lines:
            writer.offer(Captured("a secret", "s", "m", None, None))
            writer.stop()
        assert written(tmp_path, f"{hook}.jsonl") == []
        assert count(hook, outcome) == before + 1
        assert "a secret" not in str(lines)


def test_a_hook_that_returns_no_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value instead of a text would make the whole file unreadable for a comparison."""
    (tmp_path / "hooks_without_text.py").write_text(HOOKS)
    monkeypatch.syspath_prepend(tmp_path)
    capture = Capture(queries=1, to="q.jsonl", scrub="hooks_without_text:keep")
    writer = CaptureWriter("keep", capture, tmp_path / "q.jsonl")

    with capture_logs() as lines:
        writer.offer(Captured("a secret", "s", "m", None, None))
        writer.stop()

    assert written(tmp_path, "q.jsonl") == []
    [failure] = [line for line in lines if line["event"] == "capture_failed"]
    assert failure["reason"] == "hooks_without_text:keep must return a text or None, and returned bool"


# ------------------------------------------------------------------------------------------------- bounds and deletion


def count(name: str, outcome: str) -> float:
    return metrics.values(metrics.CAPTURED_TEXTS).get((name, outcome), 0)


def test_old_files_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    for age in (0, 1, 6, 7, 40):
        dated(path, today() - timedelta(days=age)).write_text("{}\n")
    others = [tmp_path / name for name in ("q.jsonl", "q-2020-01-01.txt", "qq-2020-01-01.jsonl", "q-2020-99-01.jsonl")]
    for other in others:
        other.write_text("")

    last = datetime.now(UTC).date() - timedelta(days=7)
    CaptureWriter("search", Capture(queries=1, to="q.jsonl", days=7), path).stop()

    kept = [day for day in (today() - timedelta(days=age) for age in (40, 7, 6, 1, 0)) if day > last]
    assert list(dated_files(path)) == kept
    assert 2 <= len(kept) <= 3
    assert all(other.exists() for other in others)


@pytest.mark.parametrize("name", ["q-{}.jsonl", "q.jsonl.key"])
def test_a_named_pipe_instead_of_a_file_is_an_error_and_nothing_waits_for_it(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name.format(today()))
    writer = CaptureWriter("pipe", Capture(queries=1, to="q.jsonl"), tmp_path / "q.jsonl")

    with capture_logs() as lines:
        writer.offer(Captured("text", "s", "m", None, "ada"))
        writer.stop()

    assert [line["reason"] for line in lines if line["event"] == "capture_failed"] == [
        "must be a regular file, but is a named pipe"
    ]
    assert count("pipe", "failed") >= 1


def test_a_key_that_was_cut_is_named(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl.key").write_bytes(b"short")
    writer = CaptureWriter("cut key", Capture(queries=1, to="q.jsonl"), tmp_path / "q.jsonl")

    with capture_logs() as lines:
        writer.offer(Captured("text", "s", "m", None, "ada"))
        writer.stop()

    [failure] = [line for line in lines if line["event"] == "capture_failed"]
    assert failure["reason"] == "the key q.jsonl.key of the captured units is truncated: delete it to make a new one"


def test_files_that_are_deleted_while_it_runs_are_made_again(tmp_path: Path) -> None:
    writer = CaptureWriter("again", Capture(queries=1, to="q.jsonl"), tmp_path / "q.jsonl")
    writer.offer(Captured("before", "s", "m", None, None))
    file = dated(tmp_path / "q.jsonl", today())
    while not file.exists() or not file.stat().st_size:
        threading.Event().wait(0.01)
    file.unlink()

    writer.offer(Captured("after", "s", "m", None, None))
    writer.stop()

    assert [line["text"] for line in written(tmp_path, "q.jsonl")] == ["after"]


async def test_texts_that_are_typed_into_the_console_are_not_kept(serve: Serve, tmp_path: Path) -> None:
    """They are not the questions of users, and the console promises to store nothing."""
    client = await serve()
    await embed(client, "search", "of a user", task="query")

    form = {"kind": "query", "query": "typed", "candidates": "one\ntwo", "arm": ["search"]}
    page = await client.post("/console/playground", data=form, headers={"origin": "http://gateway"})
    await finish(client)

    assert page.status_code == 200, page.text
    assert "typed" in page.text
    assert [line["text"] for line in written(tmp_path, "kept/search.jsonl")] == ["of a user"]


def test_commands_in_process_capture_nothing(tmp_path: Path) -> None:
    """A running gateway may write the same file."""
    path = tmp_path / "models.yaml"
    path.write_text(REGISTRY.format(revision="a" * 40, capture=ALL))

    narrowed = _narrowed(load_registry(path, {}), ["search", "questions"])

    assert set(narrowed.aliases) == {"search", "questions", "plain"}
    assert narrowed.captures() == {}


async def test_a_client_can_forbid_it(serve: Serve, tmp_path: Path) -> None:
    client = await serve()

    for value in ("off", "OFF", "false", "no"):
        await embed(client, "search", f"with {value}", task="query", headers={"x-gateway-capture": value})
    await embed(client, "search", "with on", task="query", headers={"x-gateway-capture": " On"})
    answer = await client.post(
        "/v1/rerank",
        json={"model": "ranked", "query": "a question", "documents": ["b", "c"]},
        headers={"x-gateway-capture": "off"},
    )
    twice = await client.post(
        "/v1/embeddings",
        json={"model": "search", "input": "a client's, and its proxy's", "task": "query"},
        headers=[("x-gateway-capture", "on"), ("x-gateway-capture", "off")],
    )
    await finish(client)

    assert (answer.status_code, twice.status_code) == (200, 200)
    assert [line["text"] for line in written(tmp_path, "kept/search.jsonl")] == ["with on"]
    assert written(tmp_path, "ranked.jsonl") == []


async def test_a_client_can_forbid_it_for_a_batch(serve: Serve, tmp_path: Path) -> None:
    client = await serve(batch_dir=tmp_path / "batches")

    for value in ("off", "on"):
        body = {"model": "search", "input": f"with {value}", "task": "query"}
        line = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": body}
        file = await client.post("/v1/files", files={"file": json.dumps(line).encode()}, data={"purpose": "batch"})
        batch = await client.post(
            "/v1/batches",
            json={"input_file_id": file.json()["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"},
            headers={"x-gateway-capture": value},
        )
        async with asyncio.timeout(20):
            while batch.json()["status"] != "completed":
                await asyncio.sleep(0.01)
                batch = await client.get(f"/v1/batches/{batch.json()['id']}")
        assert batch.json()["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
    await finish(client)

    assert [line["text"] for line in written(tmp_path, "kept/search.jsonl")] == ["with on"]


def test_a_file_is_deleted_when_its_day_ends_although_nothing_is_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first text may be from the first moment of its day."""
    began_at = time.monotonic()
    evening = datetime(2026, 11, 30, 23, 59, 59, 500_000, UTC)

    class Evening(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            assert tz is UTC
            return evening + timedelta(seconds=time.monotonic() - began_at)

    monkeypatch.setattr(writing, "datetime", Evening)
    kept, old = (dated(tmp_path / "q.jsonl", evening.date() - timedelta(days=age)) for age in (5, 6))
    for file in (kept, old):
        file.write_text("{}\n")

    writer = CaptureWriter("search", Capture(queries=1, to="q.jsonl", days=7), tmp_path / "q.jsonl")
    deadline = time.monotonic() + 20
    while old.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    ended = Evening.now(UTC)
    writer.stop()

    assert not old.exists()
    assert kept.exists()
    assert ended.date() == evening.date() + timedelta(days=1)


def test_a_full_queue_drops_texts_and_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, free = threading.Event(), threading.Event()

    def hold(_place: str) -> Callable[[str], str]:
        held.set()
        free.wait(30)
        return lambda text: text

    monkeypatch.setattr(writing, "load_scrub", hold)
    writer = CaptureWriter("slow", Capture(queries=1, to="q.jsonl", scrub="a:b"), tmp_path / "q.jsonl")
    before = count("slow", "dropped")
    writer.offer(Captured("first", "s", "m", None, None))
    assert held.wait(30)

    started = time.monotonic()
    for _ in range(writing.MAX_WAITING + 50):
        writer.offer(Captured("text", "s", "m", None, None))
    took = time.monotonic() - started

    free.set()
    writer.stop()
    assert count("slow", "dropped") == before + 50
    assert took < 5
    assert len(written(tmp_path, "q.jsonl")) == 1 + writing.MAX_WAITING


def test_a_long_text_and_a_full_day_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MAX_BYTES_PER_DAY", 400)
    writer = CaptureWriter("bounded", Capture(queries=1, to="q.jsonl"), tmp_path / "q.jsonl")

    writer.offer(Captured("x" * (writing.MAX_CHARACTERS + 1), "s", "m", None, None))
    for _ in range(10):
        writer.offer(Captured("x" * 50, "s", "m", None, None))
    writer.stop()

    assert count("bounded", "too_long") == 1
    assert count("bounded", "full") > 0
    assert count("bounded", "full") + count("bounded", "written") == 10
    assert os.stat(dated(tmp_path / "q.jsonl", today())).st_size <= 400  # noqa: PTH116


async def test_a_file_that_cannot_be_written_costs_no_request(serve: Serve, tmp_path: Path) -> None:
    client = await serve()
    dated(tmp_path / "kept" / "search.jsonl", today()).mkdir()

    with capture_logs() as lines:
        await embed(client, "search", "a secret", task="query")
        await embed(client, "search", "a secret", task="query")
        await finish(client)

    failures = [line for line in lines if line["event"] == "capture_failed"]
    assert [line["reason"] for line in failures] == ["Is a directory"]
    assert "secret" not in str(lines)


@pytest.mark.parametrize("name", ["q-{today}.jsonl", "q.jsonl.key"])
def test_a_named_pipe_without_a_reader_holds_up_neither_the_thread_nor_the_end(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name.format(today=today()))
    writer = CaptureWriter("piped", Capture(queries=1, to="q.jsonl"), tmp_path / "q.jsonl")
    before = count("piped", "failed")

    with capture_logs() as lines:
        writer.offer(Captured("text", "s", "m", None, "ada"))
        writer.stop()

    assert not writer._thread.is_alive()
    assert count("piped", "failed") == before + 1
    assert [line["event"] for line in lines] == ["capture_failed"]


def test_texts_may_be_kept_for_longer_than_there_are_dates(tmp_path: Path) -> None:
    old = dated(tmp_path / "q.jsonl", today() - timedelta(days=9_000))
    old.write_text("{}\n")

    with capture_logs() as lines:
        CaptureWriter("search", Capture(queries=1, to="q.jsonl", days=10**12), tmp_path / "q.jsonl").stop()

    assert old.exists()
    assert lines == []


# ------------------------------------------------------------------------------------------------ the registry, reloads


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        ("{queries: 0, to: q.jsonl}", "capture.queries"),
        ("{queries: 1.5, to: q.jsonl}", "capture.queries"),
        ("{queries: 0.1}", "capture.to"),
        ("{queries: 0.1, to: q.jsonl, days: 0}", "capture.days"),
        ("{queries: 0.1, to: q.jsonl, scrub: nothing}", "must be `package.module:function`, got `nothing`"),
        ("{queries: 0.1, to: q.jsonl, day: 3}", "did you mean `days`?"),
        ("{queries: 0.1, to: exp.jsonl}", "`search` and `exp` have the same file"),
        ("{queries: 0.1, to: ./a/../exp.jsonl}", "`search` and `exp` have the same file"),
        ("{queries: 0.1, to: ~no-such-user/q.jsonl}", "is a file that cannot be resolved, `~no-such-user/q.jsonl`"),
        ("{queries: 0.1, to: ./kept/../exp.jsonl}", "`search` and `exp` have the same file"),
    ],
)
def test_a_wrong_capture_is_reported_with_its_place(tmp_path: Path, capture: str, message: str) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(REGISTRY.format(revision="a" * 40, capture=capture))

    with pytest.raises(ConfigError) as caught:
        load_registry(path, {})

    assert message in str(caught.value)


async def test_nothing_starts_or_is_reloaded_without_its_scrub(serve: Serve, tmp_path: Path) -> None:
    wrong = "{queries: 1.0, to: q.jsonl, scrub: gateway.capture.scrubbing:unmask}"
    with pytest.raises(StartError, match=r"`scrub` of the capture of 'search' cannot be imported: .*unmask"):
        await serve(wrong)
    client = await serve()
    (tmp_path / "models.yaml").write_text(REGISTRY.format(revision="a" * 40, capture=wrong))

    with pytest.raises(ReloadRefused, match="unmask"):
        await client.deployment.reload()  # type: ignore[attr-defined]

    await embed(client, "search", "still kept", task="query")
    await finish(client)
    assert [line["text"] for line in written(tmp_path, "kept/search.jsonl")] == ["still kept"]


async def test_a_capture_that_cannot_work_is_found_before_models_load(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def load(_fleet: Fleet) -> None:
        pytest.fail("the models were loaded first")

    monkeypatch.setattr(Fleet, "start", load)

    with pytest.raises(StartError, match="unmask"):
        await serve("{queries: 1.0, to: q.jsonl, scrub: gateway.capture.scrubbing:unmask}")


async def test_a_reload_keeps_unchanged_captures_and_stops_removed_ones(serve: Serve, tmp_path: Path) -> None:
    client = await serve()
    deployment: Deployment = client.deployment  # type: ignore[attr-defined]
    before = deployment.captures
    assert isinstance(before, Captures)
    await embed(client, "search", "before", task="query")
    content = REGISTRY.format(revision="a" * 40, capture="{queries: 1.0, to: other.jsonl}")
    (tmp_path / "models.yaml").write_text(content.replace("capture: {queries: 1.0, to: exp.jsonl}", ""))

    await deployment.reload()
    await embed(client, "search", "after", task="query")
    await embed(client, "exp/ada", "not kept", task="query")
    await finish(client)

    assert deployment.captures is not None
    assert deployment.captures.writers["questions"] is before.writers["questions"]
    assert [line["text"] for line in written(tmp_path, "kept/search.jsonl")] == ["before"]
    assert [line["text"] for line in written(tmp_path, "other.jsonl")] == ["after"]
    assert written(tmp_path, "exp.jsonl") == []


@pytest.mark.parametrize(
    "text", ["a" * 10_000, "\u597d" * 10_000, "a-" * 5_000, "a." * 5_000, "a@" + "b." * 4_999, "a@" * 5_000]
)
def test_the_mask_takes_time_in_proportion_to_a_text_without_a_blank(text: str) -> None:
    started = time.thread_time()
    mask(text)

    assert time.thread_time() - started < 0.1  # 0.6 s where each character was a beginning; the interpreter waits


def test_a_full_disk_leaves_no_half_a_line_and_no_half_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "q.jsonl"
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[: len(line) // 2]))
    writer = CaptureWriter("cut", Capture(queries=1, to="q.jsonl"), path)
    writer.offer(Captured("lost", "s", "m", None, "ada"))
    writer.stop()
    monkeypatch.undo()
    assert dated(path, today()).read_bytes() == b""

    writer = CaptureWriter("cut", Capture(queries=1, to="q.jsonl"), path)
    writer.offer(Captured("kept", "s", "m", None, "ada"))
    writer.stop()

    assert [line["text"] for line in written(tmp_path, "q.jsonl")] == ["kept"]
    assert [file.name for file in tmp_path.iterdir() if "key" in file.name] == ["q.jsonl.key"]
    assert len((tmp_path / "q.jsonl.key").read_bytes()) == 32
    assert stat.S_IMODE((tmp_path / "q.jsonl.key").stat().st_mode) == 0o600

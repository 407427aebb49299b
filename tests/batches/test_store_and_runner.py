"""A folder of batches: the faults that it survives, and the files that it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog

from gateway.batches import answering, recording
from gateway.batches import store as store_module
from gateway.batches.lines import Answered, Line, in_one_space, read_lines
from gateway.batches.runner import Runner
from gateway.batches.store import Page, Store
from gateway.batches.values import Batch, BatchesUnavailable, Purpose, Status, StorageFull, StoredFile
from gateway.errors import BadInput, StartError
from gateway.telemetry import metrics
from tests.batches.killed_runner import Slow

NOW = 1_800_000_000.0
LEFT = "file-0123456789abcdef01234567"
OpenStore = Callable[..., Store]


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[OpenStore]:
    stores: list[Store] = []

    def open_store(max_bytes: int = 1 << 30, now: Callable[[], float] = time.time) -> Store:
        stores.append(Store(tmp_path / "batches", max_bytes, now))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def add_file(store: Store, content: bytes = b"content", owner: str = "someone", seconds: float = 1e6) -> StoredFile:
    now = int(store._now())
    file = StoredFile(store.new_id(), owner, "name", Purpose.BATCH, len(content), now, now + int(seconds))
    store.write(file.id, 0, content)
    store.sync(file.id)
    store.add_file(file)
    return file


def new_batch(store: Store, num_lines: int = 10, owner: str = "someone") -> Batch:
    """Keep a batch of lines, each of which holds its number."""
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/embeddings", "body": {"n": i}} for i in range(num_lines)
    ]
    file = add_file(store, b"".join(json.dumps(line).encode() + b"\n" for line in lines), owner)
    now = int(store._now())
    ids = [store.new_id(), store.new_id()]
    batch = Batch(f"batch_{file.id}", owner, "/v1/embeddings", file.id, *ids, now, now + 86_400)
    store.add_batch(batch)
    return batch


def rows(store: Store, file_id: str) -> list[dict[str, object]]:
    with store.open(file_id) as file:
        return [json.loads(line) for line in file]


# --------------------------------------------------------------------------------------------------------- the folder


def test_two_processes_cannot_share_a_folder(open_store: OpenStore, tmp_path: Path) -> None:
    open_store()

    program = Path(__file__).with_name("killed_runner.py")
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, program, tmp_path / "batches"]
    other = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)

    assert other.returncode != 0
    assert "is in use by another process: each gateway needs a separate folder" in other.stderr


def test_a_process_that_is_refused_a_folder_holds_nothing_of_it(open_store: OpenStore, tmp_path: Path) -> None:
    open_store()

    def num_open() -> int:
        number = 0
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # that of the folder of descriptors itself
                number += link.readlink().is_relative_to(tmp_path)
        return number

    before = num_open()
    with pytest.raises(StartError) as caught:
        Store(tmp_path / "batches", 1 << 30)

    assert num_open() == before, caught  # which holds the frames
    assert before > 0


def test_synced_data_survives_a_power_cut(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content, and the folder's entry for it."""
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(Path(f"/proc/self/fd/{number}").readlink()))
    store = open_store()
    file = add_file(store)

    assert synced == [store.path(file.id), store.path(file.id).parent]


def test_a_client_s_batches_are_listed_and_no_other_s(open_store: OpenStore) -> None:
    store = open_store()
    ids = [new_batch(store).id for _ in range(3)]
    other = new_batch(store, owner="another")

    assert [batch.id for batch in store.batches("someone", Page())] == ids[::-1]
    assert [batch.id for batch in store.batches("another", Page())] == [other.id]


@pytest.mark.parametrize("content", [b"this is not a database" * 100, b"SQLite format 3\x00" + b"\xff" * 5000])
def test_a_database_that_is_damaged_is_named_at_the_start(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "batches.sqlite3").write_bytes(content)

    with pytest.raises(StartError, match=r"GATEWAY_BATCH_DIR: .*batches.sqlite3 cannot be opened.*move it away"):
        Store(tmp_path, 1 << 30)
    (tmp_path / "batches.sqlite3").unlink()
    Store(tmp_path, 1 << 30).close()  # the lock was given back


def test_a_database_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    Store(tmp_path, 1 << 30).close()
    with sqlite3.connect(tmp_path / "batches.sqlite3") as db:
        db.execute("PRAGMA user_version = 9")

    with pytest.raises(StartError, match="version 9, but this gateway reads version 1"):
        Store(tmp_path, 1 << 30)


def test_a_database_with_other_tables_is_named_at_the_start(tmp_path: Path) -> None:
    """Otherwise every later list of files would be an error."""
    Store(tmp_path, 1 << 30).close()
    with sqlite3.connect(tmp_path / "batches.sqlite3") as db:
        db.execute("ALTER TABLE files DROP COLUMN purpose")

    with pytest.raises(StartError, match="its table files has no column purpose; move it away"):
        Store(tmp_path, 1 << 30)


@pytest.mark.parametrize("damage", ["{}", "[]", "{", '{"status": "completed", "end": "completed", "errors": []}'])
@pytest.mark.parametrize("is_open", [0, 1])
def test_a_damaged_row_of_a_batch_is_named_at_the_start(tmp_path: Path, damage: str, is_open: int) -> None:
    """Otherwise every later list of batches would be an error."""
    Store(tmp_path, 1 << 30).close()
    with sqlite3.connect(tmp_path / "batches.sqlite3") as db:
        db.execute(
            "INSERT INTO batches (id, owner, is_open, ended_at, data) VALUES ('b', '', ?, 1, ?)", (is_open, damage)
        )

    with pytest.raises(StartError, match=r"cannot be opened as a database of batches: .*; move it away"):
        Store(tmp_path, 1 << 30)


def test_only_its_own_files_are_removed(tmp_path: Path) -> None:
    """A disk has its lost+found, and GATEWAY_BATCH_DIR may name a folder with something else in its ``files``."""
    (tmp_path / "files" / "lost+found" / "x").mkdir(parents=True)
    (tmp_path / "files" / LEFT).write_text("by a crash")
    others = {"thesis.pdf", "file-1", "file-1.jsonl", f"{LEFT}.bak", f"old-{LEFT}"}
    for name in others:
        (tmp_path / "files" / name).write_text("of another program")

    Store(tmp_path, 1 << 30).close()

    assert {path.name for path in (tmp_path / "files").iterdir()} == {"lost+found", *others}


def test_a_file_that_cannot_be_removed_is_named_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(tmp_path, 1 << 30).close()
    (tmp_path / "files" / LEFT).write_text("x")

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(
            StartError, match=rf"GATEWAY_BATCH_DIR: .*files/{LEFT} cannot be removed: Permission denied"
        ):
            Store(tmp_path, 1 << 30)
    Store(tmp_path, 1 << 30).close()  # the lock was given back


def test_a_pipe_instead_of_the_lock_does_not_hang_the_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")

    with pytest.raises(StartError, match=r"cannot be written: must be a regular file, but is a named pipe"):
        Store(tmp_path, 1 << 30)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(StartError, match=r"GATEWAY_BATCH_DIR: .* cannot be written"):
        Store(tmp_path / "file" / "batches", 1 << 30)


def test_only_the_owner_of_the_process_may_read_the_files(open_store: OpenStore, tmp_path: Path) -> None:
    add_file(open_store())

    assert (tmp_path / "batches" / "files").stat().st_mode & 0o077 == 0


def test_a_database_that_is_held_by_another_program_is_a_503(
    open_store: OpenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_BUSY_S", 0.01)
    store = open_store()
    other = sqlite3.connect(tmp_path / "batches" / "batches.sqlite3", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(BatchesUnavailable, match="cannot be written at the moment"):
        add_file(store)

    other.execute("ROLLBACK")
    other.close()
    add_file(store)


def test_nothing_is_confirmed_in_a_database_that_was_removed(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store()
    add_file(store)

    (tmp_path / "batches" / "batches.sqlite3").unlink()

    with pytest.raises(BatchesUnavailable, match="was removed or replaced while the gateway runs"):
        add_file(store)


def test_content_without_a_row_is_removed_at_the_next_start(open_store: OpenStore) -> None:
    store = open_store()
    kept = add_file(store)
    lost = store.new_id()
    store.write(lost, 0, b"half an upload")
    store.close()

    store = open_store()

    assert store.path(kept.id).exists()
    assert not store.path(lost).exists()
    assert store.num_bytes == 4096


def test_files_that_have_expired_are_not_found_and_then_removed(open_store: OpenStore) -> None:
    now = [NOW]
    store = open_store(now=lambda: now[0])
    file, other = add_file(store, seconds=10), add_file(store, seconds=1000)

    now[0] += 11

    assert store.file("someone", file.id) is None
    assert store.files("someone", Page()) == [other]
    assert store.sweep() == 1
    assert not store.path(file.id).exists()
    assert store.num_bytes == 4096


def test_a_file_that_a_batch_still_reads_outlives_its_end(open_store: OpenStore) -> None:
    now = [NOW]
    store = open_store(now=lambda: now[0])
    batch = new_batch(store)

    now[0] += 1e7

    assert store.sweep() == 0
    store.save(replace(batch, status=Status.COMPLETED))
    assert store.sweep() == 1
    now[0] += 1e7
    store.sweep()
    assert store.batch("someone", batch.id) is None


@pytest.mark.parametrize("sizes", [[100_000], [1] * 30, [40_000, 40_001]])
def test_the_quota_of_the_folder_holds(open_store: OpenStore, sizes: list[int]) -> None:
    store = open_store(max_bytes=80_000)

    def fill() -> None:
        for size in sizes:
            add_file(store, b"x" * size, owner="")

    with pytest.raises(StorageFull, match="GATEWAY_BATCH_MAX_BYTES=80000"):
        fill()

    for file in store.files("", Page(limit=100)):
        store.remove_file(file.id)
    add_file(store, b"x" * 60_000, owner="")


def test_a_client_leaves_room_for_others(open_store: OpenStore) -> None:
    store = open_store(max_bytes=1_000_000)

    add_file(store, b"x" * 400_000, "greedy")
    with pytest.raises(
        StorageFull, match="would take 800000 bytes, and a key may take as much as remains free, 200000"
    ):
        add_file(store, b"x" * 400_000, "greedy")
    for file in store.files("greedy", Page()):
        store.remove_file(file.id)
    store.discard(next(store.path("x").parent.iterdir()).name)  # the refused upload
    add_file(store, b"x" * 400_000, "greedy")
    add_file(store, b"x" * 250_000, "modest")

    without_keys = add_file(store, b"x" * 300_000, "")
    assert store.file("", without_keys.id) == without_keys


def test_a_disk_that_is_nearly_full_takes_nothing_more(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store()
    monkeypatch.setattr(os, "statvfs", lambda _path: SimpleNamespace(f_bavail=10, f_frsize=4096))

    with pytest.raises(StorageFull, match=r"bytes left, of which 67108864 must stay free\. .* more room on the disk"):
        add_file(store)


def test_a_write_that_fails_midway_is_a_full_disk_and_counts_with_the_bytes_it_left(open_store: OpenStore) -> None:
    store = open_store()
    file_id = store.new_id()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(StorageFull, match="File too large"):
            store.write(file_id, 0, b"x" * 1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert store.num_bytes == store.path(file_id).stat().st_size == 500_000
    store.write(file_id, 0, b"again")
    assert store.path(file_id).read_bytes() == b"again"


@pytest.mark.parametrize("gone", ["files", "all", "no folder"])
def test_a_folder_that_is_gone_costs_its_own_requests_only(open_store: OpenStore, tmp_path: Path, gone: str) -> None:
    store = open_store()
    file = add_file(store)
    shutil.rmtree(tmp_path / "batches" / ("" if gone == "all" else "files"))
    if gone == "no folder":
        (tmp_path / "batches" / "files").touch()

    with pytest.raises((OSError, BatchesUnavailable)):
        store.write(store.new_id(), 0, b"content")
    store.discard(file.id)
    with contextlib.suppress(BatchesUnavailable):  # the database is gone as well
        store.remove_file(file.id)


def test_no_more_batches_of_a_client_are_kept_than_the_limit(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_MAX_KEPT", 3)
    store = open_store()
    still_open = new_batch(store)
    other = new_batch(store, owner="another")
    made = []
    for _ in range(5):
        made.append(new_batch(store))
        store.save(replace(made[-1], status=Status.COMPLETED))

    assert [batch.id for batch in store.batches("someone", Page())] == [
        *(batch.id for batch in made[:-4:-1]),
        still_open.id,
    ]
    assert [batch.id for batch in store.batches("another", Page())] == [other.id]


@pytest.mark.parametrize("limit", [1, 5, 7, 100])
@pytest.mark.parametrize("is_ascending", [True, False])
def test_pages_together_are_the_whole_list(open_store: OpenStore, limit: int, is_ascending: bool) -> None:
    store = open_store()
    ids = [add_file(store).id for _ in range(12)]
    add_file(store, owner="another")

    found: list[str] = []
    while page := store.files("someone", Page(found[-1] if found else None, limit, is_ascending))[:limit]:
        found += [file.id for file in page]

    assert found == (ids if is_ascending else ids[::-1])
    with pytest.raises(BadInput, match="after"):  # the id of another client is not a position in a list
        store.files("another", Page(ids[3]))


# --------------------------------------------------------------------------------------------------------------- lines


def test_an_answer_in_another_space_than_the_batch_is_an_error_that_names_both() -> None:
    line, answered = Line("r1", "mini", b"{}"), Answered(200, "req", b"{}", num_tokens=2, space="mini@aaaaaaaaaaaa")
    other = replace(answered, space="mini@bbbbbbbbbbbb")

    first, spaces = in_one_space({}, line, answered)
    assert (first, spaces) == (answered, {"": "mini@aaaaaaaaaaaa"})
    assert in_one_space(spaces, line, answered) == (answered, spaces)
    refused, after = in_one_space(spaces, line, other)
    error = json.loads(refused.body)["error"]

    assert (refused.status, refused.request_id, refused.num_tokens, after) == (412, "req", 0, spaces)
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "space_mismatch", "model")
    assert "mini@aaaaaaaaaaaa" in error["message"]
    assert "mini@bbbbbbbbbbbb" in error["message"]
    other_task = replace(line, options="retrieval.query")
    assert in_one_space(spaces, other_task, other)[1] == {**spaces, "retrieval.query": "mini@bbbbbbbbbbbb"}


def test_lines_are_read_from_any_line_on(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\n\n  \ntwo is far too long\r\nthree\n" + b"x" * 100 + b"\nlast")
    with path.open("rb") as file:
        lines = list(read_lines(file, 10))
        for i, line in enumerate(lines):
            file.seek(line.end)
            rest = [one._replace(number=one.number - line.number) for one in lines[i + 1 :]]
            assert list(read_lines(file, 10)) == rest

    assert [line.content.strip() for line in lines if not line.is_too_long] == [b"one", b"three", b"last"]
    assert [line.is_too_long for line in lines] == [False, True, False, True, False]
    assert lines[-1].end == path.stat().st_size


# ---------------------------------------------------------------------------------------------------------- the runner


async def end_of(runner: Runner, batch: Batch) -> Batch:
    async with asyncio.timeout(20):
        while not (found := await runner.find(batch.owner, batch.id)).status.is_final:  # noqa: ASYNC110  as a client looks
            await asyncio.sleep(0.005)
    return found


def test_a_process_that_is_killed_at_any_moment_answers_each_line_once(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store()
    batch = new_batch(store, 3000)
    store.close()
    folder, program = tmp_path / "batches", Path(__file__).with_name("killed_runner.py")
    chance = random.Random(5)
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    positions = []

    for _ in range(5):
        process = subprocess.Popen([sys.executable, program, folder], env=environ)
        deadline = time.monotonic() + 20
        position = positions[-1] if positions else 0
        while position == (positions[-1] if positions else 0) and time.monotonic() < deadline:
            time.sleep(0.005 + chance.random() * 0.05)
            db = sqlite3.connect(f"file:{folder / 'batches.sqlite3'}?mode=ro", uri=True)
            position = json.loads(db.execute("SELECT data FROM batches").fetchone()[0])["position"]
            db.close()
        process.send_signal(signal.SIGKILL)
        process.wait()
        positions.append(position)
    subprocess.run([sys.executable, program, folder], env=environ, check=True, timeout=60)

    store = open_store()
    found = store.batch("someone", batch.id)
    assert found is not None
    assert found.status is Status.COMPLETED
    assert 0 < positions[0] < positions[-1]
    good, bad = rows(store, batch.output_id), rows(store, batch.error_id)
    assert [row["custom_id"] for row in good] == [f"r{i}" for i in range(3000) if i % 10 != 7]
    assert [row["custom_id"] for row in bad] == [f"r{i}" for i in range(3000) if i % 10 == 7]
    assert (found.num_completed, found.num_failed, found.num_tokens) == (2700, 300, 3000)
    file = store.file("someone", batch.output_id)
    assert file is not None
    assert file.num_bytes == store.path(file.id).stat().st_size


async def test_requests_without_an_answer_in_the_window_are_in_the_error_file(open_store: OpenStore) -> None:
    now = [NOW]
    store = open_store(now=lambda: now[0])
    batch = new_batch(store, 250)

    class Stuck(Slow):
        async def answer(self, batch: Batch, line: Line) -> Answered:
            if line.custom_id == "r100":
                now[0] += 90_000
                await asyncio.sleep(60)
            return await super().answer(batch, line)

    runner = Runner(store, Stuck(), lambda: now[0])
    runner.start()
    found = await end_of(runner, batch)

    assert found.status is Status.EXPIRED
    assert "expired" in found.times
    good, bad = rows(store, batch.output_id), rows(store, batch.error_id)
    ids = sorted(int(str(row["custom_id"])[1:]) for row in [*good, *bad])
    assert ids == list(range(250))
    expired = [row for row in bad if row["response"] is None]
    assert len(expired) >= 150
    assert {row["error"]["code"] for row in expired} == {"batch_expired"}  # type: ignore[index]
    await runner.stop()


async def test_clients_take_turns_and_the_batches_of_one_come_one_after_the_other(open_store: OpenStore) -> None:
    store = open_store()
    batches = [new_batch(store, 30, owner) for owner in ("a", "a", "b")]
    order: list[str] = []

    class Noting(Slow):
        async def answer(self, batch: Batch, line: Line) -> Answered:
            order.append(batch.id)
            return await super().answer(batch, line)

    runner = Runner(store, Noting())
    runner.start()
    for batch in batches:
        await end_of(runner, batch)

    first, second, other = (batch.id for batch in batches)
    assert max(i for i, name in enumerate(order) if name == first) < order.index(second)
    assert order.index(other) < order.index(second)
    await runner.stop()


async def test_a_disk_without_room_holds_a_batch_up_until_there_is_some(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "_PAUSE_S", 0.01)
    store = open_store(max_bytes=150_000)
    large = add_file(store, b"x" * 120_000, owner="")
    batch = new_batch(store, 150)
    answered: list[str] = []

    class Counting(Slow):
        async def answer(self, batch: Batch, line: Line) -> Answered:
            answered.append(line.custom_id)
            return await super().answer(batch, line)

    runner = Runner(store, Counting())
    with structlog.testing.capture_logs() as logged:
        runner.start()
        async with asyncio.timeout(20):
            while not any(line["event"] == "batch_waits" for line in logged):  # noqa: ASYNC110  a log line has no event
                await asyncio.sleep(0.005)
    before = await runner.find(batch.owner, batch.id)
    assert before is not None
    assert before.status is Status.IN_PROGRESS

    await runner.call(store.remove_file, large.id)
    found = await end_of(runner, batch)

    assert found.status is Status.COMPLETED
    assert answered == [f"r{i}" for i in range(150)]  # no answer was discarded and computed again
    assert found.num_answered == 150
    assert len(rows(store, batch.output_id)) + len(rows(store, batch.error_id)) == 150
    await runner.stop()


async def test_an_input_that_is_gone_from_the_disk_ends_its_batch(open_store: OpenStore) -> None:
    store = open_store()
    batch = new_batch(store)
    store.path(batch.input_id).unlink()
    runner = Runner(store, Slow())
    runner.start()

    found = await end_of(runner, batch)

    assert found.status is Status.FAILED
    assert [error.code for error in found.errors] == ["file_missing"]
    await runner.stop()


async def test_an_input_that_is_cut_short_while_its_batch_runs_fails_it(open_store: OpenStore) -> None:
    store = open_store()
    batch = new_batch(store, 600)
    runner = Runner(store, Slow())
    runner.start()
    while (await runner.find(batch.owner, batch.id)).num_completed < 10:  # type: ignore[union-attr]  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await runner.stop()
    store = open_store()
    content = store.path(batch.input_id).read_bytes().splitlines(keepends=True)
    store.path(batch.input_id).write_bytes(b"".join(content[:300]))

    runner = Runner(store, Slow())
    runner.start()
    found = await end_of(runner, batch)

    assert found.status is Status.FAILED
    [error] = found.errors
    assert error.code == "file_changed"
    assert error.message.endswith("has changed since the batch began: it had 600 requests, and 300 could be read")
    assert found.num_answered == 300
    await runner.stop()


@pytest.mark.parametrize("moment", ["while it runs", "at its end"])
async def test_an_output_that_is_cut_short_gets_no_hole(
    open_store: OpenStore, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    batch = new_batch(store, 600)
    runner = Runner(store, Slow())
    cut, shortened = store.cut, []

    def shorten_and_cut(file_id: str, num_bytes: int) -> None:
        if file_id == batch.output_id and not shortened:
            shortened.append(os.truncate(store.path(file_id), num_bytes // 2))
        cut(file_id, num_bytes)

    if moment == "at its end":
        monkeypatch.setattr(store, "cut", shorten_and_cut)
        runner.start()
    else:
        runner.start()
        while (await runner.find(batch.owner, batch.id)).num_completed < 10:  # type: ignore[union-attr]  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        os.truncate(store.path(batch.output_id), 100)
    found = await end_of(runner, batch)

    assert found.status is Status.FAILED
    assert [error.code for error in found.errors] == ["file_missing"]
    assert b"\0" not in store.path(batch.output_id).read_bytes()
    await runner.stop()


async def test_a_batch_has_not_ended_before_its_files_can_be_read(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    batch = new_batch(store, 5)
    runner = Runner(store, Slow())
    is_saving, may_save = threading.Event(), threading.Event()
    save = store.save

    def save_slowly(batch: Batch, *files: StoredFile) -> None:
        if batch.status.is_final:
            is_saving.set()
            may_save.wait(20)
        save(batch, *files)

    monkeypatch.setattr(store, "save", save_slowly)
    runner.start()
    await asyncio.to_thread(is_saving.wait, 20)

    assert (await runner.find(batch.owner, batch.id)).status is Status.FINALIZING  # type: ignore[union-attr]
    may_save.set()
    found = await end_of(runner, batch)
    assert found.status is Status.COMPLETED
    assert store.file(batch.owner, batch.output_id)
    await runner.stop()


async def test_a_cancelation_that_comes_while_a_batch_fails_is_too_late(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    batch = new_batch(store, 0)  # without requests, it fails
    runner = Runner(store, Slow())
    is_saving, may_save = threading.Event(), threading.Event()
    save = store.save

    def save_slowly(batch: Batch, *files: StoredFile) -> None:
        if batch.status is Status.FAILED:
            is_saving.set()
            may_save.wait(20)
        save(batch, *files)

    monkeypatch.setattr(store, "save", save_slowly)
    runner.start()
    await asyncio.to_thread(is_saving.wait, 20)
    canceling = asyncio.create_task(runner.cancel(batch))
    await asyncio.sleep(0)
    may_save.set()

    assert (await canceling).status is Status.FAILED
    assert (await end_of(runner, batch)).status is Status.FAILED
    assert store.batch(batch.owner, batch.id).status is Status.FAILED  # type: ignore[union-attr]
    assert not store.open_batches()
    await runner.stop()


async def test_a_cancelation_stays_when_the_change_before_it_cannot_be_saved(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    batch = new_batch(store, 3)
    runner = Runner(store, Slow())
    is_saving, may_fail = threading.Event(), threading.Event()
    save = store.save

    def fail_once(batch: Batch, *files: StoredFile) -> None:
        if batch.status is Status.IN_PROGRESS and not is_saving.is_set():
            is_saving.set()
            may_fail.wait(20)
            raise BatchesUnavailable("the disk does not answer")
        save(batch, *files)

    monkeypatch.setattr(store, "save", fail_once)
    monkeypatch.setattr(recording, "_PAUSE_S", 0.0)
    runner.start()
    await asyncio.to_thread(is_saving.wait, 20)
    canceling = asyncio.create_task(runner.cancel(batch))
    await asyncio.sleep(0)
    may_fail.set()

    assert (await canceling).status is Status.CANCELLING
    assert (await end_of(runner, batch)).status is Status.CANCELLED
    await runner.stop()


async def test_an_expired_batch_ends_in_a_full_folder(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [NOW]
    store = open_store(now=lambda: now[0])
    batch = new_batch(store, 3)
    now[0] += 90_000

    def refuse(*_values: object) -> int:
        raise StorageFull("full", is_permanent=True)

    monkeypatch.setattr(store, "write", refuse)
    runner = Runner(store, Slow(), lambda: now[0])
    runner.start()
    found = await end_of(runner, batch)

    assert (found.status, found.num_total, found.num_answered) == (Status.EXPIRED, 3, 0)
    await runner.stop()


@pytest.mark.parametrize("gone", ["input", "output", "error", "all"])
async def test_a_file_that_is_gone_after_a_restart_ends_its_batch_with_what_is_left(
    open_store: OpenStore, gone: str
) -> None:
    store = open_store()
    batch = new_batch(store, 600)
    runner = Runner(store, Slow())
    runner.start()
    # The 64 answers that are written at once have 7 errors at most: with more, the first of them are recorded.
    while (await runner.find(batch.owner, batch.id)).num_failed <= 7:  # type: ignore[union-attr]  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await runner.stop()
    store = open_store()
    names = {"input": batch.input_id, "output": batch.output_id, "error": batch.error_id}
    for name in names.values() if gone == "all" else [names[gone]]:
        store.path(name).unlink()

    runner = Runner(store, Slow())
    runner.start()
    found = await end_of(runner, batch)

    assert found.status is Status.FAILED
    assert [error.code for error in found.errors] == ["file_missing"]
    kept = {name: store.file(batch.owner, names[name]) for name in ("output", "error")}
    assert {name for name, file in kept.items() if file} == {"output", "error"} - (
        {"input": set(), "all": set(names)}.get(gone, {gone})
    )
    if gone == "input":
        assert len(rows(store, batch.output_id)) == found.num_completed > 0
        assert len(rows(store, batch.error_id)) == found.num_failed > 0
    await runner.stop()


async def test_a_canceled_batch_lists_the_requests_that_were_not_executed(open_store: OpenStore) -> None:
    store = open_store()
    batch = new_batch(store, 1200)
    runner = Runner(store, Slow())
    runner.start()
    while not (await runner.find(batch.owner, batch.id)).num_completed:  # type: ignore[union-attr]  # noqa: ASYNC110
        await asyncio.sleep(0.001)

    found = await runner.find(batch.owner, batch.id)
    assert found is not None
    await runner.cancel(found)
    await runner.cancel(found)
    found = await end_of(runner, batch)

    assert (found.status, found.num_answered, found.num_total) == (Status.CANCELLED, 1200, 1200)
    canceled = [row for row in rows(store, batch.error_id) if row["response"] is None]
    assert len(canceled) > 500
    assert {row["error"]["code"] for row in canceled} == {"batch_cancelled"}  # type: ignore[index]
    ids = [str(row["custom_id"]) for row in [*rows(store, batch.output_id), *rows(store, batch.error_id)]]
    assert sorted(ids) == sorted(f"r{i}" for i in range(1200))
    await runner.stop()


async def test_a_batch_that_waits_for_its_turn_is_canceled_at_once(open_store: OpenStore) -> None:
    store = open_store()
    first, second, third = (new_batch(store, 3) for _ in range(3))
    store.save(replace(third, status=Status.CANCELLING))  # the process stopped in the middle of its cancelation
    never = asyncio.Event()

    class Stuck(Slow):
        async def answer(self, batch: Batch, line: Line) -> Answered:
            await never.wait()
            return await super().answer(batch, line)

    runner = Runner(store, Stuck())
    runner.start()
    await runner.cancel(second)
    ended = [await end_of(runner, batch) for batch in (second, third)]

    assert {found.status for found in ended} == {Status.CANCELLED}
    assert {(found.num_total, found.error_bytes) for found in ended} == {(0, 0)}  # they were not checked
    assert runner.num_open("someone") == 1
    never.set()
    assert (await end_of(runner, first)).status is Status.COMPLETED
    await runner.stop()


async def test_the_metric_of_open_batches_follows_their_states(open_store: OpenStore) -> None:
    store = open_store()
    batches = [new_batch(store, 3) for _ in range(2)]
    begun, may_end = asyncio.Event(), asyncio.Event()

    class Held(Slow):
        async def answer(self, batch: Batch, line: Line) -> Answered:
            begun.set()
            await may_end.wait()
            return await super().answer(batch, line)

    def counted() -> dict[str, float]:
        samples = metrics.BATCH_JOBS.collect()[0].samples
        return {sample.labels["status"]: sample.value for sample in samples if sample.value}

    runner = Runner(store, Held())
    runner.start()
    assert counted() == {"validating": 2}
    await begun.wait()
    assert counted() == {"validating": 1, "in_progress": 1}
    may_end.set()
    for batch in batches:
        await end_of(runner, batch)
    assert counted() == {}
    await runner.stop()


async def test_a_cancelation_does_not_wait_for_a_file_that_is_being_checked(open_store: OpenStore) -> None:
    store = open_store()
    large, other = new_batch(store, 5000), new_batch(store, 5, "another")
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    class Checking(Slow):
        def read(self, endpoint: str, line: bytes) -> Line:
            loop.call_soon_threadsafe(begun.set)
            time.sleep(0.002)
            return super().read(endpoint, line)

    runner = Runner(store, Checking())
    runner.start()
    await begun.wait()
    await runner.cancel(large)

    assert (await end_of(runner, large)).status is Status.CANCELLED
    assert (await end_of(runner, other)).num_answered == 5
    await runner.stop()


async def test_a_batch_is_answered_while_the_file_of_another_client_is_checked(open_store: OpenStore) -> None:
    store = open_store()
    small, large = new_batch(store, 5, "another"), new_batch(store, 6)
    may_end = threading.Event()

    class Checking(Slow):
        def read(self, endpoint: str, line: bytes) -> Line:
            if b'"r5"' in line:
                may_end.wait(20)
            return super().read(endpoint, line)

    runner = Runner(store, Checking())
    runner.start()
    assert (await end_of(runner, small)).num_answered == 5
    assert not may_end.is_set()
    may_end.set()

    assert (await end_of(runner, large)).num_answered == 6
    await runner.stop()


async def test_a_refused_request_waits_as_long_as_it_takes(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "_LONGEST_WAIT_S", 0.001)
    store = open_store()
    batch = new_batch(store, 3)
    tries: list[str] = []

    class Limited(Slow):
        async def answer(self, batch: Batch, line: Line) -> Answered:
            tries.append(line.custom_id)
            if tries.count(line.custom_id) < 50:
                return Answered(429, "req-1", b"{}", is_passing=True, retry_after_s=60)
            return await super().answer(batch, line)

    runner = Runner(store, Limited())
    runner.start()
    found = await end_of(runner, batch)

    assert (found.num_completed, found.num_failed) == (3, 0)
    assert len(tries) == 150
    await runner.stop()


async def test_requests_with_large_answers_are_in_flight_alone(open_store: OpenStore) -> None:
    store = open_store()
    batch = new_batch(store, 40)
    in_flight: dict[str, int] = {}
    most = [0, 0]

    class Weighty(Slow):
        def read(self, endpoint: str, line: bytes) -> Line:
            found = super().read(endpoint, line)
            return replace(found, weight=1000 if int(found.custom_id[1:]) < 20 else 1)

        async def answer(self, batch: Batch, line: Line) -> Answered:
            in_flight[line.custom_id] = line.weight
            most[line.weight == 1] = max(most[line.weight == 1], len(in_flight))
            answered = await super().answer(batch, line)
            del in_flight[line.custom_id]
            return answered

    runner = Runner(store, Weighty())
    runner.start()
    found = await end_of(runner, batch)

    assert found.num_answered == 40
    assert most[0] <= 3 < most[1]
    await runner.stop()


async def test_a_stop_does_not_wait_for_a_file_that_is_being_checked(open_store: OpenStore) -> None:
    store = open_store()
    batch = new_batch(store, 5000)
    seen: list[bytes] = []
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    class Checking(Slow):
        def read(self, endpoint: str, line: bytes) -> Line:
            seen.append(line)
            loop.call_soon_threadsafe(begun.set)
            time.sleep(0.002)
            return super().read(endpoint, line)

    runner = Runner(store, Checking())
    runner.start()
    await begun.wait()
    await runner.stop()

    assert len(seen) < 1000
    assert open_store().open_batches() == [batch]

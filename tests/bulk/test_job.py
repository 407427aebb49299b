"""Each row exactly once: after every kind of interruption, the next process continues. Also the jobs that are refused."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.dataset as ds
import pytest

from gateway.bulk.blocks import BlockReader
from gateway.bulk.fake import FakeEmbedder
from gateway.bulk.fields import FieldNames
from gateway.bulk.files.parquet_sink import ParquetSink
from gateway.bulk.files.sinks import open_folder
from gateway.bulk.files.source import open_files
from gateway.bulk.job import Job, Options, Outcome, Silent
from gateway.bulk.manifest import Counts, Manifest, Shard
from gateway.bulk.rows import BadRow, BulkError, EmbeddedRows, Position, Row, RowsRefused, SpaceNote

ROOT = Path(__file__).parents[2]
NUM_ROWS = 500


def write_source(path: Path, num_rows: int = NUM_ROWS) -> Path:
    """Write rows of which some are not JSON, have no text, are refused by the model, or have an id twice."""
    lines = []
    for i in range(num_rows):
        record: dict[str, Any] = {"id": f"d{i}", "text": f"text {i} " * (i % 4 + 1), "n": i}
        match i % 50:
            case 7:
                record.pop("text")
            case 21:
                record["text"] = f"refuse {i}"
            case 33:
                record["id"] = f"d{i // 2}"
        lines.append(b"{" if i % 50 == 44 else orjson.dumps(record))
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def is_bad(i: int) -> bool:
    return i % 50 in {7, 21, 33, 44}


def read_sink(folder: Path) -> list[dict[str, Any]]:
    if list(folder.glob("part-*.parquet")):
        rows: list[dict[str, Any]] = ds.dataset(folder, format="parquet").to_table().to_pylist()
        return rows
    parts = sorted(folder.glob("part-*.jsonl"))
    return [orjson.loads(line) for part in parts for line in part.read_bytes().splitlines()]


def read_errors(folder: Path) -> list[dict[str, Any]]:
    path = folder / "_errors.jsonl"
    return [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


@pytest.mark.parametrize("name", ["out", "out.jsonl"])
def test_a_job_that_is_killed_at_random_moments_writes_each_row_once(name: str, tmp_path: Path) -> None:
    source, folder = write_source(tmp_path / "docs.jsonl", 2_000), tmp_path / name
    command = [sys.executable, "-m", "tests.bulk.killed", str(source), str(folder), "19"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3  # a slow machine writes fewer times before it is done
    rows = read_sink(folder)
    good = [i for i in range(2_000) if not is_bad(i)]
    assert [row["id"] for row in rows] == [f"d{i}" for i in good]
    for row, i in zip(rows, good, strict=True):
        text = f"text {i} " * (i % 4 + 1)
        assert (row["text"], row["n"]) == (text, i)
        assert row["vector"] == [len(text), 1, 0, 0, 0, 0, 0, 0]
        assert len(row["multivector"]) == 3
    bad = [error["place"] for error in read_errors(folder)]
    assert sorted(bad) == sorted(f"{source}:{i + 1}" for i in range(2_000) if is_bad(i))
    others = {path.name for path in folder.iterdir() if not path.name.startswith("part-")}
    assert others == {"_manifest.sqlite3", "_errors.jsonl"}


# ------------------------------------------------------------------------------------------------- in this process


class Jobs:
    """Runs jobs from one source into one folder."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder = folder
        self.source = source
        folder.mkdir(exist_ok=True)

    def run(
        self,
        embedder: FakeEmbedder | None = None,
        *,
        stop: Callable[[asyncio.Event], None] = lambda _stop: None,
        identity: dict[str, Any] | None = None,
        sink: Any = None,
        source: Any = None,
        **options: Any,
    ) -> Outcome:
        embedder = embedder or FakeEmbedder()
        embedder.block_texts = 32
        source = source or open_files([str(self.source)], FieldNames())
        sink = sink or open_folder(str(self.folder), source.text_field)
        chosen = replace(Options(self.folder / "_errors.jsonl", "skip", 64), **options)

        async def work() -> Outcome:
            asked = asyncio.Event()
            stop(asked)
            with closing(Manifest(self.folder / "_manifest.sqlite3")) as manifest:
                known = {"source hash": source.fingerprint(), "space": embedder.note.space, **(identity or {})}
                progress = manifest.begin(known)
                return await Job(source, sink, manifest, embedder, chosen, Silent()).run(progress, asked)

        return asyncio.run(work())

    def ids(self) -> list[Any]:
        return [row["id"] for row in read_sink(self.folder)]


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path / "out", write_source(tmp_path / "docs.jsonl"))


GOOD = [f"d{i}" for i in range(NUM_ROWS) if not is_bad(i)]


def test_a_job_counts_its_rows(jobs: Jobs) -> None:
    outcome = jobs.run()
    assert outcome.is_finished
    assert jobs.ids() == GOOD
    tokens = sum(min(100, len(f"text {i} " * (i % 4 + 1))) for i in range(NUM_ROWS) if not is_bad(i))
    assert outcome.done == Counts(NUM_ROWS, 460, 40, tokens, 0)
    assert outcome.total == outcome.done
    problems = {error["problem"] for error in read_errors(jobs.folder)}
    assert problems == {
        "the text in field `text` is missing",
        "the model refuses a text that begins with `refuse`",
        *(f"the id 'd{i // 2}' was already used by an earlier row" for i in range(33, NUM_ROWS, 50)),
        *(one for one in problems if one.startswith("is not JSON")),
    }
    again = jobs.run()
    assert again.done == Counts()
    assert jobs.ids() == GOOD


def test_ctrl_c_writes_the_embedded_rows_and_the_next_run_continues(jobs: Jobs) -> None:
    def run(num_calls: int) -> Outcome:
        calls: list[int] = []
        asked: list[asyncio.Event] = []

        def on_call(texts: Sequence[str]) -> None:
            calls.append(len(texts))
            if len(calls) == num_calls:
                asked[0].set()

        return jobs.run(FakeEmbedder(on_call=on_call), stop=asked.append)

    first = run(40)  # more than the blocks ahead make, so that one has been taken
    assert not first.is_finished
    assert 0 < first.total.rows < 460
    assert jobs.ids() == GOOD[: first.total.rows]
    second = run(10**9)
    assert second.is_finished
    assert second.total.rows == first.total.rows + second.done.rows == 460
    assert jobs.ids() == GOOD


def test_a_model_that_fails_midway_loses_nothing_that_was_embedded(jobs: Jobs) -> None:
    calls: list[int] = []

    def fail_later(texts: Sequence[str]) -> None:
        calls.append(len(texts))
        if len(calls) > 40:
            raise BulkError("the gateway is gone")

    with pytest.raises(BulkError, match="the gateway is gone"):
        jobs.run(FakeEmbedder(on_call=fail_later))
    assert 0 < len(jobs.ids()) < 460
    assert jobs.run().is_finished
    assert jobs.ids() == GOOD


def test_stop_ends_right_before_the_bad_row_and_skip_continues_from_there(jobs: Jobs) -> None:
    with pytest.raises(BulkError, match=r"docs\.jsonl:8: the text in field `text` is missing\. The rows before it are"):
        jobs.run(on_error="stop")
    assert jobs.ids() == GOOD[:7]
    with pytest.raises(BulkError, match=r"docs\.jsonl:8: "):
        jobs.run(on_error="stop")
    assert jobs.run(on_error="skip").is_finished
    assert jobs.ids() == GOOD


def test_stop_also_ends_at_a_row_that_the_model_refuses(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"id": i, "text": "refuse" if i == 40 else "x"}) + b"\n" for i in range(99)))
    jobs = Jobs(tmp_path / "out", path)
    with pytest.raises(
        BulkError,
        match=r"docs\.jsonl:41: the model refuses.*\. The rows before it are written, except those of the same block, which",
    ):
        jobs.run(on_error="stop")
    assert jobs.ids() == list(range(32))  # the block before
    assert jobs.run(on_error="skip").total.rows == 98


class Strict(ParquetSink):
    """A sink that cannot store a row."""

    def problem(self, row: Row) -> str:
        return "cannot be stored" if row.id == GOOD[3] else ""


def test_a_row_that_the_sink_cannot_store_is_a_bad_row(jobs: Jobs) -> None:
    with pytest.raises(BulkError, match=r"docs\.jsonl:\d+: cannot be stored\. The rows before it are written"):
        jobs.run(on_error="stop", sink=Strict(str(jobs.folder), "text"))
    assert jobs.ids() == GOOD[:3]
    assert jobs.run(on_error="skip", sink=Strict(str(jobs.folder), "text")).is_finished
    assert jobs.ids() == [row_id for row_id in GOOD if row_id != GOOD[3]]


class Constrained(ParquetSink):
    """A sink that finds out while it writes that it cannot store some rows."""

    def write(self, shard: int, batch: EmbeddedRows) -> None:
        bad = [BadRow(row.place, "is rejected", None, row.id) for row in batch.rows if row.id in GOOD[3:200:50]]
        if bad:
            raise RowsRefused(bad)
        super().write(shard, batch)


def test_rows_that_the_sink_rejects_while_it_writes_are_bad_rows(jobs: Jobs) -> None:
    with pytest.raises(
        BulkError, match=r"docs\.jsonl:\d+: is rejected\. With --on-error skip, the job leaves such rows"
    ):
        jobs.run(on_error="stop", sink=Constrained(str(jobs.folder), "text"))
    assert jobs.ids() == []

    outcome = jobs.run(on_error="skip", sink=Constrained(str(jobs.folder), "text"))

    assert outcome.is_finished
    rejected = GOOD[3:200:50]
    assert jobs.ids() == [row_id for row_id in GOOD if row_id not in rejected]
    assert [error["id"] for error in read_errors(jobs.folder) if error["problem"] == "is rejected"] == rejected
    assert (outcome.total.rows, outcome.total.skipped) == (460 - len(rejected), 40 + len(rejected))


def test_stop_also_ends_at_a_row_that_the_sink_rejects_while_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"id": i, "text": f"text {i}"}) + b"\n" for i in range(300)))
    jobs = Jobs(tmp_path / "out", path)

    class Rejecting(ParquetSink):
        def write(self, shard: int, batch: EmbeddedRows) -> None:
            if bad := [BadRow(row.place, "is rejected", None, row.id) for row in batch.rows if row.id == 200]:
                raise RowsRefused(bad)
            super().write(shard, batch)

    for _ in range(2):
        with pytest.raises(BulkError, match=r"docs\.jsonl:201: is rejected"):
            jobs.run(on_error="stop", shard_rows=960, sink=Rejecting(str(jobs.folder), "text"))
        assert jobs.ids() == list(range(192))  # the blocks before
    outcome = jobs.run(on_error="skip", shard_rows=960, sink=Rejecting(str(jobs.folder), "text"))
    assert (outcome.total.items, outcome.total.rows, outcome.total.skipped) == (300, 299, 1)
    assert jobs.ids() == [i for i in range(300) if i != 200]


def test_all_rows_of_an_item_are_left_out_with_one_that_the_sink_rejects(jobs: Jobs) -> None:
    def twice(row: Row) -> list[Row | BadRow]:
        return [replace(row, id=f"{row.id}#{number}") for number in range(2)]

    class OfChunks(ParquetSink):
        def write(self, shard: int, batch: EmbeddedRows) -> None:
            if bad := [BadRow(row.place, "is rejected", None, row.id) for row in batch.rows if row.id == "d3#1"]:
                raise RowsRefused(bad)
            super().write(shard, batch)

    outcome = jobs.run(expand=twice, sink=OfChunks(str(jobs.folder), "text"))

    assert jobs.ids() == [f"{row_id}#{number}" for row_id in GOOD if row_id != "d3" for number in range(2)]
    assert (outcome.total.rows, outcome.total.skipped) == (2 * 459, 41)


def test_all_rows_of_an_item_are_left_out_with_one_that_the_model_refuses(jobs: Jobs) -> None:
    def thrice(row: Row) -> list[Row | BadRow]:
        texts = ["fine", "refuse" if row.id == "d3" else "fine", "refuse" if row.id in {"d3", "d60"} else "fine"]
        return [replace(row, id=f"{row.id}#{number}", text=text) for number, text in enumerate(texts)]

    outcome = jobs.run(expand=thrice)

    left_out = {"d3", "d60"}
    kept = [f"d{i}#{n}" for i in range(500) if i % 50 not in {7, 33, 44} and f"d{i}" not in left_out for n in range(3)]
    assert jobs.ids() == kept
    assert outcome.total.rows == len(kept)
    refused = [error["id"] for error in read_errors(jobs.folder) if "refuses" in error["problem"]]
    assert refused == ["d3#1", "d60#2"]


class Broken:
    """A sink whose store becomes unavailable."""

    def __init__(self, sink: Any, num_good: int) -> None:
        self._sink = sink
        self._num_good = num_good
        self.name = "store"

    def open(self, note: SpaceNote) -> None:
        self._sink.open(note)

    def write(self, shard: int, batch: EmbeddedRows) -> None:
        if not self._num_good:
            raise BulkError("store: the connection was closed")
        self._num_good -= 1
        self._sink.write(shard, batch)


def test_a_store_that_goes_away_midway_is_named_and_the_next_run_continues(jobs: Jobs) -> None:
    with pytest.raises(BulkError, match="store: the connection was closed"):
        jobs.run(sink=Broken(open_folder(str(jobs.folder), "text"), 3))
    done = len(jobs.ids())
    assert 3 * 32 < done < 460
    assert jobs.run().done.rows == 460 - done
    assert jobs.ids() == GOOD


class GoneSource:
    """A source that becomes unavailable after some rows."""

    name, has_unique_ids, text_field = "gone", False, "text"

    def __init__(self, source: Any, num_rows: int) -> None:
        self._source = source
        self._num_rows = num_rows
        self.is_open = False

    def fingerprint(self) -> str:
        return str(self._source.fingerprint())

    def count(self) -> int | None:
        return None

    def read(self, after: Position | None = None) -> Iterator[Row | BadRow]:
        self.is_open = True
        try:
            for number, row in enumerate(self._source.read(after)):
                if number == self._num_rows:
                    raise BulkError("gone: no answer")
                yield row
        finally:
            self.is_open = False


def test_a_source_that_goes_away_midway_is_named_and_the_next_run_continues(jobs: Jobs) -> None:
    gone = GoneSource(open_files([str(jobs.source)], FieldNames()), 100)
    with pytest.raises(BulkError, match="gone: no answer"):
        jobs.run(source=gone)
    assert len(jobs.ids()) == sum(not is_bad(i) for i in range(100))
    assert jobs.run().is_finished
    assert jobs.ids() == GOOD


@pytest.mark.parametrize("fails", [True, False], ids=["the model fails", "Ctrl-C"])
def test_a_job_that_ends_early_closes_the_reading_of_its_source(jobs: Jobs, fails: bool) -> None:
    source = GoneSource(open_files([str(jobs.source)], FieldNames()), 10**9)
    asked: list[asyncio.Event] = []

    def end(texts: Sequence[str]) -> None:
        assert source.is_open
        if fails:
            raise BulkError("the gateway is gone")
        asked[0].set()

    error: BulkError | None = None
    try:
        jobs.run(FakeEmbedder(on_call=end), source=source, stop=asked.append)
    except BulkError as kept:  # its traceback holds the frames of the job
        error = kept
    assert (error is not None) == fails
    assert not source.is_open


def test_a_planned_shard_gets_the_same_rows_after_a_change_of_the_size(jobs: Jobs) -> None:
    """A killed process may have written them."""
    source = open_files([str(jobs.source)], FieldNames())
    with closing(Manifest(jobs.folder / "_manifest.sqlite3")) as manifest:
        manifest.begin({"source hash": source.fingerprint(), "space": FakeEmbedder().note.space})
        manifest.plan(0, 150)
    assert jobs.run(shard_rows=10).is_finished
    first = ds.dataset(jobs.folder / "part-00000.parquet").to_table().num_rows
    assert first == sum(not is_bad(i) for i in range(150))
    assert jobs.ids() == GOOD


@pytest.mark.parametrize("shard_rows", [40, 65, 100])
def test_no_shard_has_more_rows_than_it_may(jobs: Jobs, shard_rows: int) -> None:
    """Blocks with skipped rows never add up to a full shard, and 65 rows are not a whole number of blocks."""
    jobs.run(shard_rows=shard_rows)
    sizes = [ds.dataset(part).to_table().num_rows for part in sorted(jobs.folder.glob("part-*"))]
    assert max(sizes) <= shard_rows
    assert min(sizes[:-1]) > shard_rows / 4
    assert sum(sizes) == len(GOOD)


def test_slow_and_large_shards_end_early(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.run(shard_rows=10**6)
    assert len(list(jobs.folder.glob("part-*"))) == 1
    for setting in ("_SHARD_S", "_SHARD_BYTES"):
        monkeypatch.setattr(f"gateway.bulk.job.{setting}", 0)
        other = Jobs(jobs.folder.with_name(setting), jobs.source)
        other.run(shard_rows=10**6)
        assert len(list(other.folder.glob("part-*"))) > 10
        assert other.ids() == GOOD
        monkeypatch.undo()


def test_vectors_count_for_the_size_of_a_shard(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.bulk.job._SHARD_BYTES", 2**20)
    jobs.run(FakeEmbedder(dimensions=2_000), shard_rows=10**6)  # 8 kB for a row of 30 bytes

    assert 3 <= len(list(jobs.folder.glob("part-*"))) <= 8
    assert jobs.ids() == GOOD


def test_a_job_of_good_rows_only_has_no_file_of_errors(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b'{"id": 1, "text": "x"}\n')
    jobs = Jobs(tmp_path / "out", path)

    assert jobs.run().is_finished
    assert not (jobs.folder / "_errors.jsonl").exists()


def test_a_job_of_bad_rows_only_writes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b'{"id": 1, "text": "x"}\n' + b"{\n" * 99)
    jobs = Jobs(tmp_path / "out", path)
    path.write_bytes(b'{"id": 1, "text": "refuse"}\n' + b"{\n" * 99)
    outcome = jobs.run()
    assert (outcome.is_finished, outcome.total.skipped, outcome.total.rows) == (True, 100, 0)
    assert not list(jobs.folder.glob("part-*"))
    assert len(read_errors(jobs.folder)) == 100


# -------------------------------------------------------------------------------------------------------- refusals


def test_a_changed_source_another_space_and_other_options_are_refused_with_the_way_out(jobs: Jobs) -> None:
    jobs.run(identity={"truncate": "end"})
    changed = [
        (lambda: jobs.run(identity={"truncate": "start"}), "its truncate is end, but now it would be start"),
        (lambda: jobs.run(FakeEmbedder(space="new@ffffffffffff"), identity={"truncate": "end"}),
         "its space is fake@0123456789ab, but now it would be new@ffffffffffff"),
        (jobs.run, "its truncate is end, but now it would be not set"),
    ]  # fmt: skip
    for run, reason in changed:
        with pytest.raises(BulkError) as caught:
            run()
        assert reason in str(caught.value)
        assert "choose another --to or --manifest, or add --restart" in str(caught.value)
    write_source(jobs.source, NUM_ROWS + 1)
    with pytest.raises(BulkError, match="the content of the source has changed since"):
        jobs.run(identity={"truncate": "end"})
    assert jobs.ids() == GOOD


def test_the_second_process_on_a_manifest_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gateway.bulk.manifest import Manifest\n"
        "try: Manifest(Path(sys.argv[1]))\nexcept Exception as error: print(error)"
    )
    path = tmp_path / "m.sqlite3"
    with closing(Manifest(path)) as manifest:
        manifest.begin({"space": "a"})
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True, cwd=ROOT)
        assert done.stdout == f"{path}: another process works on this job; wait for it, or end it\n"
        with pytest.raises(BulkError, match="another process works on this job"):
            Manifest(path)
    Manifest(path).close()


def test_a_file_that_is_not_a_manifest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.sqlite3"
    path.write_text("text, and not a database at all " * 100)
    with pytest.raises(BulkError, match="the manifest cannot be used: file is not a database"):
        Manifest(path)
    with sqlite3.connect(tmp_path / "new.sqlite3") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(BulkError, match="was written by another version of the gateway"):
        Manifest(tmp_path / "new.sqlite3")
    with pytest.raises(BulkError, match="the manifest cannot be used: unable to open database file"):
        Manifest(tmp_path / "absent" / "m.sqlite3")


@pytest.mark.parametrize(
    "damage", ["UPDATE facts SET value = '{'", "UPDATE facts SET value = '5'", "UPDATE shards SET position = NULL"]
)
def test_a_damaged_manifest_says_what_to_do(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "m.sqlite3"
    with closing(Manifest(path)) as manifest:
        manifest.begin({"sink": "out"})
        manifest.commit(0, Shard(0, Counts(1, 1), 1), ["a"])
    with closing(sqlite3.connect(path)) as db:
        db.execute(damage)
        db.commit()
    with (
        closing(Manifest(path)) as manifest,
        pytest.raises(BulkError, match="is damaged: start over with another --to"),
    ):
        manifest.begin({"sink": "out"})


def test_a_database_of_another_program_is_not_a_manifest(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "shop.db")) as db:
        db.execute("CREATE TABLE users (name)")
        db.commit()
    with pytest.raises(BulkError, match="is another program's database"):
        Manifest(tmp_path / "shop.db")


def test_ids_of_all_kinds_are_found_again(tmp_path: Path) -> None:
    ids: list[int | str] = [1, "1", -(2**63), 2**64, 2**70, "x" * 1000, "ü", "\0", ""]
    with closing(Manifest(tmp_path / "m.sqlite3")) as manifest:
        manifest.commit(0, Shard(0, Counts(), None), ids)
        assert manifest.seen([*ids, 2, "2", "y" * 1000]) == set(ids)
        manifest.forget()
        assert manifest.seen(ids) == set()


def test_a_manifest_knows_that_its_job_is_finished(tmp_path: Path) -> None:
    with closing(Manifest(tmp_path / "m.sqlite3")) as manifest:
        assert not manifest.begin({"space": "a"}).is_finished
        manifest.finish()
    with closing(Manifest(tmp_path / "m.sqlite3")) as manifest:
        assert manifest.begin({"space": "a"}).is_finished
        manifest.forget()
        assert not manifest.progress().is_finished


def test_a_part_of_the_identity_is_compared_before_the_rest_is_known(tmp_path: Path) -> None:
    with closing(Manifest(tmp_path / "m.sqlite3")) as manifest:
        manifest.check({"space": "b"})  # nothing has begun
        manifest.begin({"space": "a", "sink": "out"})
        manifest.check({"space": "a"})
        with pytest.raises(BulkError, match="its space is a, but now it would be b"):
            manifest.check({"space": "b"})


def test_a_shard_that_fails_while_it_is_committed_leaves_nothing(tmp_path: Path) -> None:
    def ids() -> Iterator[str]:
        yield "a"
        raise KeyError

    with closing(Manifest(tmp_path / "m.sqlite3")) as manifest:
        with pytest.raises(KeyError):
            manifest.commit(0, Shard(0, Counts(rows=1), 1), ids())
        manifest.commit(0, Shard(0, Counts(rows=2), 1), ["b"])
        assert manifest.seen(["a", "b"]) == {"b"}
        assert manifest.progress().counts == Counts(rows=2)


@pytest.mark.parametrize("is_writable", [True, False])
def test_a_full_disk_at_the_manifest_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_writable: bool
) -> None:
    monkeypatch.setattr("gateway.bulk.manifest.os.access", lambda *_args: is_writable)
    with closing(Manifest(tmp_path / "m.sqlite3")) as manifest:
        manifest._db.execute("PRAGMA max_page_count = 8")
        with pytest.raises(BulkError, match="database or disk is full; make room, and run the same command again"):
            manifest.commit(0, Shard(0, Counts(rows=9), 1), [f"id {i}" for i in range(10_000)])
        assert manifest.progress().counts == Counts()


# ---------------------------------------------------------------------------------------------------------- blocks


def test_rows_can_be_taken_apart_and_a_block_ends_with_an_item(tmp_path: Path) -> None:
    """Like chunking: an item becomes several rows, or cannot be embedded."""
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"id": i, "text": "a b c"}) + b"\n" for i in range(5)))

    def expand(row: Row) -> list[Row | BadRow]:
        if row.id == 3:
            return [BadRow(row.place, "no chunk", row.position, row.id)]
        return [replace(row, id=f"{row.id}-{i}", text=part) for i, part in enumerate(row.text.split())]

    jobs = Jobs(tmp_path / "out", path)
    outcome = jobs.run(expand=expand)
    assert jobs.ids() == [f"{i}-{part}" for i in (0, 1, 2, 4) for part in range(3)]
    assert (outcome.total.items, outcome.total.rows, outcome.total.skipped) == (5, 12, 1)
    reader = BlockReader(open_files([str(path)], FieldNames()), lambda _ids: set(), 2, "skip", expand)
    assert [block.num_items for block in reader.read(None, 0)] == [1, 1, 1, 1, 1]
    reader = BlockReader(open_files([str(path)], FieldNames()), lambda _ids: set(), 6, "skip", expand)
    assert [block.num_items for block in reader.read(None, 0)] == [2, 2, 1]
    stopped = Jobs(tmp_path / "stopped", path)
    for _again in range(2):
        with pytest.raises(BulkError, match=r"docs\.jsonl:4: no chunk"):
            stopped.run(expand=expand, on_error="stop")
        assert stopped.ids() == [f"{i}-{part}" for i in range(3) for part in range(3)]


def test_an_item_with_a_part_that_the_sink_cannot_store_is_a_bad_row_as_a_whole(tmp_path: Path) -> None:
    """The parts are checked, and their ids differ from their item's; a later item may have the id of the bad one."""
    path = tmp_path / "docs.jsonl"
    items = {"id": [0, 1, 2, 1], "text": ["a b", "a bad", "c d", "e f"]}
    rows = [dict(zip(items, values, strict=True)) for values in zip(*items.values(), strict=True)]
    path.write_bytes(b"".join(orjson.dumps(one) + b"\n" for one in rows))

    def expand(row: Row) -> list[Row | BadRow]:
        return [replace(row, id=f"{row.id}#{i}", text=part) for i, part in enumerate(row.text.split())]

    seen: list[Any] = []

    def problem(row: Row) -> str:
        seen.append(row.id)
        return "cannot be stored" if row.text == "bad" else ""

    reader = BlockReader(open_files([str(path)], FieldNames()), lambda _ids: set(), 2, "skip", expand, problem)
    blocks = list(reader.read(None, 0))
    assert [row.id for block in blocks for row in block.rows] == ["0#0", "0#1", "2#0", "2#1", "1#0", "1#1"]
    assert [(bad.id, bad.problem) for block in blocks for bad in block.bad] == [(1, "cannot be stored")]
    assert sum(block.num_items for block in blocks) == 4
    assert all("#" in row_id for row_id in seen)


@pytest.mark.parametrize("on_error", ["skip", "stop"])
def test_an_id_that_does_not_fit_the_first_shard_is_a_bad_row(tmp_path: Path, on_error: str) -> None:
    path = tmp_path / "docs.jsonl"
    ids = [*range(400), "x", *range(401, 500)]
    path.write_bytes(b"".join(orjson.dumps({"id": i, "text": f"text {i}"}) + b"\n" for i in ids))
    jobs = Jobs(tmp_path / "out", path)
    for _again in range(2):  # the second run reads the type of the ids from the first file
        if on_error == "stop":
            with pytest.raises(BulkError, match=r"docs\.jsonl:401: its id 'x' does not fit into the id column"):
                jobs.run(on_error=on_error)
            assert jobs.ids() == ids[:400]
    assert jobs.run(on_error="skip").is_finished
    assert jobs.ids() == [i for i in ids if i != "x"]
    assert [error["id"] for error in read_errors(jobs.folder)] == ["x"]


def test_no_shard_has_more_rows_than_it_may_and_those_of_one_item(tmp_path: Path) -> None:
    """Long documents become many chunks: a shard of so many documents would not fit into memory."""
    path = tmp_path / "docs.jsonl"
    lengths = np.random.default_rng(3).integers(1, 30, 200).tolist()
    path.write_bytes(b"".join(orjson.dumps({"id": i, "text": "x" * n}) + b"\n" for i, n in enumerate(lengths)))
    jobs = Jobs(tmp_path / "out", path)
    jobs.run(
        expand=lambda row: [replace(row, id=f"{row.id}-{i}", text="x") for i in range(len(row.text))], shard_rows=64
    )
    sizes = [ds.dataset(part).to_table().num_rows for part in sorted(jobs.folder.glob("part-*"))]
    assert sum(sizes) == sum(lengths)
    assert max(sizes) < 64 + 30
    assert len(sizes) < sum(lengths) / 16


def test_a_block_has_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.bulk.blocks._BLOCK_BYTES", 1_000)
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"id": i, "text": "x" * 400, "n": [i]}) + b"\n" for i in range(8)))
    reader = BlockReader(open_files([str(path)], FieldNames()), lambda _ids: set(), 100, "skip")
    assert [block.num_items for block in reader.read(None, 0)] == [2, 2, 2, 2]


def test_vectors_of_texts_of_all_lengths_come_back_in_the_order_of_the_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 99, 300).tolist()
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"id": i, "text": "x" * n}) + b"\n" for i, n in enumerate(lengths)))
    jobs = Jobs(tmp_path / "out", path)
    sizes: list[int] = []
    embedder = FakeEmbedder(on_call=lambda texts: sizes.append(sum(map(len, texts))))
    embedder.max_texts, embedder.max_characters = 7, 200
    jobs.run(embedder)
    assert [row["vector"][0] for row in read_sink(jobs.folder)] == lengths
    assert max(sizes) <= 200

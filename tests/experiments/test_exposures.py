"""The exposure log: written, rotated, read back, and never the reason why a request fails."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import os
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from structlog.testing import capture_logs

from gateway.errors import StartError
from gateway.experiments.exposures import Exposure, ExposureLog, now, read_exposures
from gateway.telemetry.metrics import REGISTRY

FIRST = Exposure(
    "2026-11-01T00:00:00.000+00:00",
    "exp",
    "aaaaaaaa",
    "a",
    "0" * 16,
    "m",
    "m@0123456789ab",
    0.5,
    "body:user",
    declared="01234567.89abcdef",
)
FULL_DISK = Path("/dev/full")
T = TypeVar("T")


def exposures(num: int) -> Iterator[Exposure]:
    return (dataclasses.replace(FIRST, unit=f"{i:016x}") for i in range(num))


def open_log(path: Path, max_bytes: int = 10**6, num_backups: int = 3) -> ExposureLog:
    return ExposureLog(path, max_bytes, num_backups)


def num_dropped() -> float:
    value = REGISTRY.get_sample_value("gateway_exposures_dropped_total")
    assert value is not None
    return value


def test_a_line_says_all_in_json(tmp_path: Path) -> None:
    log = open_log(tmp_path / "x.jsonl")
    log.write(FIRST)

    (line,) = (tmp_path / "x.jsonl").read_text().splitlines()

    assert json.loads(line) == {
        "time": "2026-11-01T00:00:00.000+00:00",
        "experiment": "exp",
        "generation": "aaaaaaaa",
        "arm": "a",
        "unit": "0000000000000000",
        "model": "m",
        "space": "m@0123456789ab",
        "share": 0.5,
        "source": "body:user",
        "answered": True,
        "declared": "01234567.89abcdef",
    }


def test_the_time_is_of_utc() -> None:
    assert datetime.fromisoformat(now()).utcoffset() == timedelta(0)


def test_a_restart_appends(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.jsonl"  # folders are made
    for exposure in exposures(3):
        assert open_log(path).write(exposure) is True

    with capture_logs() as lines:
        assert list(read_exposures([path])) == list(exposures(3))
    assert lines == []


def test_files_are_rotated_and_read_oldest_first(tmp_path: Path) -> None:
    log = open_log(tmp_path / "x.jsonl", max_bytes=1024, num_backups=100)
    (tmp_path / "x.jsonl.old").touch()
    for exposure in exposures(100):
        log.write(exposure)

    files = log.files()

    assert len(files) > 11  # a 10 is sorted as a number
    assert all(path.stat().st_size <= 1024 for path in files)
    assert files[-2:] == [tmp_path / "x.jsonl.1", tmp_path / "x.jsonl"]
    assert list(read_exposures(files)) == list(exposures(100))


def test_the_oldest_files_are_dropped(tmp_path: Path) -> None:
    log = open_log(tmp_path / "x.jsonl", max_bytes=1024, num_backups=2)
    for exposure in exposures(100):
        log.write(exposure)

    kept = list(read_exposures(log.files()))

    assert len(log.files()) == 3
    assert kept == list(exposures(100))[-len(kept) :]


def test_a_torn_line_loses_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    first, second, third = exposures(3)
    open_log(path).write(first)
    open_log(path).write(second)
    path.write_bytes(path.read_bytes()[:-20])

    open_log(path).write(third)

    with capture_logs() as lines:
        assert list(read_exposures([path])) == [first, third]
    assert lines == [{"event": "exposures_not_read", "log_level": "warning", "path": str(path), "lines": 1}]


@pytest.mark.parametrize(
    "line",
    [
        b"\x00\x00\x00",
        b"\xff",
        b"[]",
        b"5",
        b"{}",
        b'{"unit": "0000000000000000"}',
        json.dumps(dataclasses.asdict(FIRST) | {"unit": 5}).encode(),
        json.dumps(dataclasses.asdict(FIRST) | {"unit": "no hash"}).encode(),
        json.dumps(dataclasses.asdict(FIRST) | {"unit": "0" * 17}).encode(),
        json.dumps(dataclasses.asdict(FIRST) | {"arm": None}).encode(),
        json.dumps(dataclasses.asdict(FIRST) | {"more": "x"}).encode(),
        json.dumps(dataclasses.asdict(FIRST) | {"share": 1.5}).encode(),
        json.dumps(dataclasses.asdict(FIRST) | {"share": "0.5"}).encode(),
        json.dumps(dataclasses.asdict(FIRST) | {"answered": 1}).encode(),
    ],
)
def test_a_malformed_line_is_skipped(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "x.jsonl"
    open_log(path).write(FIRST)
    path.write_bytes(line + b"\n\n" + path.read_bytes())

    with capture_logs() as lines:
        assert list(read_exposures([path])) == [FIRST]
    assert [line["lines"] for line in lines] == [1]


@pytest.mark.parametrize(
    "time",
    [
        "yesterday",
        "",
        "2026-11-01T00:00:00",
        "0001-01-01T00:00:00+14:00",
        "1969-12-31T23:59:59Z",
        "9999-12-31T00:00:00Z",
    ],
)
def test_a_line_with_an_impossible_time_is_skipped(tmp_path: Path, time: str) -> None:
    path = tmp_path / "x.jsonl"
    lines = [dataclasses.asdict(FIRST), dataclasses.asdict(FIRST) | {"time": time}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    with capture_logs() as logged:
        assert list(read_exposures([path])) == [FIRST]
    assert [line["lines"] for line in logged] == [1]


def test_a_line_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    line = dataclasses.asdict(FIRST)
    for added in ("share", "source", "answered", "declared"):
        del line[added]
    path.write_text(json.dumps(line) + "\n")

    assert list(read_exposures([path])) == [dataclasses.replace(FIRST, share=None, source=None, declared=None)]


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"

    with pytest.raises(StartError, match=r"none\.jsonl cannot be read: No such file or directory"):
        list(read_exposures([path]))


@pytest.mark.parametrize(("name", "why"), [("folder", "Is a directory"), ("file/x.jsonl", "directory|File exists")])
def test_a_log_that_cannot_be_written_stops_the_start(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()

    with pytest.raises(StartError, match=f"the exposure log .*{name} cannot be written: .*({why})"):
        open_log(tmp_path / name)


@pytest.mark.skipif(not FULL_DISK.exists(), reason="needs /dev/full")
def test_a_full_disk_costs_lines_and_no_requests(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.symlink_to(FULL_DISK)
    before = num_dropped()
    log = open_log(path)

    with capture_logs() as lines:
        written = [log.write(exposure) for exposure in exposures(3)]

    assert written == [False] * 3
    assert num_dropped() == before + 3
    assert [line["event"] for line in lines] == ["exposure_not_written"]  # once a minute
    assert "No space left" in lines[0]["reason"]

    path.unlink()  # room was made
    log.write(FIRST)
    assert list(read_exposures([path])) == [FIRST]


def test_a_log_that_is_a_pipe_is_not_read_back(tmp_path: Path) -> None:
    """For example, ``/dev/stdout`` in a container: reading it would wait for this process itself."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        log = open_log(path)
        assert log.files() == []
        log.write(FIRST)
        log.close()
        assert json.loads(os.read(reader, 10_000)) == dataclasses.asdict(FIRST)
    finally:
        os.close(reader)


def test_a_pipe_without_a_reader_is_refused(tmp_path: Path) -> None:
    """Opening it would wait for a reader, and the gateway would never start."""
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(StartError, match=r"pipe cannot be written: No such device or address"):
        open_log(tmp_path / "pipe")


def within(seconds: float, work: Callable[[], T]) -> T:
    """Return the result of work that may hang; a thread that hangs is left behind."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, "it hangs or has failed"
    return results[0]


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """Return a named pipe with its only reader."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    yield path, reader
    with contextlib.suppress(OSError):
        os.close(reader)


def test_a_pipe_that_loses_its_reader_holds_nothing_up(pipe: tuple[Path, int]) -> None:
    """Opening it again would wait for the next reader, and all requests with it."""
    path, reader = pipe
    log = open_log(path)
    before = num_dropped()
    first, second, third, fourth = exposures(4)
    with capture_logs():
        assert log.write(first)
        os.close(reader)
        assert [within(10, functools.partial(log.write, lost)) for lost in (second, third)] == [False, False]
        assert num_dropped() == before + 2

        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            assert within(10, lambda: log.write(fourth))
            assert json.loads(os.read(reader, 10_000)) == dataclasses.asdict(fourth)
        finally:
            os.close(reader)


def test_a_pipe_that_is_not_read_holds_nothing_up(pipe: tuple[Path, int]) -> None:
    path, reader = pipe
    log = open_log(path)
    with capture_logs():
        taken = within(10, lambda: [log.write(exposure) for exposure in exposures(2_000)])
        lines = os.read(reader, 2**20).splitlines()
        taken_later = within(10, lambda: log.write(FIRST))

    assert not all(taken), "a pipe holds 64 KiB"
    assert [json.loads(line)["unit"] for line in lines[:3]] == [f"{i:016x}" for i in range(3)]
    assert all(json.loads(line) for line in lines)
    assert taken_later


@pytest.mark.parametrize("remove", [Path.unlink, lambda path: path.rename(path.with_name("moved.jsonl"))])
def test_a_file_that_another_program_removes_or_rotates_is_begun_again(
    tmp_path: Path, remove: Callable[[Path], object]
) -> None:
    path = tmp_path / "x.jsonl"
    log = open_log(path)
    first, second, third = exposures(3)
    log.write(first)
    remove(path)

    assert [log.write(exposure) for exposure in (second, third)] == [True, True]

    assert list(read_exposures([path])) == [second, third]


def test_lines_without_a_folder_are_counted_and_later_ones_are_written(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "x.jsonl"
    log = open_log(path)
    log.write(FIRST)
    before = num_dropped()
    path.unlink()
    path.parent.rmdir()

    with capture_logs() as lines:
        assert not log.write(FIRST)
    assert num_dropped() == before + 1
    assert [line["event"] for line in lines] == ["exposure_not_written"]

    path.parent.mkdir()
    assert log.write(FIRST)
    assert list(read_exposures([path])) == [FIRST]


def test_a_rotation_that_fails_costs_lines_and_no_requests(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    log = open_log(path, max_bytes=1024, num_backups=1)
    (tmp_path / "x.jsonl.1").mkdir()
    before = num_dropped()

    with capture_logs():
        for exposure in exposures(10):
            log.write(exposure)
    written = list(read_exposures([path]))
    (tmp_path / "x.jsonl.1").rmdir()
    log.write(FIRST)

    assert 0 < len(written) == 10 - (num_dropped() - before)
    assert list(read_exposures([path])) == [FIRST]


@pytest.mark.skipif(not FULL_DISK.exists(), reason="needs /dev/full")
def test_lost_lines_are_logged_once_per_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 0.0
    monkeypatch.setattr("gateway.experiments.exposures.time.monotonic", lambda: seconds)
    (tmp_path / "x.jsonl").symlink_to(FULL_DISK)
    log = open_log(tmp_path / "x.jsonl")

    with capture_logs() as lines:
        for seconds in (10.0, 69.0, 71.0, 110.0, 132.0):  # noqa: B007  the clock reads it
            log.write(FIRST)

    assert [line["event"] for line in lines] == ["exposure_not_written"] * 3


@pytest.mark.parametrize("content", [b"", b"{", b"\n"])
def test_a_file_that_was_hardly_begun_is_continued(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)

    open_log(path).write(FIRST)

    assert list(read_exposures([path])) == [FIRST]


def test_a_log_that_is_closed_closes_its_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    log = open_log(path)
    log.write(FIRST)

    log.close()

    assert path.name not in open_files()


def test_a_released_log_closes_its_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    log = open_log(path)
    log.write(FIRST)
    assert path.name in open_files()

    del log
    gc.collect()  # an open file would be warned of as well, and warnings are errors

    assert path.name not in open_files()


def open_files() -> set[str]:
    return {Path(file.path).name for file in psutil.Process().open_files()}


def test_a_named_pipe_without_a_writer_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "exposures.jsonl"
    os.mkfifo(path)

    with pytest.raises(StartError, match="cannot be written: No such device or address"):
        ExposureLog(path, 1024, 1)
    with pytest.raises(StartError, match="cannot be read: must be a regular file, but is a named pipe"):
        list(read_exposures([path]))

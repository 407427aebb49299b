"""The log: complete lines, in order, which never wait for their reader."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import httpx
import pytest
import structlog

from gateway.telemetry import metrics
from gateway.telemetry.logs import QueuedHandler, configure_logs, flush_logs
from tests.test_drain import ONE

ROOT = Path(__file__).parents[2]
PATIENCE_S = 20
MANY = 10_000_000


def dropped() -> float:
    return metrics.REGISTRY.get_sample_value("gateway_log_lines_dropped_total") or 0


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    """Return a pipe: the descriptor to read from, and the stream to write to."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        yield reader, stream
        os.close(reader)  # first: a handler that still has lines loses them now, and not to the descriptor's next file


def read_lines(reader: int, number: int) -> list[str]:
    content = b""
    while content.count(b"\n") < number:
        assert select.select((reader,), (), (), PATIENCE_S)[0], content[-1000:]
        content += os.read(reader, 65536)
    return content.decode().splitlines()


def record(message: str) -> logging.LogRecord:
    return logging.LogRecord("test", logging.INFO, __file__, 1, message, None, None)


def fill(stream: TextIO) -> int:
    """Write until the pipe takes no more; return how many bytes that were."""
    os.set_blocking(stream.fileno(), False)
    size = 0
    for piece in (4096, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                size += os.write(stream.fileno(), b"." * piece)
    os.set_blocking(stream.fileno(), True)
    return size


def drain(reader: int, size: int) -> None:
    while size:
        size -= len(os.read(reader, size))


def test_unread_lines_are_dropped_and_counted_and_the_others_come_in_order(
    pipe: tuple[int, TextIO],
) -> None:
    reader, stream = pipe
    handler = QueuedHandler(stream, max_bytes=1000)
    before, size = dropped(), fill(stream)

    for number in range(100):
        handler.emit(record(f"line {number:05}"))  # 11 bytes with its end; would block forever

    num_dropped = dropped() - before
    assert num_dropped == 100 - 1000 // 11
    drain(reader, size)
    lines = read_lines(reader, int(100 - num_dropped))
    assert lines == [f"line {number:05}" for number in range(len(lines))]


def test_when_the_reader_is_back_a_line_says_how_many_are_missing(
    pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, stream = pipe
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("gateway.telemetry.logs.MAX_QUEUED_BYTES", 2000)
    configure_logs("info", "json")
    before, size = dropped(), fill(stream)

    for number in range(100):
        structlog.get_logger("gateway.test").info("hello", number=number)
    num_dropped = dropped() - before
    drain(reader, size)

    lines = [json.loads(line) for line in read_lines(reader, int(100 - num_dropped) + 1)]
    assert [line["number"] for line in lines[:-1]] == list(range(len(lines) - 1))
    assert {name: lines[-1][name] for name in ("event", "level", "num_lines")} == {
        "event": "log_lines_dropped",
        "level": "warning",
        "num_lines": num_dropped,
    }


def test_a_flush_waits_for_the_reader_but_not_forever(
    pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.telemetry.logs._FLUSH_S", 0.3)
    reader, stream = pipe
    handler = QueuedHandler(stream, MANY)
    handler.emit(record("read"))
    handler.flush()
    assert os.read(reader, 100) == b"read\n"  # is there, and nothing has to be waited for

    size = fill(stream)
    handler.emit(record("stuck"))
    ended = threading.Event()

    def flush() -> None:
        handler.flush()
        ended.set()

    threading.Thread(target=flush, daemon=True).start()
    assert ended.wait(PATIENCE_S)
    drain(reader, size)


def test_a_pipe_that_another_process_made_non_blocking_loses_nothing(pipe: tuple[int, TextIO]) -> None:
    reader, stream = pipe
    handler = QueuedHandler(stream, MANY)
    size = fill(stream)
    os.set_blocking(stream.fileno(), False)
    before = dropped()

    for number in range(1000):
        handler.emit(record(f"{number:04} {'x' * 100}"))
    drain(reader, size)

    assert [line[:4] for line in read_lines(reader, 1000)] == [f"{number:04}" for number in range(1000)]
    assert dropped() == before


def test_a_log_that_is_closed_counts_as_dropped(pipe: tuple[int, TextIO]) -> None:
    handler = QueuedHandler(pipe[1], MANY)
    reader = os.dup(pipe[0])
    os.close(reader)
    closed = os.open(os.devnull, os.O_RDONLY)  # cannot be written to
    os.dup2(closed, pipe[1].fileno())
    os.close(closed)
    before = dropped()

    handler.emit(record("lost"))
    handler.flush()

    assert dropped() == before + 1


def test_every_library_s_lines_exceptions_and_warnings_come_in_one_form(
    pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, stream = pipe
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logs("info", "json")

    try:
        raise ValueError("spilled")
    except ValueError:
        structlog.get_logger("gateway.test").exception("broken", request_id="r1")
    logging.getLogger("uvicorn.error").warning("Shutting down")
    logging.getLogger("some.library").warning("a %s", "lone \ud83d surrogate")
    # Under pytest, which records warnings by the same means, the hook is called by hand.
    logging._showwarning(UserWarning("old"), UserWarning, "a file", 3)  # type: ignore[attr-defined]

    lines = [json.loads(line) for line in read_lines(reader, 4)]
    assert [line["event"] for line in lines[:2]] == ["broken", "Shutting down"]
    assert "ValueError: spilled" in lines[0]["exception"]
    assert (lines[0]["request_id"], lines[1]["logger"]) == ("r1", "uvicorn.error")
    assert "UserWarning: old" in lines[3]["event"]


def test_a_stream_in_memory_has_its_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    handler = QueuedHandler(stream, MANY)

    handler.emit(record("there"))

    assert stream.getvalue() == "there\n"


@pytest.mark.usefixtures("restored_logging")
@pytest.mark.parametrize(
    "others", [{}, {"tokens": 2**70}, {"counts": {2: [math.nan]}, "unit": "a \ud83d"}], ids=["few", "large", "nested"]
)
def test_a_line_is_json_whatever_numbers_it_has(monkeypatch: pytest.MonkeyPatch, others: dict[str, Any]) -> None:
    """``NaN``, as Python writes it, is not JSON, and a collector would drop the line."""
    monkeypatch.setattr(sys, "stderr", output := io.StringIO())
    configure_logs("info", "json")

    structlog.get_logger("gateway.test").info("measured", seconds=math.nan, share=math.inf, **others)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    line = json.loads(output.getvalue(), parse_constant=refuse)
    assert line["seconds"] is None
    assert {name: line[name] for name in others} == json.loads(json.dumps(others).replace("NaN", "null"))


@pytest.mark.parametrize("through", ["logging", "structlog"])
@pytest.mark.usefixtures("restored_logging")
def test_lines_are_gathered_until_one_is_urgent(
    pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch, through: str
) -> None:
    reader, stream = pipe
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("gateway.telemetry.logs._GATHER_S", 3600.0)
    configure_logs("info", "json")
    log = logging.getLogger("gateway.test") if through == "logging" else structlog.get_logger("gateway.test")

    log.info("first")
    assert not select.select((reader,), (), (), 0.05)[0]
    log.warning("second")

    assert [json.loads(line)["event"] for line in read_lines(reader, 2)] == ["first", "second"]


def test_a_record_that_cannot_be_formatted_raises_nothing(pipe: tuple[int, TextIO], capsys: Any) -> None:
    handler = QueuedHandler(pipe[1], MANY)

    handler.emit(logging.LogRecord("test", logging.INFO, __file__, 1, "%d", ("text",), None))

    assert "Logging error" in capsys.readouterr().err


@pytest.fixture
def restored_logging() -> Iterator[None]:
    """Undo what ``configure_logs`` does to loggers, and to the environment."""
    loggers = [logging.getLogger(name) for name in ("", "gateway", "uvicorn", "sentence_transformers")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    progress_bars = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    logger_class = logging.getLoggerClass()
    yield
    logging.setLoggerClass(logger_class)
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
    logging.captureWarnings(False)
    if progress_bars is None:
        os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)


class Terminal(io.StringIO):
    """A stream in memory that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("restored_logging")
@pytest.mark.parametrize(
    ("stream", "style", "is_json"),
    [
        (io.StringIO, "auto", True),
        (Terminal, "auto", False),
        (io.StringIO, "console", False),
        (Terminal, "console", False),
        (io.StringIO, "json", True),
        (Terminal, "json", True),
    ],
)
def test_the_style_is_json_unless_the_output_is_a_terminal(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], style: str, is_json: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", output := stream())
    configure_logs("info", style)

    structlog.get_logger("gateway.test").info("hello", number=1)

    assert output.getvalue().startswith("{") is is_json


@pytest.mark.usefixtures("restored_logging")
def test_a_json_line_has_the_context_the_level_the_logger_and_the_time_in_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", output := io.StringIO())
    configure_logs("info", "json")

    with structlog.contextvars.bound_contextvars(request_id="r1"):
        structlog.get_logger("gateway.test").warning("hello", number=1)
        logging.getLogger("a.library").error("oh no")

    first, second = [json.loads(line) for line in output.getvalue().splitlines()]
    times = [datetime.fromisoformat(line.pop("timestamp")) for line in (first, second)]
    assert first == {
        "event": "hello", "number": 1, "level": "warning", "logger": "gateway.test", "request_id": "r1",
    }  # fmt: skip
    assert second == {"event": "oh no", "level": "error", "logger": "a.library", "request_id": "r1"}
    assert all(abs((datetime.now(UTC) - time).total_seconds()) < 60 for time in times)


@pytest.mark.usefixtures("restored_logging")
def test_only_events_of_the_level_are_logged_each_once_and_the_details_of_libraries_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", output := io.StringIO())
    configure_logs("info", "json")

    for name in ("gateway.test", "uvicorn.test", "a.library", "sentence_transformers.test", "httpx2", "uvicorn.error"):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING):
            logging.getLogger(name).log(level, "hello")

    lines = [json.loads(line) for line in output.getvalue().splitlines()]
    assert [(line["logger"], line["level"]) for line in lines] == [
        ("gateway.test", "info"),
        ("gateway.test", "warning"),
        ("uvicorn.test", "info"),
        ("uvicorn.test", "warning"),
        ("a.library", "info"),
        ("a.library", "warning"),
        ("sentence_transformers.test", "warning"),
        ("httpx2", "warning"),
        ("uvicorn.error", "warning"),
    ]


@pytest.mark.usefixtures("restored_logging")
@pytest.mark.parametrize(
    "library",
    ["infinity_emb", "transformers", "sentence_transformers", "huggingface_hub", "httpx", "httpx2", "torch"],
)
def test_libraries_that_tell_of_their_internals_log_warnings_only(library: str) -> None:
    configure_logs("info", "json")
    inside = logging.getLogger(f"{library}.inside")

    assert not inside.isEnabledFor(logging.INFO)
    assert inside.isEnabledFor(logging.WARNING)


@pytest.mark.usefixtures("restored_logging")
def test_the_gateway_logs_even_if_a_library_clears_the_root_loggers_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", output := io.StringIO())
    configure_logs("info", "json")
    logging.getLogger().handlers.clear()

    structlog.get_logger("gateway.test").info("still here")
    logging.getLogger("uvicorn.error").warning("and here")

    assert [json.loads(line)["event"] for line in output.getvalue().splitlines()] == ["still here", "and here"]


_CHATTY = """
import io, logging, sys, threading
early = logging.getLogger("early")
early.addHandler(logging.StreamHandler())
from gateway.telemetry.logs import configure_logs, flush_logs
configure_logs("info", "json")
import huggingface_hub, pymilvus, torch._logging, torch.distributed, transformers
try:
    import ray.serve
except ModuleNotFoundError:
    pass
late = logging.getLogger("late")
late.propagate = False
late.addHandler(own := logging.StreamHandler(io.StringIO()))
late.addHandler(logging.StreamHandler(sys.stdout))
late.propagate = False
libraries = ("huggingface_hub", "pymilvus", "torch", "torch.distributed", "transformers", "ray", "ray.serve")
for logger in ("early", "late", *libraries):
    logging.getLogger(logger).setLevel("DEBUG")
    logging.getLogger(logger).debug("hello from %s", logger)
    logging.getLogger(logger).warning("hello from %s", logger)
assert own.stream.getvalue() == "hello from late\\n" * 2
class Broken:
    def __del__(self):
        1 / 0
broken = Broken()
del broken
threading.Thread(target=lambda: 1 / 0, name="a thread").start()
"""


def test_libraries_that_print_their_lines_themselves_write_to_the_same_log() -> None:
    printed = subprocess.run([sys.executable, "-c", _CHATTY], capture_output=True, text=True, check=True, cwd=ROOT)

    *lines, deleted, last = [json.loads(line) for line in printed.stderr.splitlines()]
    names = [line["logger"] for line in lines]
    assert [line["event"] for line in lines] == [f"hello from {name}" for name in names]
    assert names[:2] == ["early", "late"]
    assert len(names) == len(set(names)) == 9
    assert printed.stdout == ""
    assert (last["event"], last["thread"], last["level"]) == ("thread_failed", "a thread", "error")
    assert (deleted["event"], deleted["where"], deleted["level"]) == ("error_ignored", "Broken.__del__", "error")
    assert "ZeroDivisionError" in last["exception"]
    assert "ZeroDivisionError" in deleted["exception"]


@pytest.mark.usefixtures("restored_logging")
def test_libraries_draw_no_progress_bars_among_the_lines_unless_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    configure_logs("info", "json")
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"

    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    configure_logs("info", "json")
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "0"


@pytest.mark.usefixtures("restored_logging")
def test_flushing_the_logs_writes_queued_lines(pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch) -> None:
    reader, stream = pipe
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logs("info", "json")
    structlog.get_logger("gateway.test").info("the last words")

    flush_logs()

    os.set_blocking(reader, False)
    assert b"the last words" in os.read(reader, 65536)


def test_lines_larger_than_a_pipe_are_written_whole_and_in_order(pipe: tuple[int, TextIO]) -> None:
    reader, stream = pipe
    handler = QueuedHandler(stream, MANY)
    sizes = [10, 70_000, 40_000, 40_000, 300_000, 10, 65_535, 65_536, 1]
    for number, size in enumerate(sizes):
        handler.emit(record(str(number) * size))

    assert read_lines(reader, len(sizes)) == [str(number) * size for number, size in enumerate(sizes)]


def test_a_line_that_fits_exactly_is_kept_and_room_is_made_by_writing(pipe: tuple[int, TextIO]) -> None:
    reader, stream = pipe
    handler = QueuedHandler(stream, max_bytes=100)
    before = dropped()

    for number in range(50):
        handler.emit(record(f"{number:099}"))  # 100 bytes with its end
        assert read_lines(reader, 1) == [f"{number:099}"]
        handler.flush()
    assert dropped() == before
    handler.emit(record("x" * 100))
    assert dropped() == before + 1


def test_every_line_that_a_closed_log_loses_is_counted(pipe: tuple[int, TextIO]) -> None:
    reader, stream = pipe
    handler = QueuedHandler(stream, MANY)
    fill(stream)
    before = dropped()
    for number in range(10):
        handler.emit(record(f"line {number}"))
    unread = os.dup(reader)
    drain_to_null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(drain_to_null, reader)  # the pipe's only reader is `unread` now
    os.close(drain_to_null)

    os.close(unread)
    handler.flush()

    assert dropped() == before + 10


def test_a_closed_stream_in_memory_loses_the_line_and_raises_nothing() -> None:
    stream = io.StringIO()
    handler = QueuedHandler(stream, MANY)
    stream.close()
    before = dropped()

    handler.emit(record("lost"))

    assert dropped() == before + 1


def test_what_cannot_be_encoded_is_escaped(pipe: tuple[int, TextIO]) -> None:
    reader, stream = pipe
    handler = QueuedHandler(stream, MANY)

    handler.emit(record("a lone \ud83d surrogate, ü"))

    assert read_lines(reader, 1) == ["a lone \\ud83d surrogate, ü"]


@pytest.fixture
def stuck_gateway() -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """Serve fake models with a log that has no reader; yield the process, its address and the log's read end."""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", ONE.replace('"error", "json"', '"info", "json"')],
        env={"GATEWAY_PORT": "0", "DELAY_S": "0"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=writer,
        text=True,
    )
    os.close(writer)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().split()[-1], reader
    finally:
        process.kill()
        process.communicate()
        os.close(reader)


def embed(client: httpx.Client, url: str) -> int:
    return client.post(f"{url}/v1/embeddings", json={"input": "a b", "model": "mini"}, timeout=PATIENCE_S).status_code


def test_an_unread_log_blocks_neither_requests_nor_probes_nor_the_stop(
    stuck_gateway: tuple[subprocess.Popen[str], str, int],
) -> None:
    process, url, _reader = stuck_gateway
    with httpx.Client() as client:
        assert {embed(client, url) for _ in range(600)} == {200}  # 200 kB of lines; the pipe holds 64
        assert client.get(f"{url}/health/live", timeout=PATIENCE_S).status_code == 200
        assert "gateway_log_lines_dropped_total 0.0" in client.get(f"{url}/metrics").text

    process.send_signal(signal.SIGTERM)

    assert process.wait(PATIENCE_S) == 0


def test_every_line_is_there_when_the_reader_comes_late(stuck_gateway: tuple[subprocess.Popen[str], str, int]) -> None:
    process, url, reader = stuck_gateway
    with httpx.Client() as client:
        assert {embed(client, url) for _ in range(300)} == {200}
    content = bytearray()

    def read() -> None:
        while chunk := os.read(reader, 65536):
            content.extend(chunk)

    reading = threading.Thread(target=read)
    reading.start()
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0
    reading.join(PATIENCE_S)

    lines = [json.loads(line) for line in content.splitlines()]
    assert sum(line["event"] == "request" for line in lines) == 300
    assert [line["timestamp"] for line in lines] == sorted(line["timestamp"] for line in lines)
    assert lines[-1]["event"] == "stopping"


_LOGS_WHILE_THE_THREAD_WAITS = """
import threading
import structlog
from gateway.telemetry.logs import configure_logs
configure_logs("info", "json")
nested, is_done, allocate = [], threading.Event(), threading._allocate_lock
def collect():
    # The collector may run here, where the thread begins to wait, and delete an object whose error is logged.
    if threading.current_thread().name == "log" and len(nested) < 50:
        nested.append(len(nested))
        structlog.get_logger("x").error("nested", number=nested[-1])
        if len(nested) == 50:
            is_done.set()
    return allocate()
threading._allocate_lock = collect
structlog.get_logger("x").info("first")
assert is_done.wait(60)
threading._allocate_lock = allocate
structlog.get_logger("x").warning("last")
"""


def test_an_error_that_is_logged_while_the_thread_of_the_log_begins_to_wait_blocks_nothing() -> None:
    command = [sys.executable, "-c", _LOGS_WHILE_THE_THREAD_WAITS]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=100)

    lines = [json.loads(line) for line in printed.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["first", *["nested"] * 50, "last"]
    assert [line["number"] for line in lines[1:-1]] == list(range(50))

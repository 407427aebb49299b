"""Comparisons in separate processes: their progress, their end, and the behavior of faulty programs."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from gateway.comparisons.jobs import MAX_ARMS, Captured, Job, Jobs, JudgeChoice, Wanted, _environment
from gateway.comparisons.runs import Runs
from gateway.errors import BadInput, NotFound

ARMS = ("one", "two")


class Keys:
    """Issues keys, and tracks which are in use."""

    def __init__(self) -> None:
        self.out: set[str] = set()

    def lend(self) -> tuple[str, Callable[[], None]]:
        key = f"key-{len(self.out)}"
        self.out.add(key)
        return key, lambda: self.out.remove(key)


@pytest.fixture
def keys() -> Keys:
    return Keys()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "data" / "mine" / "corpus.jsonl").touch()
    (tmp_path / "data" / "empty").mkdir()
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "results.json").touch()
    return tmp_path


@pytest.fixture
def make_jobs(folder: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Jobs]:
    """Return a function that makes jobs whose command is a Python program."""

    def make(program: str) -> Jobs:
        monkeypatch.setattr(Jobs, "_command", lambda *_: [sys.executable, "-c", f"import sys, time, os\n{program}"])
        return Jobs(Runs(folder), keys.lend)

    return make


async def run(jobs: Jobs, name: str = "new") -> Job:
    """Start a comparison, and wait for its end."""
    job = await jobs.start(Wanted(name, ARMS, "mine"), "http://gateway")
    await job.ended()
    return job


SHOW = 'print(\'{"step": "one: documents", "done": 3, "total": 9}\', file=sys.stderr, flush=True)\n'


async def test_the_progress_is_read_until_the_end(make_jobs: Callable[[str], Jobs], keys: Keys) -> None:
    jobs = make_jobs(SHOW)
    job = await jobs.start(Wanted("new", ARMS, "mine"), "http://gateway")
    assert jobs.running is job

    await job.ended()

    assert (job.state, job.step, job.done, job.total, job.problem) == ("done", "one: documents", 3, 9, "")
    assert jobs.running is None
    assert not keys.out


async def test_a_failure_shows_the_last_lines(make_jobs: Callable[[str], Jobs]) -> None:
    jobs = make_jobs(SHOW + 'print("\\n".join(map(str, range(50))), "no such model", file=sys.stderr)\nsys.exit(1)')

    job = await run(jobs)

    assert job.state == "failed"
    assert job.problem.endswith("48\n49 no such model")
    assert len(job.problem.splitlines()) == 20


async def test_lines_that_do_not_show_progress_do_no_harm(make_jobs: Callable[[str], Jobs]) -> None:
    strange = [
        "[]",
        "1",
        '{"step": 1, "done": 2, "total": 3}',
        '{"step": "a", "done": "b", "total": 3}',
        "\\xff",
    ]
    writes = "".join(f'sys.stderr.buffer.write(b"""{line}\\n""")\n' for line in strange)
    writes += 'sys.stderr.buffer.write(b"x" * 300_000 + b"\\n")\n'
    jobs = make_jobs(f"{writes}{SHOW}sys.exit(3)")

    job = await run(jobs)

    assert (job.state, job.done) == ("failed", 3)


@pytest.mark.parametrize("stubborn", ["", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"])
async def test_a_comparison_is_stopped_also_if_it_does_not_want_to(
    make_jobs: Callable[[str], Jobs], keys: Keys, stubborn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.comparisons.child._GRACE_S", 0.2)
    jobs = make_jobs(f"{stubborn}{SHOW}time.sleep(600)")
    job = await jobs.start(Wanted("new", ARMS, "mine"), "http://gateway")
    while not job.total:  # noqa: ASYNC110  progress has no event: pages ask for it
        await asyncio.sleep(0.01)
    with pytest.raises(BadInput, match="'new' is running: wait for it, or stop it"):
        await jobs.start(Wanted("other", ARMS, "mine"), "http://gateway")

    await jobs.stop("new")

    assert job.state == "stopped"
    assert job.child is not None
    with pytest.raises(ProcessLookupError):
        os.kill(job.child.pid, 0)
    assert not keys.out
    with pytest.raises(NotFound, match="no comparison 'new' is running"):
        await jobs.stop("new")


async def test_the_end_of_the_gateway_ends_its_comparison(make_jobs: Callable[[str], Jobs], keys: Keys) -> None:
    jobs = make_jobs("time.sleep(600)")
    job = await jobs.start(Wanted("new", ARMS, "mine"), "http://gateway")

    await jobs.close()

    assert job.state == "stopped"
    assert not keys.out
    assert job.child is not None
    assert await job.child.wait() == -15


async def test_a_comparison_whose_messages_are_unread_is_canceled_without_a_trace(
    make_jobs: Callable[[str], Jobs], keys: Keys
) -> None:
    """With its buffer full, the library stops to read, and does not learn that the pipe was closed."""
    jobs = make_jobs(f"{SHOW}for _ in range(9_000): sys.stderr.write(chr(120) * 60 + chr(10))\ntime.sleep(600)")
    job = await jobs.start(Wanted("new", ARMS, "mine"), "http://gateway")
    while not job.total:  # noqa: ASYNC110  progress has no event: pages ask for it
        await asyncio.sleep(0.01)
    assert job.task is not None

    job.task.cancel()
    await job.ended()

    assert job.task.cancelled()
    assert not keys.out
    assert job.child is not None
    assert await job.child.wait() == -15


async def test_a_program_that_cannot_be_started_is_a_failure(
    folder: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(folder / "nothing"))
    jobs = Jobs(Runs(folder), keys.lend)

    job = await run(jobs)

    assert (job.state, job.problem) == ("failed", "the command cannot be started: No such file or directory")
    assert not keys.out


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted("../out", ARMS, "mine"), "the name of a comparison has .*; got '../out'"),
        (Wanted("", ARMS, "mine"), "the name of a comparison has"),
        (Wanted("data", ARMS, "mine"), "'data' is the folder of the data sets: choose another name"),
        (Wanted("done", ARMS, "mine"), "a comparison 'done' already exists"),
        (Wanted("new", ("one",), "mine"), f"1 models were sent; 2 to {MAX_ARMS} are accepted"),
        (Wanted("new", ("one", "--out=/etc"), "mine"), "'--out=/etc' is not a model's name"),
        (Wanted("new", ("one", "a\nb"), "mine"), "is not a model's name"),
        (Wanted("new", ("one", ""), "mine"), "is not a model's name"),
        (Wanted("new", ARMS, "../../etc"), "no data set is called '../../etc'; available: mine"),
        (Wanted("new", ARMS, "empty"), "no data set is called 'empty'"),
    ],
)
async def test_an_impossible_comparison_is_refused_before_anything_runs(
    make_jobs: Callable[[str], Jobs], wanted: Wanted, message: str
) -> None:
    jobs = make_jobs("")
    with pytest.raises(BadInput, match=message.replace("(", r"\(")):
        await jobs.start(wanted, "http://gateway")
    assert jobs.all() == []


async def test_the_name_of_a_comparison_that_was_stopped_is_free(
    make_jobs: Callable[[str], Jobs], folder: Path
) -> None:
    """`gateway compare` claims its folder at once; one that is killed leaves it empty."""
    (folder / "new").mkdir()
    (folder / "link").symlink_to(folder / "nowhere")
    jobs = make_jobs("")

    assert (await run(jobs)).state == "done"
    with pytest.raises(BadInput, match="'link' already exists"):
        await jobs.start(Wanted("link", ARMS, "mine"), "http://gateway")


async def test_only_the_last_ones_are_remembered(make_jobs: Callable[[str], Jobs]) -> None:
    jobs = make_jobs("")
    for number in range(25):
        with suppress(ValueError):
            await run(jobs, f"run {number}")
    assert [job.wanted.name for job in jobs.all()] == [f"run {number}" for number in range(24, 4, -1)]


def test_the_command_has_no_secret_and_no_proxy() -> None:
    environ = {
        "GATEWAY_ADMIN_KEY": "secret",
        "gateway_api_keys": "secret",
        "HTTP_PROXY": "http://proxy",
        "HOME": "/home",
    }

    passed = _environment(environ, "lent")

    assert "secret" not in str(passed)
    assert passed["EMBEDDINGS_API_KEY"] == "lent"
    assert passed["NO_PROXY"] == passed["no_proxy"] == "*"
    assert passed["HOME"] == "/home"
    assert _environment(environ, "lent", JudgeChoice("http://host", "m", "key"))["JUDGE_API_KEY"] == "key"
    assert "JUDGE_API_KEY" not in _environment(environ, "lent", JudgeChoice("http://host", "m"))


def test_the_command_takes_names_as_they_are(folder: Path, keys: Keys) -> None:
    wanted = Wanted(
        "new",
        ("one@256", "two+hybrid"),
        "mine",
        max_documents=100,
        margin=0.02,
        measures_cost=False,
        queries=Captured("search", Path("/captured/queries.jsonl")),
        judge=JudgeChoice("http://host/v1", "-judge", "secret", 5_000),
    )

    command = Jobs(Runs(folder), keys.lend)._command(wanted, "http://gateway")

    assert command[-3:] == ["--", "one@256", "two+hybrid"]
    assert command[1:6] == ["-m", "gateway", "compare", "--url", "http://gateway"]
    for option, value in (
        ("--out", folder / "new"), ("--data", folder / "data" / "mine"), ("--max-documents", 100), ("--margin", 0.02),
    ):  # fmt: skip
        assert command[command.index(option) + 1] == str(value)
    assert {"--no-cost", "--queries=/captured/queries.jsonl", "--judge=http://host/v1", "--judge-model=-judge"} <= set(
        command
    )
    assert command[command.index("--judge-budget") + 1] == "5000"
    assert "secret" not in str(command)


async def test_a_data_set_is_not_deleted_while_a_comparison_on_it_starts_or_runs(
    make_jobs: Callable[[str], Jobs], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = make_jobs("time.sleep(60)")
    is_checking, may_start = threading.Event(), threading.Event()
    check = jobs._check

    def slow_check(wanted: Wanted) -> None:
        check(wanted)
        is_checking.set()
        may_start.wait(10)

    monkeypatch.setattr(jobs, "_check", slow_check)
    starting = asyncio.create_task(jobs.start(Wanted("new", ARMS, "mine"), "http://gateway"))
    await asyncio.to_thread(is_checking.wait, 10)
    deleting = asyncio.create_task(jobs.remove_data_set("mine"))
    await asyncio.sleep(0)  # it is at the lock
    may_start.set()
    await starting

    for attempt in (deleting, jobs.remove_data_set("mine")):
        with pytest.raises(BadInput, match="the comparison 'new' needs it: wait for it, or stop it"):
            await attempt
    assert (folder / "data" / "mine").is_dir()

    await jobs.stop("new")
    await jobs.remove_data_set("mine")
    assert not (folder / "data" / "mine").exists()

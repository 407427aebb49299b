"""Comparisons that run now: ``gateway compare`` in a separate process, with its progress read line by line.

It is a separate process, because a comparison computes for minutes, holds a corpus in memory, and must be stoppable.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

import structlog

from gateway.comparisons.child import Child, without_settings
from gateway.comparisons.runs import Runs
from gateway.comparisons.uploads import remove_data_set
from gateway.config.wording import cut
from gateway.errors import BadInput, NotFound

log = structlog.get_logger(__name__)

MAX_ARMS: Final = 6
_MAX_ARM: Final = 200
_MAX_JUDGE: Final = 1_000
_LEAST_S_BETWEEN_CHANGES: Final = 0.2
_MAX_JOBS: Final = 20  # the number of comparisons that are remembered
_MAX_LINES: Final = 20
_NICE: Final = 10
_DATA: Final = "data"
_CACHE: Final = ".vectors"

State = Literal["running", "done", "failed", "stopped"]
LendKey = Callable[[], tuple[str, Callable[[], None]]]
"""Returns a key for the requests of a comparison, and the function that makes it invalid."""


@dataclass(frozen=True, slots=True)
class JudgeChoice:
    """A chat model that grades the results.

    Attributes:
        url: the address of an API like OpenAI's.
        key: the key for that API; empty to use the variable ``JUDGE_API_KEY``.
        max_tokens: the budget that is agreed to in advance; ``None`` to ask when the price is known.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Captured:
    """The captured queries of an alias or an experiment.

    Attributes:
        file: the file without a date, see :meth:`gateway.config.capture.Capture.path`.
    """

    name: str
    file: Path


@dataclass(frozen=True, slots=True)
class Wanted:
    """A comparison to make.

    Attributes:
        name: the name of the folder for its results.
        arms: the arms, as for ``gateway compare``, the baseline first.
        data: the name of a data set.
        max_documents: the size of the sample; ``None`` for all documents.
        margin: the margin of the verdicts; ``None`` for the default.
        queries: queries that replace those of the data set.
    """

    name: str
    arms: Sequence[str]
    data: str
    max_documents: int | None = None
    margin: float | None = None
    measures_cost: bool = True
    queries: Captured | None = None
    judge: JudgeChoice | None = None


@dataclass(slots=True)
class Job:
    """A comparison that was started here.

    Attributes:
        step: the current step, such as ``jina: documents``.
        done, total: the numbers of finished texts and of all texts of this step; a total of 0 is unknown.
        question: the judge's price, while the comparison waits for consent.
        problem: the reason why it failed.
        task: the task that follows it to its end.
        version: the number of changes so far.
    """

    wanted: Wanted
    started: datetime
    state: State = "running"
    step: str = "it starts"
    done: int = 0
    total: int = 0
    question: str = ""
    problem: str = ""
    child: Child | None = field(default=None, repr=False)
    task: asyncio.Task[None] | None = field(default=None, repr=False)
    version: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def note_change(self) -> None:
        """Wake all that wait for a change."""
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def next_change(self, version: int, timeout_s: float) -> None:
        """Wait until the version changes. Changes in quick succession count as one."""
        await asyncio.sleep(min(timeout_s, _LEAST_S_BETWEEN_CHANGES))
        if self.version == version:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout_s)

    async def ended(self) -> None:
        """Wait for the end."""
        if self.task is not None:
            await asyncio.wait([self.task])


class Jobs:
    """Starts comparisons, one at a time, and remembers the last ones.

    Args:
        runs: the folder of the results. Its folder ``data`` holds the data sets.
        lend_key: returns the key for requests to this gateway.
    """

    def __init__(self, runs: Runs, lend_key: LendKey) -> None:
        self._runs = runs
        self._lend_key = lend_key
        self._jobs: dict[str, Job] = {}
        # No data set is deleted between the check of a comparison on it and its start.
        self._starting = asyncio.Lock()

    @property
    def data_folder(self) -> Path:
        """The folder of the data sets."""
        return self._runs.folder / _DATA

    def data_sets(self) -> list[str]:
        """Return the names of the data sets. Blocking."""
        try:
            found = [path for path in self.data_folder.iterdir() if (path / "corpus.jsonl").is_file()]
        except OSError:
            return []
        return sorted(path.name for path in found if self._runs.is_name(path.name))

    def all(self) -> list[Job]:
        """Return the comparisons that were started here, the latest first."""
        return list(reversed(self._jobs.values()))

    def find(self, name: str) -> Job | None:
        """Return a comparison that was started here, if it is remembered."""
        return self._jobs.get(name)

    @property
    def running(self) -> Job | None:
        """The comparison that runs now."""
        return next((job for job in self._jobs.values() if job.state == "running"), None)

    async def start(self, wanted: Wanted, url: str) -> Job:
        """Start a comparison.

        Args:
            url: the address of this gateway.

        Raises:
            BadInput: the request is not valid, or another comparison runs.
        """
        async with self._starting:
            await asyncio.to_thread(self._check, wanted)
            if self.running is not None:
                raise BadInput(f"the comparison {self.running.wanted.name!r} is running: wait for it, or stop it")
            job = Job(wanted, datetime.now(UTC).replace(microsecond=0))
            self._jobs.pop(wanted.name, None)
            self._jobs[wanted.name] = job
        while len(self._jobs) > _MAX_JOBS:
            del self._jobs[next(iter(self._jobs))]
        job.task = asyncio.create_task(self._run(job, url))
        return job

    async def remove_data_set(self, name: str) -> None:
        """Delete a data set, unless a comparison needs it.

        Raises:
            NotFound: there is no such data set.
            BadInput: a comparison on it is running, or it cannot be deleted.
        """
        async with self._starting:
            if self.running is not None and self.running.wanted.data == name:
                raise BadInput(f"the comparison {self.running.wanted.name!r} needs it: wait for it, or stop it")
            await asyncio.to_thread(remove_data_set, self.data_folder, name)

    async def stop(self, name: str) -> Job:
        """Stop a comparison, and wait for its end.

        Raises:
            NotFound: no such comparison runs.
        """
        job = self._jobs.get(name)
        if job is None or job.state != "running":
            raise NotFound(f"no comparison {cut(name)!r} is running")
        job.state = "stopped"
        if job.child is not None:
            await job.child.end()
        await job.ended()
        return job

    async def answer(self, name: str, *, is_agreed: bool) -> Job:
        """Agree to the price of the judge, or continue without the judge.

        Raises:
            NotFound: no such comparison waits for an answer.
        """
        job = self._jobs.get(name)
        stdin = None if job is None or job.child is None else job.child.stdin
        if job is None or stdin is None or job.state != "running" or not job.question:
            raise NotFound(f"no comparison {cut(name)!r} waits for an answer")
        job.question = ""
        with suppress(ConnectionError):  # it has ended in the meantime
            stdin.write(b"yes\n" if is_agreed else b"no\n")
            await stdin.drain()
        job.note_change()
        return job

    async def close(self) -> None:
        """Stop the comparison that runs."""
        if self.running is not None:
            await self.stop(self.running.wanted.name)

    def _check(self, wanted: Wanted) -> None:
        self._runs.check_name(wanted.name, "comparison")
        if wanted.name == _DATA:
            raise BadInput(f"{_DATA!r} is the folder of the data sets: choose another name", param="name")
        if not self._runs.is_free(wanted.name):
            raise BadInput(f"a comparison {wanted.name!r} already exists: choose another name", param="name")
        if not 2 <= len(wanted.arms) <= MAX_ARMS:
            raise BadInput(f"{len(wanted.arms)} models were sent; 2 to {MAX_ARMS} are accepted", param="arms")
        for arm in wanted.arms:
            if not arm.isprintable() or not 0 < len(arm) <= _MAX_ARM or arm.startswith("-"):
                raise BadInput(f"{cut(arm)!r} is not a model's name", param="arms")
        if wanted.judge is not None:
            _check_judge(wanted.judge)
        known = self.data_sets()
        if wanted.data not in known:
            where = f"put one into {self.data_folder}/NAME, with corpus.jsonl and queries.jsonl"
            raise BadInput(
                f"no data set is called {cut(wanted.data)!r}; available: {', '.join(known) or 'none'}; {where}",
                param="data",
            )

    async def _run(self, job: Job, url: str) -> None:
        """Run the command, and follow it to its end."""
        key, give_back = self._lend_key()
        last: deque[str] = deque(maxlen=_MAX_LINES)
        code = None
        try:
            environ = _environment(os.environ, key, job.wanted.judge)
            child = job.child = await Child.start(self._command(job.wanted, url), environ, has_stdin=True)
            try:
                with suppress(OSError):  # requests of clients come first
                    os.setpriority(os.PRIO_PROCESS, child.pid, _NICE)
                if job.state != "running":  # it was stopped before the process started
                    await child.end()
                await _follow(child.stderr, job, last)
                code = await child.wait()
            finally:  # the process must not outlive a canceled task
                await child.end()
        except OSError as error:
            last.append(f"the command cannot be started: {error.strerror}")
        finally:
            give_back()
        if job.state == "running":
            job.state = "done" if code == 0 else "failed"
            job.problem = "" if code == 0 else "\n".join(last) or f"it ended with code {code}"
        job.question = ""
        job.note_change()
        log.info("comparison_ended", name=job.wanted.name, state=job.state, code=code)

    def _command(self, wanted: Wanted, url: str) -> list[str]:
        command = [sys.executable, "-m", "gateway", "compare", "--url", url, "--progress", "json"]
        command += ["--data", str(self.data_folder / wanted.data)]
        command += ["--out", str(self._runs.path(wanted.name)), "--cache", str(self._runs.folder / _CACHE)]
        if wanted.max_documents is not None:
            command += ["--max-documents", str(wanted.max_documents)]
        if wanted.margin is not None:
            command += ["--margin", str(wanted.margin)]
        command += [] if wanted.measures_cost else ["--no-cost"]
        if wanted.queries is not None:
            command += [f"--queries={wanted.queries.file}"]
        if (judge := wanted.judge) is not None:
            command += [f"--judge={judge.url}", f"--judge-model={judge.model}"]
            command += [] if judge.max_tokens is None else ["--judge-budget", str(judge.max_tokens)]
        return [*command, "--", *wanted.arms]


def _check_judge(judge: JudgeChoice) -> None:
    """Check a judge without sending it a request.

    Raises:
        BadInput: its address or its model cannot be right.
    """
    if not all(0 < len(text) <= _MAX_JUDGE and text.isprintable() for text in (judge.url, judge.model)):
        raise BadInput("a judge needs the address of an API, and the name of a model there", param="judge")
    try:
        address = urlsplit(judge.url)
        is_address = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        message = f"{cut(judge.url)!r} is not the address of an API, such as http://127.0.0.1:8080/v1"
        raise BadInput(message, param="judge")
    if address.username is not None:
        raise BadInput("the address of the judge contains a password: send the key separately", param="judge")
    if not judge.key.isascii() or not judge.key.isprintable():
        message = "the key of the judge may contain only printable ASCII characters: check it for line breaks"
        raise BadInput(message, param="judge")


def _environment(environ: Mapping[str, str], key: str, judge: JudgeChoice | None = None) -> dict[str, str]:
    """Return the variables of the command: without the gateway's secrets, and with a key, but no proxy, for its requests."""
    kept = without_settings(environ)
    for name in ("NO_PROXY", "no_proxy"):
        kept[name] = "*"
    if judge is not None and judge.key:
        kept["JUDGE_API_KEY"] = judge.key
    return kept | {"EMBEDDINGS_API_KEY": key, "PYTHONUNBUFFERED": "1"}


async def _follow(messages: asyncio.StreamReader, job: Job, last: deque[str]) -> None:
    """Read the progress until the command closes its output; keep the last lines that are something else."""
    while True:
        try:
            line = await messages.readline()
        except ValueError:  # the line is longer than the limit
            continue
        if not line:
            return
        text = line.decode("utf-8", "replace").rstrip()
        try:
            match json.loads(text):
                case {"step": str(step), "done": int(done), "total": int(total)}:
                    job.step, job.done, job.total = step, done, total
                    job.note_change()
                case {"question": str(question)}:
                    job.question = question
                    job.note_change()
                case _:
                    last.append(text)
        except ValueError:
            last.append(text)

"""Run a job again and again, and kill it each time at a random moment, until it is done.

    python -m tests.bulk.killed SOURCE SINK SEED

A separate program, so that nothing but the job runs in the processes that it forks and kills. Prints how many were killed.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pyarrow.parquet  # noqa: F401  before the forks

from gateway.bulk.fake import FakeEmbedder
from gateway.bulk.fields import FieldNames
from gateway.bulk.job import Job, Options, Silent
from gateway.bulk.manifest import Manifest
from gateway.bulk.opening import open_sink, open_source

SHARD_ROWS = 100
_KILLS = 25
_LONGEST_S = 0.2
# Events that Python reports where files are opened, renamed and so on: a process is killed before one of them.
_EVENTS = ("open", "os.rename", "os.truncate", "os.listdir", "os.scandir")


def work(source_path: str, sink_path: str, kill_at_call: int = 0) -> None:
    """Do the rest of the job."""
    calls = 0

    def on_call(_texts: Sequence[str]) -> None:
        nonlocal calls
        calls += 1
        if calls == kill_at_call:
            os.kill(os.getpid(), signal.SIGKILL)

    embedder = FakeEmbedder(outputs=("dense", "sparse", "multivector"), on_call=on_call)
    embedder.block_texts, embedder.max_texts = 40, 16
    source = open_source([source_path], FieldNames())
    sink = open_sink(sink_path, source.text_field)
    folder = Path(sink_path)
    folder.mkdir(exist_ok=True)
    with closing(Manifest(folder / "_manifest.sqlite3")) as manifest:
        progress = manifest.begin({"source hash": source.fingerprint(), "space": embedder.note.space})
        options = Options(folder / "_errors.jsonl", "skip", SHARD_ROWS)
        job = Job(source, sink, manifest, embedder, options, Silent())
        asyncio.run(job.run(progress, asyncio.Event()))


def _work_and_be_killed(source_path: str, sink_path: str, rng: random.Random) -> None:
    kill_at_call = kill_at_event = 0
    match rng.randrange(3):
        case 0:
            kill_at_call = rng.randint(1, 60)
        case 1:
            kill_at_event = rng.randint(1, 40)
        case _:
            # The default action of this signal ends a process immediately.
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.001, _LONGEST_S))
    events = 0

    def hook(event: str, _arguments: object) -> None:
        nonlocal events
        if event in _EVENTS and kill_at_event:
            events += 1
            if events == kill_at_event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    work(source_path, sink_path, kill_at_call)


def main() -> None:
    source_path, sink_path, seed = sys.argv[1:]
    rng = random.Random(int(seed))
    num_killed = 0
    deadline = time.monotonic() + 60
    for _ in range(_KILLS):
        child = os.fork()
        if child == 0:
            _work_and_be_killed(source_path, sink_path, rng)
            os._exit(0)
        rng.random()
        rng = random.Random(rng.random())
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
        num_killed += os.WIFSIGNALED(status)
        assert time.monotonic() < deadline
    work(source_path, sink_path)
    sys.stdout.write(f"{num_killed}\n")


if __name__ == "__main__":
    main()

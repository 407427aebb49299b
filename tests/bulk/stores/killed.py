"""Run a job into a store again and again, and kill it each time at a random moment while it writes, until it is done.

    python -m tests.bulk.stores.killed SOURCE SINK STATE OUTPUTS

STATE is the folder of the manifest.

Prints how many were killed.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import random
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from gateway.bulk.fake import FakeEmbedder
from gateway.bulk.fields import FieldNames
from gateway.bulk.job import Job, Options, Silent
from gateway.bulk.manifest import Manifest
from gateway.bulk.opening import open_sink, open_source

SHARD_ROWS = 20
_LONGEST_S = (0.02, 0.05, 0.1, 0.2)
"""The limits of the random times after which the process is killed, one for each attempt."""


def work(source_url: str, sink_url: str, state: Path, outputs: Sequence[str], kill_after_s: float = 0.0) -> None:
    """Do the rest of the job, and be killed some time after the first text is embedded."""

    def on_call(_texts: Sequence[str]) -> None:
        if kill_after_s and signal.getitimer(signal.ITIMER_REAL)[0] == 0:
            # The default action of this signal ends a process immediately.
            signal.setitimer(signal.ITIMER_REAL, kill_after_s)

    embedder = FakeEmbedder(outputs=outputs, on_call=on_call)
    embedder.block_texts, embedder.max_texts = 16, 8
    state.mkdir(exist_ok=True)
    with (
        closing(open_source([source_url], FieldNames())) as source,
        closing(open_sink(sink_url, source.text_field)) as sink,
        closing(Manifest(state / "manifest.sqlite3")) as manifest,
    ):
        progress = manifest.begin({"source hash": source.fingerprint(), "space": embedder.note.space})
        job = Job(source, sink, manifest, embedder, Options(state / "errors.jsonl", "stop", SHARD_ROWS), Silent())
        asyncio.run(job.run(progress, asyncio.Event()))


def main() -> None:
    source, sink, state, outputs = sys.argv[1:]
    rng = random.Random()
    num_killed = 0
    kind = sink.partition(":")[0]
    if kind != "lancedb":  # which starts threads that a fork does not copy
        importlib.import_module(f"gateway.bulk.stores.{kind}")
    for longest_s in _LONGEST_S:
        kill_after_s = rng.uniform(0.001, longest_s)
        child = os.fork()
        if child == 0:
            work(source, sink, Path(state), outputs.split(","), kill_after_s)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
        num_killed += os.WIFSIGNALED(status)
    work(source, sink, Path(state), outputs.split(","))
    sys.stdout.write(f"{num_killed}\n")


if __name__ == "__main__":
    main()

"""Jobs of ``gateway embed`` in a separate process, for :mod:`bench.embed`: one JSON line in, one out.

python -m bench.embed_job real|fake
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import orjson
import psutil

from bench.bare import MODEL
from bench.processes import ROOT
from gateway.bulk.embedder import Embedder
from gateway.bulk.fake import FakeEmbedder
from gateway.bulk.fields import FieldNames
from gateway.bulk.files.source import open_files
from gateway.bulk.job import SHARD_ROWS, Job, Options, Outcome
from gateway.bulk.manifest import Manifest
from gateway.bulk.model_spec import ModelSpec
from gateway.bulk.opening import open_sink
from gateway.config.registry import load_registry
from gateway.config.settings import Settings

_WIDTH = 384
_SAMPLE_S = 0.1
_MIB = 2**20


class Memory:
    """A reporter that notes the resident memory of this process over the rows that are done."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.samples: list[tuple[int, float]] = []
        self._process = psutil.Process()

    def start(self, done: int, total: int | None) -> None:
        self.num_rows = done

    def advance(self, number: int) -> None:
        self.num_rows += number

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take samples while the context lasts."""
        end = Event()

        def watch() -> None:
            while not end.wait(_SAMPLE_S):
                self.samples.append((self.num_rows, self._process.memory_info().rss / _MIB))

        thread = Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()


async def run_job(embedder: Embedder, source: Path, folder: Path, memory: Memory, shard_rows: int) -> Outcome:
    """Embed a file of JSON lines into Parquet files in a folder, as the command does."""
    opened = open_files([str(source)], FieldNames())
    sink = open_sink(str(folder), opened.text_field)
    with closing(Manifest(folder / "_manifest.sqlite3")) as manifest, memory.watching():
        progress = manifest.begin({"source hash": opened.fingerprint(), "space": embedder.note.space})
        options = Options(folder / "_errors.jsonl", shard_rows=shard_rows)
        job = Job(opened, sink, manifest, embedder, options, memory)
        return await job.run(progress, asyncio.Event())


def write_source(path: Path, texts: Iterator[str]) -> None:
    """Write texts as JSON lines, with ids and two more fields."""
    with path.open("wb") as file:
        for i, text in enumerate(texts):
            file.write(orjson.dumps({"id": f"row-{i}", "text": text, "number": i, "language": "en"}) + b"\n")


def fake_texts(num_rows: int) -> Iterator[str]:
    """Yield texts of 5 to 60 words, of which no two are equal."""
    for i in range(num_rows):
        yield f"row {i} " + "some words of a text " * (1 + i % 12)


@asynccontextmanager
async def _embedder(kind: str) -> AsyncIterator[Embedder]:
    if kind == "fake":
        fake = FakeEmbedder(_WIDTH)
        fake.block_texts, fake.max_texts, fake.max_characters = 2048, 2048, 1_000_000
        yield fake
        return
    from gateway.bulk.local import local_embedder

    async with local_embedder(load_registry(ROOT / "models.yaml", {}), Settings(), ModelSpec(MODEL)) as local:
        yield local


async def _answer(kind: str, questions: Iterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    async with _embedder(kind) as embedder:
        for line in questions:
            question = orjson.loads(line)
            with tempfile.TemporaryDirectory(prefix="bench-embed-") as name:
                source, folder = Path(name) / "source.jsonl", Path(name) / "out"
                folder.mkdir()
                write_source(source, iter(question["texts"]) if "texts" in question else fake_texts(question["rows"]))
                memory = Memory()
                started = time.perf_counter()
                outcome = await run_job(embedder, source, folder, memory, question.get("shard_rows", SHARD_ROWS))
                yield {
                    "seconds": time.perf_counter() - started,
                    "rows": outcome.done.rows,
                    "tokens": outcome.done.tokens,
                    "samples": memory.samples,
                }


async def _serve(kind: str, answers: Any) -> None:
    async for answer in _answer(kind, iter(sys.stdin.buffer)):
        answers.write(orjson.dumps(answer) + b"\n")
        answers.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("real", "fake"))
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr  # so that output of the libraries does not look like an answer
    asyncio.run(_serve(parser.parse_args().kind, answers))


if __name__ == "__main__":
    main()

"""Backends of replicas for tests, made in the replicas' processes. A model's id determines how it behaves."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Container
from pathlib import Path

from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.model_entry import ModelEntry
from gateway.config.settings import Settings
from gateway.errors import LoadError
from gateway.types import Embeddings, EmbedJob

MAKE = "tests.cluster.fakes:make"


def make(entry: ModelEntry, _settings: Settings, _on_card_lost: Callable[[str], None]) -> Diary:
    """Return a fake: ``liar…`` has other weights in each process, ``broken…`` does not load, ``…-delay200`` takes 200 ms."""
    folder = Path(entry.source)
    delay = re.search(r"-delay(\d+)", entry.id)
    if entry.id.startswith("broken"):
        raise LoadError("the checkpoint is broken")
    salt = str(os.getpid()) if entry.id.startswith("liar") else ""
    fingerprint = (f"{entry.max_tokens or 0:x}" + salt).ljust(64, "0")
    info = fake_info(entry.id, source=entry.source, fingerprint=fingerprint)
    return Diary(info, delay_s=int(delay.group(1)) / 1000 if delay else 0.0, folder=folder)


class Diary(FakeBackend):
    """A fake that records its events in a folder: its start, and begun and canceled texts."""

    def __init__(self, info: object, *, delay_s: float, folder: Path) -> None:
        super().__init__(info, delay_s=delay_s)  # type: ignore[arg-type]
        self._folder = folder
        self.note("started", str(os.getpid()))

    def note(self, event: str, text: str) -> None:
        path = self._folder / f"{event}-{os.getpid()}-{time.monotonic_ns()}"
        half = path.with_name(f"half-{path.name}")
        half.write_text(text)
        half.rename(path)  # no reader sees half of it

    async def embed(self, job: EmbedJob) -> Embeddings:
        if job.texts[0].startswith("noted"):
            self.note("begun", f"{job.texts[0]} {job.deadline - time.monotonic():.3f}")
        try:
            if job.texts[0].startswith("noted slow"):
                await asyncio.sleep(30)
            return await super().embed(job)
        except asyncio.CancelledError:
            self.note("canceled", job.texts[0])
            raise


def notes(folder: Path, event: str, left_out: Container[str] = ()) -> list[str]:
    """Return the notes of all replicas about an event, in order, but for some files."""
    paths = [path for path in folder.glob(f"{event}-*") if path.name not in left_out]
    return [path.read_text() for path in sorted(paths, key=lambda path: int(path.name.rsplit("-", 1)[1]))]

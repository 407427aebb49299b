"""The registry is read again in the middle of a batch: models are removed, added and changed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from gateway.app import create_app
from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import ModelEntry, Registry, load_registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.types import EmbedJob

NUM_LINES = 400
_ENTRY = "  - {{id: {0}, source: ./{1}, enabled: true, allow_space_change: true}}\n"


class Reloaded:
    """A gateway whose registry changes while it answers the hundredth request.

    Attributes:
        after: the registry from then on.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "models.yaml"
        self._num_jobs = 0
        self._is_far = asyncio.Event()
        self._write("one", "one")
        settings = Settings(batch_dir=folder / "batches")
        self.deployment = Deployment(self._read(), settings, read_registry=self._read, make_backend=self._make)

    def _make(self, entry: ModelEntry) -> FakeBackend:
        info = fake_info(entry.id, fingerprint=entry.source.encode().hex())
        return FakeBackend(info, delay_s=0.005, on_embed=self._note)

    def _note(self, _job: EmbedJob) -> None:
        self._num_jobs += 1
        if self._num_jobs == 100:
            self._is_far.set()

    def _read(self) -> Registry:
        return load_registry(self._file, {})

    def _write(self, source: str, alias: str | None) -> None:
        entries = _ENTRY.format("one", source) + _ENTRY.format("two", "two")
        aliases = f"aliases: {{name: {{model: {alias}, allow_space_change: true}}}}\n" if alias else ""
        self._file.write_text(f"version: 1\nmodels:\n{entries}{aliases}", encoding="utf-8")

    async def run(self, name: str, source: str, alias: str | None) -> tuple[Any, list[Any], list[Any]]:
        """Run a batch, and change the registry in the middle of it; return the batch, its answers and its errors."""
        lines = [
            {
                "custom_id": str(i),
                "method": "POST",
                "url": "/v1/embeddings",
                "body": {"model": name, "input": f"text {i}"},
            }
            for i in range(NUM_LINES)
        ]
        content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        transport = httpx.ASGITransport(create_app(self.deployment))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway/v1") as http:
            client = AsyncOpenAI(api_key="any", base_url="http://gateway/v1", http_client=http)
            file = await client.files.create(file=("requests.jsonl", content), purpose="batch")
            batch = await client.batches.create(
                input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
            )
            await self._is_far.wait()
            self._write(source, alias)
            await self.deployment.reload()
            async with asyncio.timeout(30):
                while batch.status not in ("completed", "failed"):
                    await asyncio.sleep(0.01)
                    batch = await client.batches.retrieve(batch.id)
            outputs = []
            for file_id in (batch.output_file_id, batch.error_file_id):
                text = (await client.files.content(file_id)).text if file_id else ""
                outputs.append([json.loads(line) for line in text.splitlines()])
        return batch, *outputs


@pytest.fixture
async def reloaded(tmp_path: Path) -> AsyncIterator[Reloaded]:
    found = Reloaded(tmp_path)
    await found.deployment.start()
    yield found
    await found.deployment.stop()


@pytest.mark.parametrize(
    ("name", "source", "alias"), [("name", "one", "two"), ("one", "other", "one")], ids=["alias", "weights"]
)
async def test_a_batch_never_has_vectors_of_two_spaces(reloaded: Reloaded, name: str, source: str, alias: str) -> None:
    batch, answers, errors = await reloaded.run(name, source, alias)

    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == (
        "completed", len(answers), len(errors)
    )  # fmt: skip
    assert len(answers) >= 50
    assert len(errors) >= 100
    assert {row["custom_id"] for row in [*answers, *errors]} == {str(i) for i in range(NUM_LINES)}
    assert [row["custom_id"] for row in answers] == [str(i) for i in range(len(answers))], "those before the reload"
    assert {row["response"]["status_code"] for row in errors} == {412}
    assert {row["response"]["body"]["error"]["code"] for row in errors} == {"space_mismatch"}


async def test_a_name_that_is_gone_fails_the_requests_that_are_left(reloaded: Reloaded) -> None:
    batch, answers, errors = await reloaded.run("name", "one", None)

    assert batch.status == "completed"
    assert len(answers) >= 50
    assert len(answers) + len(errors) == NUM_LINES
    assert {row["response"]["status_code"] for row in errors} == {404}


async def test_a_reload_that_changes_nothing_of_the_model_costs_no_request(reloaded: Reloaded) -> None:
    batch, answers, errors = await reloaded.run("one", "one", None)

    assert (batch.status, len(answers), errors) == ("completed", NUM_LINES, [])

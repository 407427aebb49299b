"""Chunks of bulk jobs with a real model: their vectors are those of the slices, alone or together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from gateway.bulk.chunking import Chunk, Chunker, Chunking
from gateway.bulk.embedder import BlockEmbedder
from gateway.bulk.local import LocalEmbedder, local_embedder
from gateway.bulk.model_spec import ModelSpec
from gateway.bulk.rows import Row
from gateway.config.registry import ModelEntry, Registry
from gateway.config.settings import Settings
from tests.models.checkpoints import MAX_TOKENS, SENTENCES

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = ". ".join(sentence.rstrip(".") for sentence in SENTENCES * 3) + "."


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def embedder(jina: Path) -> AsyncIterator[LocalEmbedder]:
    """Load a small Jina v3, whose documents have an instruction."""
    entry = ModelEntry(
        id="jina", source=str(jina), device="cpu", dtype="float32", runtime="torch", default_task="text-matching"
    )
    registry = Registry(path=Path("models.yaml"), version=1, models=(entry,))
    async with local_embedder(registry, Settings(cpu_threads=1), ModelSpec("jina")) as embedder:
        yield embedder


async def chunks_of(embedder: LocalEmbedder, chunking: Chunking) -> list[Chunk]:
    tokens = await embedder.tokens()
    chunking.check(tokens, "jina")
    rows = list(Chunker(chunking, tokens).expand(Row("d", TEXT, {}, "docs:1", 1)))
    chunks = [row for row in rows if isinstance(row, Chunk)]
    assert len(chunks) == len(rows) > 3
    return chunks


async def test_chunks_are_embedded_whole_and_as_the_slices_they_are(embedder: LocalEmbedder) -> None:
    limit = MAX_TOKENS // 2
    chunks = await chunks_of(embedder, Chunking(limit, overlap=4))
    embedded = await BlockEmbedder(embedder).embed(chunks)
    assert embedded.num_truncated == 0
    for chunk, vector in zip(chunks, embedded.embedded.dense, strict=True):
        alone = await embedder.embed([TEXT[int(chunk.payload["chunk_start"]) : int(chunk.payload["chunk_stop"])]])
        assert alone.num_tokens <= limit  # by the model's own count
        np.testing.assert_allclose(vector, alone.dense[0], atol=2e-6)


async def test_late_chunks_are_those_of_the_service(embedder: LocalEmbedder) -> None:
    chunks = await chunks_of(embedder, Chunking(MAX_TOKENS // 3, is_late=True))
    embedded = await BlockEmbedder(embedder).embed(chunks)
    windows = dict.fromkeys(chunk.window for chunk in chunks)
    assert len(windows) > 1
    expected = []
    for window in windows:
        texts = [chunk.text for chunk in chunks if chunk.window == window]
        together = await embedder.embed(texts, is_late=True)
        expected += list(together.dense)
    np.testing.assert_allclose(embedded.embedded.dense, expected, atol=2e-6)
    alone = (await embedder.embed([chunks[1].text])).dense[0]
    assert not np.allclose(embedded.embedded.dense[1], alone, atol=1e-3)

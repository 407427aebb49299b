"""Mem0 with its OpenAI embedder pointed at the gateway, on Qdrant and on Milvus Lite.

Memories are stored as they are (``infer=False``). The language model that Mem0 wants is OpenAI's own address with a
made-up key: any call of it would be a look-up of another host, which fails a test.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest

from tests.clients.gateway_process import MODEL, WIDTH, Gateway

if TYPE_CHECKING:
    from mem0 import AsyncMemory, Memory

# Mem0 has no way to close its embedder's connections, nor Milvus Lite its log.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

USER = {"user_id": "ada"}
FACTS = ["I play the violin in an orchestra", "My cat is allergic to fish", "I moved to Lisbon in March"]


def config(
    gateway: Gateway, store: str, folder: Path, *, embedding_dims: int | None = WIDTH, embedding_model_dims: int = WIDTH
) -> dict[str, Any]:
    stores = {
        "qdrant": {"path": str(folder / "qdrant"), "on_disk": True},
        "milvus": {"url": str(folder / "milvus.db"), "token": "", "metric_type": "COSINE"},
    }
    embedder = {"model": MODEL, "api_key": "any", "openai_base_url": gateway.base_url}
    if embedding_dims is not None:
        embedder["embedding_dims"] = embedding_dims
    return {
        "vector_store": {
            "provider": store,
            "config": {"collection_name": "memories", "embedding_model_dims": embedding_model_dims, **stores[store]},
        },
        "embedder": {"provider": "openai", "config": embedder},
        "llm": {"provider": "openai", "config": {"api_key": "unused"}},
        "history_db_path": str(folder / "history.db"),
    }


@contextmanager
def closed_at_the_end(memory: Memory | AsyncMemory) -> Iterator[Any]:
    """Close what Mem0 leaves open: the connection of its vector store."""
    with closing(memory), closing(memory.vector_store.client):
        yield memory


@pytest.fixture(params=["qdrant", "milvus"])
def store(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def memory(gateway: Gateway, store: str, tmp_path: Path) -> Iterator[Memory]:
    from mem0 import Memory

    with closed_at_the_end(Memory.from_config(config(gateway, store, tmp_path))) as memory:
        yield memory


def texts(answer: dict[str, Any]) -> list[str]:
    return [result["memory"] for result in answer["results"]]


def test_the_related_memory_is_found_first(memory: Memory) -> None:
    for fact in FACTS:
        memory.add(fact, **USER, infer=False)

    found = memory.search("Which instrument do I play?", filters=USER, threshold=0.0)
    other = memory.search("What may my pet not eat?", filters=USER, threshold=0.0)

    assert texts(found)[0] == FACTS[0]
    assert texts(other)[0] == FACTS[1]
    assert found["results"][0]["score"] > 0.5, "the score is a cosine"
    assert sorted(texts(memory.get_all(filters=USER))) == sorted(FACTS)


def test_the_text_itself_scores_1(memory: Memory) -> None:
    memory.add(FACTS[0], **USER, infer=False)

    found = memory.search(FACTS[0], filters=USER)["results"]

    assert found[0]["score"] == pytest.approx(1, abs=1e-4)


def test_messages_are_added_one_by_one_an_empty_one_included(memory: Memory) -> None:
    messages = [
        {"role": "system", "content": "Mem0 skips this one"},
        {"role": "user", "content": "I moved to\nLisbon"},
        {"role": "assistant", "content": ""},
    ]

    added = memory.add(messages, **USER, infer=False)

    assert texts(added) == ["I moved to\nLisbon", ""]


def test_a_memory_is_changed_and_keeps_its_history(memory: Memory) -> None:
    added = memory.add(FACTS[0], **USER, infer=False)
    memory.add(FACTS[1], **USER, infer=False)
    memory_id = added["results"][0]["id"]

    memory.update(memory_id, text="I have a dog")

    assert memory.get(memory_id)["memory"] == "I have a dog"
    assert texts(memory.search("Do I own a dog?", filters=USER))[0] == "I have a dog"
    assert [change["event"] for change in memory.history(memory_id)] == ["ADD", "UPDATE"]


def test_memories_are_deleted(memory: Memory) -> None:
    ids = [memory.add(fact, **USER, infer=False)["results"][0]["id"] for fact in FACTS]
    memory.add("another user's", user_id="bob", infer=False)

    memory.delete(ids[0])
    assert sorted(texts(memory.get_all(filters=USER))) == sorted(FACTS[1:])

    memory.delete_all(**USER)
    assert texts(memory.get_all(filters=USER)) == []
    assert texts(memory.get_all(filters={"user_id": "bob"})) == ["another user's"]


def test_a_batch_beyond_mem0s_request_size_keeps_its_order(
    memory: Memory, embed: Callable[..., Any], assert_same_vectors: Callable[..., None]
) -> None:
    batch = [f"fact number {i}" for i in range(150)]

    vectors = memory.embedding_model.embed_batch(batch)

    assert_same_vectors(vectors, embed(*batch))


@pytest.mark.parametrize(("embedding_dims", "embedding_model_dims"), [(1536, 1536), (1536, WIDTH), (256, 256)])
def test_a_wrong_width_is_an_error_that_names_the_settings_to_change(
    gateway: Gateway, store: str, tmp_path: Path, embedding_dims: int, embedding_model_dims: int
) -> None:
    """Older releases of Mem0 send 1,536, OpenAI's width, when nothing is configured."""
    from mem0 import Memory

    wrong = config(gateway, store, tmp_path, embedding_dims=embedding_dims, embedding_model_dims=embedding_model_dims)

    with (
        closed_at_the_end(Memory.from_config(wrong)) as memory,
        pytest.raises(openai.BadRequestError, match=r"embedding_dims.*embedding_model_dims.* to 384") as caught,
    ):
        memory.add(FACTS[0], **USER, infer=False)

    assert caught.value.code == "unsupported_dimensions"


def test_embedding_dims_may_be_left_out_of_the_embedder(gateway: Gateway, store: str, tmp_path: Path) -> None:
    """Mem0 then sends no `dimensions`."""
    from mem0 import Memory

    with closed_at_the_end(Memory.from_config(config(gateway, store, tmp_path, embedding_dims=None))) as memory:
        memory.add(FACTS[0], **USER, infer=False)

        assert texts(memory.search(FACTS[0], filters=USER)) == [FACTS[0]]


async def test_20_memories_added_at_once_are_all_found(gateway: Gateway, tmp_path: Path) -> None:
    """On Milvus Lite only: Qdrant's local mode shares one SQLite connection between Mem0's threads, which SQLite refuses."""
    from mem0 import AsyncMemory

    facts = [f"The code word of room {i} is {word}" for i, word in enumerate(["apple", "river", "stone", "cloud"] * 5)]
    with closed_at_the_end(AsyncMemory.from_config(config(gateway, "milvus", tmp_path))) as memory:
        await asyncio.gather(*(memory.add(fact, **USER, infer=False) for fact in facts))

        stored = await memory.get_all(filters=USER, top_k=100)
        found = await asyncio.gather(*(memory.search(fact, filters=USER, top_k=1) for fact in facts))

    assert sorted(texts(stored)) == sorted(facts)
    assert [texts(answer) for answer in found] == [[fact] for fact in facts]

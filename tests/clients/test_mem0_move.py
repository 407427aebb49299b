"""Real Mem0 changes its embedding model: its collections on Qdrant, Milvus Lite and PostgreSQL are moved by the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.clients.gateway_process import MODEL, TOLD, Gateway

# Mem0 has no way to close its embedder's connections, nor Milvus Lite its log.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

USER = {"user_id": "ada"}
FACTS = ["I play the violin in an orchestra", "My cat is allergic to fish", "I moved to Lisbon\nin March"]
CONFIG = """\
# Mem0 of the shop
vector_store:
  provider: {provider}
  config: {{collection_name: memories, {store}}}   # since the spring
embedder:
  provider: openai
  config:
    model: {model}
    api_key: {key}
    openai_base_url: {url}
    embedding_dims: 384
llm: {{provider: openai, config: {{api_key: unused}}}}
history_db_path: {folder}/history.db
"""


@pytest.fixture(params=["qdrant", "milvus", "pgvector"])
def config(request: pytest.FixtureRequest, furnished_gateway: Gateway, tmp_path: Path) -> Path:
    """A file with Mem0's configuration."""
    if request.param == "pgvector":
        import psycopg

        address = request.getfixturevalue("postgres")
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        store = f"connection_string: {json.dumps(address)}, embedding_model_dims: 384"
    elif request.param == "milvus":
        store = f'url: {tmp_path}/milvus.db, token: "", embedding_model_dims: 384, metric_type: COSINE'
    else:
        store = f"path: {tmp_path}/qdrant, on_disk: true, embedding_model_dims: 384"
    path = tmp_path / "config.yaml"
    path.write_text(
        CONFIG.format(
            provider=request.param, store=store, model=MODEL, key="sk-of-the-tests",
            url=furnished_gateway.base_url, folder=tmp_path,
        )
    )  # fmt: skip
    return path


@contextmanager
def memory_of(config: Path) -> Iterator[Any]:
    """Open Mem0 as an application does, and close its store at the end, so that other processes can use it."""
    from mem0 import Memory

    content = YAML(typ="safe").load(config.read_text())
    memory = Memory.from_config(content)
    if content["vector_store"]["provider"] == "milvus":
        # Milvus Lite forgets at its end which collections are loaded, and Mem0 loads only those that it makes.
        memory.vector_store.client.load_collection(memory.collection_name)
    try:
        yield memory
    finally:
        client = getattr(memory.vector_store, "client", None)
        if client is not None:
            client.close()
        pool = getattr(memory.vector_store, "connection_pool", None)
        if pool is not None:
            pool.close()
        memory.close()
        if content["vector_store"]["provider"] == "milvus":
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(content["vector_store"]["config"]["url"])


@pytest.fixture
def gateway_move(tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs `gateway move`, and returns its output."""

    def run(*options: object, code: int = 0) -> str:
        environ = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state"), "EMBEDDINGS_API_KEY": "sk-of-the-tests"}
        command = [sys.executable, "-m", "gateway", "move", *map(str, options)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environ)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    return run


def texts(answer: dict[str, Any]) -> list[str]:
    return [result["memory"] for result in answer["results"]]


def test_mem0_searches_the_new_collection_with_ids_payload_and_history_kept(
    config: Path, furnished_gateway: Gateway, gateway_move: Callable[..., str]
) -> None:
    before = config.read_text()
    with memory_of(config) as memory:
        ids = [
            memory.add(fact, **USER, infer=False, metadata={"n": n})["results"][0]["id"] for n, fact in enumerate(FACTS)
        ]
        memory.update(ids[0], text="I play the cello in an orchestra")
        old = {one["id"]: one for one in memory.get_all(filters=USER)["results"]}

    shown = gateway_move("--mem0", config, "--to", TOLD, "--url", furnished_gateway.root_url)
    assert "3 items, 3 embedded" in shown
    assert "next: gateway move check memories" in shown
    assert config.read_text() == before, "nothing changes for applications before the flip"
    with memory_of(config) as memory:
        late = memory.add("My sister plays chess", **USER, infer=False)["results"][0]["id"]
    assert "ready: the new collection can be used" in gateway_move("check")
    shown = gateway_move("flip")
    assert "names memories_told_" in shown

    after = config.read_text()
    assert "# Mem0 of the shop" in after
    assert "# since the spring" in after
    content = YAML(typ="safe").load(after)
    assert content["embedder"]["config"]["model"] == TOLD
    collection = content["vector_store"]["config"]["collection_name"]
    assert collection.startswith("memories_told_")
    with memory_of(config) as memory:
        found = {one["id"]: one for one in memory.get_all(filters=USER)["results"]}
        assert found.keys() == {*ids, late}
        assert {row_id: found[row_id] for row_id in ids} == old
        assert (
            texts(memory.search("Which instrument do I play?", filters=USER))[0] == "I play the cello in an orchestra"
        )
        [exact] = memory.search(FACTS[2], filters=USER, top_k=1)["results"]
        assert exact["memory"] == FACTS[2]
        if content["vector_store"]["provider"] != "pgvector":  # which gets another score
            assert exact["score"] == pytest.approx(1, abs=1e-3), "Mem0 embeds a text as the move did"
        assert [change["event"] for change in memory.history(ids[0])] == ["ADD", "UPDATE"]
        memory.add("I learn Portuguese", **USER, infer=False)
        memory.delete(ids[1])
        memory.update(ids[2], text="I moved to Porto in May")

    shown = gateway_move("back")
    assert "Let applications use memories again." in shown
    assert YAML(typ="safe").load(config.read_text()) == YAML(typ="safe").load(before)
    with memory_of(config) as memory:
        expected = [
            "I learn Portuguese",
            "I moved to Porto in May",
            "I play the cello in an orchestra",
            "My sister plays chess",
        ]
        assert sorted(texts(memory.get_all(filters=USER))) == expected
        assert texts(memory.search("Which language do I study?", filters=USER))[0] == "I learn Portuguese"

    gateway_move("flip", "--force")
    shown = gateway_move("finish", "--delete-old")
    assert "finished" in shown
    with memory_of(config) as memory:
        assert sorted(texts(memory.get_all(filters=USER))) == expected
        assert "memories" not in collections_of(memory)


def collections_of(memory: Any) -> list[str]:
    found = memory.vector_store.list_cols()
    return [one.name for one in found.collections] if hasattr(found, "collections") else list(found)

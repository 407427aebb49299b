"""Give Mem0 a memory whose embeddings come from the gateway.

    pip install mem0ai qdrant-client                # or, for --store milvus: mem0ai pymilvus milvus-lite
    make run                                        # in one terminal
    python examples/mem0_memory.py --store qdrant   # in another

No language model and no account is needed: memories are stored as they are (``infer=False``).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from openai import APIConnectionError, APIStatusError, OpenAI
    from openai.types import Model
except ModuleNotFoundError:
    sys.exit("openai is not installed. It comes with Mem0: pip install mem0ai qdrant-client")
if TYPE_CHECKING:
    from mem0 import Memory

USER = {"user_id": "ada"}


def main() -> None:
    """Store, find, change and delete memories."""
    options = parse_options()
    card = ask_gateway(options)
    Memory = import_mem0()  # noqa: N806  a class
    with tempfile.TemporaryDirectory() as temporary:
        memory = Memory.from_config(mem0_config(options, card, options.dir or Path(temporary)))
        print(f"{card.id}: {card.width} dimensions, space {card.space}")
        print(f"{options.store} collection {memory.collection_name}\n")
        try:
            use(memory)
        except (APIConnectionError, APIStatusError) as error:  # it has stopped in the meantime, for example
            sys.exit(f"The gateway did not embed: {error.message}")
        finally:
            memory.vector_store.client.close()
            memory.close()


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Mem0 with embeddings from the gateway.")
    parser.add_argument("--store", choices=["qdrant", "milvus"], default="qdrant", help="where memories are kept")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="the gateway")
    parser.add_argument("--model", default="default", help="a model of the gateway, or an alias")
    # The gateway asks for a key only if GATEWAY_API_KEYS is set; OpenAI's client wants one that isn't empty.
    parser.add_argument("--api-key", default="any", help="a key of the gateway, if it asks for one")
    parser.add_argument(
        "--api-key-file", type=Path, help="a file with that key, which then shows in no list of processes"
    )
    parser.add_argument(
        "--milvus-url", help="a Milvus server such as http://127.0.0.1:19530; by default a file in --dir"
    )
    parser.add_argument("--dir", type=Path, help="folder to keep memories in; by default a temporary one")
    options = parser.parse_args()
    if options.api_key_file:
        options.api_key = options.api_key_file.read_text(encoding="utf-8").strip()
    return options


def ask_gateway(options: argparse.Namespace) -> Model:
    """Return the model's card from GET /v1/models, with its width and its space."""
    try:
        with OpenAI(base_url=options.base_url, api_key=options.api_key) as client:
            card = client.models.retrieve(options.model)
    except APIConnectionError:
        sys.exit(f"No gateway answers at {options.base_url}. Start it with `make run`, or say where it is: --base-url")
    except APIStatusError as error:
        sys.exit(f"The gateway at {options.base_url} refuses: {error.message}")
    if card.kind == "experiment" and card.space is None:
        arms = "".join(f"\n  --model {arm['model']}   (space {arm['space'] or 'not known yet'})" for arm in card.arms)
        sys.exit(
            f"{card.id} is an experiment between spaces: each user gets one of several models, and vectors of two models "
            f"cannot be compared. This example has one collection for all users, so name one of the models:{arms}\n"
            "Or compare the models with your users: examples/mem0_ab.py keeps a collection for each arm (docs/ab-mem0.md)."
        )
    if card.kind == "rerank":
        sys.exit(f"{card.id} reranks texts and returns no vectors; --model wants one that embeds")
    if card.state != "ready":
        sys.exit(f"Model {card.id} is {card.state}: {card.reason or 'try again soon'}")
    return card


def import_mem0() -> type[Memory]:
    """Import Mem0, which takes seconds, after everything that may be wrong with the gateway or the model is known."""
    # Mem0 reports usage unless this is set, and reads it when it is imported.
    os.environ["MEM0_TELEMETRY"] = "False"
    try:
        from mem0 import Memory
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed: pip install mem0ai qdrant-client, or mem0ai pymilvus milvus-lite")
    if (found := version("mem0ai")).startswith(("0.", "1.")):  # whose search takes other arguments
        sys.exit(f"This example needs mem0ai 2 or later, and {found} is installed: pip install --upgrade mem0ai")
    return Memory


def mem0_config(options: argparse.Namespace, card: Model, folder: Path) -> dict[str, Any]:
    """Return Mem0's configuration for a model of the gateway."""
    folder.mkdir(parents=True, exist_ok=True)
    # One collection per model. Vectors of two models can't be compared, and a vector store would not notice: it checks
    # their width, and two models (such as Jina v3 and BGE-M3) can have the same one. The space that the gateway reports
    # changes with everything that changes vectors (weights, task, dimensions ...), so a collection that is named after
    # it can't hold two kinds, even if an alias such as `default` points to another model tomorrow.
    collection = "memories_" + re.sub(r"\W", "_", card.space)  # Milvus takes letters, digits and underscores only
    stores = {
        "qdrant": {"path": str(folder / "qdrant"), "on_disk": True},  # without on_disk, older Mem0 empties it
        # Mem0's own default metric is L2, whose scores mean something else; neither a file nor this server asks for a token.
        "milvus": {"url": options.milvus_url or str(folder / "milvus.db"), "token": "", "metric_type": "COSINE"},
    }
    return {
        "embedder": {
            "provider": "openai",
            "config": {
                "model": options.model,
                "openai_base_url": options.base_url,
                "api_key": options.api_key,
                "embedding_dims": card.width,
            },
        },
        "vector_store": {
            "provider": options.store,
            "config": {"collection_name": collection, "embedding_model_dims": card.width, **stores[options.store]},
        },
        # Mem0 requires a language model. With infer=False it is never used, so any valid configuration will do.
        "llm": {"provider": "openai", "config": {"api_key": "unused"}},
        "history_db_path": str(folder / "history.db"),
    }


def use(memory: Memory) -> None:
    """Add, search, update and delete."""
    for text in (
        "I play the violin in an orchestra",
        "My cat is allergic to fish",
        "I moved to Lisbon in March",
    ):
        memory.add(text, **USER, infer=False)
        print(f"added    {text}")

    found = search(memory, "Which instrument do I play?")
    memory.update(found["id"], text="I play the cello in a quartet")
    print("\nupdated  the memory that was found")
    search(memory, "Which instrument do I play?")

    memory.delete(found["id"])
    print("\ndeleted  it")
    search(memory, "What may my pet not eat?")

    events = ", ".join(change["event"] for change in memory.history(found["id"]))
    print(f"\nhistory  of the deleted memory: {events}")
    memory.delete_all(**USER)
    print(f"left     {len(memory.get_all(filters=USER)['results'])} memories after delete_all")


def search(memory: Memory, question: str) -> dict[str, Any]:
    """Print the results of a question, and return the best."""
    results = memory.search(question, filters=USER, top_k=3)["results"]
    print(f"\nsearched {question}")
    for result in results:
        print(f"  {result['score']:.2f}   {result['memory']}")
    return results[0]


if __name__ == "__main__":
    main()

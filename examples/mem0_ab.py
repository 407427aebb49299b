"""Compare two models with Mem0's users: an arm for each user, a collection for each arm, and the outcomes.

    pip install mem0ai qdrant-client                    # or mem0ai pymilvus milvus-lite, or mem0ai "psycopg[binary,pool]"
    GATEWAY_STATE_DIR=/tmp/mem0-ab gateway serve --models examples/mem0_ab.yaml     # in one terminal
    python examples/mem0_ab.py --users 20               # in another; docs/ab-mem0.md says how to get the second model

The users are made up: each has a few memories and asks for one of them. It helped if that memory came first. In your
application, the outcome is what your users do. No language model and no account is needed.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import httpx
    import openai
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is not installed. It comes with Mem0: pip install mem0ai qdrant-client")
if TYPE_CHECKING:
    from mem0 import Memory

EXPERIMENT = "mem0-ab"
MEMORIES_PER_USER = 5
MOST_AT_ONCE = 1_000  # units, or outcomes, in one request
# The reasons for which the gateway leaves outcomes out, as its API names them.
LEFT_OUT = ("repeated", "conflicting", "excluded", "too_many_of_unit", "unknown_unit", "too_many_names")
# A memory, values for its gap, and a question that it answers.
FACTS = [
    ("I play the {} in an orchestra", "violin cello oboe harp", "Which instrument do I play?"),
    ("My cat is allergic to {}", "fish chicken wheat milk", "What may my pet not eat?"),
    ("I moved to {} in March", "Lisbon Oslo Turin Ghent", "Where do I live now?"),
    ("On Tuesdays I take the {} to work", "tram ferry bicycle bus", "How do I get to the office?"),
    ("My daughter studies {}", "law physics history medicine", "What is my child reading at university?"),
    ("We spent our honeymoon in {}", "Peru Iceland Japan Kenya", "Where did I travel after the wedding?"),
    ("The doctor told me to avoid {}", "salt coffee alcohol sugar", "What is bad for my health?"),
    ("I painted the kitchen {}", "yellow green gray blue", "What color are the walls where I cook?"),
    ("My first job was at a {}", "bakery bank circus farm", "How did my career begin?"),
    ("I keep the spare key under the {}", "mat bench pot stairs", "How can a friend get into my house?"),
    ("Before bed I read {}", "poems thrillers essays comics", "What do I do in the evening?"),
    ("My brother owes me {} euros", "forty ninety two hundred", "Who has to pay me back?"),
]


def main() -> None:
    """Assign users to arms, store and search their memories, send the outcomes, and print the decision."""
    options = parse_options()
    headers = {"authorization": f"Bearer {options.api_key}"}
    with (
        httpx.Client(base_url=options.base_url, headers=headers, timeout=60) as gateway,
        tempfile.TemporaryDirectory() as temporary,
    ):
        users = [f"user-{options.first + number}" for number in range(options.users)]
        assignments = assign(gateway, users)
        ask(gateway, "GET", f"/experiments/{EXPERIMENT}/outcomes")  # they may be turned off: say so before the work
        memories = open_memories(options, assignments, options.dir or Path(temporary))
        try:
            outcomes = {user: live(memory_of(memories, assignments[user]), user) for user in users}
        except openai.APIError as error:  # the gateway has stopped, or a user's arm has changed in the meantime
            sys.exit(
                f"The gateway did not embed: {error.message}. Run again when it does: outcomes are sent at the end"
            )
        finally:
            for memory in memories.values():
                close(memory)
        post(gateway, outcomes)
        report(gateway)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="An experiment with two models and Mem0's users.")
    parser.add_argument(
        "--store", choices=["qdrant", "milvus", "pgvector"], default="qdrant", help="where memories are kept"
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="the gateway")
    parser.add_argument("--api-key", default="any", help="a key of the gateway, if it asks for one")
    parser.add_argument("--users", type=int, default=20, help="how many users to make up")
    parser.add_argument("--first", type=int, default=0, help="the number of the first user, to add others later")
    parser.add_argument("--dir", type=Path, help="folder to keep memories in; by default a temporary one")
    parser.add_argument("--milvus-url", help="a Milvus server; by default a file in --dir")
    parser.add_argument("--postgres", help="for pgvector: postgresql://user:password@host:5432/database")
    options = parser.parse_args()
    if options.users < 1:
        parser.error(f"--users must be at least 1, got {options.users}")
    if options.store == "pgvector" and not options.postgres:
        parser.error("--store pgvector needs --postgres, a PostgreSQL database with the extension pgvector")
    return options


def ask(gateway: httpx.Client, method: str, path: str, content: object = None) -> dict[str, Any]:
    """Send a request to the gateway, and return its answer; end with the reason if it fails."""
    try:
        answer = gateway.request(method, path, json=content)
    except httpx.TransportError as error:
        sys.exit(f"No gateway answers at {gateway.base_url}: {error}")
    try:
        found: dict[str, Any] = answer.json()
    except ValueError:
        sys.exit(f"{gateway.base_url} answers {answer.status_code} without JSON: is it the address of the gateway?")
    if answer.is_error:
        sys.exit(f"The gateway refuses: {found.get('message', found)}")
    return found


def assign(gateway: httpx.Client, users: list[str]) -> dict[str, dict[str, Any]]:
    """Return the assignment of each user. In your application, ask at the beginning of each session."""
    assignments = {}
    for start in range(0, len(users), MOST_AT_ONCE):
        units = {"units": users[start : start + MOST_AT_ONCE]}
        answer = ask(gateway, "POST", f"/experiments/{EXPERIMENT}/assignment", units)
        assignments |= {one["unit"]: one for one in answer["data"]}
    for one in assignments.values():
        if not one["counted"]:  # `ended`, for example: everyone gets the first arm, and outcomes say nothing
            sys.exit(f"The experiment does not count {one['unit']}: {one['reason']}")
        if one["space"] is None or one["state"] != "ready":
            sys.exit(f"Model {one['model']} of arm {one['arm']} is {one['state']}: try again when it is ready")
    return assignments


def open_memories(
    options: argparse.Namespace, assignments: dict[str, dict[str, Any]], folder: Path
) -> dict[str, Memory]:
    """Return a Mem0 memory for each space: a separate collection, with the width of its model."""
    # Mem0 reports usage unless this is set, and reads both when it is imported.
    os.environ["MEM0_TELEMETRY"] = "False"
    os.environ.setdefault("MEM0_DIR", str(folder))
    try:
        from mem0 import Memory
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed: pip install mem0ai qdrant-client")
    if (found := version("mem0ai")).startswith(("0.", "1.")):  # whose search takes other arguments
        sys.exit(f"This example needs mem0ai 2 or later, and {found} is installed: pip install --upgrade mem0ai")
    folder.mkdir(parents=True, exist_ok=True)
    by_space = {one["space"]: one for one in assignments.values()}
    memories = {}
    for space, assignment in sorted(by_space.items()):
        memories[space] = Memory.from_config(mem0_config(options, assignment, folder))
        print(
            f"arm {assignment['arm']}: {assignment['width']} dimensions, collection {memories[space].collection_name}"
        )
    return memories


def mem0_config(options: argparse.Namespace, assignment: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return Mem0's configuration for the space of an assignment."""
    # The space is in the name, so vectors of two models never meet, even if the weights change.
    collection = "memories_" + re.sub(r"\W", "_", assignment["space"])
    stores = {
        "qdrant": {"path": str(folder / collection), "on_disk": True},  # two local clients cannot share a folder
        "milvus": {"url": options.milvus_url or str(folder / "milvus.db"), "token": "", "metric_type": "COSINE"},
        "pgvector": {"connection_string": options.postgres},
    }
    width = assignment["width"]
    return {
        "embedder": {
            "provider": "openai",
            "config": {
                "model": assignment["send"]["model"],  # each user gets another one, see memory_of
                "openai_base_url": options.base_url,
                "api_key": options.api_key,
                "embedding_dims": width,
            },
        },
        "vector_store": {
            "provider": options.store,
            "config": {"collection_name": collection, "embedding_model_dims": width, **stores[options.store]},
        },
        # Mem0 requires a language model. With infer=False it is never used, so any valid configuration will do.
        "llm": {"provider": "openai", "config": {"api_key": "unused"}},
        "history_db_path": str(folder / f"{collection}.db"),
    }


def memory_of(memories: dict[str, Memory], assignment: dict[str, Any]) -> Memory:
    """Return the memory of a user's arm, whose requests name the user to the gateway.

    Mem0 sends nothing but the name of the model, so the user is a part of that name. The copy shares the store and the
    connections, and can be used while others are used in other threads.
    """
    memory = copy.copy(memories[assignment["space"]])
    memory.embedding_model = copy.copy(memory.embedding_model)
    memory.embedding_model.config = copy.copy(memory.embedding_model.config)
    memory.embedding_model.config.model = assignment["send"]["model"]
    return memory


def live(memory: Memory, user: str) -> bool:
    """Store a user's memories and ask for one of them; return whether it came first."""
    chance = random.Random(user)  # the same user has the same memories in every run
    facts = chance.sample(FACTS, MEMORIES_PER_USER)
    stored = [text.format(chance.choice(values.split())) for text, values, _question in facts]
    for text in stored:
        memory.add(text, user_id=user, infer=False)
    found = memory.search(facts[0][2], filters={"user_id": user}, top_k=1)["results"]
    return bool(found) and found[0]["memory"] == stored[0]


def close(memory: Memory) -> None:
    """Close a memory and its store."""
    client = getattr(memory.vector_store, "client", None)
    if client is not None:
        client.close()
    memory.close()


def post(gateway: httpx.Client, outcomes: dict[str, bool]) -> None:
    """Send the outcome of each user, once: with the same id again, it would not count again."""
    rows = [{"unit": user, "value": int(helped), "id": f"{user}-first"} for user, helped in outcomes.items()]
    for start in range(0, len(rows), MOST_AT_ONCE):
        path = f"/experiments/{EXPERIMENT}/outcomes"
        answer = ask(gateway, "POST", path, rows[start : start + MOST_AT_ONCE])
        if reasons := ", ".join(f"{answer[why]} {why}" for why in LEFT_OUT if answer[why]):
            print(f"of {answer['received']} outcomes, left out: {reasons}")
        if answer["unseen"]:
            print(
                f"of {answer['stored']} stored outcomes, {answer['unseen']} unseen: their users sent no request to this "
                "gateway, so they count only if another replica got one"
            )


def report(gateway: httpx.Client) -> None:
    """Print the arms, and the gateway's conclusions from all outcomes so far, including earlier runs."""
    shown = ask(gateway, "GET", f"/experiments/{EXPERIMENT}/outcomes")
    outcome = next((outcome for outcome in shown["outcomes"] if outcome["primary"]), None)
    if outcome is None:
        sys.exit("models.yaml declares no `outcome` for the experiment, so there is no decision")
    for arm in outcome["arms"]:
        mean = "-" if arm["mean"] is None else f"{arm['mean']:.3f}"
        print(f"arm {arm['arm']}: {arm['units']} users, {outcome['name']} {mean}")
    for found in outcome["comparisons"]:
        difference = ""
        if found["estimate"] is not None:
            difference = f" {found['estimate']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f});"
        print(
            f"decision: {found['arm']} against {found['control']}: {found['verdict'] or 'none'};{difference} "
            f"{found['reason']}"
        )
        if found["verdict"] == "not yet" and found["units_needed"]:
            print(f"about {found['units_needed']} users find a difference of {outcome['margin']:g}")


if __name__ == "__main__":
    main()

"""The example of an experiment with Mem0: two real models, three vector stores, and the counts of the gateway."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from gateway.config.registry import load_registry
from tests.clients.gateway_process import MODEL, Gateway, running_gateway
from tests.second_model import e5_small

# Neither LangChain nor LlamaIndex has a way to close its connections.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")]

EXAMPLES = Path(__file__).parents[2] / "examples"
SECOND, EXPERIMENT = "multilingual-e5-small", "mem0-ab"
NUM_USERS = 6
_MORE = """\
  - {{id: {second}, source: {folder}, enabled: true, dtype: float32, runtime: torch}}
experiments:
  - id: {experiment}
    kind: cross_space
    unit: {{from: [model]}}
    outcome: {{name: helped, per: unit, better: more, margin: 0.05}}
    arms: [{{model: {model}, weight: 1}}, {{model: {second}, weight: 1}}]
"""


@pytest.fixture(scope="module")
def two_models(_quiet_clients: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with an experiment between two real models."""
    folder = e5_small()
    more = _MORE.format(second=SECOND, folder=json.dumps(str(folder)), experiment=EXPERIMENT, model=MODEL)
    folder = tmp_path_factory.mktemp("mem0_ab")
    with running_gateway(folder, models=more, GATEWAY_STATE_DIR=str(folder / "state")) as gateway:
        yield gateway


@pytest.fixture
def run(two_models: Gateway, tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that runs the example, and returns the lines that it prints."""

    def run(*options: str) -> list[str]:
        command = [
            sys.executable,
            EXAMPLES / "mem0_ab.py",
            "--base-url",
            two_models.base_url,
            "--dir",
            tmp_path,
            *options,
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def units(gateway: Gateway) -> dict[str, int]:
    shown = httpx.get(f"{gateway.base_url}/experiments/{EXPERIMENT}").json()
    return {arm["arm"]: arm["units"] for arm in shown["evidence"]}


def spaces(gateway: Gateway) -> dict[str, str]:
    return {model: httpx.get(f"{gateway.base_url}/models/{model}").json()["space"] for model in (MODEL, SECOND)}


@pytest.mark.parametrize("store", ["qdrant", "milvus", "pgvector"])
def test_each_user_stays_in_an_arm_and_its_collection(
    two_models: Gateway, run: Callable[..., list[str]], request: pytest.FixtureRequest, store: str
) -> None:
    first = {"qdrant": 0, "milvus": 1_000, "pgvector": 2_000}[store]
    options = ["--store", store, "--users", str(NUM_USERS), "--first", str(first)]
    if store == "pgvector":
        options += ["--postgres", request.getfixturevalue("postgres")]
    before = units(two_models)

    lines = run(*options)

    for model, space in spaces(two_models).items():
        collection = "memories_" + re.sub(r"\W", "_", space)
        assert f"arm {model}: 384 dimensions, collection {collection}" in lines
    assert sum(units(two_models).values()) == sum(before.values()) + NUM_USERS
    arms = [re.match(r"arm (\S+): (\d+) users, helped ([\d.]+)", line) for line in lines]
    means = {match[1]: (int(match[2]), float(match[3])) for match in arms if match}
    assert set(means) == {MODEL, SECOND}
    # The figures may be some seconds old: those of the store before.
    helped = sum(number * mean for number, mean in means.values())
    assert helped >= sum(number for number, _mean in means.values()) / 2, "searched in vectors of two models?"
    assert [line for line in lines if line.startswith(f"decision: {SECOND} against {MODEL}: not yet;")]
    assert f"user-{first + 1}" not in httpx.get(f"{two_models.root_url}/metrics").text
    assert f"user-{first + 1}" not in (two_models.folder / "gateway.log").read_text()


def test_langchain_and_llamaindex_take_part_with_the_same_name(two_models: Gateway) -> None:
    from langchain_openai import OpenAIEmbeddings
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    before = sum(units(two_models).values())
    for number, unit in enumerate(("langchain-user", "llama/index@user")):
        asked = httpx.get(f"{two_models.base_url}/experiments/{EXPERIMENT}/assignment", params={"unit": unit}).json()
        name = asked["send"]["model"]
        if number == 0:
            client = OpenAIEmbeddings(
                model=name, base_url=two_models.base_url, api_key="any", check_embedding_ctx_length=False
            )
            vectors = client.embed_documents(["a", "b"])
        else:
            embedding = OpenAILikeEmbedding(model_name=name, api_base=two_models.base_url, api_key="any")
            vectors = embedding.get_text_embedding_batch(["a", "b"])
        assert [len(vector) for vector in vectors] == [asked["width"]] * 2

    assert sum(units(two_models).values()) == before + 2


def test_a_gateway_without_the_experiment_ends_the_example_with_the_reason(gateway: Gateway) -> None:
    command = [sys.executable, EXAMPLES / "mem0_ab.py", "--base-url", gateway.base_url]

    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)

    assert done.returncode == 1
    assert "The gateway refuses: no experiment is called 'mem0-ab'; available: none" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_registry_next_to_it_is_valid() -> None:
    registry = load_registry(EXAMPLES / "mem0_ab.yaml", {})

    [experiment] = registry.experiments
    assert (experiment.id, experiment.kind, experiment.unit) == (EXPERIMENT, "cross_space", ("model",))

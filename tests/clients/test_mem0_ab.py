"""The example of an experiment with Mem0: two real models, three vector stores, and the counts of the gateway."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import ModuleType

import httpx
import numpy as np
import pytest
from ruamel.yaml import YAML

from gateway.api.outcomes import OutcomesAnswer
from gateway.config.registry import load_registry
from tests.clients.gateway_process import MODEL, Gateway, running_gateway
from tests.second_model import e5_small

# Neither LangChain nor LlamaIndex has a way to close its connections.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")]

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGE = (Path(__file__).parents[2] / "docs" / "ab-mem0.md").read_text(encoding="utf-8")
SECOND, EXPERIMENT, SALT = "multilingual-e5-small", "mem0-ab", "mem0-ab-2026-11"
NUM_USERS = 6
THRESHOLD = 0.1  # of `Memory.search`, by default
_MORE = """\
  - {{id: {second}, source: {folder}, enabled: true, dtype: float32, runtime: torch}}
experiments:
  - id: {experiment}
    kind: cross_space
    unit: {{from: [model]}}
    salt: {salt}
    outcome: {{name: helped, per: unit, better: more, margin: 0.05}}
    arms: [{{model: {model}, weight: 1}}, {{model: {second}, weight: 1}}]
"""


@pytest.fixture(scope="module")
def two_models(_quiet_clients: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with an experiment between two real models."""
    with _two_models(tmp_path_factory.mktemp("mem0_ab")) as gateway:
        yield gateway


def _two_models(folder: Path) -> AbstractContextManager[Gateway]:
    more = _MORE.format(
        second=SECOND, folder=json.dumps(str(e5_small())), experiment=EXPERIMENT, salt=SALT, model=MODEL
    )
    return running_gateway(folder, models=more, GATEWAY_STATE_DIR=str(folder / "state"))


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("mem0_ab")


@pytest.fixture
def run(two_models: Gateway, tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that runs the example, and returns the lines that it prints."""

    return partial(_run, two_models, tmp_path)


def _run(gateway: Gateway, folder: Path, *options: str) -> list[str]:
    command = [sys.executable, EXAMPLES / "mem0_ab.py", "--base-url", gateway.base_url, "--dir", folder, *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def units(gateway: Gateway) -> dict[str, int]:
    shown = httpx.get(f"{gateway.base_url}/experiments/{EXPERIMENT}").json()
    return {arm["arm"]: arm["units"] for arm in shown["evidence"]}


def spaces(gateway: Gateway) -> dict[str, str]:
    return {model: httpx.get(f"{gateway.base_url}/models/{model}").json()["space"] for model in (MODEL, SECOND)}


@pytest.mark.parametrize("store", ["qdrant", "milvus", "pgvector"])
def test_each_user_stays_in_an_arm_and_its_collection(
    two_models: Gateway, run: Callable[..., list[str]], request: pytest.FixtureRequest, store: str
) -> None:
    first = {"qdrant": 10, "milvus": 1_000, "pgvector": 2_000}[store]  # six users from each of these are in both arms
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


def test_a_second_run_says_what_is_left_out_and_unseen_outcomes_are_stored(
    two_models: Gateway, run: Callable[..., list[str]], example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--users", "2", "--first", "4000"]
    assert not [line for line in run(*options) if line.startswith("of ")]
    assert "of 2 outcomes, left out: 2 repeated" in run(*options)

    with httpx.Client(base_url=two_models.base_url) as client:
        example.post(client, {"stranger-1": True, "stranger-2": False})
    assert capsys.readouterr().out.startswith("of 2 stored outcomes, 2 unseen: their users sent no request")


def test_the_reasons_have_the_names_of_the_api(example: ModuleType) -> None:
    others = {"object", "received", "stored", "unseen"}
    assert set(example.LEFT_OUT) == set(OutcomesAnswer.model_fields) - others
    for name, field in OutcomesAnswer.model_fields.items():
        assert (name in example.LEFT_OUT) == str(field.description).startswith("Left out: ")


def block_after(command: str) -> str:
    """Return the output that the page shows for a command."""
    [found] = re.findall(rf"{re.escape(command)}\n```\n\n```\n(.*?)```", PAGE, re.DOTALL)
    return str(found)


class ExactMemory:
    """Memories of one user, found by their exact cosines: what Mem0 finds, without the minutes that its stores take."""

    def __init__(self, vectors: Mapping[str, np.ndarray]) -> None:
        self._vectors = vectors
        self._stored: list[str] = []

    def add(self, text: str, *, user_id: str, infer: bool) -> None:
        assert user_id
        assert not infer
        self._stored.append(text)

    def search(self, query: str, *, filters: dict[str, str], top_k: int) -> dict[str, list[dict[str, str]]]:
        assert filters["user_id"]
        assert top_k == 1
        vector = self._vectors[query]
        score, best = max((float(self._vectors[text] @ vector), text) for text in self._stored)
        return {"results": [{"memory": best}] if score >= THRESHOLD else []}


def live_all(gateway: httpx.Client, example: ModuleType, users: list[str]) -> dict[str, bool]:
    """Send a counted request for each user, and return whether each found the right memory with the model of the arm."""

    facts = [text.format(value) for text, values, _ in example.FACTS for value in values.split()]
    texts = [*facts, *(question for _, _, question in example.FACTS)]
    vectors: dict[str, dict[str, np.ndarray]] = {}
    for model in (MODEL, SECOND):
        answer = gateway.post("/embeddings", json={"model": model, "input": texts}).raise_for_status().json()
        vectors[model] = {text: np.array(one["embedding"]) for text, one in zip(texts, answer["data"], strict=True)}
    outcomes = {}
    for user, assignment in example.assign(gateway, users).items():
        answer = gateway.post("/embeddings", json={"model": assignment["send"]["model"], "input": "a"})
        assert answer.headers["x-gateway-arm"] == assignment["arm"]
        outcomes[user] = example.live(ExactMemory(vectors[assignment["model"]]), user)
    return outcomes


@pytest.mark.usefixtures("_quiet_clients")
def test_the_page_shows_what_its_commands_print(
    tmp_path: Path, example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """All with Mem0, except the last 260 users."""
    (tmp_path / "gateway").mkdir()
    with _two_models(tmp_path / "gateway") as gateway, httpx.Client(base_url=gateway.base_url, timeout=60) as client:
        shown = client.get(f"/experiments/{EXPERIMENT}/assignment", params={"unit": "bob"}).json()
        lines = _run(gateway, tmp_path, "--users", "20")
        example.post(client, live_all(client, example, [f"user-{number}" for number in range(100, 360)]))
        ended, decision = time.monotonic() + 20, ""
        while time.monotonic() < ended and "multilingual-e5-small: 133 users" not in decision:
            example.report(client)  # its figures may be some seconds old
            decision = capsys.readouterr().out

    [sample] = re.findall(r'assignment\?unit=bob"\n(.*?)```', PAGE, re.DOTALL)
    del shown["generation"]
    assert json.loads(sample.replace("…,", "")) == shown
    assert "\n".join(lines) + "\n" == block_after("examples/mem0_ab.py --users 20")
    assert decision == block_after("examples/mem0_ab.py --users 260 --first 100")


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
    assert experiment.salt == SALT
    [shown] = re.findall(r"```yaml\n(experiments:.*?)```", PAGE, re.DOTALL)
    assert YAML().load(shown) == {"experiments": YAML().load(EXAMPLES / "mem0_ab.yaml")["experiments"]}

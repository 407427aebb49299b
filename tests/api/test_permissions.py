"""A key sees exactly the names that it may use: each name, with each kind of key, at each endpoint."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.access.keyring import key_digest
from gateway.config.registry import Experiment
from gateway.fleet import Model
from gateway.types import ModelKind

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
MakeModel = Callable[..., Model]

# The model and the task of each name that a request can send; experiments have several models.
NAMES = {
    "mini": "mini",
    "owner/mini": "mini",
    "jina": "jina",
    "jina:retrieval.query": "jina",
    "jinaai/jina-v3": "jina",
    "team/small": "team/small",
    "default": "mini",
    "ask": "jina",
    "plain": "jina",
    "plain:retrieval.query": "jina",
    "cross": "",
    "cross:retrieval.query": "",
    "same": "",
    "ranker": "ranker",
    "judge": "ranker",
    "rank-exp": "",
}
RANK = {"ranker", "ranker-2", "judge", "rank-exp"}
ALIASES = {"default": "mini", "ask": ("jina", "retrieval.query"), "plain": "jina", "judge": "ranker"}
KEYS = {
    "all": None,
    "nothing": ["gone"],
    "a model": ["mini"],
    "a model with tasks": ["jina"],
    "an alias": ["default"],
    "an alias with a task": ["ask"],
    "an alias without one": ["plain"],
    "an experiment": ["cross"],
    "one within a space": ["same"],
    "a reranker": ["ranker"],
    "its alias": ["judge"],
    "an experiment of rerankers": ["rank-exp"],
    "several": ["ask", "cross", "mini"],
}


def is_allowed(key: str, name: str) -> bool:
    """Restate the rule of docs/configuration.md in other words."""
    models = KEYS[key]
    return models is None or name.partition(":")[0] in models or NAMES[name] in models


def split(experiment_id: str, kind: str, *models: str) -> Experiment:
    arms = [{"model": model, "weight": 1} for model in models]
    unit = ("header:x-unit",) if kind == "cross_space" else ()
    return Experiment.model_validate({"id": experiment_id, "kind": kind, "unit": unit, "arms": tuple(arms)})


@dataclass
class Gateway:
    """A gateway whose keys are called like their entries in ``KEYS``."""

    client: httpx.AsyncClient

    async def ask(self, key: str, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}", **options.pop("headers", {})}
        return await self.client.request(method, path, headers=headers, **options)

    async def uses(self, key: str, name: str, unit: str = "u") -> httpx.Response:
        """Have something computed under a name."""
        if name in RANK:
            body = {"model": name, "query": "q", "documents": ["a"]}
            return await self.ask(key, "POST", "/v1/rerank", json=body, headers={"x-unit": unit})
        body = {"model": name, "input": "a"}
        return await self.ask(key, "POST", "/v1/embeddings", json=body, headers={"x-unit": unit})

    async def get(self, key: str, path: str) -> Any:
        answer = await self.ask(key, "GET", path)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture
async def gateway(connect: Connect, models: list[Model], make_model: MakeModel, tmp_path: Path) -> Gateway:
    lines = []
    for key, names in KEYS.items():
        allowed = "" if names is None else f", models: {names}"
        lines.append(f"- {{name: {key.replace(' ', '-')}, sha256: {key_digest(key)}{allowed}}}\n")
    (tmp_path / "keys.yaml").write_text("version: 1\nkeys:\n" + "".join(lines))
    twin = make_model("twin", fingerprint=models[0].info.fingerprint, max_tokens=8)  # type: ignore[union-attr]
    rankers = [make_model(name, kind=ModelKind.RERANK, width=1, dimensions=()) for name in ("ranker", "ranker-2")]
    experiments = [
        split("cross", "cross_space", "mini", "jina"),
        split("same", "same_space", "mini", "twin"),
        split("rank-exp", "cross_space", "ranker", "ranker-2"),
    ]
    client = await connect(
        *models,
        twin,
        *rankers,
        aliases=ALIASES,
        experiments=experiments,
        api_keys_file=tmp_path / "keys.yaml",
    )
    return Gateway(client)


@pytest.mark.parametrize("key", KEYS)
async def test_a_key_sees_the_cards_of_the_names_it_may_use(gateway: Gateway, key: str) -> None:
    for name in NAMES:
        used = await gateway.uses(key, name)
        card = await gateway.ask(key, "GET", f"/v1/models/{name}")

        assert used.status_code == card.status_code == (200 if is_allowed(key, name) else 403), (name, used.text)
        if not is_allowed(key, name):
            assert {answer.json()["error"]["code"] for answer in (used, card)} == {"model_not_allowed"}


@pytest.mark.parametrize("key", KEYS)
async def test_the_other_endpoints_know_the_same_rule(gateway: Gateway, key: str) -> None:
    for name in ("mini", "default", "ask", "plain", "same", "cross"):
        asked = {
            "embed": ("POST", f"/tei/{name}/embed", {"inputs": "a"}),
            "tokenize": ("POST", f"/tei/{name}/tokenize", {"inputs": "a"}),
            "tokens": ("POST", "/v1/tokenize", {"model": name, "input": "a"}),
            "decode": ("POST", f"/tei/{name}/decode", {"ids": [0]}),
            "info": ("GET", f"/tei/{name}/info", None),
            "azure": ("POST", f"/openai/deployments/{name}/embeddings", {"input": "a"}),
            "ollama": ("POST", "/api/embed", {"model": name, "input": "a"}),
        }

        seen = {what: (await gateway.ask(key, *it[:2], json=it[2])).status_code for what, it in asked.items()}

        expected = dict.fromkeys(asked, 200 if is_allowed(key, name) else 403)
        if name == "cross" and is_allowed(key, name):  # an experiment has no tokens; see test_experiment_cards
            expected |= dict.fromkeys(("tokenize", "decode", "info"), 422) | {"tokens": 400}
        assert seen == expected, name


@pytest.mark.parametrize("key", KEYS)
async def test_the_lists_have_every_name_that_a_key_may_use_and_no_other(gateway: Gateway, key: str) -> None:
    bare = [name for name in ("mini", "jina", "team/small", "twin", "ranker", "ranker-2") if _may(key, name, name)]
    aliases = [name for name, to in ALIASES.items() if _may(key, name, to if isinstance(to, str) else to[0])]
    experiments = [name for name in ("cross", "same", "rank-exp") if _may(key, name)]

    cards = (await gateway.get(key, "/v1/models"))["data"]
    tags = (await gateway.get(key, "/api/tags"))["models"]
    listed = (await gateway.get(key, "/v1/experiments"))["data"]
    unknown = await gateway.uses(key, "no-such-name-at-all")

    assert {card["id"] for card in cards} | {alias for card in cards for alias in card["aliases"]} == {
        *bare,
        *aliases,
        *experiments,
    }
    assert len({card["id"] for card in cards}) == len(cards)
    assert [tag["name"] for tag in tags] == [*bare, *aliases, *experiments]
    assert [one["id"] for one in listed] == experiments
    available = re.search(r"; available: (.*)", unknown.json()["message"])
    assert available
    assert available[1] == (", ".join([*bare, *aliases, *experiments]) or "none")


@pytest.mark.parametrize("key", KEYS)
async def test_every_listed_name_can_be_used_and_leads_where_it_says(gateway: Gateway, key: str) -> None:
    for card in (await gateway.get(key, "/v1/models"))["data"]:
        assert card == await gateway.get(key, f"/v1/models/{card['id']}")
        for name in (card["id"], *(f"{card['id']}:{task}" for task in card["spaces"])):
            answer = await gateway.uses(key, name)
            assert answer.status_code == 200, answer.text
            task = name.partition(":")[2]
            space = card["spaces"][task] if task else card["space"]
            if space is not None:
                assert answer.headers["x-gateway-space"].rpartition("@")[2] == space.rpartition("@")[2]
        if card["kind"] == "embed":
            assert card["space"] is not None


@pytest.mark.parametrize("key", KEYS)
async def test_the_spaces_of_a_key_are_those_that_its_vectors_can_be_in(gateway: Gateway, key: str) -> None:
    listed = (await gateway.get(key, "/v1/spaces"))["data"]

    named = {
        (card["id"].rpartition("@")[2], name) for card in listed for one in card["members"] for name in one["names"]
    }
    possible = {
        (card["id"].rpartition("@")[2], name)
        for card in listed
        for one in card["members"]
        for name in one["experiments"]
    }
    reached = set()
    for name in NAMES:
        if not is_allowed(key, name) or name in RANK or name.startswith(("owner/", "jinaai/")):
            continue
        for unit in range(8):
            answer = await gateway.uses(key, name, f"unit-{unit}")
            reached.add((answer.headers["x-gateway-space"].rpartition("@")[2], name))
    native = {space for space, _name in reached}
    assert native <= {card["id"].rpartition("@")[2] for card in listed}
    for space, name in reached:
        experiment = name.partition(":")[0]
        is_other = name.partition(":")[0] in ALIASES and ":" in name and is_allowed(key, "jina")
        assert (space, name) in named or (space, experiment) in possible or is_other, (space, name)
    for card in listed:
        for member in card["members"]:
            for name in member["names"]:
                body = {"model": name, "input": "a", "dimensions": card["dimensions"]}
                answer = await gateway.ask(key, "POST", "/v1/embeddings", json=body)
                assert answer.headers["x-gateway-space"].rpartition("@")[2] == card["id"].rpartition("@")[2], name


@pytest.mark.parametrize("key", KEYS)
async def test_no_answer_has_a_name_that_the_key_may_not_use(gateway: Gateway, key: str) -> None:
    """The places that could reveal other names: lists, and messages that list names."""
    hidden = [name for name in ("team/small", "judge", "rank-exp", "plain", "default") if not is_allowed(key, name)]
    answers = [
        await gateway.ask(key, "GET", path)
        for path in (
            "/v1/models",
            "/v1/spaces",
            "/v1/experiments",
            "/v1/experiments/none",
            "/v1/models/none",
            "/api/tags",
        )
    ]
    answers += [
        await gateway.uses(key, "Judge"),
        await gateway.uses(key, "openai/plain"),
        await gateway.ask(key, "POST", "/v1/embeddings", json={"input": "a", "model": "judge"}),
        await gateway.ask(key, "POST", "/v1/rerank", json={"query": "a", "documents": ["b"], "model": "mini"}),
        await gateway.ask(key, "POST", "/v1/rerank", json={"query": "a", "documents": ["b"]}),
    ]

    for answer in answers:
        text = (
            answer.text.replace("model 'judge'", "").replace("called 'Judge'", "").replace("called 'openai/plain'", "")
        )
        for name in hidden:
            assert not re.search(rf"(?<![\w/-]){re.escape(name)}(?![\w/-])", text), (name, answer.request.url, text)


async def test_a_request_without_a_name_gets_the_only_reranker_that_its_key_may_use(gateway: Gateway) -> None:
    body = {"query": "a", "documents": ["b"]}

    answers = {
        key: await gateway.ask(key, "POST", "/v1/rerank", json=body)
        for key in ("all", "a reranker", "its alias", "a model")
    }

    assert {key: answer.status_code for key, answer in answers.items()} == {
        "all": 400, "a reranker": 200, "its alias": 200, "a model": 403
    }  # fmt: skip
    assert "several models rerank: ranker, ranker-2" in answers["all"].json()["message"]


async def test_only_the_probe_of_a_model_needs_no_key(connect: Connect, make_model: MakeModel) -> None:
    """The path of a probe may also be a model's address, to which clients post: a name or a unit may be `health`."""
    experiment = split("search", "cross_space", "mini", "team/health").model_copy(update={"unit": ("model",)})
    client = await connect(
        make_model("mini"),
        make_model("team/health"),
        aliases={"my/health": "mini"},
        experiments=[experiment],
        api_keys=["sk-one"],
    )

    for name in ("team/health", "my/health", "search/health"):
        posted = {
            key: await client.post(f"/tei/{name}", json={"inputs": "a"}, headers={"authorization": key})
            for key in ("", "Bearer sk-one")
        }
        probed = await client.get(f"/tei/{name}/health")
        with_head = await client.head(f"/tei/{name}/health")

        assert {key: answer.status_code for key, answer in posted.items()} == {"": 401, "Bearer sk-one": 200}, name
        assert probed.status_code == with_head.status_code == 200


async def test_a_probe_without_a_key_learns_no_names(gateway: Gateway) -> None:
    for name in ("none", "MINI", "rank-expp"):
        answer = await gateway.client.get(f"/tei/{name}/health")

        assert answer.status_code == 404
        assert answer.json()["message"] == f"no model is called {name!r}"


async def test_every_other_path_needs_a_key(connect: Connect, tmp_path: Path) -> None:
    """Whatever its parameters are: a name may be a path that needs no key elsewhere."""
    folders = {name: tmp_path / name for name in ("batch_dir", "state_dir", "runs_dir")}
    client = await connect(api_keys=["sk-one"], admin_key="operators-key", **folders)
    methods = client._transport.app.state.methods  # type: ignore[attr-defined]

    opened = set()
    for path, value in product(methods, ("mini", "mini/health", "mini/v1/health/live")):
        for method in methods[path]:
            answer = await client.request(method, re.sub(r"\{[^}]*\}", value, path), json={"inputs": "a", "input": "a"})
            if answer.status_code not in (401, 403, 404, 303):  # the console asks for the key itself
                opened.add((method, path))

    assert opened - {("GET", path) for path in ("/console/sign-in",)} == {
        ("GET", path)
        for path in ("/health", "/health/live", "/health/ready", "/health/startup", "/tei/{model:path}/health")
    }


async def test_an_arm_cannot_be_found_out_without_the_experiment(
    connect: Connect, tmp_path: Path, models: list[Model]
) -> None:
    """A header that forces an arm is refused with the names of the arms."""
    experiment = split("cross", "cross_space", "mini", "jina").model_copy(update={"force": "header:x-arm"})
    (tmp_path / "k.yaml").write_text(f"version: 1\nkeys: [{{name: a, sha256: {key_digest('key')}, models: [mini]}}]")
    client = await connect(*models, experiments=[experiment], api_keys_file=tmp_path / "k.yaml")

    answer = await client.post(
        "/v1/embeddings",
        json={"model": "cross", "input": "a"},
        headers={"authorization": "Bearer key", "x-arm": "no-such-arm"},
    )

    assert answer.status_code == 403
    assert "jina" not in answer.text


def _may(key: str, *names: str) -> bool:
    models = KEYS[key]
    return models is None or any(name in models for name in names)

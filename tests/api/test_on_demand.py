"""Models that are loaded on demand, as clients, probes and the operator see them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest

from gateway.app import create_app
from gateway.backends.base import Backend
from gateway.backends.fake import FakeBackend, fake_info
from gateway.backends.on_demand import OnDemandBackend
from gateway.config.registry import ModelEntry, Registry
from gateway.deployment import Deployment
from gateway.errors import LoadError
from gateway.telemetry import metrics
from tests.backends.loadable import Machine, make_entry, settle

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
CheckError = Callable[..., str]
ADMIN = {"authorization": "Bearer operator-key"}
INPUT = {"input": ["a b c"]}


class Gateway:
    """A gateway in this process: ``team/one`` and ``two`` are loaded on demand, ``twin`` has the vectors of ``two``."""

    def __init__(self, **settings: object) -> None:
        self.machine = Machine(admin_key="operator-key", **settings)
        self.entries = [make_entry("team/one"), make_entry("two")]
        self.fallbacks: dict[str, tuple[str, ...]] = {}

    def registry(self) -> Registry:
        return Registry(path=Path("models.yaml"), version=1, models=tuple(self.entries), fallbacks=self.fallbacks)

    def make_backend(self, entry: ModelEntry) -> Backend:
        if entry.is_on_demand:
            return self.machine.make(entry.id, 60)
        return FakeBackend(fake_info(entry.id, fingerprint=fake_info("two").fingerprint))

    async def start(self) -> httpx.AsyncClient:
        self.deployment = Deployment(
            self.registry(), self.machine.settings, make_backend=self.make_backend, read_registry=self.registry
        )
        await self.deployment.start()
        transport = httpx.ASGITransport(create_app(self.deployment))
        return httpx.AsyncClient(transport=transport, base_url="http://gateway")

    def state(self, model: str) -> str:
        found = self.deployment.fleet.get(model)
        assert found is not None
        return found.state.value


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    made = Gateway()
    yield made
    await made.deployment.stop()


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(await gateway.start())


async def states_in(client: httpx.AsyncClient, path: str) -> dict[str, str]:
    body = (await client.get(path)).json()
    return {model["id"]: model["state"] for model in body.get("data") or body["models"]}


async def test_a_model_is_described_before_it_is_loaded(gateway: Gateway, client: httpx.AsyncClient) -> None:
    cards = {card["id"]: card for card in (await client.get("/v1/models")).json()["data"]}

    assert {card["state"] for card in cards.values()} == {"unloaded"}
    assert cards["two"]["space"].startswith("two@")
    assert (cards["two"]["width"], cards["two"]["max_tokens"]) == (8, 256)
    ready = await client.get("/health/ready")
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")
    assert await states_in(client, "/health") == {"team/one": "unloaded", "two": "unloaded"}
    assert metrics.REGISTRY.get_sample_value("gateway_model_ready", {"model": "two"}) == 1
    assert "two" in [tag["name"] for tag in (await client.get("/api/tags")).json()["models"]]
    space = cards["two"]["space"]
    answer = await client.post(
        "/v1/embeddings", json={"model": "two", **INPUT}, headers={"x-gateway-expect-space": space}
    )
    assert answer.headers["x-gateway-space"] == space
    assert gateway.machine.inner["two"].num_loads == 1


async def test_requests_load_models_in_turn(gateway: Gateway, client: httpx.AsyncClient) -> None:
    for model, loaded in (("two", 1), ("team/one", 1), ("team/one", 1), ("two", 2)):
        answer = await client.post("/v1/embeddings", json={"model": model, **INPUT})
        assert answer.status_code == 200, answer.text
        assert gateway.machine.inner[model].num_loads == loaded

    assert await states_in(client, "/v1/models") == {"two": "ready", "team/one": "unloaded"}


async def test_a_client_that_cannot_wait_learns_when_to_come_back(
    gateway: Gateway, client: httpx.AsyncClient, check_error: CheckError
) -> None:
    gateway.machine.inner["two"].gate.clear()
    # OpenAI's clients send their timeout; the deadline is on the real clock, and the other one stands still.
    gateway.machine.time.time = asyncio.get_running_loop().time()
    answer = await client.post(
        "/v1/embeddings", json={"model": "two", **INPUT}, headers={"x-stainless-read-timeout": "0.05"}
    )

    message = check_error(answer, 503, "model_not_ready", type_="server_error")
    assert message == "model 'two' is loaded on demand, which will probably take 3 s more"
    assert answer.headers["retry-after"] == "3"
    assert await states_in(client, "/health") == {"team/one": "unloaded", "two": "loading"}
    assert (await client.get("/health/ready")).status_code == 200
    gateway.machine.inner["two"].gate.set()
    assert (await client.post("/v1/embeddings", json={"model": "two", **INPUT})).status_code == 200


async def test_a_load_that_fails_is_a_503_and_other_models_answer(
    gateway: Gateway, client: httpx.AsyncClient, check_error: CheckError
) -> None:
    gateway.machine.inner["two"].error = LoadError("the weights are torn")
    answer = await client.post("/v1/embeddings", json={"model": "two", **INPUT})

    message = check_error(answer, 503, "model_unavailable", type_="server_error")
    assert "failed to load: the weights are torn" in message
    assert "x-should-retry" not in answer.headers
    card = (await client.get("/v1/models/two")).json()
    assert (card["state"], card["reason"]) == ("unloaded", "failed to load: the weights are torn")
    assert (await client.post("/v1/embeddings", json={"model": "team/one", **INPUT})).status_code == 200


async def test_texts_are_split_by_a_model_that_has_to_be_loaded_first(
    gateway: Gateway, client: httpx.AsyncClient
) -> None:
    answer = await client.post("/tei/two/tokenize", json={"inputs": "a b c", "add_special_tokens": False})

    assert [len(row) for row in answer.json()] == [3]
    assert gateway.state("two") == "ready"


# ----------------------------------------------------------------------------------------------------------- fallbacks


async def test_a_ready_fallback_answers_while_the_model_loads(gateway: Gateway) -> None:
    gateway.entries.append(ModelEntry(id="twin", source="package:twin", enabled=True))
    gateway.fallbacks = {"two": ("twin",)}
    async with await gateway.start() as client:
        gateway.machine.inner["two"].gate.clear()
        first = await client.post("/v1/embeddings", json={"model": "two", **INPUT})
        assert first.headers["x-gateway-model"] == "twin"
        assert gateway.state("two") == "loading"

        gateway.machine.inner["two"].gate.set()
        await settle()
        second = await client.post("/v1/embeddings", json={"model": "two", **INPUT})

    assert second.headers["x-gateway-model"] == "two"


async def test_a_fallback_is_loaded_when_the_model_cannot_answer(gateway: Gateway) -> None:
    gateway.entries.append(ModelEntry(id="twin", source="package:twin", enabled=True))
    gateway.fallbacks = {"twin": ("two",)}
    async with await gateway.start() as client:
        assert (await client.post("/v1/embeddings", json={"model": "twin", **INPUT})).status_code == 200
        assert gateway.state("two") == "unloaded"
        twin = gateway.deployment.fleet.get("twin")
        assert twin is not None
        await twin.backend.stop()
        answer = await client.post("/v1/embeddings", json={"model": "twin", **INPUT})

    assert (answer.status_code, answer.headers["x-gateway-model"]) == (200, "two")


# -------------------------------------------------------------------------------------------------------- the operator


async def test_the_operator_loads_and_unloads(gateway: Gateway, client: httpx.AsyncClient) -> None:
    loaded = await client.post("/admin/models/team/one/load", headers=ADMIN)
    assert loaded.status_code == 200, loaded.text
    assert {**loaded.json(), "seconds": 0} == {"id": "team/one", "state": "ready", "seconds": 0}
    assert gateway.machine.free == 40

    unloaded = await client.post("/admin/models/team/one/unload", headers=ADMIN)
    assert {**unloaded.json(), "seconds": 0} == {"id": "team/one", "state": "unloaded", "seconds": 0}
    assert gateway.machine.free == 100


@pytest.mark.parametrize("action", ["load", "unload"])
async def test_a_refused_action_of_the_operator_has_a_reason(
    gateway: Gateway, check_error: CheckError, action: str
) -> None:
    gateway.entries.append(ModelEntry(id="twin", source="package:twin", enabled=True))
    gateway.entries.append(make_entry("off").model_copy(update={"enabled": False}))
    async with await gateway.start() as client:

        async def ask(model: str, headers: dict[str, str] = ADMIN) -> httpx.Response:
            return await client.post(f"/admin/models/{model}/{action}", headers=headers)

        check_error(await ask("two", {}), 403, "forbidden", type_="permission_error")
        assert "available: team/one, two, twin, off" in check_error(await ask("three"), 404, "model_not_found")
        message = check_error(await ask("twin"), 400, "invalid_input")
        assert (
            message
            == "model 'twin' is loaded at the start and stays loaded: set `load: on_demand` in models.yaml to change that"
        )
        answer = await ask("off")
        message = check_error(answer, 503, "model_unavailable", type_="server_error")
        assert message == "model 'off' is disabled: switched off in models.yaml (`enabled: false`)"
        assert answer.headers["x-should-retry"] == "false"
        gateway.machine.inner["two"].error = LoadError("torn")
        answer = await ask("two")
        assert answer.status_code == (503 if action == "load" else 200)


@pytest.mark.parametrize("action", ["load", "unload"])
async def test_a_model_that_has_not_been_read_yet_can_be_loaded_soon(
    gateway: Gateway, check_error: CheckError, action: str
) -> None:
    async with await gateway.start():
        starting = Deployment(gateway.registry(), gateway.machine.settings, make_backend=gateway.make_backend)
        transport = httpx.ASGITransport(create_app(starting))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            answer = await client.post(f"/admin/models/two/{action}", headers=ADMIN)

    message = check_error(answer, 503, "model_not_ready", type_="server_error")
    assert message == "model 'two' cannot be loaded yet: the gateway is starting"
    assert (answer.headers["retry-after"], answer.headers.get("x-should-retry")) == ("5", None)


@pytest.mark.parametrize("action", ["load", "unload"])
async def test_a_model_on_other_servers_is_loaded_there(gateway: Gateway, check_error: CheckError, action: str) -> None:
    upstream = {"urls": ("http://127.0.0.1:9/v1",)}
    gateway.entries.append(
        ModelEntry.model_validate({"id": "far", "source": "x", "backend": "openai", "upstream": upstream})
    )
    async with await gateway.start() as client:
        answer = await client.post(f"/admin/models/far/{action}", headers=ADMIN)

    message = check_error(answer, 400, "invalid_input")
    assert message == "model 'far' runs on other servers, and is loaded there"


async def test_a_similar_path_is_shown_as_the_documentation_writes_it(
    client: httpx.AsyncClient, check_error: CheckError
) -> None:
    message = check_error(await client.post("/admin/models/two/loads", headers=ADMIN), 404, "not_found")

    assert message == "no such path: /admin/models/two/loads; did you mean /admin/models/{model}/load?"


# ---------------------------------------------------------------------------------------------------------- reloading


async def test_a_reload_keeps_loaded_models_and_replaces_changed_ones(
    gateway: Gateway, client: httpx.AsyncClient
) -> None:
    machine = gateway.machine
    await client.post("/v1/embeddings", json={"model": "two", **INPUT})
    old = machine.inner["two"]
    gateway.entries[0] = make_entry("team/one", idle_unload_s=60)
    gateway.entries.append(make_entry("three"))
    reloaded = (await client.post("/admin/reload", headers=ADMIN)).json()
    assert (reloaded["loaded"], reloaded["kept"]) == (["team/one", "three"], ["two"])
    assert await states_in(client, "/health") == {"team/one": "unloaded", "two": "ready", "three": "unloaded"}
    assert machine.free == 40

    gateway.entries[1] = make_entry("two", idle_unload_s=60)
    await client.post("/admin/reload", headers=ADMIN)
    await settle()

    assert (gateway.state("two"), machine.free) == ("unloaded", 100), "the old one was stopped"
    assert machine.inner["two"] is not old
    assert (await client.post("/v1/embeddings", json={"model": "two", **INPUT})).status_code == 200


async def test_a_reload_while_a_model_loads_lets_it_finish(gateway: Gateway, client: httpx.AsyncClient) -> None:
    old = gateway.machine.inner["two"]
    old.gate.clear()
    waiting = asyncio.create_task(client.post("/v1/embeddings", json={"model": "two", **INPUT}))
    await asyncio.wait_for(old.has_begun.wait(), 5)
    gateway.entries[1] = make_entry("two", idle_unload_s=60)
    assert (await client.post("/admin/reload", headers=ADMIN)).status_code == 200
    old.gate.set()

    assert (await waiting).status_code == 200
    await settle()
    assert (gateway.state("two"), gateway.machine.free) == ("unloaded", 100)
    assert isinstance(next(iter(gateway.deployment.fleet)).backend, OnDemandBackend)


async def test_a_stop_while_a_model_loads_answers_those_that_wait(
    gateway: Gateway, client: httpx.AsyncClient, check_error: CheckError
) -> None:
    gateway.machine.inner["two"].gate.clear()
    waiting = asyncio.create_task(client.post("/v1/embeddings", json={"model": "two", **INPUT}))
    await asyncio.wait_for(gateway.machine.inner["two"].has_begun.wait(), 5)
    gateway.deployment.drain()

    await asyncio.wait_for(gateway.deployment.stop(), 5)

    check_error(await waiting, 503, "shutting_down", type_="server_error")
    assert gateway.state("two") == "stopped"
    gateway.machine.inner["two"].gate.set()
    await settle()
    assert (gateway.state("two"), gateway.machine.free) == ("stopped", 100)

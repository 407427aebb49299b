"""``/v1/experiments``: the list, and the figures of the requests that each splits."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from gateway.app import create_app
from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import Arm, Experiment, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.experiments.exposures import read_exposures
from gateway.fleet import Fleet, Model

CheckError = Callable[..., str]
GatewayWith = Callable[..., Awaitable[httpx.AsyncClient]]
ARMS = (Arm(model="mini", weight=50), Arm(name="second", model="other", weight=50))
UNIT = "x-unit"


def experiment(experiment_id: str = "exp", **fields: Any) -> Experiment:
    given = {"kind": "cross_space", "unit": (f"header:{UNIT}",), "force": "header:x-arm", "arms": ARMS, **fields}
    return Experiment(id=experiment_id, **given)


@pytest.fixture
async def gateway_with(make_model: Callable[..., Model]) -> AsyncIterator[GatewayWith]:
    """Return a function that starts a gateway with experiments over two models, and returns a client of it."""
    async with contextlib.AsyncExitStack() as stack:

        async def gateway_with(*experiments: Experiment, **settings: Any) -> httpx.AsyncClient:
            models = [make_model(name, backend=FakeBackend(fake_info(name, width=8))) for name in ("mini", "other")]
            registry = Registry(
                path=Path("models.yaml"),
                version=1,
                models=tuple(model.entry for model in models),
                experiments=experiments or (experiment(),),
            )
            fleet = Fleet(models)
            for model in fleet:
                await model.backend.start()
            fleet.started.set()
            deployment = Deployment(registry, Settings(**settings), fleet)
            app = create_app(deployment)
            stack.push_async_callback(deployment.resources.aclose)
            client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")
            return await stack.enter_async_context(client)

        yield gateway_with


async def test_the_id_of_an_experiment_is_not_a_path_below_another_one(gateway_with: GatewayWith) -> None:
    """Such an experiment could not be retrieved."""
    client = await gateway_with()
    below = "/v1/experiments/{experiment_id:path}/"
    methods = client._transport.app.state.methods  # type: ignore[attr-defined]
    names = [path.removeprefix(below) for path in methods if path.startswith(below) and "GET" in methods[path]]

    assert {"assignment", "outcomes", "units"} <= set(names)
    for name in names:
        with pytest.raises(ValidationError, match=f"must not end in .*`/{name}`"):
            experiment(f"team/{name}")


async def embed(client: httpx.AsyncClient, name: str = "exp", **headers: str) -> httpx.Response:
    sent = {key.replace("_", "-"): value for key, value in headers.items()}
    return await client.post("/v1/embeddings", json={"model": name, "input": ["a", "b"]}, headers=sent)


async def embed_for(client: httpx.AsyncClient, units: Sequence[str]) -> list[str]:
    """Embed once for each unit; return the arms."""
    return [(await embed(client, x_unit=unit)).headers["x-gateway-arm"] for unit in units]


@pytest.mark.parametrize("path", ["/v1/experiments", "/experiments"])
async def test_experiments_are_listed_as_the_registry_has_them(gateway_with: GatewayWith, path: str) -> None:
    client = await gateway_with(
        experiment(arms=(Arm(model="mini", weight=90), Arm(name="second", model="other", task=None, weight=0.5))),
        experiment("later/one", start="2126-11-01T00:00:00Z", end="2126-12-01T00:00:00Z"),
    )

    answer = await client.get(path)

    assert answer.status_code == 200
    assert answer.json()["object"] == "list"
    first, second = answer.json()["data"]
    assert first == {
        "id": "exp",
        "object": "experiment",
        "kind": "cross_space",
        "start": None,
        "end": None,
        "running": True,
        "arms": [
            {"arm": "mini", "model": "mini", "task": None, "weight": 90.0},
            {"arm": "second", "model": "other", "task": None, "weight": 0.5},
        ],
    }
    assert (second["id"], second["running"]) == ("later/one", False)
    assert (second["start"], second["end"]) == ("2126-11-01T00:00:00+00:00", "2126-12-01T00:00:00+00:00")


async def test_a_registry_without_experiments_lists_none(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/experiments")).json() == {"object": "list", "data": []}


@pytest.mark.parametrize("path", ["/v1/experiments/exp", "/experiments/exp"])
async def test_requests_are_counted_in_their_arms(gateway_with: GatewayWith, path: str) -> None:
    client = await gateway_with()
    units = [f"user-{i}" for i in range(40)]
    arms = await embed_for(client, units)
    await embed_for(client, units[:5])
    await embed(client, x_unit="user-0", x_arm="second")
    await embed(client)

    shown = (await client.get(path)).json()

    assert (shown["id"], shown["running"]) == ("exp", True)
    assert [arm["arm"] for arm in shown["evidence"]] == ["mini", "second"]
    assert [arm["model"] for arm in shown["evidence"]] == ["mini", "other"]
    assert [arm["units"] for arm in shown["evidence"]] == [arms.count("mini"), arms.count("second")]
    assert [arm["share"] for arm in shown["evidence"]] == [0.5, 0.5]
    assert sum(arm["requests"] for arm in shown["evidence"]) == 45
    assert sum(arm["texts"] for arm in shown["evidence"]) == 90
    for arm in shown["evidence"]:
        assert arm["p50_s"] > 0
        assert (arm["p95_s"], arm["p99_s"]) == (None, None)
        assert arm["tokens_per_s"] > 0
    assert shown["uncounted"] == {"forced": 1, "no_unit": 1}
    assert shown["sample_ratio"]["degrees"] == 1
    assert shown["sample_ratio"]["mismatch"] is False
    assert shown["sample_ratio"]["verdict"].startswith("no mismatch found, p = ")
    assert shown["units_since"] >= shown["since"]
    assert shown["sources"] == [{"source": "header:x-unit", "units": 40, "requests": 45}]


async def test_errors_are_counted_in_their_arm(gateway_with: GatewayWith) -> None:
    client = await gateway_with()
    answer = await client.post(
        "/v1/embeddings", json={"model": "exp", "input": "a", "dimensions": 3}, headers={UNIT: "u"}
    )
    assert answer.status_code == 400

    evidence = (await client.get("/v1/experiments/exp")).json()["evidence"]

    (hit,) = [arm for arm in evidence if arm["requests"]]
    assert (hit["client_errors"], hit["server_errors"], hit["error_rate"], hit["p50_s"]) == (1, 0, 1.0, None)
    assert (hit["units"], hit["unanswered_units"], hit["errors_by_code"]) == (1, 1, {"unsupported_dimensions": 1})


async def test_an_id_may_have_slashes(gateway_with: GatewayWith) -> None:
    client = await gateway_with(experiment("team/exp"))

    assert (await client.get("/v1/experiments/team/exp")).json()["id"] == "team/exp"


@pytest.mark.parametrize(("experiments", "known"), [((), "exp"), ((experiment("one"), experiment("two")), "one, two")])
async def test_an_unknown_id_gets_the_known_ones(
    gateway_with: GatewayWith, check_error: CheckError, experiments: tuple[Experiment, ...], known: str
) -> None:
    client = await gateway_with(*experiments)

    message = check_error(await client.get("/v1/experiments/mini"), 404, "experiment_not_found")

    assert message == f"no experiment is called 'mini'; available: {known}"


async def test_units_are_logged_and_counted_after_a_restart(gateway_with: GatewayWith, tmp_path: Path) -> None:
    path = tmp_path / "log" / "exposures.jsonl"
    units = [f"user-{i}" for i in range(10)]
    await embed_for(await gateway_with(exposure_log=path), units)

    restarted = await gateway_with(exposure_log=path)
    arms = await embed_for(restarted, units)
    shown = (await restarted.get("/v1/experiments/exp")).json()

    assert [arm["units"] for arm in shown["evidence"]] == [arms.count("mini"), arms.count("second")]
    logged = list(read_exposures([path]))
    assert [exposure.arm for exposure in logged] == arms
    assert {exposure.model for exposure in logged} == {"mini", "other"}
    assert not any("user-" in line for line in path.read_text().splitlines())


async def test_counts_begin_again_with_other_weights(gateway_with: GatewayWith, tmp_path: Path) -> None:
    path = tmp_path / "exposures.jsonl"
    await embed_for(await gateway_with(exposure_log=path), ["user-1", "user-2"])
    ramped = (ARMS[0], ARMS[1].model_copy(update={"weight": 60}))

    shown = (await (await gateway_with(experiment(arms=ramped), exposure_log=path)).get("/v1/experiments/exp")).json()

    assert [arm["units"] for arm in shown["evidence"]] == [0, 0]
    assert shown["units_since"] is None

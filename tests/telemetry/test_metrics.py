"""The metrics of a gateway that serves: their values, and that each is documented, bounded, and gone with its model."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway import __version__
from gateway.app import create_app
from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import Registry, load_registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.telemetry import metrics
from gateway.types import ModelState


def samples(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Return the values of a scrape, by sample name and labels."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


@pytest.fixture
async def deployment(tmp_path: Path) -> AsyncIterator[Deployment]:
    path = tmp_path / "models.yaml"
    write(path, "measured", "other")

    def read() -> Registry:
        return load_registry(path, {})

    settings = Settings(models=path)
    deployment = Deployment(
        read(), settings, read_registry=read, make_backend=lambda entry: FakeBackend(fake_info(entry.id))
    )
    await deployment.start()
    yield deployment
    await deployment.stop()


def write(path: Path, *models: str) -> None:
    path.write_text(
        "version: 1\nmodels:\n" + "".join(f"  - {{id: {name}, source: ./x, enabled: true}}\n" for name in models)
    )


async def scrape(client: httpx.AsyncClient) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    return samples((await client.get("/metrics")).text)


async def test_a_request_is_seen_in_every_stage(deployment: Deployment) -> None:
    transport = httpx.ASGITransport(create_app(deployment))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        answer = await client.post("/v1/embeddings", json={"model": "measured", "input": ["a", "b c"]})
        found = await scrape(client)

    target = (("arm", ""), ("experiment", ""), ("model", "measured"), ("task", ""))
    for stage in ("tokenize", "queue", "inference", "serialize"):
        assert found["gateway_stage_duration_seconds_count"][tuple(sorted((*target, ("stage", stage))))] == 1
    assert found["gateway_texts_total"][target] == 2
    assert found["gateway_tokens_total"][target] == answer.json()["usage"]["total_tokens"]
    assert "serialize;dur=" in answer.headers["server-timing"]
    assert found["gateway_build_info"] == {(("version", __version__),): 1}


async def test_a_model_has_metrics_of_its_info_and_its_state(deployment: Deployment) -> None:
    transport = httpx.ASGITransport(create_app(deployment))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        found = await scrape(client)
        space = (await client.post("/v1/embeddings", json={"model": "measured", "input": "a"})).headers[
            "x-gateway-space"
        ]

    states = {
        dict(key)["state"]: value
        for key, value in found["gateway_model_state"].items()
        if dict(key)["model"] == "measured"
    }
    assert states == {state.value: float(state is ModelState.READY) for state in ModelState}
    (info,) = [dict(key) for key in found["gateway_model_info"] if dict(key)["model"] == "measured"]
    assert info["space"] == space
    assert info.keys() == {"model", "source", "revision", "space", "dtype", "device", "runtime"}


async def test_the_metrics_of_a_model_are_removed_with_it(deployment: Deployment) -> None:
    transport = httpx.ASGITransport(create_app(deployment))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        for model in ("measured", "other"):
            await client.post("/v1/embeddings", json={"model": model, "input": "a"})
        before = (await client.get("/metrics")).text
        write(deployment.registry.path, "other")
        await deployment.reload()
        for _ in range(100):
            await asyncio.sleep(0.01)
            if 'model="measured"' not in (after := (await client.get("/metrics")).text):
                break

    assert 'gateway_embed_requests_total{arm="",experiment="",model="measured",outcome="ok",task=""} ' in before
    assert 'model="measured"' not in after
    assert 'gateway_embed_requests_total{arm="",experiment="",model="other",outcome="ok",task=""} ' in after


async def test_no_label_contains_text_of_a_client(deployment: Deployment) -> None:
    made_up = "made-up-by-a-client"
    transport = httpx.ASGITransport(create_app(deployment))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        headers = {"authorization": f"Bearer {made_up}", "x-request-id": made_up, "user-agent": made_up}
        for body in (
            {"model": made_up, "input": made_up},
            {"model": "measured", "input": made_up, "task": made_up, "user": made_up},
            {"model": f"measured:{made_up}", "input": "a"},
        ):
            await client.post(f"/v1/embeddings?{made_up}", json=body, headers=headers)
        for path in (f"/{made_up}", f"/v1/models/{made_up}", f"/v1/experiments/{made_up}"):
            await client.get(path, headers=headers)
        text = (await client.get("/metrics")).text

    assert made_up not in text


def test_every_metric_has_a_unit_or_a_plain_count_in_its_name_and_a_help_that_is_a_sentence() -> None:
    for metric in metrics.declared():
        name = metric.name
        assert re.fullmatch(r"gateway_[a-z_]+", name), name
        assert metric.help.endswith("."), name
        if metric.kind == "histogram":
            assert name.endswith(("_seconds", "_texts", "_tokens", "_ratio")), name


def test_every_metric_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()

    for metric in metrics.declared():
        name = metric.name + ("_total" if metric.kind == "counter" else "")
        assert f"| `{name}` |" in page
        for label in metric.labels:
            assert f"`{label}`" in page


def test_no_series_says_when_another_was_made() -> None:
    """The Python client would export one for each counter and histogram, which no dashboard needs."""
    metrics.RELOADS.labels("ok").inc(0)

    assert "gateway_reloads_total" in metrics.render().decode()
    assert "_created" not in metrics.render().decode()

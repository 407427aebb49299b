"""Models that run on other servers, as part of a gateway: their space, their fallbacks, and servers that come and go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from opentelemetry.sdk.trace import TracerProvider
from starlette.responses import Response
from structlog.testing import capture_logs

from gateway import fleet as fleet_module
from gateway.app import create_app
from gateway.backends.base import Backend, Report
from gateway.backends.fake import FakeBackend, fake_info
from gateway.backends.residents import Residents
from gateway.backends.upstream.backend import UpstreamBackend
from gateway.cli.lock import differences, make_lock
from gateway.cli.verify import record_golden, verify
from gateway.config.registry import ModelEntry, load_registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment, make_real_backend
from gateway.errors import ConfigError, ModelNotReady
from gateway.experiments.stats import ExperimentStats
from gateway.requests import EmbedRequest
from gateway.routing.names import GATEWAY
from gateway.routing.spaces import is_same_space
from gateway.server import server_config
from gateway.service import EmbeddingService
from gateway.telemetry import tracing
from gateway.types import EmbedJob, ModelInfo, ModelState
from tests.backends.stand_in import StandIn, vector_of
from tests.listener import make_listener

PATIENCE_S = 30

NEAR = """
version: 1
models:
  - {id: near, source: ./near, enabled: true}
"""
FAR = """
  - id: far
    backend: %s
    source: %s
    upstream: {urls: ["%s"], probe_interval_s: 0.1}
"""


class Gateway:
    """A deployment of ``models.yaml``, in which ``near`` runs here and can be made to fail, and all else runs elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "models.yaml"
        self.is_near_well = True

    def deploy(self, text: str) -> Deployment:
        self.path.write_text(text)

        def fail(_job: EmbedJob) -> None:
            if not self.is_near_well:
                raise ModelNotReady("commanded")

        def make_backend(entry: ModelEntry) -> Backend:
            if entry.is_remote:
                return make_real_backend(entry, Settings(), Residents(), lambda _reason: None)
            return FakeBackend(fake_info(entry.id, max_tokens=512), on_embed=fail)

        registry = load_registry(self.path, {})
        return Deployment(
            registry, Settings(), make_backend=make_backend, read_registry=lambda: load_registry(self.path, {})
        )

    @asynccontextmanager
    async def serving(self, text: str) -> AsyncIterator[Deployment]:
        deployment = self.deploy(text)
        await deployment.start()
        try:
            yield deployment
        finally:
            await deployment.stop()


async def ask(deployment: Deployment, model: str, **fields: Any) -> Any:
    who = {"caller": "test", "client": GATEWAY}
    request = EmbedRequest(texts=["a b", "c"], model=model, timeout_s=PATIENCE_S, **who, **fields)
    return await EmbeddingService(deployment, ExperimentStats(None)).embed(request)


async def wait_until(look: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not look():  # noqa: ASYNC110  the condition has no event
            await asyncio.sleep(0.02)


def state(deployment: Deployment, model: str = "far") -> tuple[ModelState, str]:
    found = deployment.fleet.get(model)
    assert found is not None
    return found.state, found.reason


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    return Gateway(tmp_path)


@pytest.fixture
async def server() -> AsyncIterator[StandIn]:
    async with StandIn().serving() as one:
        yield one


@pytest.fixture
async def other_gateway(tmp_path: Path) -> AsyncIterator[str]:
    """Serve ``near`` over HTTP from a second gateway; return its address."""
    folder = tmp_path / "other"
    folder.mkdir()
    async with Gateway(folder).serving(NEAR) as deployment:
        server = uvicorn.Server(server_config(create_app(deployment), Settings()))
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        with make_listener() as listener:
            task = asyncio.create_task(server.serve(sockets=[listener]))
            await wait_until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            server.should_exit = True
            await task


@pytest.mark.parametrize(("kind", "path"), [("openai", "/v1"), ("tei", "/tei/near")])
async def test_a_second_gateway_runs_a_model(gateway: Gateway, other_gateway: str, kind: str, path: str) -> None:
    async with gateway.serving(NEAR + FAR % (kind, "near", other_gateway + path)) as deployment:
        far, near = await ask(deployment, "far"), await ask(deployment, "near")

    np.testing.assert_allclose(far.vectors, near.vectors, rtol=1e-6)
    assert (far.model, far.num_tokens) == ("far", 3)
    assert far.space != near.space  # the registry does not say that they are the same


async def test_a_model_that_is_proven_to_be_the_same_is_a_fallback(gateway: Gateway, other_gateway: str) -> None:
    text = (
        NEAR + FAR % ("openai", "near", f"{other_gateway}/v1") + "    same_space_as: near\nfallbacks: {near: [far]}\n"
    )
    async with gateway.serving(text) as deployment:
        near = await ask(deployment, "near")
        gateway.is_near_well = False
        far = await ask(deployment, "near", expect_space=near.space)

    assert (near.model, far.model) == ("near", "far")
    np.testing.assert_allclose(far.vectors, near.vectors, rtol=1e-6)


async def test_a_model_that_is_not_the_declared_one_is_not_served(gateway: Gateway, server: StandIn) -> None:
    server.width = 8
    text = NEAR + FAR % ("openai", "acme/embed", f"{server.url}/v1") + "    same_space_as: near\n"
    async with gateway.serving(text) as deployment:
        assert state(deployment)[0] is ModelState.FAILED
        assert "its vectors are not those of near: cosine" in state(deployment)[1]


async def test_a_model_that_becomes_the_declared_one_is_served(
    gateway: Gateway, other_gateway: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "_FIRST_PAUSE_S", 0.05)
    gateway.is_near_well = False  # there is nothing to compare with
    text = NEAR + FAR % ("openai", "near", f"{other_gateway}/v1") + "    same_space_as: near\n"
    async with gateway.serving(text) as deployment:
        assert "that could not be checked: commanded" in state(deployment)[1]
        gateway.is_near_well = True
        await wait_until(lambda: state(deployment)[0] is ModelState.READY)
        far, near = await ask(deployment, "far"), await ask(deployment, "near")

    assert is_same_space(far.space, near.space)


async def test_models_whose_servers_are_absent_are_served_when_they_come(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "_FIRST_PAUSE_S", 0.05)
    server = StandIn()
    async with server.serving():
        pass
    async with gateway.serving(NEAR + FAR % ("tei", "acme/embed", server.url)) as deployment:
        assert state(deployment)[0] is ModelState.FAILED
        async with server.serving():
            await wait_until(lambda: state(deployment)[0] is ModelState.READY)
            answer = await ask(deployment, "far")

    expected = np.stack([vector_of(text, width=16) for text in ("a b", "c")])
    np.testing.assert_allclose(answer.vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-5)


async def test_a_model_that_stays_wrong_is_reported_once_and_again_when_that_changes(
    gateway: Gateway, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(fleet_module, "_LONGEST_PAUSE_S", 0.02)
    attempts: list[ModelEntry] = []
    plan = UpstreamBackend.plan

    async def counted(backend: UpstreamBackend, report: Report) -> ModelInfo:
        attempts.append(backend._entry)
        return await plan(backend, report)

    monkeypatch.setattr(UpstreamBackend, "plan", counted)
    with capture_logs() as lines:
        async with gateway.serving(NEAR + FAR % ("tei", "acme/other", server.url)) as deployment:
            await wait_until(lambda: len(attempts) >= 4)
            assert "serves acme/embed, and not acme/other" in state(deployment)[1]
            server.info_response = Response(b'{"model_id": "acme/third"}')
            await wait_until(lambda: "serves acme/third, and not acme/other" in state(deployment)[1])
            num_attempts = len(attempts)
            await wait_until(lambda: len(attempts) >= num_attempts + 3)

    of_far = [(line["event"], line["log_level"]) for line in lines if line.get("model") == "far"]
    assert of_far.count(("model_failed", "error")) == 2
    assert of_far.count(("model_loading", "info")) == 1
    assert of_far.count(("upstream_not_pinned", "warning")) <= 1


async def test_a_late_model_may_not_break_a_rule(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "_FIRST_PAUSE_S", 0.05)
    server = StandIn()
    async with server.serving():
        pass
    text = NEAR + FAR % ("openai", "acme/embed", f"{server.url}/v1") + "fallbacks: {near: [far]}\n"
    async with gateway.serving(text) as deployment, server.serving():
        await wait_until(lambda: "'far' cannot be a fallback of 'near'" in state(deployment)[1])
        assert state(deployment)[0] is ModelState.FAILED


async def test_recorded_vectors_catch_a_model_that_was_exchanged_between_two_starts(
    gateway: Gateway, server: StandIn
) -> None:
    text = NEAR + FAR % ("openai", "acme/embed", f"{server.url}/v1") + "    golden: far.json\n"
    entry = gateway.deploy(text).registry.model("far")
    assert entry.golden is not None
    assert await asyncio.to_thread(record_golden, entry, Path(entry.golden)) == 6
    async with gateway.serving(text) as deployment:
        first = await ask(deployment, "far")
        assert state(deployment)[0] is ModelState.READY
    assert all(check.is_passed for check in await asyncio.to_thread(verify, entry, Settings()))

    server.weights = "other"
    async with gateway.serving(text) as deployment:
        assert "gives different vectors than its golden file says" in state(deployment)[1]
    assert not all(check.is_passed for check in await asyncio.to_thread(verify, entry, Settings()))

    assert await asyncio.to_thread(record_golden, entry, Path(entry.golden)) == 6
    async with gateway.serving(text) as deployment:
        assert (await ask(deployment, "far")).space != first.space


async def test_raw_vectors_cannot_be_had_where_they_come_normalized(gateway: Gateway, server: StandIn) -> None:
    async with gateway.serving(NEAR + FAR % ("openai", "acme/embed", f"{server.url}/v1")) as deployment:
        transport = httpx.ASGITransport(create_app(deployment))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"model": "far", "input": "x", "normalized": False}
            response = await client.post("/v1/embeddings", json=body)

    assert response.status_code == 400
    assert "returns normalized vectors only" in response.json()["message"]


async def test_a_text_that_a_server_cannot_embed_is_named_and_others_succeed(gateway: Gateway, server: StandIn) -> None:
    server.fault, server.fault_on = "nan", "bad"
    async with gateway.serving(NEAR + FAR % ("openai", "acme/embed", f"{server.url}/v1")) as deployment:
        transport = httpx.ASGITransport(create_app(deployment))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for _ in range(5):
                poisoned = await client.post("/v1/embeddings", json={"model": "far", "input": ["a", "bad"]})
                innocent = await client.post("/v1/embeddings", json={"model": "far", "input": ["innocent"]})
                assert innocent.status_code == 200

    assert poisoned.status_code == 502
    assert poisoned.json()["error"]["code"] == "upstream_failed"
    assert "not finite (NaN or infinity) for text 1 (counted from 0)" in poisoned.json()["message"]
    assert poisoned.headers["x-should-retry"] == "false"


async def test_the_trace_continues_at_the_server(gateway: Gateway, server: StandIn) -> None:
    provider = TracerProvider()
    tracing.use(provider)
    try:
        async with gateway.serving(NEAR + FAR % ("openai", "acme/embed", f"{server.url}/v1")) as deployment:
            with provider.get_tracer("test").start_as_current_span("outer") as outer:
                await ask(deployment, "far")
        assert f"{outer.get_span_context().trace_id:032x}" in server.headers[-1]["traceparent"]
    finally:
        tracing.use(None)


async def test_a_lock_agrees_with_the_registry(gateway: Gateway) -> None:
    text = NEAR + FAR % ("tei", "acme/embed", "http://127.0.0.1:1")
    registry = gateway.deploy(text).registry
    far = registry.model_copy(update={"models": (registry.model("far"),)})

    lock = make_lock(far, None)

    assert lock.models["far"].fingerprint is None
    assert differences(far, lock) == []


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("same_space_as: far", "is the model itself"),
        ("same_space_as: absent", "is not a model of this file"),
        ("dtype: float16", "`dtype` cannot be set here for `backend: openai`: the servers decide that"),
        ("outputs: [dense, sparse]", "`outputs` must be .* for `backend: openai`"),
    ],
)
def test_conflicting_settings_are_reported(gateway: Gateway, lines: str, problem: str) -> None:
    gateway.path.write_text(NEAR + FAR % ("openai", "acme/embed", "http://127.0.0.1:1/v1") + f"    {lines}\n")

    with pytest.raises(ConfigError, match=problem):
        load_registry(gateway.path, {})


async def test_a_reload_keeps_unchanged_models(gateway: Gateway, server: StandIn) -> None:
    text = NEAR + FAR % ("openai", "acme/embed", f"{server.url}/v1")
    async with gateway.serving(text) as deployment:
        kept = deployment.fleet.get("far")
        gateway.path.write_text(text + "aliases: {distant: far}\n")
        await deployment.reload()
        answer = await ask(deployment, "distant")

        assert deployment.fleet.get("far") is kept
        assert answer.model == "far"


async def test_a_request_that_is_canceled_leaves_nothing_behind(gateway: Gateway, server: StandIn) -> None:
    async with gateway.serving(NEAR + FAR % ("openai", "acme/embed", f"{server.url}/v1")) as deployment:
        server.delay_s = 5
        task = asyncio.create_task(ask(deployment, "far"))
        started = len(server.bodies)
        await wait_until(lambda: len(server.bodies) > started)
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        server.delay_s = 0
        await ask(deployment, "far")

    assert time.monotonic() - began < 4

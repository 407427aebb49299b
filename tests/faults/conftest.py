"""A gateway behind a real socket, on the real engine, around a scripted model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from gateway.app import create_app
from gateway.config.registry import Alias, ModelEntry, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.fleet import Fleet, Model
from tests.faults.scripted import PATIENCE_S, Bystanders, Gateway, ScriptedBackend
from tests.listener import make_listener


@pytest.fixture
def gateway(request: pytest.FixtureRequest) -> Iterator[Gateway]:
    """Serve a scripted model on a free port, with a watchdog that waits half a second, or the parameter's seconds."""
    settings = Settings(forward_timeout_s=getattr(request, "param", 0.5), request_timeout_s=PATIENCE_S)
    entry = ModelEntry(id="scripted", source="owner/scripted", revision="0" * 40, enabled=True)
    alias = Alias(name="default", model="scripted")
    registry = Registry(path=Path("models.yaml"), version=1, models=(entry,), aliases={"default": alias})
    backend = ScriptedBackend(entry, settings)
    listener = make_listener()
    fleets: list[Fleet] = []
    servers: list[uvicorn.Server] = []
    is_up = threading.Event()

    async def serve() -> None:
        fleet = Fleet([Model(entry, backend)])
        await fleet.start()
        fleets.append(fleet)
        config = uvicorn.Config(create_app(Deployment(registry, settings, fleet)), log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        servers.append(server)
        asyncio.get_running_loop().call_later(0.1, is_up.set)
        await server.serve(sockets=[listener])
        await fleet.stop()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert is_up.wait(PATIENCE_S)
    running = Gateway(fleets[0], backend, f"http://127.0.0.1:{listener.getsockname()[1]}")
    try:
        yield running
    finally:
        running.client.close()
        backend.encoder.let_go.set()
        servers[0].should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@pytest.fixture
def bystanders(gateway: Gateway) -> Bystanders:
    return Bystanders(gateway.base_url, number=4)

"""A gateway in a separate process, which has its own metrics: one model answers, one cannot be loaded.

Run as a script with the file descriptor of a socket that listens: serves until SIGTERM.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

import uvicorn

from gateway.app import create_app
from gateway.backends.base import Report
from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import ModelEntry, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import LoadError
from gateway.server import server_config
from gateway.types import ModelInfo


class BrokenBackend(FakeBackend):
    """Cannot be loaded."""

    async def start(self, report: Report) -> ModelInfo:
        raise LoadError("the weights are corrupt")


def make_backend(entry: ModelEntry) -> FakeBackend:
    return (BrokenBackend if entry.id == "broken" else FakeBackend)(fake_info(entry.id))


async def serve(listener: socket.socket) -> None:
    entries = tuple(ModelEntry(id=name, source="./x", enabled=True) for name in ("scraped", "broken"))
    settings = Settings()
    registry = Registry(path=Path("models.yaml"), version=1, models=entries)
    deployment = Deployment(registry, settings, make_backend=make_backend)
    await deployment.start()
    await uvicorn.Server(server_config(create_app(deployment), settings)).serve(sockets=[listener])
    await deployment.stop()


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as inherited:
        asyncio.run(serve(inherited))

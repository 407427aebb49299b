"""A real Redis for the tests."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis.asyncio as asyncio_redis

from tests.peers import find


@dataclass(frozen=True, slots=True)
class Redis:
    """The address, the socket and the process of a Redis."""

    uri: str
    socket: Path
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def running_redis(folder: Path) -> Iterator[Redis]:
    """Run a Redis while the context lasts."""
    server = find("redis-server", "redis-server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    command += ["--unixsocket", str(folder / "socket")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            _wait_until_it_listens(port)
            yield Redis(f"redis://127.0.0.1:{port}/0", folder / "socket", process)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """Run a Redis, and yield its address, socket and process."""
    with running_redis(tmp_path_factory.mktemp("redis")) as redis:
        yield redis


def _wait_until_it_listens(port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise TimeoutError("redis-server does not listen")


@contextlib.contextmanager
def failing_over(folder: Path) -> Iterator[tuple[str, Callable[[], Awaitable[None]]]]:
    """Run two Redis servers; yield the address of the primary, and a function that makes the other one the primary.

    The address is a name, here in the file system, that leads new connections to the new primary. The old one becomes its
    replica, and keeps the connections that it has.
    """
    for name in ("old", "new"):
        (folder / name).mkdir()
    primary = folder / "primary"
    with running_redis(folder / "old") as old, running_redis(folder / "new") as new:
        primary.symlink_to(old.socket)

        async def fail_over() -> None:
            primary.unlink()
            primary.symlink_to(new.socket)
            host, _, port = new.uri.removeprefix("redis://").removesuffix("/0").partition(":")
            async with asyncio_redis.from_url(old.uri) as operator:
                await operator.execute_command("REPLICAOF", host, port)

        yield f"unix://{primary}", fail_over

"""Serve: bind, start the web server, load the models, answer until told to stop."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import structlog
import uvicorn
from uvicorn.loops.auto import auto_loop_factory

from gateway.app import create_app
from gateway.backends.fleet import Fleet
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import ReloadRefused, StartError

log = structlog.get_logger(__name__)


def serve(deployment: Deployment, announce: Callable[[Fleet, str], None]) -> int:
    """Serve until a signal says to stop.

    The server answers at once, with 503 for models that are still loading, so that probes see a living process while
    gigabytes are downloaded.

    Args:
        deployment: what is served; started and stopped here.
        announce: called with the fleet and the base URL once all models are ready or have failed.

    Returns:
        The exit code: 0 after a clean stop, 1 when a required model could not be loaded.

    Raises:
        StartError: the address is in use or not this machine's.
    """
    listener = _bind(deployment.settings)
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        return runner.run(_serve(deployment, listener, announce))


async def _serve(deployment: Deployment, listener: socket.socket, announce: Callable[[Fleet, str], None]) -> int:
    server = _Server(
        uvicorn.Config(
            create_app(deployment),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=round(deployment.settings.shutdown_grace_s),
        )
    )
    with _reloading_on_hangup(deployment):
        loading = asyncio.create_task(
            _load(deployment, server, lambda: announce(deployment.fleet, _base_url(listener)))
        )
        await server.serve(sockets=[listener])
    if not loading.done():
        loading.cancel()
    await asyncio.wait((loading,))
    await deployment.stop()
    return 0 if loading.cancelled() or loading.result() else 1


@contextmanager
def _reloading_on_hangup(deployment: Deployment) -> Iterator[None]:
    """Reload on SIGHUP, which would otherwise end the process."""
    tasks: set[asyncio.Task[None]] = set()

    async def reload() -> None:
        with suppress(ReloadRefused):  # the log has told why
            await deployment.reload()

    def on_hangup() -> None:
        task = asyncio.create_task(reload())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        for task in tasks:
            task.cancel()


class _Server(uvicorn.Server):
    """uvicorn's server, which after a clean stop kills its process with the signal that asked for it: not here."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)


async def _load(deployment: Deployment, server: uvicorn.Server, announce: Callable[[], None]) -> bool:
    """Load the models; stop the server if that is fatal. Returns whether all is well."""
    try:
        await deployment.start()
    except StartError as error:
        log.error("start_failed", reason=str(error))
        server.should_exit = True
        return False
    finally:
        if deployment.fleet.started.is_set():
            announce()
    return True


def _bind(settings: Settings) -> socket.socket:
    """Take the address before anything is loaded: a port in use is told at once, not after a minute."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio switches Nagle's algorithm off only for sockets that name their protocol; with it on, every answer on a
    # kept connection is 40 ms late.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise StartError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}. Set another port with GATEWAY_PORT or "
            "--port"
        ) from error
    return listener


def _base_url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  to show, not to bind
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

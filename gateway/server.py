"""Serve: bind, start the web server, load the models, and answer requests until a signal arrives."""

from __future__ import annotations

import asyncio
import errno
import gc
import ipaddress
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import cast

import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn.loops.auto import auto_loop_factory

from gateway.access.keyring import Keyring
from gateway.app import create_admin_app, create_app
from gateway.config.setting_values import with_mapped
from gateway.config.settings import Settings, variable
from gateway.deployment import Deployment
from gateway.errors import StartError
from gateway.http.protocol import bounded
from gateway.telemetry import metrics
from gateway.telemetry.logs import flush_logs

log = structlog.get_logger(__name__)

EXIT_RESTART = 75
"""Exit code after a card or a cluster was lost ("try again later" in sysexits.h): a new process may use it again."""

_ANNOUNCE = "announce"
# The seconds that the process waits, at its end, for threads that may end soon.
_LAST_WAIT_S = 1.0
# How many seconds models and connections have to end after the grace period, because a lost card may hang.
_LAST_RESORT_S = 15.0
# The minimum time between two log lines about exhausted file descriptors.
_LIMIT_LOG_S = 10.0


@dataclass(frozen=True, slots=True)
class Addresses:
    """The addresses of a gateway.

    Attributes:
        clients: base URL of the port that clients use.
        admin: base URL of the operator's port, if it is a separate port.
    """

    clients: str
    admin: str | None = None


Announce = Callable[[Addresses, bool], None]
"""Announces the addresses of a gateway, and whether it requires API keys."""


def serve(deployment: Deployment, announce: Announce) -> None:
    """Serve until a signal says to stop.

    The server answers immediately, with 503 for models that are still loading, so that probes see a live process while
    gigabytes are downloaded.

    Args:
        deployment: the deployment to serve; started and stopped here.
        announce: called once the models are loaded and may be served; not called after a failed start. Runs in a
            thread, because standard output may be a pipe without a reader.

    Raises:
        StartError: an address is in use or not this machine's, the file of API keys is wrong, or the models cannot be
            served: a required one could not be loaded, for example. Also when anything unexpected ended the start or the
            service; the log has its traceback.
    """
    try:
        _serve_apps(deployment, announce)
    except StartError:
        raise
    except Exception as error:  # no error may end the process silently
        log.exception("serve_failed")
        raise StartError(f"ended by an unexpected error: {type(error).__name__}: {error}") from error


def _serve_apps(deployment: Deployment, announce: Announce) -> None:
    settings = deployment.settings
    app = create_app(deployment)
    listeners = [_bind(settings.host, settings.port, "port")]
    admin_app = None
    if settings.admin_port is not None:
        admin_app = create_admin_app(deployment, app)
        listeners.append(_bind(settings.host, settings.admin_port, "admin_port"))
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        runner.run(_serve(deployment, app, admin_app, listeners, announce))


async def _serve(
    deployment: Deployment,
    app: FastAPI,
    admin_app: FastAPI | None,
    listeners: Sequence[socket.socket],
    announce: Announce,
) -> None:
    keyring: Keyring = app.state.keyring
    keyring.watch()
    for begin in app.state.on_start:
        begin()
    addresses = Addresses(*map(_base_url, listeners))
    _warn_if_open(deployment.settings, keyring)
    asyncio.get_running_loop().set_default_executor(_Threads())
    server = _Server(server_config(app, deployment.settings), deployment, addresses.clients)
    deployment.on_lost = server.end_for_restart
    loading = asyncio.create_task(_load(deployment, app, server, lambda: announce(addresses, bool(keyring))))
    try:
        async with (
            _reloading_on_hangup(deployment),
            _serving_operator(admin_app, deployment.settings, listeners[1:]),
        ):
            await server.serve(sockets=[listeners[0]])
    finally:
        loading.cancel()
        await asyncio.wait((loading,))
        await keyring.close()
        await deployment.stop()
    if not loading.cancelled() and (reason := loading.result()):
        raise StartError(reason)  # at the very end, so that the reason is the last line of the output


class _Threads(ThreadPoolExecutor):
    """The loop's threads; when the loop ends, it does not wait for downloads and loads of gigabytes."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=True)


@asynccontextmanager
async def _serving_operator(
    app: FastAPI | None, settings: Settings, listeners: Sequence[socket.socket]
) -> AsyncIterator[None]:
    """Serve the operator's port until the clients' last request has ended."""
    if app is None:
        yield
        return
    server = _BackgroundServer(server_config(app, settings))
    serving = asyncio.create_task(server.serve(sockets=list(listeners)))
    serving.add_done_callback(_log_failure)
    log.info("operator_port", url=_base_url(listeners[0]))
    try:
        yield
    finally:
        server.should_exit = True
        await asyncio.wait((serving,))


def server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Return uvicorn's configuration for an application."""
    return uvicorn.Config(
        app,
        http=bounded(settings),
        ws="none",  # a request to upgrade would otherwise leave our protocol, and its bounds
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=with_mapped(settings.trusted_proxies),
        lifespan="off",
        timeout_keep_alive=cast(int, settings.keep_alive_s),  # passed to `call_later`, which accepts fractions
        timeout_graceful_shutdown=cast(int, settings.shutdown_grace_s),  # likewise
    )


@asynccontextmanager
async def _reloading_on_hangup(deployment: Deployment) -> AsyncIterator[None]:
    """Reload on SIGHUP, which would otherwise end the process. An earlier signal counts now; a later one is ignored."""
    tasks: set[asyncio.Task[None]] = set()

    async def reload() -> None:
        with suppress(Exception):  # the deployment has logged and counted it
            await deployment.reload()

    def on_hangup() -> None:
        if len(tasks) > 1:  # one runs, and the other has not read the file yet
            return
        task = asyncio.create_task(reload())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # for all threads; the process is about to end
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _log_failure(serving: asyncio.Task[None]) -> None:
    if not serving.cancelled() and (error := serving.exception()) is not None:
        log.error("operator_port_failed", exc_info=error)


class _BackgroundServer(uvicorn.Server):
    """uvicorn's server, without its signal handlers."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Server(uvicorn.Server):
    """uvicorn's server, which drains before it stops, and does not end its process with the signal that stopped it."""

    def __init__(self, config: uvicorn.Config, deployment: Deployment, url: str) -> None:
        super().__init__(config)
        self._deployment = deployment
        self._url = url
        self._next_limit_log = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        log.info("listening", url=self._url, models=[model.id for model in self._deployment.fleet])

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
                # Closing the rest takes a few seconds at most. A signal would end the process in the middle of it.
                signal.signal(number, signal.SIG_IGN)

    async def on_tick(self, counter: int) -> bool:
        """Check, ten times per second, whether connections can still be accepted."""
        self._check_file_limit()
        return await super().on_tick(counter)

    def _check_file_limit(self) -> None:
        """Log when no file descriptor is left: the event loop then resets new connections silently."""
        try:
            os.close(os.open("/", os.O_RDONLY))
        except OSError as error:
            metrics.FILE_LIMIT_REACHED.inc()
            now = asyncio.get_running_loop().time()
            if now >= self._next_limit_log:
                self._next_limit_log = now + _LIMIT_LOG_S
                log.error(
                    "no_file_descriptor_left",
                    reason=error.strerror,
                    num_connections=len(self.server_state.connections),
                    limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
                )

    def _on_signal(self, number: signal.Signals) -> None:
        """Become unready immediately, and stop after a delay. A second signal skips the delay, a third aborts requests."""
        if self.should_exit:
            self.force_exit = True
        delay_s = 0.0 if self._deployment.is_draining else self._deployment.settings.drain_delay_s
        self._deployment.drain()
        log.info("stopping", signal=number.name, drain_delay_s=delay_s)
        asyncio.get_running_loop().call_later(delay_s, self.handle_exit, number, None)

    def end_for_restart(self) -> None:
        """Stop as after a signal, but within a hard time limit."""
        settings = self._deployment.settings
        log.error(
            "stopping_for_restart",
            reason=self._deployment.lost,
            exit_code=EXIT_RESTART,
            drain_delay_s=settings.drain_delay_s,
            grace_s=settings.shutdown_grace_s,
        )
        _end_within(settings.drain_delay_s + settings.shutdown_grace_s + _LAST_RESORT_S)
        asyncio.get_running_loop().call_later(settings.drain_delay_s, self.handle_exit, signal.SIGTERM, None)


def _end_within(limit_s: float) -> None:
    """End the process after ``limit_s`` seconds, from a thread: with a lost card, everything else may hang."""

    def end() -> None:
        time.sleep(limit_s)
        log.error("end_forced", seconds=limit_s)
        flush_logs()
        os._exit(EXIT_RESTART)

    threading.Thread(target=end, name="last-resort", daemon=True).start()


async def _load(deployment: Deployment, app: FastAPI, server: uvicorn.Server, announce: Callable[[], None]) -> str:
    """Load the models. If that fails, stop the server and return the reason; otherwise return an empty string."""
    try:
        await deployment.start()
    except StartError as error:
        log.error("start_failed", reason=str(error))
        server.should_exit = True
        return str(error)
    except Exception as error:  # a broken driver or library can raise anything
        log.exception("start_failed", reason=str(error))
        server.should_exit = True
        return f"the start was ended by an unexpected error: {type(error).__name__}: {error}"
    _freeze_objects()
    _keep_freed_memory()
    threading.Thread(target=_announce, args=(announce,), name=_ANNOUNCE, daemon=True).start()
    # Otherwise the first request for the documentation would delay the others. Not earlier: it would delay the load.
    await asyncio.to_thread(app.openapi)
    gc.freeze()
    return ""


def _freeze_objects() -> None:
    """Exempt the permanent objects, a hundred thousand, from collections, which would stop all requests for 0.1 s."""
    gc.collect()
    gc.freeze()


def _keep_freed_memory() -> None:
    """Have glibc keep freed blocks for later responses, as it does once a block of that size was freed (``man mallopt``).

    Otherwise, page faults take a sixth of the processor time of a response with 32 texts. Loading a model has that effect.
    """
    bytearray(16 * 2**20)


def _announce(announce: Callable[[], None]) -> None:
    try:
        announce()
    except Exception:  # a closed terminal, for example: serving does not depend on it
        log.exception("announce_failed")


def leave(deployment: Deployment) -> None:
    """End the process after its deployment has stopped; return if Python's normal exit is safe.

    A normal exit would wait for threads that load a model or that write to a pipe without a reader. With a lost card or
    cluster, Python's cleanup may hang or crash.
    """
    if deployment.lost:
        os._exit(EXIT_RESTART)
    deadline = time.monotonic() + _LAST_WAIT_S
    for thread in threading.enumerate():
        if thread is threading.main_thread() or (thread.daemon and thread.name != _ANNOUNCE):
            continue
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            os._exit(0)


def _warn_if_open(settings: Settings, keyring: Keyring) -> None:
    """Warn when other machines can reach a gateway that requires no key."""
    with suppress(ValueError):  # a name rather than an address
        if not keyring and not ipaddress.ip_address(settings.host).is_loopback:
            log.warning(
                "no_api_keys",
                host=settings.host,
                reason="anyone who reaches this address can use the gateway; set GATEWAY_API_KEYS_FILE, or GATEWAY_HOST to "
                "127.0.0.1",
            )


def _bind(host: str, port: int, setting: str) -> socket.socket:
    """Bind an address. This happens before models load, so that a port in use is reported at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's algorithm off only for sockets that name their protocol; with it on, every answer on a
    # kept connection is 40 ms late.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror}. {_advice(error, setting)}") from error
    return listener


def _advice(error: OSError, setting: str) -> str:
    is_port = error.errno in {errno.EADDRINUSE, errno.EACCES, errno.EPERM}
    what, name = ("port", setting) if is_port else ("address", "host")
    return f"Set another {what} with {variable(name)}" + ("" if name == "admin_port" else f" or --{name}")


def _base_url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  to show, not to bind
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

"""One replica of a model: a process started by Ray Serve, with an engine and connections to the fronts."""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import ray
import structlog
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from gateway import __version__
from gateway.backends.base import Backend
from gateway.backends.infinity import InfinityBackend
from gateway.cluster.claims import NAMESPACE
from gateway.cluster.host import Host
from gateway.cluster.placing import Spec
from gateway.cluster.scaling import REQUESTS
from gateway.config.model_entry import ModelEntry
from gateway.config.settings import Settings
from gateway.errors import LoadError
from gateway.types import ModelInfo, ModelState

log = structlog.get_logger(__name__)

_EXIT_CARD_LOST: Final = 75
# The seconds to send the last answers after a card is lost, before the process ends.
_LAST_ANSWERS_S: Final = 1.0
DRAIN_S: Final = 60.0
LOADING_FOLDER: Final = Path(tempfile.gettempdir()) / "gateway-loading"


class Replica:
    """The class of a deployment in Ray Serve.

    It loads the model when it starts, with the same checks as a gateway. After that, Serve counts it as running.
    """

    async def __init__(self, spec: Spec) -> None:  # type: ignore[misc]  # Serve awaits it
        from gateway.telemetry.logs import configure_logs

        configure_logs(spec.settings.log_level, "json")
        self._model = spec.entry.id
        self._patience_s = spec.settings.forward_timeout_s
        self._host: Host | None = None
        self._secret = secrets.token_bytes(32)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._loop = asyncio.get_running_loop()
        _internal_kv_put(begun_key(spec.name), b"1", namespace=NAMESPACE)
        with loading():
            await self._load(spec)

    async def _load(self, spec: Spec) -> None:
        if spec.version != __version__:
            raise LoadError(
                f"the gateway here is version {__version__}, but the one that deploys the model is {spec.version}"
            )
        make = resolve(spec.make_backend)
        self._backend: Backend = make(self._with_files(spec), spec.settings, self._lose_card)
        planned = await self._backend.plan()
        require_card(spec, planned)
        require_same_weights(spec.name, planned.fingerprint)
        self._info = await self._backend.start(self._report)
        require_same_weights(spec.name, self._info.fingerprint)
        self._host = Host(self._backend, self._info, self._secret, _own_address())
        await self._host.start()
        self._report(ModelState.READY, "")

    def _with_files(self, spec: Spec) -> ModelEntry:
        """Return the entry with its files written to this machine."""
        if not spec.files:
            return spec.entry
        self._folder = tempfile.TemporaryDirectory(prefix="gateway-replica-")  # a killed process leaves it behind
        paths = {}
        for name, text in spec.files.items():
            path = Path(self._folder.name, f"{name}.json")
            path.write_text(text)
            paths[name] = str(path)
        return spec.entry.model_copy(update=paths)

    def _report(self, state: ModelState, reason: str) -> None:
        if self._host is not None:
            self._host.report(state, reason)

    def _lose_card(self, reason: str) -> None:
        """End the process once its last answers are sent. Serve starts another, which may get the card to work again."""
        log.error("replica_ends_without_card", model=self._model, reason=reason)
        if self._host is not None:
            self._host.report(ModelState.RECOVERING, reason)
        self._loop.call_later(_LAST_ANSWERS_S, os._exit, _EXIT_CARD_LOST)

    def record_replica_metadata(self) -> dict[str, Any]:
        """Return the address of this replica, which Serve sends to the fronts."""
        assert self._host is not None  # noqa: S101  Serve asks once the replica is made
        return {
            "host": _own_address(),
            "port": self._host.port,
            "secret": self._secret.hex(),
            "fingerprint": self._info.fingerprint,
            "node": ray.get_runtime_context().get_node_id(),
            "device": self._info.device,
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the metric for Serve's autoscaling."""
        return {REQUESTS: float(self._host.num_requests if self._host is not None else 0)}

    def check_health(self) -> None:
        """Raise an error if only a new process can help, which Serve then starts.

        Raises:
            RuntimeError: the model has failed permanently, or cannot be reloaded in this process.
        """
        if self._host is not None and (reason := self._host.why_unwell(self._patience_s)):
            raise RuntimeError(reason)

    async def __del__(self) -> None:
        """Finish the work in progress and stop. Serve calls this before it ends the process."""
        if self._host is not None:
            await self._host.drain(DRAIN_S)
            await self._host.stop()
        await self._backend.stop()
        if self._folder is not None:
            self._folder.cleanup()


@contextmanager
def loading() -> Iterator[None]:
    """Keep a file with the number of this process while the context lasts: Kubernetes then counts its pod as not ready."""
    mark = LOADING_FOLDER / str(os.getpid())
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


def _own_address() -> str:
    """Return the address of this node in the cluster."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def make_infinity(entry: ModelEntry, settings: Settings, on_card_lost: Callable[[str], None]) -> Backend:
    """Return the backend of a replica: an engine in its process."""
    return InfinityBackend(entry, settings, on_card_lost=on_card_lost)


def resolve(path: str) -> Callable[[ModelEntry, Settings, Callable[[str], None]], Backend]:
    """Return the function that ``module:function`` names."""
    module, _, name = path.partition(":")
    function: Callable[[ModelEntry, Settings, Callable[[str], None]], Backend] = getattr(import_module(module), name)
    return function


def begun_key(name: str) -> bytes:
    """Return the key under which the cluster records that a replica of a deployment was placed."""
    return f"begun:{name}".encode()


def fingerprint_key(name: str) -> bytes:
    """Return the key under which the cluster records the weights of a deployment."""
    return f"fingerprint:{name}".encode()


def require_card(spec: Spec, planned: ModelInfo) -> None:
    """Refuse the CPU to a replica that has reserved a card: it would be slow, and keep the card from others.

    Raises:
        LoadError: the card cannot be used; the message has the reason and the remedy.
    """
    if spec.num_gpus and planned.device == "cpu" and planned.notes:
        raise LoadError(f"{planned.id} has reserved a graphics card, but would run {'; '.join(planned.notes)}")


def require_same_weights(name: str, fingerprint: str) -> None:
    """Compare the weights with those of the deployment's first replica, which the cluster records.

    Raises:
        LoadError: the weights differ, because this machine has other files under the same name.
    """
    key, own = fingerprint_key(name), fingerprint.encode()
    _internal_kv_put(key, own, overwrite=False, namespace=NAMESPACE)
    noted = _internal_kv_get(key, namespace=NAMESPACE)
    if noted != own:
        raise LoadError(
            f"its checkpoint differs from that of the model's other replicas (fingerprint {fingerprint[:12]}, theirs "
            f"is {(noted or b'').decode()[:12]}): put the same files on every machine"
        )

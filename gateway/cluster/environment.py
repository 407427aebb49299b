"""The environment of Ray, which it reads when it is imported, and the choice of a cluster. Imports no ray itself."""

from __future__ import annotations

import os
import secrets
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

import structlog

from gateway.cluster.placing import LOCAL
from gateway.config.registry import Registry
from gateway.config.settings import Settings
from gateway.errors import StartError

if TYPE_CHECKING:
    from gateway.cluster.site import ClusterSite

log = structlog.get_logger(__name__)

# What Ray reads when it is imported: no reports to its makers, no chatter, and no cluster that starts by itself, because a
# thread still asks for something after this process has left its own.
_ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",
}


def site_of(registry: Registry, settings: Settings) -> ClusterSite | None:
    """Return the cluster that the models run on, not yet connected to; ``None`` if they run in this process.

    Raises:
        StartError: Ray is not installed.
    """
    if settings.cluster is None:
        if idle := [entry.id for entry in registry.models if entry.replicas is not None]:
            log.info("replicas_ignored", models=idle, reason="GATEWAY_CLUSTER is not set: they run in this process")
        return None
    prepare(settings.cluster)
    from gateway.cluster.site import ClusterSite

    return ClusterSite(settings.cluster, settings)


def prepare(address: str) -> None:
    """Set what Ray reads when it is imported. A local cluster takes only what has its token, which is made here.

    Raises:
        StartError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise StartError('a cluster needs Ray, which is not installed: pip install "embedding-gateway[cluster]"')
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address == LOCAL:
        # Named after two systems where it is the default: all addresses of this cluster are those of the loopback.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if address == LOCAL and os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

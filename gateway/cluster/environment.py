"""Ray's environment variables, which it reads when imported, and the choice of a cluster. Does not import ray."""

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

# Ray reads these variables when imported: send no usage reports, log little, and never start a cluster automatically,
# because a Ray thread still makes a call after this process has left its cluster.
_ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",
}


def site_of(registry: Registry, settings: Settings) -> ClusterSite | None:
    """Return the cluster that the models run on, not connected yet; ``None`` if they run in this process.

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
    """Set the variables that Ray reads when imported. For a local cluster, create the token that its clients need.

    Raises:
        StartError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise StartError(
            'a cluster needs Ray, which is not installed: pip install "embedding-gateway[cluster]", or in a checkout: '
            "make install EXTRAS=cluster"
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address == LOCAL:
        # Despite its name, this setting applies to all systems: every address of this cluster is a loopback address.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # No Python process for each core, which would wait for work that never comes.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    if address == LOCAL and os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

"""A gateway in its own process, whose replicas run the fakes: python -m tests.cluster.front ADDRESS REGISTRY PORT."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gateway.cluster.environment import prepare
from gateway.telemetry.logs import configure_logs


def main(address: str, models: str, port: str) -> None:
    """Serve until a signal."""
    configure_logs("warning", "json")
    prepare(address)
    from gateway.cluster.site import ClusterSite
    from gateway.config.registry import load_registry
    from gateway.config.settings import Settings
    from gateway.deployment import Deployment
    from gateway.fleet import Fleet
    from gateway.server import leave, serve
    from tests.cluster.fakes import MAKE

    settings = Settings(port=int(port), models=Path(models), cluster=address, request_timeout_s=60, cpu_threads=1)
    site = ClusterSite(address, settings, MAKE)
    registry = load_registry(Path(models), {})
    fleet = Fleet.from_registry(registry, site.backend, site)
    deployment = Deployment(registry, settings, fleet, make_backend=site.backend)
    site.on_lost = deployment.lose
    deployment.resources.push_async_callback(site.disconnect)
    serve(deployment, lambda _addresses, _has_keys: os.write(1, b"ready\n"))
    leave(deployment)


if __name__ == "__main__":
    main(*sys.argv[1:])

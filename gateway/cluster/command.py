"""``gateway cluster``: list the deployments on the cluster, and remove those that no gateway uses."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gateway.cluster.deploying import Cluster, Deployed
from gateway.cluster.discovery import DIRECTORY
from gateway.cluster.line import Line
from gateway.cluster.placing import stem_of
from gateway.cluster.pool import Pool
from gateway.config.wording import enumerate_names

# The seconds to wait for the replicas' status.
_PATIENCE_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """A deployment on the cluster, and its reachable replicas.

    Attributes:
        num_fronts: the number of gateways that use it or wait for it.
    """

    deployed: Deployed
    lines: Sequence[Line]
    num_fronts: int


async def look(cluster: Cluster) -> list[DeploymentStatus]:
    """Ask the cluster and each replica for their status."""
    deployments = await asyncio.to_thread(cluster.deployed)
    return await asyncio.gather(*(ask(cluster, deployed) for deployed in deployments.values()))


async def ask(cluster: Cluster, deployed: Deployed) -> DeploymentStatus:
    """Ask the replicas of a deployment for their status."""
    pool = Pool(deployed.name, lambda: None, serves=False)
    claims = await asyncio.to_thread(cluster.claims.of, deployed.name)
    handle = await asyncio.to_thread(cluster.watch, deployed.name)
    end_watch = DIRECTORY.watch(deployed.name, pool.update)
    try:
        deadline = asyncio.get_running_loop().time() + _PATIENCE_S
        while len(_heard(pool)) < deployed.num_running and asyncio.get_running_loop().time() < deadline:
            await pool.changed(0.1)
        lines = _heard(pool)
        connected = max((line.load.num_fronts for line in lines), default=0)
        return DeploymentStatus(deployed, lines, max(connected, len(claims)))
    finally:
        end_watch()
        await pool.close()
        del handle  # until now, it kept the announcements coming


def _heard(pool: Pool) -> list[Line]:
    return [line for line in pool.lines.values() if line.info is not None]


async def prune(cluster: Cluster) -> tuple[list[DeploymentStatus], list[DeploymentStatus]]:
    """Delete the deployments that no gateway uses; return them, and those that are kept."""
    statuses = [status for status in await look(cluster) if not status.deployed.is_gone]
    removed = [status for status in statuses if not status.num_fronts and await _delete(cluster, status)]
    return removed, [status for status in statuses if status not in removed]


async def _delete(cluster: Cluster, status: DeploymentStatus) -> bool:
    return await asyncio.to_thread(cluster.delete_unused, status.deployed.name)


def describe(status: DeploymentStatus) -> list[str]:
    """Describe a deployment in lines for people."""
    deployed = status.deployed
    starting = f", {deployed.num_starting} starting" if deployed.num_starting else ""
    state = f"{deployed.status.lower()}, {deployed.num_running} running{starting}"
    head = f"{deployed.name}  {state}, gateways: {status.num_fronts}"
    reason = [f"  {deployed.reason}"] if deployed.reason and deployed.status != "RUNNING" else []
    return [head, *reason, *(_line(line) for line in status.lines)]


def differing(statuses: Sequence[DeploymentStatus]) -> list[str]:
    """Return a line for each model that gateways use with different entries, settings or versions."""
    used: dict[str, list[str]] = {}
    for status in statuses:
        if status.num_fronts:
            used.setdefault(stem_of(status.deployed.name), []).append(status.deployed.name)
    return [
        f"gateways differ in a model's entry, settings or version: {enumerate_names(names)} are in use"
        for names in used.values()
        if len(names) > 1
    ]


def _line(line: Line) -> str:
    load = line.load
    work = f"{load.num_requests} requests, {load.num_texts} texts in progress" if load.num_requests else "idle"
    return f"  {line.place.id}  {line.place.host}  node {line.place.node[:12]}  {line.place.device}  {work}"


def run_status(address: str) -> list[str]:
    """Describe everything that runs on a cluster, in lines for people.

    Raises:
        StartError: there is no cluster at the address.
    """
    cluster = _connect(address)
    try:
        statuses = asyncio.run(look(cluster))
    finally:
        cluster.disconnect()
    return [*(text for status in statuses for text in describe(status)), *differing(statuses)] or [
        "no gateway has models on this cluster"
    ]


def run_prune(address: str) -> list[str]:
    """Remove the deployments that no gateway uses, and describe the result in lines for people.

    Raises:
        StartError: there is no cluster at the address.
    """
    cluster = _connect(address)
    try:
        removed, kept = asyncio.run(prune(cluster))
    finally:
        cluster.disconnect()
    return describe_pruned(removed, kept)


def describe_pruned(removed: Sequence[DeploymentStatus], kept: Sequence[DeploymentStatus]) -> list[str]:
    """Describe the removed deployments in lines for people."""
    if removed:
        return [f"removed {status.deployed.name}" for status in removed]
    return ["nothing to remove: all deployments are in use" if kept else "no gateway has models on this cluster"]


def _connect(address: str) -> Cluster:
    cluster = Cluster(address)
    cluster.connect(starts_serve=False)
    return cluster


def address_of(requested: str | None) -> str:
    """Return the address of the cluster: the given one, else the environment's, else this machine's."""
    from gateway.config.settings import load_settings

    configured = load_settings(os.environ, cluster=requested).cluster
    return "auto" if configured in (None, "local") else str(configured)

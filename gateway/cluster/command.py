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
from gateway.errors import StartError

# The seconds to wait for the replicas' status.
_PATIENCE_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """A deployment on the cluster, and its reachable replicas.

    Attributes:
        num_fronts: the number of connected gateways; ``None`` if no replica answers.
    """

    deployed: Deployed
    lines: Sequence[Line]
    num_fronts: int | None


async def look(cluster: Cluster) -> list[DeploymentStatus]:
    """Ask the cluster and each replica for their status."""
    deployments = await asyncio.to_thread(cluster.deployed)
    return await asyncio.gather(*(ask(cluster, deployed) for deployed in deployments.values()))


async def ask(cluster: Cluster, deployed: Deployed) -> DeploymentStatus:
    """Ask the replicas of a deployment for their status."""
    pool = Pool(deployed.name, lambda: None)
    handle = await asyncio.to_thread(cluster.watch, deployed.name)
    end_watch = DIRECTORY.watch(deployed.name, pool.update)
    try:
        deadline = asyncio.get_running_loop().time() + _PATIENCE_S
        while len(_heard(pool)) < deployed.num_running and asyncio.get_running_loop().time() < deadline:
            await pool.changed(0.1)
        lines = _heard(pool)
        # This process is connected too.
        num_fronts = max((line.load.num_fronts - 1 for line in lines), default=None)
        return DeploymentStatus(deployed, lines, num_fronts)
    finally:
        end_watch()
        await pool.close()
        del handle  # until now, it kept the announcements coming


def _heard(pool: Pool) -> list[Line]:
    return [line for line in pool.lines.values() if line.info is not None and line.load.num_fronts]


async def prune(cluster: Cluster, names: Sequence[str] = ()) -> tuple[list[DeploymentStatus], list[DeploymentStatus]]:
    """Delete the deployments that no gateway is connected to; return them, and those that are kept.

    A deployment with replicas that do not answer is kept, because its gateways may be waiting for them.

    Args:
        names: deployments to delete although their replicas do not answer.

    Raises:
        StartError: a name is not a deployment's, or a gateway uses it.
    """
    statuses = await look(cluster)
    for name in names:
        _require_unused(name, statuses)
    unused = [
        status
        for status in statuses
        if status.num_fronts == 0 or status.deployed.has_failed or status.deployed.name in names
    ]
    await asyncio.to_thread(cluster.delete, [status.deployed.name for status in unused])
    return unused, [status for status in statuses if status not in unused]


def _require_unused(name: str, statuses: Sequence[DeploymentStatus]) -> None:
    status = next((status for status in statuses if status.deployed.name == name), None)
    if status is None:
        names = enumerate_names([status.deployed.name for status in statuses]) or "none"
        raise StartError(f"the cluster has no deployment {name!r}: it has {names}")
    if status.num_fronts:
        raise StartError(
            f"{name} is in use by {status.num_fronts} gateways: stop them, or remove the model from theirs"
        )


def describe(status: DeploymentStatus) -> list[str]:
    """Describe a deployment in lines for people."""
    deployed = status.deployed
    fronts = "unknown" if status.num_fronts is None else str(status.num_fronts)
    starting = f", {deployed.num_starting} starting" if deployed.num_starting else ""
    head = f"{deployed.name}  {deployed.status.lower()}, {deployed.num_running} running{starting}, gateways: {fronts}"
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


def run_prune(address: str, names: Sequence[str] = ()) -> list[str]:
    """Remove the deployments that no gateway uses, and describe the result in lines for people.

    Args:
        names: deployments to remove although their replicas do not answer.

    Raises:
        StartError: there is no cluster at the address, or a named deployment is in use or not there.
    """
    cluster = _connect(address)
    try:
        removed, kept = asyncio.run(prune(cluster, names))
    finally:
        cluster.disconnect()
    return describe_pruned(removed, kept)


def describe_pruned(removed: Sequence[DeploymentStatus], kept: Sequence[DeploymentStatus]) -> list[str]:
    """Describe the removed deployments, and why others are kept, in lines for people."""
    unknown = [status.deployed.name for status in kept if status.num_fronts is None]
    lines = [f"removed {status.deployed.name}" for status in removed]
    lines += [
        f"kept {name}: none of its replicas answers, so gateways may be waiting for it; if none is, run "
        f"`gateway cluster prune {name}`"
        for name in unknown
    ]
    if lines:
        return lines
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

"""A Ray cluster of several machines, simulated in this one: each machine is a Ray node with its own processes."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.load import HOST
from gateway.cluster.environment import prepare

_ROOT = Path(__file__).parents[1]
_STORE_BYTES = 80 * 2**20
_NUM_ATTEMPTS = 4


@dataclass
class Simulated:
    """The cluster, and the machines of it that can be taken away.

    Attributes:
        address: of its head.
        cluster: Ray's own class for such clusters.
        workers: the machines besides the head.
        num_gpus: pretended cards of each of them.
    """

    address: str
    cluster: Any
    num_gpus: int
    workers: list[Any] = field(default_factory=list)

    def add_machine(self) -> Any:
        """Add a machine to the cluster. Only on the main thread, as Ray sets signal handlers."""
        for attempt in itertools.count(1):
            try:
                node = self.cluster.add_node(num_cpus=4, num_gpus=self.num_gpus, object_store_memory=_STORE_BYTES)
                break
            except Exception:  # Ray's own class: on a busy machine, its agents take longer than it waits
                if attempt == _NUM_ATTEMPTS:
                    raise
        self.workers.append(node)
        return node

    def kill_machine(self, node: str | None = None) -> None:
        """Kill all processes of a machine at once.

        Args:
            node: its id; by default, the newest machine.
        """
        self.workers.sort(key=lambda worker: worker.node_id == node)  # `replace_machine` replaces the last one
        [raylet] = self.workers[-1].all_processes["raylet"]
        parent = psutil.Process(raylet.process.pid)
        for process in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def replace_machine(self) -> None:
        """Put a new machine instead of the killed one. Only on the main thread."""
        self.cluster.remove_node(self.workers.pop(), allow_graceful=False)
        self.add_machine()

    def processes(self, name: str) -> list[psutil.Process]:
        """Return the processes of the cluster whose titles begin with a name, such as ``ray::ServeReplica``."""
        found = []
        for node in (self.cluster.head_node, *self.workers):
            for started in node.all_processes.get("raylet", ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    children = psutil.Process(started.process.pid).children(recursive=True)
                    found += [child for child in children if " ".join(child.cmdline()).startswith(name)]
        return found


def usable_on(port: int, model: str) -> list[str]:
    """Return the node of each replica of a model to which a gateway has a connection, as it says itself.

    The list is empty if the gateway does not answer.
    """
    with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
        cards = httpx.get(f"http://{HOST}:{port}/v1/models", timeout=10).json()["data"]
        [card] = [card for card in cards if card["id"] == model]
        return [replica["node"] for replica in card["replicas"] if replica["state"] == "ready"]
    return []


@contextlib.contextmanager
def simulated_cluster(
    num_machines: int, *, num_gpus: int, environ: dict[str, str] | None = None
) -> Iterator[Simulated]:
    """Start a cluster with a head, which holds no replicas that need a card, and some machines; end it at the end.

    Args:
        num_gpus: pretended cards of each machine.
        environ: more variables for all processes of the cluster.
    """
    before = dict(os.environ)
    os.environ |= {
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": str(_ROOT),
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "500",
        # No Python processes for work that never comes.
        "RAY_prestart_worker_first_driver": "0",
        **(environ or {}),
    }
    prepare("auto")
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 4, "num_gpus": 0, "object_store_memory": _STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    found = Simulated(cluster.address, cluster, num_gpus)
    try:
        for _machine in range(num_machines):
            found.add_machine()
        yield found
    finally:
        if ray.is_initialized():
            ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]
        os.environ.clear()
        os.environ.update(before)

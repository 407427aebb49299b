"""Faults for a gateway on a simulated Ray cluster under load."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.processes import ROOT
from bench.servers import clean_environ, free_port
from bench.simulated_cluster import Simulated, simulated_cluster, usable_on
from loadtest.faults import (
    MODEL,
    Victim,
    connect_all_at_once,
    go_away,
    reload,
    send_garbage,
    send_slowly,
    take_processor,
    write_registry,
)

NUM_REPLICAS: Final = 2
_START_S, _RETURN_S = 180.0, 180.0
_REPLICAS: Final = "    replicas: {min: 2, gpus: 1, per_node: 1}\n"


@dataclass(slots=True)
class OnCluster(Victim):
    """A gateway whose model is on a cluster, and another one there.

    Attributes:
        simulated: the cluster.
        other: the other gateway, which gets no load and may be killed.
        start_other: starts it again.
        other_port: where it listens.
    """

    simulated: Simulated | None = None
    other: subprocess.Popen[Any] | None = None
    start_other: Callable[[], subprocess.Popen[Any]] | None = None
    other_port: int = 0

    def num_usable(self, port: int | None = None) -> int:
        """Return how many replicas a gateway has a connection to; by default, the one that gets the load."""
        return len(usable_on(self.port if port is None else port, MODEL))

    def wait_until_whole(self) -> None:
        """Wait until both gateways have all of their replicas again, so that the next fault meets a whole cluster.

        A replica that is still being loaded would take the processor from those that answer, and if the controller is killed
        meanwhile, Ray ends it and loads another one.
        """
        deadline = time.monotonic() + _RETURN_S
        ports = {"the gateway": self.port, "the other gateway": self.other_port}
        while missing := [
            f"{name} has {number} of {NUM_REPLICAS} replicas"
            for name, port in ports.items()
            if (number := self.num_usable(port)) < NUM_REPLICAS
        ]:
            if time.monotonic() > deadline:
                raise AssertionError(f"{' and '.join(missing)} after {_RETURN_S:.0f} s")
            time.sleep(0.2)


def _cluster(victim: Victim) -> Simulated:
    assert isinstance(victim, OnCluster)  # noqa: S101  these faults are for no other
    assert victim.simulated is not None  # noqa: S101
    return victim.simulated


def kill_replica(victim: Victim) -> None:
    """A replica is killed."""
    victim.rng.choice(_cluster(victim).processes("ray::ServeReplica")).kill()  # also those of the other gateway
    time.sleep(1)  # until that has been noticed


def kill_controller(victim: Victim) -> None:
    """The controller of Ray Serve is killed."""
    _cluster(victim).processes("ray::ServeController")[0].kill()
    time.sleep(2)


def kill_machine(victim: Victim) -> None:
    """A machine with a replica is killed; another one takes its place."""
    on = Counter(usable_on(victim.port, MODEL))
    _cluster(victim).kill_machine(min(on, key=lambda node: on[node], default=None))  # one of two, if there are two
    time.sleep(2)
    _cluster(victim).replace_machine()


def kill_front(victim: Victim) -> None:
    """Another gateway on the cluster is killed and started again."""
    assert isinstance(victim, OnCluster)  # noqa: S101
    assert victim.other is not None  # noqa: S101
    assert victim.start_other is not None  # noqa: S101
    victim.other.kill()
    victim.other.wait()
    victim.other = victim.start_other()


def whole(fault: Callable[[Victim], None]) -> Callable[[Victim], None]:
    """Return a fault that lasts until the cluster is whole again."""

    def inflict(victim: Victim) -> None:
        fault(victim)
        assert isinstance(victim, OnCluster)  # noqa: S101
        victim.wait_until_whole()

    inflict.__doc__ = fault.__doc__
    return inflict


FAULTS: Final[Sequence[Callable[[Victim], None]]] = (
    *map(whole, (reload, kill_replica, kill_controller, kill_machine, kill_front)),
    go_away,
    send_slowly,
    send_garbage,
    connect_all_at_once,
    take_processor,
)


@contextmanager
def gateways_on_a_cluster(folder: Path, settings: dict[str, str], burn_s: float) -> Iterator[OnCluster]:
    """Start a simulated cluster and two gateways on it; end all of them at the end.

    Args:
        settings: of both gateways, as variables.
    """
    registry = folder / "models.yaml"
    write_registry(registry, 2048, _REPLICAS)
    with simulated_cluster(2, num_gpus=NUM_REPLICAS) as simulated:

        def start(name: str, port: int) -> subprocess.Popen[Any]:
            command = [sys.executable, "-m", "gateway", "serve", "--cluster", simulated.address]
            environ = {
                **clean_environ(),
                **settings,
                "RAY_AUTH_MODE": "disabled",
                "PYTHONPATH": str(ROOT),
                "GATEWAY_PORT": str(port),
                "GATEWAY_MODELS": str(registry),
                "GATEWAY_BATCH_DIR": str(folder / f"batches-{name}"),
            }
            with (folder / f"{name}.log").open("ab") as log:
                return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log)

        port, other_port = free_port(), free_port()
        victim = OnCluster(
            start("gateway", port),
            port,
            registry,
            more=_REPLICAS,
            burn_s=burn_s,
            simulated=simulated,
            start_other=lambda: start("other", other_port),
            other_port=other_port,
        )
        try:
            _wait_until_ready(victim, folder / "gateway.log")
            victim.other = start("other", other_port)
            yield victim
        finally:
            for process in (victim.process, victim.other):
                if process is not None:
                    process.kill()
                    process.wait()


def _wait_until_ready(victim: OnCluster, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while victim.num_usable() < NUM_REPLICAS:
        if time.monotonic() > deadline or victim.process.poll() is not None:
            raise RuntimeError(f"the gateway does not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.5)

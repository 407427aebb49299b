"""The gateways that use each deployment, as the cluster records them. A deployment without a gateway may be deleted.

A gateway claims a deployment before it deploys it, and releases the claim when it stops using it. The claims of an ended
process do not count: Ray knows which of its drivers ("jobs") run. So no claim has to be renewed, and no clock is involved.

A process that wants to delete a deployment first announces that, and then reads the claims. A gateway first records its
claim, then reads the announcements, and waits until these processes are done. The later of the two sees the other, so no
deployment is deleted that a gateway has begun to use.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import ray.exceptions
from ray._private.worker import global_worker

NAMESPACE: Final = b"embedding-gateway"
_CLAIM, _DELETING = "claim", "deleting"
# A deletion takes milliseconds, but seconds while Serve's controller restarts.
_PATIENCE_S, _POLL_S = 30.0, 0.05
# A gateway that stops does not wait for a lost head: its claims end with its process.
_RELEASE_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Claim:
    """The use of a deployment by a gateway.

    Attributes:
        job: the number of the gateway's process in Ray. Processes that connect later have larger numbers.
        gateway: tells several gateways in one process apart.
    """

    job: int
    gateway: str


class Claims:
    """The claims of one gateway, and those of all others. All methods block, so call them in a thread."""

    def __init__(self) -> None:
        self._id = secrets.token_hex(4)

    @property
    def own(self) -> Claim:
        """This gateway's claim."""
        return Claim(global_worker.current_job_id.int(), self._id)

    def claim(self, name: str) -> None:
        """Record that this gateway uses a deployment, and wait while another process may be deleting it."""
        _store().internal_kv_put(self._key(_CLAIM, name), b"", True, NAMESPACE)
        deadline = time.monotonic() + _PATIENCE_S
        while _live(_DELETING, name) and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def release(self, name: str) -> None:
        """Record that this gateway no longer uses a deployment."""
        with suppress(ray.exceptions.RayError):
            _store().internal_kv_del(self._key(_CLAIM, name), False, NAMESPACE, timeout=_RELEASE_S)

    @contextmanager
    def deleting(self, name: str) -> Iterator[bool]:
        """Keep gateways from claiming a deployment; yield whether it may be deleted, because no gateway uses it."""
        key = self._key(_DELETING, name)
        _store().internal_kv_put(key, b"", True, NAMESPACE)
        try:
            yield not _live(_CLAIM, name)
        finally:
            _store().internal_kv_del(key, False, NAMESPACE)

    def of(self, name: str) -> Sequence[Claim]:
        """Return the claims to a deployment."""
        return _live(_CLAIM, name).get(name, [])

    def all(self) -> Mapping[str, Sequence[Claim]]:
        """Return the claims to all deployments that have any."""
        return _live(_CLAIM)

    def _key(self, kind: str, name: str) -> bytes:
        own = self.own
        return f"{kind}:{name}:{own.job}:{own.gateway}".encode()


def _live(kind: str, name: str | None = None) -> dict[str, list[Claim]]:
    """Return the records of processes that still run, by deployment; forget those of ended processes."""
    prefix = f"{kind}:" if name is None else f"{kind}:{name}:"
    keys: list[bytes] = _store().internal_kv_keys(prefix.encode(), NAMESPACE)
    running = _running_jobs() if keys else set()
    found: dict[str, list[Claim]] = {}
    for key in keys:
        _, deployment, job, gateway = key.decode().split(":")
        if int(job) in running:
            found.setdefault(deployment, []).append(Claim(int(job), gateway))
        else:
            _store().internal_kv_del(key, False, NAMESPACE)
    return found


def _running_jobs() -> set[int]:
    jobs = _store().get_all_job_info(skip_submission_job_info_field=True, skip_is_running_tasks_field=True)
    return {job.int() for job, details in jobs.items() if not details.is_dead}


def _store() -> Any:
    """Return the client of the cluster's head, which keeps keys and values and knows the jobs."""
    return global_worker.gcs_client  # type: ignore[attr-defined]  # set once connected

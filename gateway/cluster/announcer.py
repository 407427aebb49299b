"""A request router for Ray Serve that routes no requests: it only announces the addresses of the replicas.

Serve pickles this module by value, and every process that has a handle unpickles a copy. So its state is in
:mod:`gateway.cluster.discovery`, which is not copied.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from gateway.cluster import discovery


class Announcer(RequestRouter):
    """Serve's request router, which here only announces the replicas: requests do not pass through Serve."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        places = {
            replica.replica_id.unique_id: discovery.place_of(replica.replica_id.unique_id, replica.replica_metadata)
            for replica in replicas
            if replica.replica_metadata
        }
        discovery.DIRECTORY.publish(self.app_name, places)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        return [candidate_replicas]

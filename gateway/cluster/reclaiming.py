"""Deletes the deployments that no gateway uses any longer, because they keep cards, while this gateway uses others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Final

import structlog

from gateway.cluster.claims import Claim
from gateway.cluster.command import ask
from gateway.cluster.deploying import Cluster, Deployed
from gateway.cluster.placing import stem_of, stem_of_model

log = structlog.get_logger(__name__)

INTERVAL_S: Final = 60.0
# A deployment is deleted after so many seconds without a gateway: its gateways may be restarting.
UNUSED_S: Final = 300.0
# The same, while a model of this gateway waits for room, perhaps for the cards that the deployment keeps.
UNUSED_IN_NEED_S: Final = 30.0


class Reclaimer:
    """Looks at all deployments of the cluster once a minute.

    Args:
        used: the deployments that this gateway uses, with their models.
    """

    def __init__(self, cluster: Cluster, used: Mapping[str, object]) -> None:
        self._cluster = cluster
        self._used = used
        self._unused_since: dict[str, float] = {}
        self._differed: set[str] = set()
        self._warned: set[str] = set()
        self._kept_by_older: set[str] = set()

    async def run(self) -> None:
        """Look at the deployments until canceled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                self._warn_of(await self.look())
            except Exception as error:  # the head or Serve may be restarting; the next look asks again
                log.warning("cluster_not_answering", error=repr(error))

    def is_kept_by_older(self, model: str) -> bool:
        """Return whether older gateways use another deployment of a model: by its last :meth:`look`.

        Only older ones, so that two gateways never wait for each other.
        """
        return stem_of_model(model) in self._kept_by_older

    async def look(self) -> Sequence[str]:
        """Delete the deployments that have had no gateway for long enough.

        Returns the deployments of this gateway's models that only other gateways use.
        """
        deployed = await asyncio.to_thread(self._cluster.deployed)
        claims = await asyncio.to_thread(self._cluster.claims.all)
        patience_s = UNUSED_IN_NEED_S if await asyncio.to_thread(self._lacks_room, deployed) else UNUSED_S
        for name in self._due(deployed, claims, patience_s):
            await self._reclaim(deployed[name])
        own = self._cluster.claims.own
        others = {name: by for name, by in claims.items() if name not in self._used}
        self._kept_by_older = {stem_of(name) for name, by in others.items() if any(one.job < own.job for one in by)}
        stems = {stem_of(name) for name in self._used}
        return [name for name in others if stem_of(name) in stems]

    def _lacks_room(self, deployed: Mapping[str, Deployed]) -> bool:
        """Return whether a model of this gateway waits for room. Blocks.

        Serve says so only after a while; until then, the model lacks room if none of its replicas ever had a place.
        """
        starting = [deployed[name] for name in list(self._used) if name in deployed and deployed[name].num_starting]
        return any(one.is_without_room or not self._cluster.has_begun(one.name) for one in starting)

    def _due(
        self, deployed: Mapping[str, Deployed], claims: Mapping[str, Sequence[Claim]], patience_s: float
    ) -> list[str]:
        """Return the deployments that have had no gateway for long enough."""
        now = time.monotonic()
        unused = [name for name, one in deployed.items() if not one.is_gone and name not in claims]
        self._unused_since = {name: self._unused_since.get(name, now) for name in unused}
        return [name for name, since in self._unused_since.items() if now - since >= patience_s]

    async def _reclaim(self, deployed: Deployed) -> None:
        """Delete a deployment, unless a gateway claims it at this moment, or is connected to its replicas."""
        num_fronts = (await ask(self._cluster, deployed)).num_fronts
        if num_fronts or not await asyncio.to_thread(self._cluster.delete_unused, deployed.name):
            self._unused_since.pop(deployed.name, None)
            return
        log.info("deployment_reclaimed", deployment=deployed.name, reason="no gateway has used it for a while")

    def _warn_of(self, others: Sequence[str]) -> None:
        """Log once if other gateways have another entry for a model, also after the minute that a rollout may take."""
        for name in (self._differed & set(others)) - self._warned:
            self._warned.add(name)
            own = next(used for used in self._used if stem_of(used) == stem_of(name))
            log.warning(
                "gateways_differ",
                deployment=own,
                other=name,
                reason="other gateways have another entry, other settings or another version for this model, so their "
                "vectors may differ; `gateway cluster status` shows both",
            )
        self._differed = set(others)

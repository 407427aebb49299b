"""The number of a model's replicas on a cluster: an entry's ``replicas`` in ``models.yaml``."""

from __future__ import annotations

from pydantic import Field, model_validator

from gateway.config.fields import Frozen, Positive


class Replicas(Frozen):
    """The replicas of a model on a Ray cluster. Each is one process."""

    min: Positive = Field(default=1, description="Minimum number of replicas.")
    max: Positive | None = Field(
        default=None,
        description="Maximum number of replicas; those beyond `min` are started when there is work for them. By "
        "default `min`.",
    )
    target_requests: Positive = Field(
        default=16,
        description="Requests in progress per replica: with more on average, replicas are added; with fewer, some "
        "are removed.",
    )
    gpus: int | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Graphics cards of a replica, 0 or 1. By default 1 if the cluster has any, and `device` is not `cpu`.",
    )
    per_node: Positive | None = Field(
        default=None,
        description="Maximum number of replicas on one machine of the cluster. With 1, a model with two replicas survives "
        "the loss of any machine; a replica waits if no other machine has room. By default no maximum.",
    )

    @property
    def most(self) -> int:
        """The maximum number of replicas."""
        return self.max or self.min

    @model_validator(mode="after")
    def _check_range(self) -> Replicas:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"`max` must be at least `min`, which is {self.min}, got {self.max}")
        return self

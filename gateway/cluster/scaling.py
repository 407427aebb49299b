"""The number of replicas that a model needs. Ray Serve's controller runs a copy of this module in its own process."""

from __future__ import annotations

from math import ceil
from typing import Any

REQUESTS = "requests_in_progress"
"""The name of the metric that each replica reports."""


def wanted_replicas(context: Any) -> tuple[int, dict[str, Any]]:
    """Return the number of replicas at which each has ``target_requests`` in progress. Serve applies delays and bounds.

    Args:
        context: Serve's context of a policy (:mod:`ray.serve.config`).
    """
    reported = (context.aggregated_metrics or {}).get(REQUESTS, {})
    if not reported:
        return context.target_num_replicas, {}
    # Replicas that have not reported yet count with the average.
    mean = sum(reported.values()) / len(reported)
    return max(1, ceil(mean * context.current_num_replicas / context.config.target_ongoing_requests)), {}

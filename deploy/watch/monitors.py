"""Datadog's monitors: the alerts of ``deploy/prometheus/rules.yml``, with the same names, thresholds and runbook.

In them, Terraform fills in ``${env}``, ``${docs}``, ``${page}``, ``${ticket}``, and the ids of the two objectives
(``${availability}``, ``${latency}``): see ``deploy/datadog/main.tf``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from deploy.watch.datadog_query import conditions
from deploy.watch.expressions import EMBEDDINGS, FAULTS, Where
from deploy.watch.names import HEALTH_CHECK, SERVICE, datadog_metric

SCOPE: Final = (f"service:{SERVICE}", "env:${env}")
_OVER: Final = ", ".join(f'"{tag}"' for tag in SCOPE)
_REPLICA: Final = "{{instance.name}}"
_MODEL: Final = "{{model.name}} on {{instance.name}}"
SLOW_S: Final = 2.5
"""A request for embeddings that takes longer counts against the objective of latency."""


@dataclass(frozen=True)
class Monitor:
    """A monitor.

    Args:
        alert: the name of the alert in the rules of Prometheus, which is the heading of its runbook too.
        variant: tells monitors of the same alert apart.
        query: with the comparison at its end, as Datadog wants it.
        critical: the value that the query compares with.
        others: more options.
    """

    alert: str
    kind: Literal["query alert", "service check", "slo alert"]
    query: str
    critical: float
    severity: Literal["page", "ticket"]
    summary: str
    description: str
    variant: str = ""
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The name of its file, without the ending."""
        return f"{self.alert}-{self.variant}".rstrip("-").lower().replace(" ", "-")

    def as_json(self) -> dict[str, Any]:
        """Return it as Datadog's API takes it."""
        runbook = f"${{docs}}/operations.md#{self.alert.lower()}"
        thresholds = self.others.get("thresholds", {"critical": self.critical})
        options = {
            "include_tags": True,
            "notify_audit": False,
            "notify_no_data": False,
            "require_full_window": False,
            **self.others,
            "thresholds": thresholds,
        }
        if self.kind == "slo alert":
            options = {"include_tags": True, "notify_audit": False, "thresholds": thresholds}
        return {
            "name": f"{self.alert}: {self.summary} in ${{env}}" + (f" ({self.variant})" if self.variant else ""),
            "type": self.kind,
            "query": self.query,
            "message": f"{self.description}\n\nWhat to do: {runbook}\n\n${{{self.severity}}}",
            "tags": [*SCOPE, f"severity:{self.severity}", f"alert:{self.alert.lower()}"],
            "priority": 1 if self.severity == "page" else 3,
            "options": options,
        }


def _after(seconds: int) -> dict[str, Any]:
    """Return the option that gives a new pod the time of a condition's window; Datadog's default is a minute."""
    return {"new_group_delay": seconds}


def _selected(metric: str, *where: Where) -> str:
    return f"{datadog_metric(metric)}{{{conditions(SCOPE, where)}}}"


def _burn_rate(objective: str, hours: int, minutes: int, rate: float) -> str:
    return f'burn_rate("${{{objective}}}").over("30d").long_window("{hours}h").short_window("{minutes}m") > {rate:g}'


# The budget of 30 days that is gone when it alerts: 2, 5, 10 and 10 %. The last is Prometheus' rate of 1 over three days in
# the two days that Datadog looks back at most: https://docs.datadoghq.com/service_level_objectives/burn_rate/.
_BURN_RATES: Final = (
    ("Fast", "1 h", 1, 5, 14.4),
    ("Fast", "6 h", 6, 30, 6.0),
    ("Slow", "24 h", 24, 120, 3.0),
    ("Slow", "48 h", 48, 240, 1.5),
)
_SUMMARIES: Final = {
    ("Errors", "Fast"): "Embedding requests fail, at a rate that uses up a month's allowance in days",
    ("Errors", "Slow"): "Embedding requests fail, a little more often than they may",
    ("Latency", "Fast"): "Embedding requests are slow, at a rate that uses up a month's allowance in days",
    ("Latency", "Slow"): "Embedding requests are slow, a little more often than they may be",
}


def _objective_monitors() -> list[Monitor]:
    return [
        Monitor(
            f"Gateway{kind}{speed}",
            "slo alert",
            _burn_rate(objective, hours, minutes, rate),
            rate,
            "page" if speed == "Fast" else "ticket",
            _SUMMARIES[kind, speed],
            f"{failing}, {{{{value}}}} times as often as the objective allows.",
            variant,
        )
        for kind, objective, failing in (
            ("Errors", "availability", "Requests for embeddings are answered with 5xx"),
            ("Latency", "latency", f"Requests for embeddings take longer than {SLOW_S} s"),
        )
        for speed, variant, hours, minutes, rate in _BURN_RATES
    ]


_BY_MODEL: Final = " by {model,instance}"
_BY_REPLICA: Final = " by {instance}"
_IS_BUSY: Final = Where("state", ("downloading", "loading", "recovering", "failed"))
_REFUSED: Final = Where("status", ("429", "503"))
_WAS_REFUSED: Final = Where("outcome", ("refused",))

CAUSES: Final = (
    Monitor(
        "GatewayDown",
        "service check",
        f'"{HEALTH_CHECK}".over({_OVER}).by("instance").last(9).count_by_status()',
        8,
        "page",
        "The gateway does not answer",
        f"{_REPLICA} has given the Agent no metrics for two minutes.",
        # Without an alert for missing data: rollouts and autoscalers remove pods, which is not a fault.
        others={"thresholds": {"critical": 8, "ok": 2}},
    ),
    Monitor(
        "GatewayDown",
        "query alert",
        f"max(last_2m):sum:{_selected('gateway_build_info')} < 1",
        1,
        "page",
        "The gateway does not answer",
        "No gateway has given an Agent any metrics for four minutes.",
        "all",
        others={"notify_no_data": True, "no_data_timeframe": 4},
    ),
    Monitor(
        "GatewayRestarts",
        "query alert",
        # Each later time of start counts once, however much later it is.
        f"sum(last_30m):clamp_max(diff(max:{_selected('process_start_time_seconds')}{_BY_REPLICA}), 1) > 2",
        2,
        "page",
        "The gateway ends again and again",
        f"{_REPLICA} has been started {{{{value}}}} times in half an hour; each time, its clients lost requests.",
    ),
    Monitor(
        "GatewayModelNotReady",
        "query alert",
        f"min(last_10m):max:{_selected('gateway_model_state', _IS_BUSY)}{_BY_MODEL} >= 1",
        1,
        "page",
        "A model does not answer",
        f"{_MODEL} has been loading, recovering or failed for ten minutes; /health says why.",
        others=_after(600),
    ),
    Monitor(
        "GatewayReplicasMissing",
        "query alert",
        f"min(last_15m):max:{_selected('gateway_replicas_wanted')}{_BY_MODEL}"
        f" - max:{_selected('gateway_replicas_usable')}{_BY_MODEL} >= 1",
        1,
        "ticket",
        "A model has fewer replicas on the cluster than it should",
        f"{_MODEL} has {{{{value}}}} replicas too few; `gateway cluster status` shows them.",
        others=_after(900),
    ),
    Monitor(
        "GatewayReplicasLost",
        "query alert",
        f"sum(last_30m):sum:{_selected('gateway_replicas_lost_total')}{_BY_MODEL}.as_count() > 3",
        3,
        "ticket",
        "The replicas of a model end again and again",
        "{{instance.name}} has lost {{value}} replicas of {{model.name}} in half an hour; its log has the reasons "
        "(replica_lost).",
    ),
    Monitor(
        "GatewayGoldenDrift",
        "query alert",
        f"min(last_5m):min:{_selected('gateway_golden_min_cosine')}{_BY_MODEL}"
        f" - max:{_selected('gateway_golden_limit_cosine')}{_BY_MODEL} < 0",
        0,
        "page",
        "A model gives vectors that it should not",
        f"{_MODEL}: the cosine between a golden vector and the vector computed now is {{{{value}}}} from the limit.",
    ),
    Monitor(
        "GatewayQueueOld",
        "query alert",
        f"min(last_2m):max:{_selected('gateway_queue_oldest_seconds')}{_BY_MODEL} > 30",
        30,
        "ticket",
        "Requests wait long",
        f"The oldest request for {_MODEL} has been waiting for {{{{value}}}} s.",
        others=_after(120),
    ),
    Monitor(
        "GatewayEngineRestarts",
        "query alert",
        f"sum(last_15m):sum:{_selected('gateway_engine_restarts_total')}{_BY_MODEL}.as_count() > 0",
        0,
        "ticket",
        "A model was reloaded after it hung or broke",
        f"{_MODEL}; the log has the reason (engine_lost).",
    ),
    Monitor(
        "GatewayRefusing",
        "query alert",
        # Refusals beyond 5 %, and more than five of them: a share alone says little about three requests.
        f"sum(last_10m):sum:{_selected('gateway_requests_total', EMBEDDINGS, _REFUSED)}.as_count()"
        f" - 0.05 * sum:{_selected('gateway_requests_total', EMBEDDINGS)}.as_count() > 5",
        5,
        "ticket",
        "Many requests are refused",
        "In ten minutes, {{value}} more requests for embeddings than 5 % of them have been answered with 429 or 503.",
    ),
    Monitor(
        "GatewayReloadRefused",
        "query alert",
        f"sum(last_10m):sum:{_selected('gateway_reloads_total', _WAS_REFUSED)}{_BY_REPLICA}.as_count() > 0",
        0,
        "ticket",
        "A reload of models.yaml was refused",
        f"{_REPLICA} still serves the previous registry; the log has the reason (reload_refused).",
    ),
    Monitor(
        "GatewayKeysRefused",
        "query alert",
        f"sum(last_10m):sum:{_selected('gateway_key_reloads_total', _WAS_REFUSED)}{_BY_REPLICA}.as_count() > 0",
        0,
        "ticket",
        "A changed file of API keys was refused",
        f"{_REPLICA} still accepts the previous keys; the log has the reason (api_keys_refused).",
    ),
    Monitor(
        "GatewayQuotaStorageDown",
        "query alert",
        f"sum(last_5m):sum:{_selected('gateway_quota_errors_total')}{_BY_REPLICA}.as_count() > 0",
        0,
        "ticket",
        "Requests pass uncounted",
        f"{_REPLICA} does not reach the storage of quotas (GATEWAY_QUOTA_STORAGE): no client is limited.",
    ),
    Monitor(
        "GatewayUpstreamServerDown",
        "query alert",
        f"max(last_5m):max:{_selected('gateway_upstream_up')} by {{model,server,instance}} < 1",
        1,
        "ticket",
        "A server that runs a model is left alone",
        "{{server.name}} does not run {{model.name}} as it should; the model's other servers answer, if it has any. "
        "The log says why.",
        others=_after(300),
    ),
)

MONITORS: Final = (*_objective_monitors(), *CAUSES)


def objectives() -> dict[str, dict[str, Any]]:
    """Return the objectives of 30 days by name, as Datadog's API takes them."""
    requests = _selected("gateway_requests_total", EMBEDDINGS)
    good = _selected("gateway_requests_total", EMBEDDINGS, replace(FAULTS, is_not=True))
    seconds = _selected("gateway_request_duration_seconds", EMBEDDINGS)
    return {
        "availability": _objective(
            "Embeddings: availability",
            "Requests for embeddings that are answered without a fault of the gateway (5xx).",
            f"sum:{good}.as_count()",
            f"sum:{requests}.as_count()",
            99.9,
        ),
        "latency": _objective(
            "Embeddings: latency",
            f"Requests for embeddings that are answered within {SLOW_S} s, bulk requests included.",
            f"count(v: v<={SLOW_S}):{seconds}.as_count()",
            f"count:{seconds}.as_count()",
            99.0,
        ),
    }


def _objective(name: str, description: str, good: str, all_requests: str, target: float) -> dict[str, Any]:
    return {
        "name": name,
        "type": "metric",
        "description": description,
        "query": {"numerator": good, "denominator": all_requests},
        "thresholds": [{"timeframe": "30d", "target": target}],
        "tags": list(SCOPE),
    }

"""Schemas of the kinds that Kubernetes itself does not know: only the fields that are used here, and no other.

Those of KEDA, the Prometheus operator, KubeRay and the Gateway API allow more. A field that is new in deploy/kubernetes has
to be looked up there and added here.
"""

from __future__ import annotations

from typing import Any

TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
DURATION = {"type": "string", "pattern": r"^\d+(ms|s|m|h)$"}
LABELS = {"type": "object", "additionalProperties": TEXT}


def exactly(optional: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    """Return the schema of an object that has these fields, the optional ones perhaps, and no other."""
    return {
        "type": "object",
        "properties": fields,
        "required": [name for name in fields if name not in optional],
        "additionalProperties": False,
    }


def listing(item: Any) -> dict[str, Any]:
    """Return the schema of a list with at least one item."""
    return {"type": "array", "items": item, "minItems": 1}


def resource(api_version: str, kind: str, spec: Any) -> dict[str, Any]:
    """Return the schema of a whole resource."""
    return exactly(
        apiVersion={"const": api_version},
        kind={"const": kind},
        metadata=exactly(("labels",), name=TEXT, namespace=TEXT, labels=LABELS),
        spec=spec,
    )


_SCALING_RULES = exactly(
    stabilizationWindowSeconds={**COUNT, "maximum": 3600},
    policies=listing(
        exactly(type={"enum": ["Pods", "Percent"]}, value=COUNT, periodSeconds={**COUNT, "minimum": 1, "maximum": 1800})
    ),
)

SCALED_OBJECT = resource(
    "keda.sh/v1alpha1",
    "ScaledObject",
    exactly(
        scaleTargetRef=exactly(name=TEXT),
        minReplicaCount=COUNT,
        maxReplicaCount=COUNT,
        pollingInterval=COUNT,
        fallback=exactly(
            failureThreshold=COUNT,
            replicas=COUNT,
            behavior={"enum": ["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]},
        ),
        advanced=exactly(
            horizontalPodAutoscalerConfig=exactly(behavior=exactly(scaleUp=_SCALING_RULES, scaleDown=_SCALING_RULES))
        ),
        triggers=listing(
            exactly(
                type={"const": "prometheus"},
                # KEDA refuses a fallback with any other type.
                metricType={"const": "AverageValue"},
                # KEDA's metadata are strings, numbers too.
                metadata=exactly(
                    serverAddress={"type": "string", "pattern": "^https?://"},
                    query=TEXT,
                    threshold={"type": "string", "pattern": r"^\d+$"},
                ),
            )
        ),
    ),
)

SERVICE_MONITOR = resource(
    "monitoring.coreos.com/v1",
    "ServiceMonitor",
    exactly(
        selector=exactly(matchLabels=LABELS),
        endpoints=listing(
            exactly(
                port=TEXT,
                path={"type": "string", "pattern": "^/"},
                interval=DURATION,
                scrapeTimeout=DURATION,
                relabelings=listing(
                    exactly(
                        ("replacement", "sourceLabels"), targetLabel=TEXT, replacement=TEXT, sourceLabels=listing(TEXT)
                    )
                ),
            )
        ),
    ),
)

SCRAPE_CONFIG = resource(
    "monitoring.coreos.com/v1alpha1",
    "ScrapeConfig",
    exactly(
        staticConfigs=listing(exactly(targets=listing({"type": "string", "pattern": r"^[^/]+:\d+$"}))),
        metricsPath={"type": "string", "pattern": "^/"},
        scrapeInterval=DURATION,
        scrapeTimeout=DURATION,
        relabelings=listing(exactly(targetLabel=TEXT, replacement=TEXT)),
        metricRelabelings=listing(exactly(sourceLabels=listing(TEXT), regex=TEXT, targetLabel=TEXT)),
    ),
)

PROMETHEUS_RULE = resource(
    "monitoring.coreos.com/v1",
    "PrometheusRule",
    exactly(
        groups=listing(
            exactly(
                name=TEXT,
                rules=listing(
                    {
                        "oneOf": [
                            exactly(record=TEXT, expr=TEXT),
                            exactly(alert=TEXT, expr=TEXT, **{"for": DURATION}, labels=LABELS, annotations=LABELS),
                        ]
                    }
                ),
            )
        )
    ),
)

_POD = {"type": "object", "required": ["metadata", "spec"]}  # compared with Kubernetes' own schema by the test
_START = {"type": "object", "additionalProperties": {"type": "string"}}  # KubeRay's are strings, numbers too
RAY_CLUSTER = resource(
    "ray.io/v1",
    "RayCluster",
    exactly(
        ("enableInTreeAutoscaling", "autoscalerOptions"),
        enableInTreeAutoscaling={"type": "boolean"},
        autoscalerOptions=exactly(
            idleTimeoutSeconds=COUNT,
            env=listing({"type": "object", "required": ["name"]}),
            securityContext=exactly(
                allowPrivilegeEscalation={"const": False}, capabilities=exactly(drop={"const": ["ALL"]})
            ),
        ),
        rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        headGroupSpec=exactly(rayStartParams=_START, template=_POD),
        workerGroupSpecs=listing(
            exactly(
                groupName=TEXT,
                replicas=COUNT,
                minReplicas=COUNT,
                maxReplicas=COUNT,
                rayStartParams=_START,
                template=_POD,
            )
        ),
    ),
)

GATEWAY = resource(
    "gateway.networking.k8s.io/v1",
    "Gateway",
    exactly(
        gatewayClassName=TEXT,
        listeners=listing(
            exactly(
                name=TEXT,
                hostname=TEXT,
                port=COUNT,
                protocol={"enum": ["HTTP", "HTTPS", "TLS", "TCP", "UDP"]},
                tls=exactly(
                    mode={"enum": ["Terminate", "Passthrough"]},
                    certificateRefs=listing(exactly(kind={"const": "Secret"}, name=TEXT)),
                ),
            )
        ),
    ),
)

HTTP_ROUTE = resource(
    "gateway.networking.k8s.io/v1",
    "HTTPRoute",
    exactly(
        parentRefs=listing(exactly(name=TEXT)),
        hostnames=listing(TEXT),
        rules=listing(
            exactly(
                matches=listing(
                    exactly(path=exactly(type={"enum": ["Exact", "PathPrefix", "RegularExpression"]}, value=TEXT))
                ),
                timeouts=exactly(request=DURATION),
                backendRefs=listing(exactly(name=TEXT, port=COUNT)),
            )
        ),
    ),
)

SCHEMAS = {
    "ScaledObject": SCALED_OBJECT,
    "ServiceMonitor": SERVICE_MONITOR,
    "ScrapeConfig": SCRAPE_CONFIG,
    "PrometheusRule": PROMETHEUS_RULE,
    "RayCluster": RAY_CLUSTER,
    "Gateway": GATEWAY,
    "HTTPRoute": HTTP_ROUTE,
}

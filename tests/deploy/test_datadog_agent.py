"""Datadog's own code on what deploy/datadog holds: the Agent's check reads the gateway's metrics, its API knows each key."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from deploy.watch.names import HEALTH_CHECK, RENAMED_LABELS
from gateway.telemetry import metrics
from gateway.telemetry.replica_metrics import LABEL, merge
from tests.clients.apart.environment import ENVIRONMENTS
from tests.deploy.datadog_language import AGENT_TAGS, Metric, known_metrics
from tests.deploy.deployment_files import DEPLOY, read_yaml
from tests.deploy.test_datadog import DASHBOARD, MONITORS, OBJECTIVES, PIPELINE
from tests.peers import is_missing

_NUM_SERIES = 40
PYTHON = ENVIRONMENTS / "datadog" / "bin" / "python"
OPENMETRICS = DEPLOY / "datadog" / "conf.d" / "openmetrics.d"
INSTANCE = read_yaml(OPENMETRICS / "conf.yaml")["instances"][0]
OF_REPLICAS = read_yaml(OPENMETRICS / "replicas.yaml")["instances"][0]
REPLICAS = ("mini#one", "mini#two")
BROKEN = {
    "a key": {**MONITORS["gatewaydown"], "mesage": "x"},
    "an option": {**MONITORS["gatewaydown"], "options": {"notify_no_date": True}},
    "a type": {**MONITORS["gatewaydown"], "type": "query alarm"},
}


def exported() -> str:
    """Return a scrape with several series of every metric: more than the 2,000 that an Agent takes by default."""
    for metric, _, kind, labels, _ in metrics.declared():
        for i in range(_NUM_SERIES if labels else 1):
            series = metric.labels(*[f"some-{name}-{i}" for name in labels]) if labels else metric
            if kind == "histogram":
                series.observe(0.3)  # type: ignore[attr-defined]
            else:
                series.inc()  # type: ignore[attr-defined]
    text = metrics.render().decode()
    for metric, _, _, labels, _ in metrics.declared():
        for i in range(_NUM_SERIES if labels else 0):
            metric.remove(*[f"some-{name}-{i}" for name in labels])
    return text


@pytest.fixture(scope="module")
def datadog() -> Any:
    if not PYTHON.exists():
        is_missing("Datadog's code is not installed: make install-clients")
    objects = {
        **{f"monitor {name}": ("monitor", monitor) for name, monitor in MONITORS.items()},
        **{f"objective {name}": ("objective", objective) for name, objective in OBJECTIVES.items()},
        **{f"broken {name}": ("monitor", monitor) for name, monitor in BROKEN.items()},
        "dashboard": ("dashboard", DASHBOARD),
        "pipeline": ("pipeline", PIPELINE),
    }
    page = exported()
    scrapes = {
        "gateway": (INSTANCE, page),
        "replicas": (OF_REPLICAS, merge(dict.fromkeys(REPLICAS, page))),
        "no replicas": (OF_REPLICAS, merge({})),
    }
    asked = {"scrapes": scrapes, "objects": objects}
    script = DEPLOY.parent / "tests" / "deploy" / "datadog_agent.py"
    done = subprocess.run(
        [PYTHON, "-I", script], input=json.dumps(asked), check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_agent_makes_the_metrics_that_the_queries_ask_for(datadog: Any) -> None:
    scraped = datadog["scraped"]["gateway"]
    sent = {**scraped["metrics"], **scraped["distributions"]}
    found = {
        name: Metric(metric["kind"], frozenset(tag.split(":")[0] for tag in metric["tags"]) | AGENT_TAGS)
        for name, metric in sent.items()
    }

    assert scraped["problem"] == ""
    assert found == known_metrics()


def test_the_agent_adds_the_tags_that_are_set_and_no_others(datadog: Any) -> None:
    scraped = datadog["scraped"]["gateway"]
    sent = {**scraped["metrics"], **scraped["distributions"]}

    for metric in sent.values():
        assert set(INSTANCE["tags"]) <= set(metric["tags"])
        keys = {tag.split(":")[0] for tag in metric["tags"]}
        assert not keys & {"endpoint", "lower_bound", "upper_bound", *RENAMED_LABELS}


def test_the_check_of_the_health_is_the_one_that_a_monitor_asks_for(datadog: Any) -> None:
    assert datadog["scraped"]["gateway"]["service_checks"] == {HEALTH_CHECK: 0}


def test_the_metrics_of_replicas_have_the_same_names_and_the_replica_as_their_instance(datadog: Any) -> None:
    scraped = datadog["scraped"]["replicas"]
    sent = {**scraped["metrics"], **scraped["distributions"]}
    replicas_of: dict[str, set[str]] = {}
    for name, tags in scraped["series"]:
        keys = [tag.split(":")[0] for tag in tags]
        assert keys.count("instance") == 1, f"{name}: a query by instance would show a replica twice"
        replicas_of.setdefault(name, set()).update(tag.partition(":")[2] for tag in tags if tag.startswith("instance:"))

    assert scraped["problem"] == ""
    assert {name: metric["kind"] for name, metric in sent.items()} == {
        name: metric.kind for name, metric in known_metrics().items()
    }
    assert set(replicas_of) == set(scraped["metrics"])
    assert {frozenset(replicas) for replicas in replicas_of.values()} == {frozenset(REPLICAS)}
    for metric in sent.values():
        assert set(OF_REPLICAS["tags"]) <= set(metric["tags"])
        assert not {tag.split(":")[0] for tag in metric["tags"]} & {LABEL, "endpoint", *RENAMED_LABELS}


def test_an_empty_page_is_valid_and_does_not_count_as_a_front(datadog: Any) -> None:
    nothing = datadog["scraped"]["no replicas"]

    assert (nothing["problem"], nothing["metrics"], nothing["distributions"]) == ("", {}, {})
    # Only a front's own check counts for the monitor of fronts, which is by instance.
    assert [datadog["scraped"][name]["service_checks"] for name in ("replicas", "no replicas")] == [{}, {}]


def test_the_api_knows_every_key_and_value(datadog: Any) -> None:
    found = {name: problems for name, problems in datadog["problems"].items() if not name.startswith("broken ")}

    assert len(found) == len(MONITORS) + len(OBJECTIVES) + 2
    assert {name: problems for name, problems in found.items() if problems} == {}


@pytest.mark.parametrize("name", BROKEN)
def test_fields_that_the_api_does_not_know_would_be_found(datadog: Any, name: str) -> None:
    assert datadog["problems"][f"broken {name}"]

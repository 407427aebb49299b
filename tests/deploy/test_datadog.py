"""deploy/datadog: every query asks for metrics that exist, and every monitor is one of the alerts with its runbook."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deploy.watch.expressions import Level
from deploy.watch.monitors import SLOW_S
from deploy.watch.names import NAMESPACE, PREFIX, RENAMED_LABELS, SERVICE, datadog_metric
from deploy.watch.rows import ROWS
from gateway import __version__
from gateway.config.settings import load_settings
from gateway.telemetry.metrics import _SECONDS
from gateway.telemetry.replica_metrics import LABEL
from gateway.types import ModelState
from tests.deploy.datadog_language import (
    AGENT_TAGS,
    Asked,
    NotAQuery,
    check,
    condition,
    dashboard_queries,
    formula_names,
    known_metrics,
    queries,
)
from tests.deploy.deployment_files import DEPLOY, image_environ, read_yaml
from tests.telemetry.observed import rules

DATADOG = DEPLOY / "datadog"
MONITORS: dict[str, Any] = {path.stem: json.loads(path.read_text()) for path in sorted(DATADOG.glob("monitors/*.json"))}
OBJECTIVES: dict[str, Any] = {path.stem: json.loads(path.read_text()) for path in DATADOG.glob("objectives/*.json")}
DASHBOARD = json.loads((DATADOG / "dashboard.json").read_text())
PIPELINE = json.loads((DATADOG / "log-pipeline.json").read_text())
LINES = list(dashboard_queries(DASHBOARD["widgets"]))
ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
EACH_MONITOR = pytest.mark.parametrize("monitor", MONITORS.values(), ids=MONITORS)


def in_production(query: str) -> str:
    """Return a query as Terraform writes it for an environment."""
    return query.replace("${env}", "production")


def metric_monitors() -> dict[str, Any]:
    return {name: monitor for name, monitor in MONITORS.items() if monitor["type"] == "query alert"}


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[0])
def test_every_query_of_the_dashboard_names_existing_metrics(line: tuple[str, str, dict[str, str]]) -> None:
    _, formula, named = line
    formula_names(formula, set(named))

    for query in named.values():
        (asked,) = queries(query)
        check(asked)
        assert {"env", "service"} <= asked.variables <= {v["name"] for v in DASHBOARD["template_variables"]}


def test_the_dashboard_has_every_panel_that_grafana_has() -> None:
    titles = [title for title, _, _ in LINES]

    assert {panel.title for row in ROWS for panel in row.panels} == set(titles)
    assert len(titles) == sum(len(panel.series) for row in ROWS for panel in row.panels)


@pytest.mark.parametrize("monitor", metric_monitors().values(), ids=metric_monitors())
def test_every_metric_monitor_names_existing_metrics_and_compares_with_its_threshold(monitor: Any) -> None:
    compared = condition(in_production(monitor["query"]))

    for asked in queries(compared.expression):
        check(asked)
        assert {("service", (SERVICE,)), ("env", ("production",))} <= set(asked.scope)
        assert set(dict(asked.scope).get("state", ())) <= {state.value for state in ModelState}
    assert monitor["options"]["thresholds"] == {"critical": compared.limit}


@pytest.mark.parametrize("name", [name for name, monitor in MONITORS.items() if monitor["type"] == "slo alert"])
def test_every_burn_rate_is_one_that_datadog_takes(name: str) -> None:
    """https://docs.datadoghq.com/service_level_objectives/burn_rate/."""
    monitor = MONITORS[name]
    match = re.fullmatch(
        r'burn_rate\("\$\{(\w+)\}"\)\.over\("30d"\)\.long_window\("(\d+)h"\)\.short_window\("(\d+)m"\) > ([\d.]+)',
        monitor["query"],
    )
    assert match
    objective, hours, minutes, rate = match[1], int(match[2]), int(match[3]), float(match[4])

    assert 1 <= hours <= 48
    assert minutes * 12 == hours * 60
    assert 0 < rate <= 1 / (1 - OBJECTIVES[objective]["thresholds"][0]["target"] / 100)
    assert monitor["options"]["thresholds"] == {"critical": rate}
    assert ("errors" in name) == (objective == "availability")


def test_burn_rates_are_those_of_prometheus() -> None:
    for kind in ("errors", "latency"):
        ours = [MONITORS[f"gateway{kind}fast-{hours}-h"]["options"]["thresholds"]["critical"] for hours in (1, 6)]
        theirs = re.findall(r"> ([\d.]+) \*", ALERTS[f"Gateway{kind.title()}Fast"]["expr"])
        assert [str(rate) for rate in ours] == [str(float(rate)) for rate in theirs[::2]]


def test_the_gateway_is_down_when_its_check_fails() -> None:
    down = MONITORS["gatewaydown"]
    match = re.fullmatch(
        r'"([\w.]+)"\.over\("([^)]+)"\)\.by\("instance"\)\.last\((\d+)\)\.count_by_status\(\)', down["query"]
    )

    assert match
    assert (match[1], match[2]) == (f"{NAMESPACE}.openmetrics.health", f'service:{SERVICE}", "env:${{env}}')
    assert down["options"]["thresholds"]["critical"] < int(match[3]) <= 100


def test_a_pod_that_a_rollout_removes_raises_no_alert_and_the_loss_of_all_does() -> None:
    """Datadog would alert for every group that has no more data."""
    noticed = [monitor for monitor in MONITORS.values() if monitor["options"].get("notify_no_data")]

    assert [monitor["name"].split(":")[0] for monitor in noticed] == ["GatewayDown"]
    assert [re.search(r"\bby\b", monitor["query"]) for monitor in noticed] == [None]
    [minutes] = [int(found) for found in re.findall(r"\(last_(\d+)m\)", noticed[0]["query"])]
    assert noticed[0]["options"]["no_data_timeframe"] >= 2 * minutes  # as Datadog requires


@pytest.mark.parametrize("name", [name for name in metric_monitors() if metric_monitors()[name]["query"][:3] == "min"])
def test_a_new_pod_has_the_time_that_prometheus_gives_it(name: str) -> None:
    """Datadog looks at a new pod after a minute by default, and then needs only one value in the window of a condition."""
    monitor = MONITORS[name]
    waits = ALERTS[monitor["name"].split(":")[0]]["for"]
    if waits == "0s":  # drifted vectors are wrong at once
        assert "new_group_delay" not in monitor["options"]
        return

    assert f"last_{waits}" in monitor["query"]
    assert monitor["options"]["new_group_delay"] == 60 * int(waits.removesuffix("m"))


@EACH_MONITOR
def test_every_monitor_is_an_alert_with_its_runbook(monitor: Any) -> None:
    alert = monitor["name"].split(":")[0]
    severity = ALERTS[alert]["labels"]["severity"]

    assert f"What to do: ${{docs}}/operations.md#{alert.lower()}\n" in monitor["message"]
    assert monitor["message"].endswith(f"${{{severity}}}")
    assert monitor["name"].startswith(f"{alert}: {ALERTS[alert]['annotations']['summary']} in ${{env}}")
    assert set(monitor["tags"]) == {
        f"service:{SERVICE}",
        "env:${env}",
        f"severity:{severity}",
        f"alert:{alert.lower()}",
    }
    assert monitor["priority"] == (1 if severity == "page" else 3)
    by = set(re.findall(r"\{\{(\w+)\.name\}\}", monitor["message"]))
    grouped = {tag for found in re.findall(r"by \{([^}]*)\}|by\(\"([^\"]*)\"\)", monitor["query"]) for tag in found}
    assert by <= {tag for tags in grouped for tag in tags.split(",")}


def test_every_alert_has_a_monitor() -> None:
    assert {monitor["name"].split(":")[0] for monitor in MONITORS.values()} == ALERTS.keys()


def test_terraform_has_the_variables_of_the_texts() -> None:
    text = (DATADOG / "main.tf").read_text()
    texts = (*MONITORS.values(), *OBJECTIVES.values())
    named = {name for monitor in texts for name in re.findall(r"\$\{(\w+)\}", json.dumps(monitor))}
    (block,) = re.findall(r"texts = \{\n(.*?)\n  \}", text, re.DOTALL)

    assert named == set(re.findall(r"^ *(\w+) +=", block, re.MULTILINE))
    read = re.findall(r'"\$\{path\.module\}/([\w.-]+)"', text)
    assert {"dashboard.json", "distributions.json", "log-pipeline.json"} == {name for name in read if "." in name}
    types = {processor["type"].replace("-", "_") for processor in PIPELINE["processors"]}
    assert types == set(re.findall(r'dynamic "(\w+_(?:remapper|processor))"', text))


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_every_objective_divides_counts_that_exist(objective: Any) -> None:
    good, every = (queries(in_production(objective["query"][part])) for part in ("numerator", "denominator"))

    for asked in (*good, *every):
        check(asked)
        assert ("env", ("production",)) in asked.scope
        assert asked.functions == ("as_count",)
    assert set(every[0].scope) <= set(good[0].scope)


def test_the_limit_of_latency_is_a_bucket() -> None:
    """Datadog counts the values below a bucket's bound exactly, and those between two bounds approximately."""
    assert SLOW_S in _SECONDS
    assert f'le="{SLOW_S}"' in str(rules())
    assert f"v<={SLOW_S}" in OBJECTIVES["latency"]["query"]["numerator"]


def test_every_distribution_has_its_tags() -> None:
    written = json.loads((DATADOG / "distributions.json").read_text())
    known = {name: set(metric.tags) for name, metric in known_metrics().items() if metric.kind == "distribution"}

    assert {name: set(tags) for name, tags in written.items()} == known


def test_the_settings_of_the_agent_are_those_of_the_names() -> None:
    (instance,) = read_yaml(DATADOG / "conf.d" / "openmetrics.d" / "conf.yaml")["instances"]

    assert (instance["namespace"], instance["raw_metric_prefix"]) == (NAMESPACE, PREFIX)
    assert instance["rename_labels"] == RENAMED_LABELS
    assert {tag.split(":")[0] for tag in instance["tags"]} <= AGENT_TAGS


def test_the_check_of_the_replicas_is_that_of_the_gateway_but_for_their_instance() -> None:
    folder = DATADOG / "conf.d" / "openmetrics.d"
    (gateway,), (replicas,) = (read_yaml(folder / name)["instances"] for name in ("conf.yaml", "replicas.yaml"))
    changed = {name for name in gateway.keys() | replicas.keys() if gateway.get(name) != replicas.get(name)}

    assert replicas["openmetrics_endpoint"] == f"{gateway['openmetrics_endpoint']}/replicas"
    assert replicas["rename_labels"] == {**RENAMED_LABELS, LABEL: "instance"}
    assert [tag for tag in gateway["tags"] if tag not in replicas["tags"]] == [gateway["tags"][-1]]
    assert gateway["tags"][-1].startswith("instance:")
    expected = {"openmetrics_endpoint", "rename_labels", "tags", "max_returned_metrics", "enable_health_service_check"}
    assert changed == expected


@pytest.mark.parametrize(
    "query",
    [
        "sum:embedding_gateway.made_up.count{model:a}.as_count()",
        "sum:embedding_gateway.texts.count{shape:red}.as_count()",
        "sum:embedding_gateway.texts.count{model:a} by {shape}.as_count()",
        "sum:embedding_gateway.texts.count{model:a}",
        "avg:embedding_gateway.texts.count{model:a}.as_count()",
        "sum:embedding_gateway.queue_texts{model:a}.as_count()",
        "p95:embedding_gateway.queue_texts{model:a}",
        "count(v: v<=2.5):embedding_gateway.queue_texts{model:a}.as_count()",
    ],
)
def test_a_query_for_a_missing_metric_would_be_found(query: str) -> None:
    (asked,) = queries(query)

    with pytest.raises(NotAQuery):
        check(asked)


@pytest.mark.parametrize(
    "expression",
    [
        "sum:a.b{model:a AND !model:b}",
        "sum:a.b{model:a,model:b}",
        "total:a.b{model:a}",
        "derivative(sum:a.b{model:a})",
        "sum:a.b{model:a} / ",
        "sum:a.b{model:a",
    ],
)
def test_an_invalid_query_would_be_found(expression: str) -> None:
    with pytest.raises(NotAQuery):
        queries(expression)


@pytest.mark.parametrize("query", ["avg(last_5x):sum:a{b:c} > 1", "sum:a{b:c} > 1", "avg(last_8d):sum:a{b:c} > 1"])
def test_an_invalid_condition_would_be_found(query: str) -> None:
    with pytest.raises(NotAQuery):
        condition(query)


def test_the_metrics_of_a_query_are_found() -> None:
    (first, second) = queries(
        "1 - default_zero(count(v: v<=2.5):a.b{$env AND NOT c:d*}) / p99.9:e{f IN (g,h)} by {i,j}.as_rate()"
    )

    assert first == Asked("count(v: v<=2.5)", "a.b", (("c", ("d*",)),), (), (), frozenset({"env"}))
    assert second == Asked("p99.9", "e", (("f", ("g", "h")),), ("i", "j"), ("as_rate",), frozenset())


def test_the_status_of_a_response_is_not_a_severity() -> None:
    """Datadog interprets an attribute `status` as the severity, and 200 as an emergency, so it is removed first."""
    first, second, *_ = PIPELINE["processors"]

    assert (first["sources"], first["preserve_source"]) == (["status"], False)
    assert (second["type"], second["sources"]) == ("status-remapper", ["level"])


def test_a_name_is_that_of_the_agent() -> None:
    assert datadog_metric("gateway_texts_total") == "embedding_gateway.texts.count"
    assert datadog_metric("gateway_batch_tokens_sum") == "embedding_gateway.batch_tokens.sum"
    assert datadog_metric("gateway_queue_texts") == "embedding_gateway.queue_texts"


def test_numbers_of_gauges_are_the_newest() -> None:
    """Not the mean over three hours."""
    numbers = {
        panel.title
        for row in ROWS
        for panel in row.panels
        if panel.kind == "number" and isinstance(panel.series[0].expression, Level)
    }
    widgets = [inner["definition"] for group in DASHBOARD["widgets"] for inner in group["definition"]["widgets"]]
    found = {
        widget["title"]: query["aggregator"]
        for widget in widgets
        for request in widget.get("requests", [])
        if request.get("response_format") == "scalar"
        for query in request["queries"]
    }

    assert {found[title] for title in numbers} == {"last"}


# ------------------------------------------------------------------------------------------------- the Agent, in containers


def checks_of(text: str) -> Any:
    """Return the instances of the Agent's check in a label or an annotation."""
    return json.loads(text)["openmetrics"]["instances"]


def same_settings(instance: Any, file: str = "conf.yaml") -> bool:
    """Return whether an instance is that of a file, but for its address and its tags."""
    (ours,) = read_yaml(DATADOG / "conf.d" / "openmetrics.d" / file)["instances"]
    apart = {"openmetrics_endpoint", "tags"}
    return {name: value for name, value in instance.items() if name not in apart} == {
        name: value for name, value in ours.items() if name not in apart
    }


def test_compose_has_the_agent_read_the_gateway() -> None:
    services = read_yaml(DEPLOY / "compose" / "compose.datadog.yaml")["services"]
    labels, agent = services["gateway"]["labels"], services["datadog-agent"]
    instance, of_replicas = checks_of(labels["com.datadoghq.ad.checks"].replace("$$", "$"))
    address = f"http://%%host%%:{load_settings(image_environ()).admin_port}/metrics"

    assert same_settings(instance)
    assert same_settings(of_replicas, "replicas.yaml")
    assert (instance["openmetrics_endpoint"], of_replicas["openmetrics_endpoint"]) == (address, f"{address}/replicas")
    assert "tags" not in of_replicas  # the label `replica` becomes `instance`
    assert [tag.split(":")[0] for tag in instance["tags"]] == ["instance"]
    (log,) = json.loads(labels["com.datadoghq.ad.logs"])
    assert f"source:{log['source']}" == PIPELINE["filter"]["query"]
    assert log["service"] == labels["com.datadoghq.tags.service"] == SERVICE
    assert labels["com.datadoghq.tags.version"] == __version__
    otlp = agent["environment"]["DD_OTLP_CONFIG_RECEIVER_PROTOCOLS_HTTP_ENDPOINT"].rsplit(":")[1]
    assert services["gateway"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"] == f"http://datadog-agent:{otlp}"
    assert "ports" not in agent


@pytest.mark.skipif(shutil.which("terraform") is None, reason="terraform is not installed")
@pytest.mark.parametrize(("change", "code"), [("", 0), ("  a=1", 3)])
def test_terraform_finds_its_own_format(tmp_path: Path, change: str, code: int) -> None:
    (tmp_path / "main.tf").write_text((DATADOG / "main.tf").read_text() + change)
    done = subprocess.run(
        ["terraform", "fmt", "-check", tmp_path],
        check=False,
        capture_output=True,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        timeout=30,
    )

    assert (done.returncode == 0) == (code == 0)

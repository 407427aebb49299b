"""deploy/kubernetes/overlays/ray: fronts and a RayCluster, alone and with all of its components."""

from __future__ import annotations

import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient

from gateway.app import create_admin_app
from gateway.cluster.placing import actor_options, make_spec
from gateway.cluster.replica import LOADING_FOLDER
from gateway.config.registry import load_registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from tests.deploy.deployment_files import DEPLOY, KUBERNETES, ROOT, kustomize, read_yaml
from tests.deploy.test_datadog import checks_of, same_settings
from tests.deploy.test_kubernetes import (
    RAY_COMPONENTS,
    VERSIONS,
    Object,
    config_map,
    container,
    copied,
    objects,
    of_kind,
    only,
    pod,
    problems_of,
    resolves_names_anywhere,
    settings_of,
)
from tests.peers import find_module

EACH = pytest.mark.parametrize("overlay", ["ray", "ray+"])
"""As it is, and with all of its components."""


def ray_pods(overlay: str = "ray") -> list[Object]:
    spec = only(overlay, "RayCluster")["spec"]
    return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]


@EACH
@VERSIONS
def test_every_object_of_ray_is_valid(overlay: str, version: str) -> None:
    assert [problem for item in objects(overlay) for problem in problems_of(item, version)] == []
    # Its schema refers to Kubernetes' own for pods.
    for template in ray_pods(overlay):
        pod_object = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template["metadata"]}}
        assert problems_of({**pod_object, "spec": template["spec"]}, version) == []


def test_fronts_and_replicas_are_nodes_of_one_cluster_and_of_one_image() -> None:
    front = container("ray")
    (command,) = front["args"]
    [name] = [variable["value"] for variable in front["env"] if variable["name"] == "RAY_CLUSTER"]

    assert settings_of("ray").cluster == "auto"
    assert name == only("ray", "RayCluster")["metadata"]["name"]
    assert "--address=$RAY_CLUSTER-head-svc:6379" in command  # the name that KubeRay gives to its Service
    assert "--num-cpus=0" in command
    assert command.endswith("exec gateway serve")  # which gets the signals
    assert {c["image"] for template in ray_pods() for c in template["spec"]["containers"]} == {front["image"]}
    keys = [
        {v["name"]: v for v in c["env"] if v["name"].startswith("RAY_AUTH_")}
        for c in (front, *(c for template in ray_pods() for c in template["spec"]["containers"]))
    ]
    assert all(key == keys[0] for key in keys)
    assert keys[0]["RAY_AUTH_MODE"]["value"] == "token"
    locked = re.search(r"^ray==(\S+)", (ROOT / "requirements" / "dev.lock").read_text(), re.MULTILINE)
    assert locked
    assert only("ray", "RayCluster")["spec"]["rayVersion"] == locked[1]


def test_the_nodes_of_ray_reach_each_other_and_keep_to_the_restricted_standard() -> None:
    (policy,) = [item for item in of_kind("ray", "NetworkPolicy") if item["metadata"]["name"].endswith("-ray")]
    assert resolves_names_anywhere(policy)
    wanted = policy["spec"]["podSelector"]["matchLabels"].items()
    service = of_kind("ray", "Service")[0]["spec"]["selector"].items()

    for template in (pod("ray"), *ray_pods()):
        assert wanted <= template["metadata"]["labels"].items()
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        assert template["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for part in template["spec"]["containers"]:
            assert part["securityContext"]["allowPrivilegeEscalation"] is False
            assert part["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    # Clients reach only fronts.
    assert [t for t in ray_pods() if service <= t["metadata"]["labels"].items()] == []


def test_fronts_join_the_cluster_of_another_name_and_can_be_applied_after_it(tmp_path: Path) -> None:
    """As in an upgrade: KubeRay keeps the pods of a changed RayCluster, so there are two for a while."""
    folder = copied(tmp_path, "ray", [])
    file = folder / "raycluster.yaml"
    file.write_text(file.read_text().replace("  name: embedding-gateway-ray\nspec:", "  name: gateway-ray-2\nspec:"))
    found = kustomize(folder)
    [cluster] = [item for item in found if item["kind"] == "RayCluster"]
    fronts = [
        item for item in found if item["metadata"].get("labels", {}).get("app.kubernetes.io/component") == "front"
    ]
    [front] = fronts[0]["spec"]["template"]["spec"]["containers"]

    assert cluster["metadata"]["name"] == "gateway-ray-2"
    assert {"name": "RAY_CLUSTER", "value": "gateway-ray-2"} in front["env"]
    assert [item["kind"] for item in fronts] == ["Deployment"]
    assert "component" not in str(fronts[0]["spec"]["selector"])  # which cannot be changed
    assert "--selector 'app.kubernetes.io/component!=front'" in (DEPLOY / "README.md").read_text()


def test_one_worker_stays_while_nodes_are_drained() -> None:
    budgets = {item["metadata"]["name"]: item["spec"] for item in of_kind("ray", "PodDisruptionBudget")}
    budget = budgets["embedding-gateway-ray-workers"]
    wanted = budget["selector"]["matchLabels"].items()
    [workers] = only("ray", "RayCluster")["spec"]["workerGroupSpecs"]

    assert [wanted <= node["metadata"]["labels"].items() for node in (pod("ray"), *ray_pods())] == [False, False, True]
    # Kubernetes ignores a share, or `maxUnavailable`, for pods of a controller that it does not know.
    assert budget["minAvailable"] == workers["minReplicas"] - 1
    assert "maxUnavailable" not in budget


def test_every_component_is_rendered_with_the_others() -> None:
    listed = re.findall(r"components/([\w-]+) ", (KUBERNETES / "overlays" / "ray" / "kustomization.yaml").read_text())

    assert sorted(listed) == sorted(RAY_COMPONENTS)
    added = {item["kind"] for item in objects("ray+")} - {item["kind"] for item in objects("ray")}
    assert added == {"PrometheusRule", "ScrapeConfig", "ServiceMonitor"}
    names = [(item["kind"], item["metadata"]["name"]) for item in objects("ray+")]
    assert len(names) == len(set(names))


# ------------------------------------------------------------------------------------------------------------- the workers


def selected(policy: Object, labels: dict[str, str]) -> bool:
    """Return whether a NetworkPolicy is about the pods with these labels."""
    return policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


def test_workers_download_models_as_the_fronts_would() -> None:
    front = container("ray")
    [worker] = [part for template in ray_pods()[1:] for part in template["spec"]["containers"]]
    environ = {variable["name"]: variable for variable in worker["env"]}

    assert worker["envFrom"] == front["envFrom"]
    assert worker["envFrom"][0]["configMapRef"]["name"] == config_map("ray", "settings")["metadata"]["name"]
    [login] = [variable for variable in front["env"] if variable["name"] == "HF_TOKEN"]
    assert environ["HF_TOKEN"] == login
    # The operator's key is for fronts.
    assert "GATEWAY_ADMIN_KEY" not in environ


def test_the_log_of_the_replicas_is_that_of_their_container() -> None:
    """Otherwise, Ray writes it to files in the pod, which end with it."""
    for template in ray_pods():
        [part] = template["spec"]["containers"]
        assert {"name": "RAY_LOG_TO_STDERR", "value": "1"} in part["env"]


def test_the_probe_of_a_node_ignores_a_proxy_and_a_worker_is_not_ready_while_a_model_loads(tmp_path: Path) -> None:
    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/local_raylet_healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    commands = {
        tuple(part[probe]["exec"]["command"])
        for template in ray_pods()
        for part in template["spec"]["containers"]
        for probe in ("livenessProbe", "readinessProbe")
    }
    loads = str(LOADING_FOLDER)
    [(python, flag, code)] = {command for command in commands if loads not in command[2]}
    [readiness] = [command[2].replace(loads, str(tmp_path)) for command in commands if loads in command[2]]
    environ = {**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = str(server.server_port)

        def run(code: str) -> tuple[int, str]:
            command = [sys.executable, flag, code.replace("52365", port)]
            done = subprocess.run(command, check=False, capture_output=True, text=True, env=environ, timeout=30)
            return done.returncode, done.stderr

        assert (python, run(code)) == ("python", (0, ""))
        assert run(readiness) == (0, "")
        (tmp_path / "4000001").touch()  # of a process that was killed while it loaded
        assert run(readiness) == (0, "")
        (tmp_path / str(os.getpid())).touch()
        assert run(readiness) == (1, "a model is loading\n")
        server.shutdown()


def test_every_node_of_ray_reaches_what_egress_lets_a_front_reach() -> None:
    [egress] = [item for item in of_kind("ray+", "NetworkPolicy") if item["metadata"]["name"].endswith("-egress")]
    nodes = [pod("ray+"), *ray_pods("ray+")]

    assert [selected(egress, node["metadata"]["labels"]) for node in nodes] == [True, True, True]
    ports = {port["port"] for rule in egress["spec"]["egress"] for port in rule["ports"]}
    assert {6379, 3128} <= ports  # Redis for the head's state, a proxy for downloads
    [state] = re.findall(r"redisAddress: \w+\.(\w+):(\d+)", (KUBERNETES / "overlays/ray/raycluster.yaml").read_text())
    assert state in {
        (rule["to"][0]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"], str(port["port"]))
        for rule in egress["spec"]["egress"]
        for port in rule["ports"]
        if "namespaceSelector" in rule["to"][0]
    }


def test_components_for_metrics_reach_fronts_and_no_other_node() -> None:
    front, *others = (node["metadata"]["labels"] for node in (pod("ray+"), *ray_pods("ray+")))
    lets_in = [
        policy
        for policy in of_kind("ray+", "NetworkPolicy")
        if "admin" in {port["port"] for rule in policy["spec"].get("ingress", []) for port in rule.get("ports", [])}
    ]

    assert len(lets_in) == 2  # base's for Prometheus, datadog's
    assert all(selected(policy, front) for policy in lets_in)
    assert [labels for policy in lets_in for labels in others if selected(policy, labels)] == []


def test_the_models_have_replicas_that_fit_on_the_workers(tmp_path: Path) -> None:
    ours, theirs = (yaml.safe_load(config_map(name, "models")["data"]["models.yaml"]) for name in ("ray", "gpu"))
    file = tmp_path / "models.yaml"
    file.write_text(yaml.safe_dump(ours))
    loaded = [entry for entry in load_registry(file, {}).models if entry.enabled is True]
    [workers] = only("ray", "RayCluster")["spec"]["workerGroupSpecs"]
    resources = workers["template"]["spec"]["containers"][0]["resources"]
    replicas = [entry.replicas for entry in loaded]

    for model in ours["models"]:
        assert model.pop("replicas").keys() == {"min", "gpus", "per_node"}
    for models in (ours, theirs):
        for model in models["models"]:
            del model["enabled"]
    assert ours == theirs  # but for where they run
    assert len(loaded) == 2
    assert [(one.min, one.per_node) for one in replicas if one] == [(2, 1), (2, 1)]
    assert sum(one.min * (one.gpus or 0) for one in replicas if one) == (
        workers["minReplicas"] * int(resources["limits"]["nvidia.com/gpu"])
    )


def test_a_model_on_cards_does_not_depend_on_whether_the_workers_started_first(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(config_map("ray", "models")["data"]["models.yaml"])
    for entry in load_registry(file, {}).models:
        before, after = (
            make_spec(without_files(entry), Settings(), has_cards=has_cards) for has_cards in (False, True)
        )
        assert before == after


def without_files(entry: Any) -> Any:
    """Return an entry without its golden vectors, which are in the image."""
    return entry.model_copy(update={"golden": None})


# --------------------------------------------------------------------------------------------------------- its autoscaling


def test_rays_own_autoscaler_finds_room_for_every_replica(tmp_path: Path) -> None:
    config_of = find_module("ray.autoscaler._private.kuberay.autoscaling_config")
    cluster = only("ray+", "RayCluster")
    config = config_of._derive_autoscaling_config_from_ray_cr(cluster)
    workers = config["available_node_types"]["gpu"]
    file = tmp_path / "models.yaml"
    file.write_text(config_map("ray+", "models")["data"]["models.yaml"])

    assert (workers["min_workers"], workers["max_workers"]) == (2, 4)
    assert (workers["resources"]["CPU"], workers["resources"]["GPU"]) == (4, 1)
    assert config["available_node_types"]["headgroup"]["resources"]["CPU"] == 0
    assert config["idle_timeout_minutes"] == 5.0
    for entry in load_registry(file, {}).models:
        wanted = actor_options(make_spec(without_files(entry), Settings(), has_cards=True))
        assert wanted["num_gpus"] <= workers["resources"]["GPU"]
        assert wanted["num_cpus"] <= workers["resources"]["CPU"]


def test_the_autoscaler_may_ask_kubernetes_and_ray_and_nothing_else_may() -> None:
    spec = only("ray+", "RayCluster")["spec"]
    head, *workers = (template["spec"] for template in ray_pods("ray+"))
    keys = [one for one in head["containers"][0]["env"] if one["name"].startswith("RAY_AUTH_")]
    [policy] = [item for item in of_kind("ray+", "NetworkPolicy") if item["metadata"]["name"].endswith("-autoscaling")]
    labels = [{**template["metadata"]["labels"]} for template in ray_pods("ray+")]
    labels[0]["ray.io/node-type"] = "head"  # by KubeRay

    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["env"] == keys
    assert spec["autoscalerOptions"]["securityContext"] == head["containers"][0]["securityContext"]
    assert [head["automountServiceAccountToken"], *(one["automountServiceAccountToken"] for one in workers)] == [
        True,
        False,
    ]
    assert [selected(policy, one) for one in labels] == [True, False]
    # Without the component, the head has no token, and the number of workers is fixed.
    assert ray_pods("ray")[0]["spec"]["automountServiceAccountToken"] is False
    assert "enableInTreeAutoscaling" not in only("ray", "RayCluster")["spec"]


# ------------------------------------------------------------------------------------------------- the metrics of replicas


def replica_metrics(folder: Path) -> Object:
    """Return the ScrapeConfig of the replicas."""
    (found,) = [
        item for item in kustomize(copied(folder, "ray", ["replica-metrics"])) if item["kind"] == "ScrapeConfig"
    ]
    return found


def test_the_metrics_of_replicas_are_scraped_once_through_the_service_of_the_fronts(
    tmp_path: Path, make_model: Callable[..., Any], make_fleet: Callable[..., Any]
) -> None:
    found = replica_metrics(tmp_path)
    spec = found["spec"]
    [config] = spec["staticConfigs"]
    [admin] = [item for item in of_kind("ray", "Service") if item["metadata"]["name"].endswith("-admin")]
    port = admin["spec"]["ports"][0]["port"]
    registry, fleet = make_fleet(make_model())
    client = TestClient(create_admin_app(Deployment(registry, Settings(), fleet)))

    assert problems_of(found, VERSIONS.args[1][0]) == []
    assert config["targets"] == [f"{admin['metadata']['name']}.{admin['metadata']['namespace']}.svc:{port}"]
    assert client.get(spec["metricsPath"]).status_code == 200
    # No pod is asked for them one by one.
    component = KUBERNETES / "components" / "monitoring" / "servicemonitor.yaml"
    assert spec["metricsPath"] not in {endpoint["path"] for endpoint in read_yaml(component)["spec"]["endpoints"]}


def test_prometheus_and_its_operator_scrape_replicas_in_the_same_way(tmp_path: Path) -> None:
    spec = replica_metrics(tmp_path)["spec"]
    jobs = {job["job_name"]: job for job in read_yaml(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"]}
    replicas = jobs["gateway-replicas"]
    [target] = [target for config in replicas["static_configs"] for target in config["targets"]]
    relabeled = [
        {"sourceLabels": rule["source_labels"], "regex": rule["regex"], "targetLabel": rule["target_label"]}
        for rule in replicas["metric_relabel_configs"]
    ]

    assert spec["metricsPath"] == replicas["metrics_path"]
    assert spec["relabelings"] == [{"targetLabel": "job", "replacement": replicas["job_name"]}]
    assert spec["metricRelabelings"] == relabeled
    assert target in {target for config in jobs["gateway"]["static_configs"] for target in config["targets"]}


def test_datadog_reads_the_metrics_of_replicas_once_as_prometheus_does(tmp_path: Path) -> None:
    found = kustomize(copied(tmp_path / "datadog", "ray", ["datadog", "datadog-replicas"]))
    (service,) = [item for item in found if item["kind"] == "Service" and item["metadata"]["name"].endswith("-admin")]
    (deployment,) = [item for item in found if item["kind"] == "Deployment"]
    (instance,) = checks_of(service["metadata"]["annotations"]["ad.datadoghq.com/service.checks"])
    scraped = replica_metrics(tmp_path / "prometheus")["spec"]
    [target] = scraped["staticConfigs"][0]["targets"]
    # Annotations of pods are a check for each pod.
    of_pods = checks_of(deployment["spec"]["template"]["metadata"]["annotations"]["ad.datadoghq.com/gateway.checks"])

    assert [problem for item in found for problem in problems_of(item, "1.30")] == []
    assert same_settings(instance, "replicas.yaml")
    assert instance["openmetrics_endpoint"] == f"http://{target}{scraped['metricsPath']}"
    assert [one for one in of_pods if one["openmetrics_endpoint"].endswith("/replicas")] == []
    # Tags of a pod, and of a Service.
    (cluster,) = [item for item in found if item["kind"] == "RayCluster"]
    [worker] = [group["template"] for group in cluster["spec"]["workerGroupSpecs"]]
    tags, *others = (
        {name: tag for name, tag in labeled["metadata"]["labels"].items() if name.startswith("tags.")}
        for labeled in (service, deployment, worker)
    )
    assert others == [tags, tags]
    assert len(tags) == 3
    # The log of the replicas, as that of the fronts.
    (container_name,) = [part["name"] for part in worker["spec"]["containers"]]
    front = deployment["spec"]["template"]["metadata"]["annotations"]["ad.datadoghq.com/gateway.logs"]
    assert worker["metadata"]["annotations"] == {f"ad.datadoghq.com/{container_name}.logs": front}

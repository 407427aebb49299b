"""deploy/kubernetes: the output of kustomize is valid, restricted, and consistent with the image and the settings."""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from fastapi.testclient import TestClient

from gateway import __version__
from gateway.app import create_admin_app
from gateway.config.api_keys import load_key_file
from gateway.config.registry import load_registry
from gateway.config.settings import Settings, load_settings
from gateway.deployment import Deployment
from gateway.telemetry.metrics import render
from tests.deploy.custom_resources import SCHEMAS
from tests.deploy.deployment_files import (
    DEPLOY,
    DOCKERFILE,
    KUBERNETES,
    ROOT,
    image_environ,
    kustomize,
    last_stage,
    read_yaml,
)
from tests.deploy.test_datadog import checks_of, same_settings
from tests.telemetry.observed import rules as prometheus_rules

COMPONENTS = ["autoscaling", "monitoring", "datadog", "egress"]
"""The optional lines of an overlay, as comments."""
RAY_COMPONENTS = ["monitoring", "replica-metrics", "datadog", "datadog-replicas", "egress", "ray-autoscaling"]
"""Those of overlays/ray."""
OVERLAYS = pytest.mark.parametrize("overlay", ["gpu", "cpu", "gpu+", "cpu+"])
"""As they are, and with all of their components."""
WITH_COMPONENTS = pytest.mark.parametrize("overlay", ["gpu+", "cpu+"])
VERSIONS = pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
"""The oldest and the newest Kubernetes that the objects are checked against."""

RULES = DEPLOY / "prometheus" / "rules.yml"
RELEASE_S = 20
"""The seconds that a pod has left to release the models after its requests have ended, as in deployment.yaml."""

Object = dict[str, Any]


@cache
def objects(overlay: str) -> list[Object]:
    """Return the objects of an overlay, with ``+`` those of its components too. They are shared: to change one, copy it."""
    if not overlay.endswith("+"):
        return kustomize(KUBERNETES / "overlays" / overlay)
    with tempfile.TemporaryDirectory() as folder:
        components = RAY_COMPONENTS if overlay == "ray+" else COMPONENTS
        return kustomize(copied(Path(folder), overlay.removesuffix("+"), components))


def copied(folder: Path, overlay: str, components: list[str]) -> Path:
    """Copy everything, take the comment away from some components of an overlay, and return its folder."""
    shutil.copytree(KUBERNETES, folder / "kubernetes")
    file = folder / "kubernetes" / "overlays" / overlay / "kustomization.yaml"
    text = re.sub(
        rf"^# (components:|  - \.\./\.\./components/({'|'.join(components)})(?=\s))",
        r"\1",
        file.read_text(),
        flags=re.MULTILINE,
    )
    file.write_text(text)
    return file.parent


def of_kind(overlay: str, kind: str) -> list[Object]:
    return [item for item in objects(overlay) if item["kind"] == kind]


def only(overlay: str, kind: str) -> Object:
    (found,) = of_kind(overlay, kind)
    return found


def pod(overlay: str) -> Object:
    return only(overlay, "Deployment")["spec"]["template"]


def container(overlay: str) -> Object:
    (found,) = pod(overlay)["spec"]["containers"]
    return found


def config_map(overlay: str, start: str) -> Object:
    (found,) = [item for item in of_kind(overlay, "ConfigMap") if item["metadata"]["name"].startswith(start)]
    return found


def settings_of(overlay: str) -> Settings:
    """Return the settings of the gateway in the pod: the image's, with those of the ConfigMap."""
    return load_settings({**image_environ(), **config_map(overlay, "settings")["data"]})


def mount_points(overlay: str) -> dict[str, str]:
    """Return where each volume is."""
    return {mount["name"]: mount["mountPath"] for mount in container(overlay)["volumeMounts"]}


def volume(overlay: str, name: str) -> Object:
    (found,) = [item for item in pod(overlay)["spec"]["volumes"] if item["name"] == name]
    return found


def base_policy(overlay: str) -> Object:
    """Return the policy that is there without any component."""
    (found,) = [item for item in of_kind(overlay, "NetworkPolicy") if item["metadata"]["name"] == "embedding-gateway"]
    return found


def problems_of(item: Object, version: str) -> list[str]:
    """Return the violations of its kind's schema in an object."""
    try:
        if item["kind"] in SCHEMAS:
            jsonschema.validate(item, SCHEMAS[item["kind"]])
        else:
            kubernetes_validate.validate(item, version, strict=True)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
        return [str(error)]
    return []


@OVERLAYS
@VERSIONS
def test_every_object_is_valid(overlay: str, version: str) -> None:
    assert len(objects(overlay)) >= (13 if overlay.endswith("+") else 9)
    assert [problem for item in objects(overlay) for problem in problems_of(item, version)] == []


@VERSIONS
@pytest.mark.parametrize("kind", ["Deployment", "Service", "ScaledObject", "ServiceMonitor", "PrometheusRule"])
def test_a_field_that_does_not_exist_would_be_found(kind: str, version: str) -> None:
    item = copy.deepcopy(of_kind("gpu+", kind)[0])
    item["spec"]["replicaz"] = 1

    assert len(problems_of(item, version)) == 1


@pytest.mark.parametrize(
    ("component", "kinds"),
    [
        ("autoscaling", ["ScaledObject"]),
        ("monitoring", ["PrometheusRule", "ServiceMonitor"]),
        ("datadog", ["NetworkPolicy"]),
        ("egress", ["NetworkPolicy"]),
    ],
)
def test_a_component_adds_its_objects(component: str, kinds: list[str], tmp_path: Path) -> None:
    found = kustomize(copied(tmp_path, "gpu", [component]))
    without = Counter(item["kind"] for item in objects("gpu"))

    assert sorted((Counter(item["kind"] for item in found) - without).elements()) == kinds


def test_a_cluster_needs_nothing_but_kubernetes() -> None:
    groups = {item["apiVersion"] for name in ("gpu", "cpu") for item in objects(name)}

    assert groups == {"v1", "apps/v1", "policy/v1", "networking.k8s.io/v1"}


@OVERLAYS
def test_all_is_in_the_one_namespace_which_is_restricted(overlay: str) -> None:
    namespace = only(overlay, "Namespace")

    assert {item["metadata"].get("namespace") for item in objects(overlay) if item is not namespace} == {
        namespace["metadata"]["name"]
    }
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@OVERLAYS
def test_the_pod_keeps_to_the_restricted_standard_and_writes_to_volumes_alone(overlay: str) -> None:
    spec = pod(overlay)["spec"]
    user = {"runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "seccompProfile": {"type": "RuntimeDefault"}}

    assert user.items() <= spec["securityContext"].items()
    assert last_stage(DOCKERFILE)["USER"][-1].value == "{runAsUser}:{runAsGroup}".format(**user)
    assert container(overlay)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    assert [item for item in spec["volumes"] if "hostPath" in item] == []
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    written = {mount["mountPath"] for mount in container(overlay)["volumeMounts"] if not mount.get("readOnly")}
    assert written == {"/tmp", *(volume.value for volume in last_stage(DOCKERFILE)["VOLUME"])}  # noqa: S108


@OVERLAYS
def test_every_selector_finds_the_pod(overlay: str) -> None:
    labels = pod(overlay)["metadata"]["labels"].items()
    deployment = only(overlay, "Deployment")
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        only(overlay, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        *(policy["spec"]["podSelector"]["matchLabels"] for policy in of_kind(overlay, "NetworkPolicy")),
        *(item["labelSelector"]["matchLabels"] for item in pod(overlay)["spec"]["topologySpreadConstraints"]),
        *(service["spec"]["selector"] for service in of_kind(overlay, "Service")),
    ]

    assert [selector for selector in selectors if not selector or not selector.items() <= labels] == []
    scaled = [item["spec"]["scaleTargetRef"]["name"] for item in of_kind(overlay, "ScaledObject")]
    assert set(scaled) <= {deployment["metadata"]["name"]}
    assert pod(overlay)["spec"]["serviceAccountName"] == only(overlay, "ServiceAccount")["metadata"]["name"]


@OVERLAYS
def test_ports_are_those_of_the_settings(overlay: str) -> None:
    settings = settings_of(overlay)
    by_name = {"http": settings.port, "admin": settings.admin_port}
    services = [port for service in of_kind(overlay, "Service") for port in service["spec"]["ports"]]
    policy = base_policy(overlay)["spec"]["ingress"]

    assert by_name == {"http": 8000, "admin": 9000}
    assert settings.host == "0.0.0.0"  # noqa: S104
    assert {port["name"]: port["containerPort"] for port in container(overlay)["ports"]} == by_name
    assert {port["targetPort"]: port["port"] for port in services} == by_name
    assert {port["port"] for rule in policy for port in rule["ports"]} == set(by_name)


def resolves_names_anywhere(policy: Object) -> bool:
    """Return whether pods may ask any address for names: a cache on the node has none that a selector of pods matches."""
    anywhere = [rule for rule in policy["spec"]["egress"] if "to" not in rule]
    ports = {(port["port"], port.get("protocol", "TCP")) for rule in anywhere for port in rule["ports"]}
    return {(53, "UDP"), (53, "TCP")} <= ports


@OVERLAYS
def test_names_may_be_resolved_by_a_cache_on_the_node(overlay: str) -> None:
    assert resolves_names_anywhere(base_policy(overlay))


@OVERLAYS
def test_clients_cannot_reach_the_operators_port_through_their_service(overlay: str) -> None:
    ports = {
        item["metadata"]["name"]: [p["name"] for p in item["spec"]["ports"]] for item in of_kind(overlay, "Service")
    }

    assert ports == {"embedding-gateway": ["http"], "embedding-gateway-admin": ["admin"]}


@WITH_COMPONENTS
def test_prometheus_finds_the_operators_service_alone(overlay: str) -> None:
    spec = only(overlay, "ServiceMonitor")["spec"]
    wanted = spec["selector"]["matchLabels"].items()
    found = [item for item in of_kind(overlay, "Service") if wanted <= item["metadata"]["labels"].items()]

    assert [item["metadata"]["name"] for item in found] == ["embedding-gateway-admin"]
    assert {port["name"] for port in found[0]["spec"]["ports"]} == {endpoint["port"] for endpoint in spec["endpoints"]}
    # Rules and dashboard ask for the job `gateway`.
    relabeled = {rule["targetLabel"]: rule.get("replacement") for e in spec["endpoints"] for rule in e["relabelings"]}
    asked = set(re.findall(r'job="(\w+)"', str(prometheus_rules())))
    assert asked == {relabeled["job"]}


@WITH_COMPONENTS
def test_the_operator_has_the_rules_of_prometheus(overlay: str) -> None:
    ours, theirs = (
        " ".join(json.dumps(groups, sort_keys=True).replace("\\n", " ").split())
        for groups in (only(overlay, "PrometheusRule")["spec"]["groups"], read_yaml(RULES)["groups"])
    )

    assert ours == theirs  # but for spaces in expressions, which kustomize writes differently


@OVERLAYS
def test_probes_and_scrapes_are_answered_on_the_operators_port(
    overlay: str, make_model: Callable[..., Any], make_fleet: Callable[..., Any]
) -> None:
    probes = [container(overlay)[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")]
    monitors = of_kind(overlay, "ServiceMonitor")
    scraped = [endpoint["path"] for monitor in monitors for endpoint in monitor["spec"]["endpoints"]]
    registry, fleet = make_fleet(make_model())
    fleet.started.set()
    client = TestClient(create_admin_app(Deployment(registry, Settings(), fleet)))

    assert [probe["path"] for probe in probes] == ["/health/startup", "/health/live", "/health/ready"]
    assert {probe["port"] for probe in probes} == {"admin"}
    paths = [*(probe["path"] for probe in probes), *scraped]
    assert [(path, client.get(path).status_code) for path in paths] == [(path, 200) for path in paths]


@OVERLAYS
def test_a_pod_has_time_to_answer_and_to_end(overlay: str) -> None:
    settings, spec = settings_of(overlay), pod(overlay)["spec"]

    # Endpoints learn of a deletion when the pod does; the gateway keeps answering until they have.
    assert settings.drain_delay_s >= 5
    assert spec["terminationGracePeriodSeconds"] == settings.drain_delay_s + settings.shutdown_grace_s + RELEASE_S
    startup = container(overlay)["startupProbe"]
    assert only(overlay, "Deployment")["spec"]["progressDeadlineSeconds"] > (
        startup["periodSeconds"] * startup["failureThreshold"]
    )


@OVERLAYS
def test_the_gateway_finds_its_files(overlay: str) -> None:
    settings, at = settings_of(overlay), mount_points(overlay)

    models = config_map(overlay, "models")
    assert volume(overlay, "models")["configMap"]["name"] == models["metadata"]["name"]
    assert settings.models == Path(at["models"], *models["data"])
    (item,) = volume(overlay, "keys")["secret"]["items"]
    assert settings.api_keys_file == Path(at["keys"], item["path"])
    (source,) = container(overlay)["envFrom"]
    assert source["configMapRef"]["name"] == config_map(overlay, "settings")["metadata"]["name"]
    # A file mounted by subPath is never updated.
    assert [mount for mount in container(overlay)["volumeMounts"] if "subPath" in mount] == []


def test_the_models_are_those_of_the_repository(tmp_path: Path) -> None:
    theirs, ours = read_yaml(KUBERNETES / "base" / "models.yaml"), read_yaml(ROOT / "models.yaml")
    for model in theirs["models"]:
        if "golden" in model:
            # From /etc/gateway/models, the image's folder is not next to the file.
            assert model["golden"].startswith("/app/")
            model["golden"] = model["golden"].removeprefix("/app/")
            assert (ROOT / model["golden"]).is_file()

    assert theirs == ours
    copied = tmp_path / "models.yaml"
    copied.write_text(yaml.safe_dump(theirs))
    assert load_registry(copied, {}).names()


@OVERLAYS
def test_the_example_of_a_secret_fits_and_admits_no_client(overlay: str, tmp_path: Path) -> None:
    secret = read_yaml(KUBERNETES / "secret.example.yaml")
    kubernetes_validate.validate(secret, kubernetes_validate.latest_version(), strict=True)
    file = tmp_path / "api-keys.yaml"
    file.write_text(secret["stringData"]["api-keys.yaml"])
    mounted = volume(overlay, "keys")["secret"]

    assert mounted["secretName"] == secret["metadata"]["name"]
    assert {item["key"] for item in mounted["items"]} <= secret["stringData"].keys()
    assert secret["metadata"]["namespace"] == only(overlay, "Namespace")["metadata"]["name"]
    (entry,) = load_key_file(file, {}).keys
    assert entry.sha256 == ("0" * 64,)
    # An apply of an overlay must not put the example over the real one.
    assert of_kind(overlay, "Secret") == []


@OVERLAYS
def test_the_keys_of_the_operator_and_the_hub_are_optional_and_from_the_secret(overlay: str) -> None:
    variables = {
        v["name"]: v["valueFrom"]["secretKeyRef"] for v in container(overlay)["env"] if "secretKeyRef" in str(v)
    }
    example = (KUBERNETES / "secret.example.yaml").read_text()

    assert variables.keys() == {"GATEWAY_ADMIN_KEY", "HF_TOKEN"}
    for reference in variables.values():
        assert reference["optional"] is True
        assert reference["name"] == volume(overlay, "keys")["secret"]["secretName"]
        assert f"# {reference['key']}: ..." in example


def test_one_gpu_is_asked_for_where_there_is_one() -> None:
    asked = {name: container(name)["resources"]["limits"].get("nvidia.com/gpu") for name in ("gpu", "cpu")}

    assert asked == {"gpu": "1", "cpu": None}
    assert container("cpu")["resources"]["requests"]["cpu"] == str(settings_of("cpu").cpu_threads)


def test_models_are_kept_for_all_replicas_where_they_are_large() -> None:
    claim = only("gpu", "PersistentVolumeClaim")

    assert volume("gpu", "cache")["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert "emptyDir" in volume("cpu", "cache")
    assert mount_points("gpu")["cache"] == mount_points("cpu")["cache"] == "/cache"


def test_images_are_this_version_of_their_variant() -> None:
    tags = {name: container(name)["image"].rsplit("/", 1)[1] for name in ("gpu", "cpu")}

    assert tags == {
        "gpu": f"embedding-gateway:{__version__}-cuda",
        "cpu": f"embedding-gateway:{__version__}-cpu",
    }


@WITH_COMPONENTS
def test_the_autoscaler_asks_for_a_metric_that_exists(overlay: str) -> None:
    spec = only(overlay, "ScaledObject")["spec"]
    (trigger,) = spec["triggers"]
    query = trigger["metadata"]["query"]

    (metric,) = re.findall(r"gateway_\w+", query)
    assert f"# TYPE {metric} gauge" in render().decode()
    assert f'namespace="{only(overlay, "Namespace")["metadata"]["name"]}"' in query
    assert 1 <= spec["minReplicaCount"] < spec["maxReplicaCount"]
    # It sets the number of replicas, which an apply would reset.
    assert "replicas" not in only(overlay, "Deployment")["spec"]


# ---------------------------------------------------------------------------------------------------- components, examples


@WITH_COMPONENTS
def test_the_agent_of_datadog_reads_the_pod(overlay: str) -> None:
    metadata = pod(overlay)["metadata"]
    (instance,) = checks_of(metadata["annotations"]["ad.datadoghq.com/gateway.checks"])
    (policy,) = [item for item in of_kind(overlay, "NetworkPolicy") if item["metadata"]["name"].endswith("-datadog")]
    environ = {variable["name"]: variable.get("value", "") for variable in container(overlay)["env"]}

    assert container(overlay)["name"] == "gateway"  # which the annotations name
    assert same_settings(instance)
    assert instance["openmetrics_endpoint"] == f"http://%%host%%:{settings_of(overlay).admin_port}/metrics"
    assert instance["tags"] == ["instance:%%kube_pod_name%%"]
    assert metadata["labels"]["tags.datadoghq.com/version"] == __version__
    assert {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]} == {"admin"}
    (otlp,) = [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]]
    assert environ["OTEL_EXPORTER_OTLP_ENDPOINT"] == f"http://$(DD_AGENT_HOST):{otlp}"


def test_the_state_of_experiments_can_be_kept(tmp_path: Path) -> None:
    found = {item["kind"]: item for item in kustomize(copied(tmp_path, "cpu", ["state"]))}
    spec = found["Deployment"]["spec"]
    environ = {v["name"]: v.get("value") for v in spec["template"]["spec"]["containers"][0]["env"]}

    assert [problem for item in found.values() for problem in problems_of(item, "1.30")] == []
    # Two pods must not write to one file.
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    assert found["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteOncePod"]
    state_dir = load_settings(image_environ()).state_dir
    assert state_dir is not None
    assert Path(environ["GATEWAY_EXPOSURE_LOG"] or "").parent == state_dir


@pytest.mark.parametrize("file", sorted((KUBERNETES / "tls").glob("*.yaml")), ids=lambda file: file.stem)
@VERSIONS
def test_an_example_is_valid_and_leads_to_the_clients_service_by_tls(file: Path, version: str) -> None:
    found = list(yaml.safe_load_all(file.read_text()))
    text = str(found)

    assert [problem for item in found for problem in problems_of(item, version)] == []
    assert {item["metadata"]["namespace"] for item in found} == {only("gpu", "Namespace")["metadata"]["name"]}
    assert "embedding-gateway-tls" in text
    service = of_kind("gpu", "Service")[0]
    assert re.search(rf"'name': '{service['metadata']['name']}', 'port': (8000|{{'name': 'http'}})", text)
    assert "admin" not in text

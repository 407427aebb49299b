"""deploy/compose: valid by the Compose specification, hardened, and consistent with the image and the gateway's settings."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from gateway import __version__
from gateway.access.keyring import key_digest
from gateway.config.api_keys import load_key_file
from gateway.config.settings import load_settings
from tests.deploy.deployment_files import DEPLOY, DOCKERFILE, ROOT, image_environ, last_stage, merged, read_yaml
from tests.peers import needs
from tests.telemetry.observed import rules

COMPOSE = DEPLOY / "compose"
GPU = read_yaml(COMPOSE / "compose.yaml")
CPU = merged(GPU, read_yaml(COMPOSE / "compose.cpu.yaml"))
DATADOG = merged(GPU, read_yaml(COMPOSE / "compose.datadog.yaml"))
VARIANTS = pytest.mark.parametrize("compose", [GPU, CPU, DATADOG], ids=["gpu", "cpu", "datadog"])
SERVICES = pytest.mark.parametrize("name", GPU["services"])
MADE_FOR_GOOD = sorted(GPU["services"].keys() - {"mem0"})
"""The services that stay; Mem0's example ends."""
PROVISIONED = ("datasources", "dashboards")
"""What Grafana reads from its folder of provisioning, a folder each."""


def problems_of(compose: Any) -> list[str]:
    """Return the violations of the Compose specification in a file. Anchors are resolved before."""
    try:
        PyCompose.from_yaml(yaml.safe_dump(compose)).validate()
    except Exception as error:  # its own exception, which is not exported
        return [str(error)]
    return []


def mounts(service: Any) -> list[tuple[str, str]]:
    """Return source and target of the volumes of a service."""
    return [(source, target) for source, target, *_ in (v.split(":") for v in service.get("volumes", []))]


def seconds(duration: str) -> float:
    found = re.fullmatch(r"(\d+)s", duration)
    assert found, duration
    return float(found[1])


@VARIANTS
def test_the_specification_knows_every_key(compose: Any) -> None:
    assert problems_of(compose) == []


@pytest.mark.parametrize(
    "mistake",
    [
        {"services": {"gateway": {"image": "x", "helthcheck": {}}}},
        {"services": {"gateway": {"image": "x", "secrets": ["nowhere"]}}},
    ],
    ids=["key", "secret"],
)
def test_the_specification_would_find(mistake: Any) -> None:
    assert len(problems_of(mistake)) == 1


@VARIANTS
def test_every_volume_and_network_is_declared_and_used(compose: Any) -> None:
    services = compose["services"].values()
    volumes = {source for service in services for source, _ in mounts(service) if source[0] not in "./"}
    networks = {name for service in services for name in service.get("networks", ["default"])}

    assert volumes == compose["volumes"].keys()
    assert networks == compose["networks"].keys()


def test_a_gpu_is_asked_for_unless_overridden() -> None:
    devices = [c["services"]["gateway"]["deploy"]["resources"]["reservations"].get("devices") for c in (GPU, CPU)]

    assert devices == [[{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}], None]
    assert CPU["services"]["gateway"]["build"]["args"]["TORCH_INDEX"].endswith("/whl/cpu")


@VARIANTS
def test_images_are_exact_versions(compose: Any) -> None:
    images = {name: service["image"] for name, service in compose["services"].items()}

    assert [image for image in images.values() if not re.search(r":v?\d+\.\d+\.\d+(-cuda|-cpu)?$", image)] == []
    assert images["gateway"].startswith(f"embedding-gateway:{__version__}-")
    assert images["mem0"].endswith(f":{__version__}")


@SERVICES
def test_a_service_has_no_rights_that_it_does_not_need(name: str) -> None:
    service = GPU["services"][name]

    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service.get("read_only", False) == (name != "milvus")
    assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid", "user"}


@pytest.mark.parametrize("name", MADE_FOR_GOOD)
def test_a_service_that_stays_has_a_healthcheck(name: str) -> None:
    assert ("healthcheck" in GPU["services"][name]) or (name == "gateway" and "HEALTHCHECK" in last_stage(DOCKERFILE))


def test_ports_are_the_hosts_own() -> None:
    ports = {name: service["ports"] for name, service in GPU["services"].items() if "ports" in service}

    assert "gateway" in ports
    for port in (port for of_service in ports.values() for port in of_service):
        assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port)


@SERVICES
def test_mounted_files_exist(name: str) -> None:
    files = [source for source, _ in mounts(GPU["services"][name]) if source.startswith(".")]

    assert [file for file in files if not (COMPOSE / file).exists()] == []


def test_services_wait_only_for_services_with_a_healthcheck() -> None:
    awaited = [pair for service in GPU["services"].values() for pair in service.get("depends_on", {}).items()]

    assert "gateway" in dict(awaited)
    for other, how in awaited:
        assert how == {"condition": "service_healthy"}
        assert other in MADE_FOR_GOOD


@VARIANTS
def test_the_gateway_takes_its_settings(compose: Any) -> None:
    gateway = compose["services"]["gateway"]
    environ = {name: value for name, value in gateway["environment"].items() if value is not None}
    settings = load_settings({**image_environ(), **environ})

    ports = [settings.port, settings.admin_port]
    assert gateway["ports"] == [f"127.0.0.1:{port}:{port}" for port in ports]
    assert str(settings.models) in [target for _, target in mounts(gateway)]
    assert str(settings.api_keys_file) in [f"/run/secrets/{name}" for name in gateway["secrets"]]
    assert seconds(gateway["stop_grace_period"]) >= 10 + settings.drain_delay_s + settings.shutdown_grace_s


def test_the_gateways_volumes_are_those_of_its_image() -> None:
    named = {target for source, target in mounts(GPU["services"]["gateway"]) if source[0] not in "./"}

    assert named == {volume.value for volume in last_stage(DOCKERFILE)["VOLUME"]}


def test_the_files_of_experiments_are_on_a_volume() -> None:
    gateway = GPU["services"]["gateway"]
    settings = load_settings(
        {**image_environ(), "GATEWAY_EXPOSURE_LOG": gateway["environment"]["GATEWAY_EXPOSURE_LOG"]}
    )

    assert str(settings.state_dir) in [target for _, target in mounts(gateway)]
    assert settings.exposure_log is not None
    assert settings.exposure_log.parent == settings.state_dir


def test_variables_of_the_user_reach_the_gateway() -> None:
    environ = GPU["services"]["gateway"]["environment"]

    # Without a value, Compose takes that of the shell or of .env, and leaves the variable out if neither has it.
    passed = {name for name, value in environ.items() if value is None}
    assert passed == {"GATEWAY_ADMIN_KEY", "HF_TOKEN", "HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"}


def test_alerts_reach_alertmanager() -> None:
    prometheus = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")
    alertmanager = read_yaml(DEPLOY / "alertmanager" / "alertmanager.yml")
    (targets,) = [
        config["targets"] for peer in prometheus["alerting"]["alertmanagers"] for config in peer["static_configs"]
    ]
    severities = {rule["labels"]["severity"] for rule in rules() if "alert" in rule}

    assert targets == ["alertmanager:9093"]
    assert GPU["services"]["alertmanager"]["ports"] == ["127.0.0.1:9093:9093"]
    assert {receiver["name"] for receiver in alertmanager["receivers"]} == severities
    used = {alertmanager["route"]["receiver"], *(route["receiver"] for route in alertmanager["route"]["routes"])}
    assert used == severities
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    named = set(re.findall(r'alertname="(\w+)"', str(alertmanager["inhibit_rules"])))
    assert named <= alerts


@needs("amtool", "prometheus-alertmanager")
def test_alertmanager_takes_its_file() -> None:
    file = DEPLOY / "alertmanager" / "alertmanager.yml"
    done = subprocess.run(["amtool", "check-config", file], check=False, capture_output=True, text=True, timeout=30)

    assert (done.returncode, "SUCCESS" in done.stdout) == (0, True), done.stderr


def test_prometheus_asks_the_operators_port_of_the_gateway() -> None:
    config = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")
    targets = [t for job in config["scrape_configs"] for s in job.get("static_configs", []) for t in s["targets"]]

    assert f"gateway:{load_settings(image_environ()).admin_port}" in targets


def test_grafana_shows_the_dashboard_with_prometheus_data() -> None:
    grafana = DEPLOY / "grafana"
    found = {
        kind: [read_yaml(file) for file in (grafana / "provisioning" / kind).glob("*.y*ml")] for kind in PROVISIONED
    }
    urls = [source["url"] for file in found["datasources"] for source in file["datasources"]]
    folders = [provider["options"]["path"] for file in found["dashboards"] for provider in file["providers"]]
    mounted = {target: COMPOSE / source for source, target in mounts(GPU["services"]["grafana"])}

    assert urls == ["http://prometheus:9090"]
    assert [(mounted[folder] / "gateway.json").resolve() for folder in folders] == [
        grafana / "dashboards" / "gateway.json"
    ]
    assert (grafana / "dashboards" / "gateway.json").is_file()


def test_mem0_asks_the_gateway_and_milvus() -> None:
    command = " ".join(GPU["services"]["mem0"]["command"])

    # No other service needs to reach Milvus, which asks for no password.
    assert [name for name, s in GPU["services"].items() if "memory" in s.get("networks", [])] == ["milvus", "mem0"]
    assert "ports" not in GPU["services"]["milvus"]
    assert f"--base-url=http://gateway:{load_settings(image_environ()).port}/v1" in command
    assert "--milvus-url=http://milvus:19530" in command
    options = set(re.findall(r"--[a-z-]+", command))
    assert options <= set(re.findall(r'"(--[a-z-]+)"', (ROOT / "examples" / "mem0_memory.py").read_text()))


def test_the_secrets_are_made_and_fit(tmp_path: Path) -> None:
    script = shutil.copy(COMPOSE / "make-secrets.sh", tmp_path)
    subprocess.run([script], check=True, capture_output=True)
    made = {name: tmp_path / secret["file"] for name, secret in GPU["secrets"].items()}

    assert [name for name, file in made.items() if not file.is_file()] == []
    (entry,) = load_key_file(made["api-keys"], {}).keys
    assert entry.sha256 == (key_digest(made["mem0-key"].read_text()),)
    assert len(made["grafana-password"].read_text()) == 64
    assert re.fullmatch(r"GATEWAY_ADMIN_KEY=[0-9a-f]{64}\n", (tmp_path / ".env").read_text())
    assert oct((tmp_path / ".env").stat().st_mode & 0o777) == "0o600"
    # The containers' users are others: they read the files, but no other user reaches the folder.
    assert {oct(file.stat().st_mode & 0o777) for file in made.values()} == {"0o644"}
    assert oct((tmp_path / "secrets").stat().st_mode & 0o777) == "0o700"


def test_secrets_that_are_there_stay(tmp_path: Path) -> None:
    script = shutil.copy(COMPOSE / "make-secrets.sh", tmp_path)
    contents = []
    for _ in range(2):
        subprocess.run([script], check=True, capture_output=True)
        files = [*sorted((tmp_path / "secrets").iterdir()), tmp_path / ".env"]
        contents.append([file.read_text() for file in files])

    assert contents[0] == contents[1]


def test_secrets_are_kept_out_of_git() -> None:
    ignored = [
        "git",
        "-C",
        ROOT,
        "check-ignore",
        COMPOSE / ".env",
        *(COMPOSE / s["file"] for s in GPU["secrets"].values()),
    ]
    done = subprocess.run(ignored, check=False, capture_output=True, text=True)

    assert len(done.stdout.splitlines()) == len(GPU["secrets"]) + 1

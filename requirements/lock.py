"""Write the lock files next to this script from pyproject.toml.

Run by `make lock`. The pins that are there stay unless they no longer fit; `make lock ARGS=--upgrade` takes the newest
versions of everything, `make lock ARGS="--upgrade-package fastapi"` of one package. Arguments go to `uv pip compile`.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import Marker

FOLDER = Path(__file__).resolve().parent
PYPROJECT = FOLDER.parent / "pyproject.toml"
EXTRAS = ["bundled", "compare", "redis", "tracing"]
GROUPS = ["dev", "clients"]
# Extras that few need, each with a lock of what it adds to run.lock: EXTRAS="cluster stores" requirements/install.sh run
ON_DEMAND = {"cluster": ["cluster"], "stores": ["chroma", "lancedb", "milvus", "parquet", "pgvector", "qdrant"]}
# Groups with a separate environment and lock, without the gateway's packages.
APART = ["clients-apart", "infinity-client", "datadog", "site"]

# infinity-emb 0.0.78 asks for numpy < 2 only because of onnx, which the gateway doesn't use; numpy 1.26 has no
# wheel for Python 3.13. This is also why the locks are installed with --no-deps.
OVERRIDES = ["numpy>=2,<3"]

# mem0ai, one of the clients that the tests run, takes no protobuf 7; what the gateway itself needs takes either.
HELD = ["protobuf<7"]

# torch has a separate lock and is installed first, with its dependencies, so that torch itself says what it needs:
# the build for GPUs brings these CUDA libraries, the build for the CPU none of them.
TORCH = re.compile(r"torch==")
CUDA = re.compile(r"(nvidia(?!-ml-py)|cuda|triton)\b")  # nvidia-ml-py is not CUDA: it asks the driver about cards

# A line is kept if one of these machines needs it, and loses its marker if all of them do.
TARGETS = [
    {
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{version}.0",
        "python_version": version,
        "sys_platform": "linux",
    }
    for version in ("3.11", "3.12", "3.13")
    for machine in ("x86_64", "aarch64")
]

HEADERS = {
    "torch": """\
# torch, installed before everything else and with dependency resolution, so that it brings the CUDA libraries that
# its build needs, or none. Its other dependencies are held to the versions of run.lock:
#   pip install -r requirements/torch.lock -c requirements/run.lock
# Without a GPU, --extra-index-url https://download.pytorch.org/whl/cpu saves some gigabytes.
""",
    "run": """\
# What the gateway needs to run, but for torch and its CUDA libraries (torch.lock): the dependencies in pyproject.toml
# with the extras bundled, compare, redis and tracing. For Python 3.11 to 3.13 on Linux, x86_64 and aarch64.
# After torch:
#   pip install --no-deps -r requirements/run.lock
# --no-deps because infinity-emb asks for numpy < 2 without needing it.
""",
    "dev": """\
# What the tests and checks need beyond run.lock: the dependency groups dev and clients of pyproject.toml. After it:
#   pip install --no-deps -r requirements/dev.lock
""",
    "cluster": """\
# What the extra `cluster` adds to run.lock, Ray:
#   EXTRAS=cluster requirements/install.sh run
""",
    "stores": """\
# What the extras for bulk jobs add to run.lock, clients of vector stores and Parquet:
#   EXTRAS=stores requirements/install.sh run
""",
    "build": """\
# The build backend of pyproject.toml, held still while the project itself is installed:
#   pip install --no-deps --build-constraint requirements/build.lock -e .
""",
    **{
        name: f"""\
# What the tests run in a separate environment, build/clients/{name}: the dependency group of this name in
# pyproject.toml. Installed by requirements/install.sh clients.
"""
        for name in APART
    },
    "site": """\
# What `make site` needs, in a separate environment, build/site-env: the dependency group `site` of pyproject.toml.
""",
}


@dataclass(frozen=True)
class Line:
    """One line of a lock: `name==version`, for which machines, and who asked for it."""

    pin: str
    marker: str
    via: str

    @classmethod
    def parse(cls, text: str) -> "Line":
        """Read a line as `uv pip compile --annotation-style line` writes it."""
        requirement, _, via = text.partition("#")
        pin, _, marker = requirement.partition(";")
        sources = via.strip().removeprefix("via ").split(", ")
        shown = [
            "pyproject.toml" if "pyproject.toml" in source else source
            for source in sources
            if not source.startswith(("-c ", "-r ", "--override"))
        ]
        return cls(pin.strip(), marker.strip(), ", ".join(dict.fromkeys(filter(None, shown))))

    def narrow(self) -> "Line | None":
        """Return the line as it reads on the target machines alone, None where no target needs it."""
        needed = [not self.marker or Marker(self.marker).evaluate(target) for target in TARGETS]
        if not any(needed):
            return None
        return Line(self.pin, "" if all(needed) else self.marker, self.via)

    @property
    def requirement(self) -> str:
        return f"{self.pin} ; {self.marker}" if self.marker else self.pin

    def __str__(self) -> str:
        return f"{self.requirement:<34}  # via {self.via}" if self.via else self.requirement


def main() -> None:
    """Write all locks."""
    upgrade = sys.argv[1:]
    extras = [f"--extra={extra}" for extra in EXTRAS]
    groups = [f"--group={group}" for group in GROUPS]
    backend = tomllib.loads(PYPROJECT.read_text())["build-system"]["requires"]

    run = compile_lock(
        [str(PYPROJECT), *extras, *upgrade], preferred=["torch", "run"], requirements=[], constraints=HELD
    )
    pins = [line.requirement for line in run]
    both = compile_lock(
        [str(PYPROJECT), *extras, *groups, *upgrade], preferred=["dev"], requirements=[], constraints=pins
    )
    added = {
        name: compile_lock(
            [str(PYPROJECT), *extras, *(f"--extra={extra}" for extra in more), *upgrade],
            preferred=[name],
            requirements=[],
            # The versions that the tests run with, which have all of these extras.
            constraints=[line.requirement for line in both],
        )
        for name, more in ON_DEMAND.items()
    }
    build = compile_lock(upgrade, preferred=["build"], requirements=backend, constraints=[])
    apart = {
        name: compile_lock([f"--group={PYPROJECT}:{name}", *upgrade], preferred=[name], requirements=[], constraints=[])
        for name in APART
    }

    write("torch", [line for line in run if TORCH.match(line.pin)])
    write("run", [line for line in run if not TORCH.match(line.pin)])
    write("dev", [line for line in both if line.requirement not in pins])
    write("build", build)
    for name, lines in added.items():
        write(name, [line for line in lines if line.requirement not in pins])
    for name, lines in apart.items():
        write(name, lines)


def compile_lock(
    arguments: list[str], *, preferred: list[str], requirements: list[str], constraints: list[str]
) -> list[Line]:
    """Resolve for all targets at once, keeping to the pins of the locks named in `preferred` where they still fit."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lock = folder / "lock.txt"
        lock.write_text("".join(path.read_text() for path in map(lock_path, preferred) if path.exists()))
        for file, lines in (("in", requirements), ("constraints", constraints), ("overrides", OVERRIDES)):
            (folder / f"{file}.txt").write_text("\n".join(lines) + "\n")
        command = [
            str(Path(sys.executable).with_name("uv")),
            *("pip", "compile", "--quiet", "--universal", "--python-version=3.11"),
            # One version for all three Pythons where there is one, rather than the newest for each.
            "--fork-strategy=fewest",
            *("--no-header", "--annotation-style=line"),
            f"--python={sys.executable}",
            f"--output-file={lock}",
            f"--constraints={folder / 'constraints.txt'}",
            f"--overrides={folder / 'overrides.txt'}",
            *([str(folder / "in.txt")] if requirements else []),
            *arguments,
        ]
        if subprocess.run(command, check=False).returncode:  # noqa: S603 - the command is written above
            sys.exit("make lock: uv found no versions that fit together, see above; no lock was changed.")
        lines = [Line.parse(text).narrow() for text in lock.read_text().splitlines()]
    return [line for line in lines if line and not CUDA.match(line.pin)]


def lock_path(name: str) -> Path:
    return FOLDER / f"{name}.lock"


def write(name: str, lines: list[Line]) -> None:
    made = "# Written by `make lock` (requirements/lock.py) from pyproject.toml; not by hand.\n"
    lock_path(name).write_text(HEADERS[name] + made + "".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()

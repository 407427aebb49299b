"""Reads the files in deploy/, and the Dockerfiles, for the tests next to it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
DOCKERFILE = ROOT / "Dockerfile"
MEM0_DOCKERFILE = DEPLOY / "compose" / "mem0" / "Dockerfile"
TOOLS = Path(sys.executable).parent


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile, its continued lines joined."""

    name: str
    value: str

    @property
    def words(self) -> list[str]:
        """The instruction without its options."""
        return [word for word in self.value.split() if not word.startswith("--")]

    @property
    def exec_form(self) -> list[str] | None:
        """The command, or ``None`` where it is given to a shell."""
        found = re.search(r"\[.*\]$", self.value)
        return json.loads(found[0]) if found else None


def instructions(dockerfile: Path) -> list[Instruction]:
    """Return the instructions of a Dockerfile in their order."""
    lines = [line for line in dockerfile.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines()]


def last_stage(dockerfile: Path) -> dict[str, list[Instruction]]:
    """Return the instructions of the stage that becomes the image, by name."""
    found: dict[str, list[Instruction]] = {}
    for instruction in instructions(dockerfile):
        if instruction.name == "FROM":
            found = {}
        found.setdefault(instruction.name, []).append(instruction)
    return found


def image_environ() -> dict[str, str]:
    """Return the environment that the gateway's image sets."""
    pairs = (word.split("=", 1) for env in last_stage(DOCKERFILE)["ENV"] for word in env.words)
    return {name: value for name, value in pairs}  # noqa: C416 - a split makes lists, not pairs


def run_tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program that was installed next to this Python."""
    return subprocess.run([TOOLS / name, *arguments], check=False, capture_output=True, text=True, timeout=120)


class _Loader(yaml.SafeLoader):
    """Understands ``!reset``, with which an override of Compose takes something away."""


class Reset:
    """The value of ``!reset``."""


_Loader.add_multi_constructor("!reset", lambda _loader, _suffix, _node: Reset())


def read_yaml(path: Path) -> Any:
    """Return the one document of a file."""
    return yaml.load(path.read_text(), _Loader)  # noqa: S506 - a SafeLoader


def merged(base: Any, override: Any) -> Any:
    """Merge one Compose file into another, as far as these files need it: mappings are merged, all else is replaced."""
    if not (isinstance(base, Mapping) and isinstance(override, Mapping)):
        return override
    result = dict(base)
    for key, value in override.items():
        if isinstance(value, Reset):
            result.pop(key, None)
        else:
            result[key] = merged(base[key], value) if key in base else value
    return result


def deployment_texts() -> Iterator[tuple[Path, str]]:
    """Yield every text file that can name a setting of the gateway."""
    folders = ("compose", "image", "kubernetes", "systemd")
    files = [path for folder in folders for path in (DEPLOY / folder).rglob("*") if path.is_file()]
    for path in [DOCKERFILE, DEPLOY / "README.md", *files]:
        if "secrets" not in path.parts and path.suffix != ".pyc":
            yield path, path.read_text()


def kustomize(folder: Path) -> list[dict[str, Any]]:
    """Return the objects that ``kubectl apply --kustomize`` would send for a folder."""
    done = run_tool("kubectl", "kustomize", folder)
    if done.returncode:
        raise ValueError(done.stderr)
    return list(yaml.safe_load_all(done.stdout))

"""Build the image of ``Dockerfile`` without an image registry, run it as a cluster would, and measure it.

::

    make image-proof

These are real: every step of ``Dockerfile`` and of ``compose/mem0/Dockerfile``, run by podman's own builder; the
secrets of ``compose/make-secrets.sh``; and the containers, run by podman. Only the base image is not: debootstrap makes
a Debian of the same release, with Debian's own Python 3.11, to replace it.

Needs root, and ``apt-get install --no-install-recommends debootstrap podman runc``. Everything that it makes is in
``build/image-proof``; with ``--keep`` it stays there, and the next run makes no new base.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "image-proof"
SECRETS = FOLDER / "secrets"
BASE_IMAGE = "localhost/python-stand-in:3.13-trixie"
IMAGE = "localhost/embedding-gateway:proof"
MEM0_IMAGE = "localhost/embedding-gateway-mem0:proof"
DEBIAN_RELEASE = "trixie"
DEBIAN_PACKAGES = "python3,python3-venv,ca-certificates"
MODEL = "all-minilm-l6-v2"
READY_LIMIT_S = 180.0
PODMAN_STOP_LIMIT_S = 60


def main() -> None:
    """Build, run, ask, measure, remove."""
    options = parse_options()
    for tool in ("debootstrap", "podman"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is missing: see the top of {Path(__file__).name}")
    podman = Podman(FOLDER)
    try:
        if not podman.has(BASE_IMAGE):
            timed("base image made by debootstrap", lambda: make_base(podman, options.mirror))
        timed("image built from Dockerfile", lambda: build(podman, options, IMAGE, "Dockerfile"))
        timed(
            "image of Mem0's example built",
            lambda: build(podman, options, MEM0_IMAGE, "deploy/compose/mem0/Dockerfile"),
        )
        tell("size of the base image", f"{podman.size_mb(BASE_IMAGE)} MB")
        tell("size of the image, base included", f"{podman.size_mb(IMAGE)} MB")
        for line in podman.layers_mb(IMAGE):
            tell("  layer", line)
        if options.limit_mb:
            check_size(podman, options.limit_mb)
        prove(podman)
    finally:
        if not options.keep:
            podman.reset()


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mirror", default="http://deb.debian.org/debian", help="where debootstrap gets Debian")
    parser.add_argument(
        "--torch-index", default="", help="the build argument TORCH_INDEX; empty: what pip finds by itself"
    )
    parser.add_argument(
        "--limit-mb", type=int, default=1200, help="the most that the files may have; 0, for the CUDA image: no limit"
    )
    parser.add_argument(
        "--volume",
        action="append",
        default=[],
        metavar="HOST:BUILD",
        help="file or folder of this machine that the build sees, such as pip.conf; repeatable",
    )
    parser.add_argument("--keep", action="store_true", help="leave the base for the next run, and the images")
    return parser.parse_args()


class Podman:
    """podman with separate storage, so that it touches no other images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # podman's builder keeps the caches of RUN --mount=type=cache among temporary files.
        self.environ = {**os.environ, "TMPDIR": str(folder / "tmp")}
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        self.command = ["podman", f"--root={folder / 'storage'}", f"--runroot={folder / 'run'}"]
        # Its log is about systemd, which would run healthchecks; errors of a command are printed at every level.
        self.command += ["--log-level=fatal"]
        self.command += ["--storage-driver=overlay", "--cgroup-manager=cgroupfs"]
        if not Path("/sys/fs/cgroup/cgroup.controllers").exists():
            self.command += ["--runtime=runc"]  # crun refuses a machine with the first version of cgroups

    def __call__(self, *arguments: str, check: bool = True) -> str:
        """Run a command of podman and return its output."""
        command = [*self.command, *arguments]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=self.environ)
        if check and done.returncode:
            sys.exit(f"podman {arguments[0]} ended with {done.returncode}\n{done.stdout}")
        return done.stdout.strip()

    def has(self, image: str) -> bool:
        return bool(self("images", "--quiet", image))

    def size_mb(self, image: str) -> int:
        return round(int(self("image", "inspect", "--format={{.Size}}", image)) / 1e6)

    def layers_mb(self, image: str) -> Iterator[str]:
        """Yield size and origin of the layers that are at least 1 MB, the newest first."""
        for layer in json.loads(self("history", "--format=json", "--no-trunc", image)):
            if layer["size"] >= 1e6:
                yield f"{layer['size'] / 1e6:.0f} MB: {' '.join(layer['CreatedBy'].split())[:100]}"

    def reset(self) -> None:
        """Remove everything that was made."""
        self("rm", "--all", "--force", "--volumes", check=False)
        # podman leaves its storage mounted on itself, and a build that was cut off leaves its containers mounted.
        mounted = [Path(line.split()[1]) for line in Path("/proc/self/mounts").read_text().splitlines()]
        for target in reversed(mounted):
            if target.is_relative_to(self.folder):
                subprocess.run(["umount", target], check=True)
        shutil.rmtree(self.folder)


def make_base(podman: Podman, mirror: str) -> None:
    """Make a base image that has what `Dockerfile` uses of python:3.13-slim-trixie: /usr/local/bin/python3.13."""
    system = podman.folder / "base"
    shutil.rmtree(system, ignore_errors=True)
    with (podman.folder / "debootstrap.log").open("w") as log:
        command = [
            "debootstrap",
            "--variant=minbase",
            f"--include={DEBIAN_PACKAGES}",
            DEBIAN_RELEASE,
            str(system),
            mirror,
        ]
        subprocess.run(command, check=True, stdout=log, stderr=log)
    for name in ("python", "python3", "python3.13"):
        (system / "usr/local/bin" / name).symlink_to("/usr/bin/python3.13")
    for waste in (*system.glob("var/lib/apt/lists/*_*"), *system.glob("var/cache/apt/archives/*.deb")):
        waste.unlink()
    tar = podman.folder / "base.tar"
    subprocess.run(["tar", "--create", f"--file={tar}", f"--directory={system}", "."], check=True)
    podman("import", "--quiet", str(tar), BASE_IMAGE)
    tar.unlink()
    shutil.rmtree(system)


def build(podman: Podman, options: argparse.Namespace, image: str, dockerfile: str) -> None:
    """Run the steps of a Dockerfile. Docker's own image format, as OCI's knows no HEALTHCHECK."""
    podman(
        # Not from layers of an earlier run, because they do not show their inputs, such as another torch.
        *("build", "--quiet", "--no-cache", "--format=docker", "--isolation=chroot", "--network=host"),
        *(f"--file={dockerfile}", f"--tag={image}"),
        *(f"--build-arg={name}" for name in (f"PYTHON_IMAGE={BASE_IMAGE}", f"TORCH_INDEX={options.torch_index}")),
        *(f"--volume={volume}" for volume in options.volume),
        str(ROOT),
    )


def check_size(podman: Podman, limit_mb: int) -> None:
    """Compare the files of the image with the limit, as the workflow of pull requests does."""
    container = podman("create", IMAGE)
    command = [sys.executable, str(ROOT / "deploy" / "image" / "size.py"), f"--limit-mb={limit_mb}"]
    with subprocess.Popen([*podman.command, "export", container], stdout=subprocess.PIPE, env=podman.environ) as export:
        done = subprocess.run(command, check=False, stdin=export.stdout)
    expect(f"its files have at most {limit_mb} MB", (export.returncode, done.returncode) == (0, 0))
    podman("rm", container)


def prove(podman: Podman) -> None:
    """Run the image as compose.yaml and the Deployment do, and see that it serves and cannot write."""
    make_secrets = shutil.copy(ROOT / "deploy" / "compose" / "make-secrets.sh", FOLDER)
    subprocess.run([make_secrets], check=True)
    port, admin_port = free_port(), free_port()
    admin = f"127.0.0.1:{admin_port}"
    with running(podman, port, admin_port) as container:
        started = time.monotonic()
        expect("its HEALTHCHECK fails while the model loads", not is_healthy(podman, container))
        wait_until_ready(podman, container, admin)
        tell("time to /health/ready", f"{time.monotonic() - started:.1f} s")
        expect("its HEALTHCHECK succeeds", is_healthy(podman, container))

        asked = time.monotonic()
        question = {"model": MODEL, "input": "Hello, world"}
        status, answer = ask(f"127.0.0.1:{port}", "/v1/embeddings", question, key=(SECRETS / "mem0-key").read_text())
        took_ms = 1000 * (time.monotonic() - asked)
        expect("with a key: an embedding", status == 200)
        tell("the first embedding", f"{len(answer['data'][0]['embedding'])} numbers in {took_ms:.0f} ms")
        expect("without a key: 401", ask(f"127.0.0.1:{port}", "/v1/embeddings", question)[0] == 401)
        run_mem0(podman, port)
        expect("/metrics is on the operator's port alone", on_admin_port_alone(port, admin_port))

        identity = podman(
            "exec", container, "sh", "-c", "id -u; id -g; grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/1/status"
        )
        tell("user, group, capabilities", " ".join(identity.split()))
        expect(
            "it is user 10001, without capabilities", identity.split()[:4] == ["10001", "10001", "CapEff:", "0" * 16]
        )
        expect("it cannot write to /app, /etc, /var", not can_write(podman, container, "/app", "/etc", "/var"))
        for folder in ("/tmp", "/cache", "/state"):
            expect(f"it can write to {folder}", can_write(podman, container, folder))
        tell(
            "files that it left", podman("exec", container, "find", "/tmp", "/cache", "/state", "-type", "f") or "none"
        )
        memory = podman("exec", container, "grep", "VmRSS", "/proc/1/status").split()
        tell("resident memory", f"{int(memory[1]) / 1024:.0f} MiB")

        stopping = time.monotonic()
        podman("stop", f"--time={PODMAN_STOP_LIMIT_S}", container)
        code = podman("inspect", "--format={{.State.ExitCode}}", container)
        expect(f"SIGTERM ends it in {time.monotonic() - stopping:.1f} s, exit code {code}", code == "0")


@contextmanager
def running(podman: Podman, port: int, admin_port: int) -> Iterator[str]:
    """Run the gateway's image; yield the container's id."""
    container = podman(
        *("run", "--detach", *hardened()),
        "--health-interval=disable",  # without systemd nothing could run it; it is run by hand below
        *(f"--env=GATEWAY_PORT={port}", f"--env=GATEWAY_ADMIN_PORT={admin_port}", "--env=GATEWAY_HOST=127.0.0.1"),
        f"--volume={SECRETS / 'api-keys.yaml'}:/run/secrets/api-keys:ro",
        "--env=GATEWAY_API_KEYS_FILE=/run/secrets/api-keys",
        IMAGE,
    )
    try:
        yield container
    except BaseException:
        print(podman("logs", container, check=False))
        raise
    finally:
        podman("rm", "--force", "--volumes", container, check=False)


def run_mem0(podman: Podman, port: int) -> None:
    """Run Mem0's example against the gateway; with Qdrant in a file, as there is no Milvus here."""
    printed = podman(
        *("run", "--rm", *hardened(), f"--volume={SECRETS / 'mem0-key'}:/run/secrets/mem0-key:ro", MEM0_IMAGE),
        *("--store=qdrant", "--dir=/tmp/mem0", "--api-key-file=/run/secrets/mem0-key"),
        f"--base-url=http://127.0.0.1:{port}/v1",
    )
    expect("Mem0's example stores, finds and deletes", printed.endswith("0 memories after delete_all"))


def hardened() -> list[str]:
    """Return the options for a read-only root file system and no capability.

    On the host's network: a bridge needs more rights than a proof of the image should.
    """
    return [
        *("--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp:rw,nosuid,nodev,size=256m"),
        *("--cap-drop=all", "--security-opt=no-new-privileges", "--network=host", *limits()),
    ]


def limits() -> list[str]:
    """Return limits as options. podman's own defaults are higher than some machines let even root go."""
    wanted = {"nofile": (resource.RLIMIT_NOFILE, 16384), "nproc": (resource.RLIMIT_NPROC, 4096)}
    options = []
    for name, (kind, limit) in wanted.items():
        hard = resource.getrlimit(kind)[1]
        number = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        options.append(f"--ulimit={name}={number}:{number}")
    return options


def on_admin_port_alone(port: int, admin_port: int) -> bool:
    """Return whether the operator's paths answer on the operator's port and nowhere else."""
    return ask(f"127.0.0.1:{admin_port}", "/metrics")[0] == 200 and ask(f"127.0.0.1:{port}", "/metrics")[0] == 404


def is_healthy(podman: Podman, container: str) -> bool:
    """Run the image's HEALTHCHECK."""
    command = [*podman.command, "healthcheck", "run", container]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def can_write(podman: Podman, container: str, *folders: str) -> bool:
    """Return whether the user of the image can create a file in any of the folders."""
    script = "for folder; do touch $folder/.proof 2>/dev/null && rm $folder/.proof && exit 0; done; exit 1"
    command = [*podman.command, "exec", container, "sh", "-c", script, "sh", *folders]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def ask(address: str, path: str, body: object = None, *, key: str = "") -> tuple[int, Any]:
    """Return the status and JSON of a response; status 0 when nothing answers."""
    connection = http.client.HTTPConnection(address, timeout=30)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        if body is None:
            connection.request("GET", path, headers=headers)
        else:
            connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if answer.headers.get_content_type() == "application/json" else text
    except OSError:
        return 0, None
    finally:
        connection.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(podman: Podman, container: str, admin: str) -> None:
    """Wait for the models; fail when they take too long, or when the container has ended."""
    deadline = time.monotonic() + READY_LIMIT_S
    while ask(admin, "/health/ready")[0] != 200:
        if podman("inspect", "--format={{.State.Running}}", container) != "true":
            raise AssertionError("the container has ended")
        if time.monotonic() > deadline:
            raise AssertionError(f"not ready after {READY_LIMIT_S:.0f} s")
        time.sleep(0.1)


def expect(claim: str, is_true: bool) -> None:
    """Print a claim that holds; fail on one that does not."""
    if not is_true:
        raise AssertionError(claim)
    tell("holds", claim)


def timed(what: str, do: Callable[[], None]) -> None:
    started = time.monotonic()
    do()
    tell(what, f"{time.monotonic() - started:.0f} s")


def tell(what: str, value: str) -> None:
    print(f"{what:<34} {value}", flush=True)


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("make image-proof needs root: debootstrap and chroot do")
    main()

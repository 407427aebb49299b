"""Look at the machine: system, Python, cards and their driver, cores, memory, disk, ports."""

from __future__ import annotations

import errno
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException

import psutil

from gateway.config.settings import Settings, variable
from gateway.doctor.finding import Check, Detail, Finding, Status
from gateway.engine.cards import Machine, Reason, describe_others, read_machine
from gateway.engine.checkpoint.fetch import free_bytes
from gateway.engine.checkpoint.hub import cache_folder, format_size
from gateway.engine.cores import read_cores
from gateway.engine.memory import available_host_bytes, format_bytes
from gateway.engine.nvml import Card, Failure

_LIMIT_S = 10.0
# torch's libraries are gigabytes with CUDA, and the disk may be slow.
_TORCH_LIMIT_S = 90.0
_LITTLE_DISK = 1e9
_LITTLE_MEMORY = 2 * 2**30

# Run in another process, because a library that does not fit the processor or the driver may end it or hang.
_TRY_TORCH = """\
import torch
for index in range(torch.cuda.device_count()):
    torch.ones(8, 8, device=f"cuda:{index}").sum().item()
print(torch.cuda.device_count() if torch.cuda.is_available() else 0)
"""


def machine_checks(settings: Settings) -> list[Check]:
    """Return the checks of the machine, in the order in which they are shown."""
    return [
        Check("system", _system, _LIMIT_S),
        Check("python", _python, _LIMIT_S),
        Check("torch", _torch, _TORCH_LIMIT_S + 5),
        Check("cards", lambda: list(cards(read_machine())), _LIMIT_S),
        Check("cores", _cores, _LIMIT_S),
        Check("memory", _memory, _LIMIT_S),
        Check("disk", lambda: list(_disks(settings)), _LIMIT_S),
        Check("ports", lambda: list(_ports(settings)), _LIMIT_S),
    ]


def _system() -> list[Finding]:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        name = platform.system()
    where = read_machine().surroundings
    kinds = [kind for kind, is_it in (("WSL2", where.is_wsl), ("a container", where.is_container)) if is_it]
    text = f"{name}, kernel {platform.release()}, {platform.machine()}{''.join(f', in {kind}' for kind in kinds)}"
    details: dict[str, Detail] = {
        "name": name,
        "kernel": platform.release(),
        "is_wsl": where.is_wsl,
        "is_container": where.is_container,
    }
    return [Finding("system", Status.OK, text, details=details)]


def _python() -> list[Finding]:
    version = platform.python_version()
    details = {"version": version, "executable": sys.executable}
    is_supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    mend = "" if is_supported else "make clean run PYTHON=python3.12; 3.11, 3.12 and 3.13 are supported"
    status = Status.OK if is_supported else Status.TODO
    return [Finding("python", status, f"{version}, {sys.executable}", mend, details)]


def _torch() -> list[Finding]:
    """Start torch, and compute something on each card."""
    build = read_machine().torch
    if build is None:
        return [Finding("torch", Status.TODO, "torch is not installed", "make install")]
    cuda = "a build without CUDA" if build.cuda is None else f"built for CUDA {build.cuda[0]}.{build.cuda[1]}"
    text, details = f"{build.version}, {cuda}", {"version": build.version, "cuda": cuda}
    try:
        done = subprocess.run(  # noqa: S603  of this Python
            [sys.executable, "-c", _TRY_TORCH], check=False, capture_output=True, text=True, timeout=_TORCH_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        reason = f"it does not start within {_TORCH_LIMIT_S:g} s"
        return [Finding("torch", Status.TODO, f"{text}; {reason}", "a card may hang: `nvidia-smi`", details)]
    if done.returncode:
        reason = _exit_reason(done)
        return [Finding("torch", Status.TODO, f"{text}; it does not run: {reason}", "make clean run", details)]
    number = done.stdout.strip()
    tried = "" if number == "0" else f"; it computes on {number} card{'' if number == '1' else 's'}"
    return [Finding("torch", Status.OK, text + tried, details=details)]


def _exit_reason(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines and done.returncode > 0 else f"it was ended by signal {-done.returncode}"


def cards(machine: Machine) -> Iterator[Finding]:
    """Yield findings about the cards and their driver."""
    driver = machine.driver
    if not isinstance(driver, Failure):
        cuda = "no CUDA library" if driver.cuda is None else f"CUDA {driver.cuda[0]}.{driver.cuda[1]}"
        text = f"{driver.version}, {cuda}"
        yield Finding("driver", Status.OK, text, details={"version": driver.version, "cuda": cuda})
        for card in driver.cards:
            yield _card(machine, card)
    obstacle = machine.obstacle_to("auto")
    if obstacle is not None:
        is_usual = obstacle.reason in (Reason.NO_CARD, Reason.NOT_NVIDIA)
        details = {"reason": obstacle.reason.value}
        text = f"{obstacle.what}; models run on the CPU" if is_usual else obstacle.what
        yield Finding("cards", Status.NOTE if is_usual else Status.TODO, text, obstacle.mend, details)


def _card(machine: Machine, card: Card) -> Finding:
    if card.error:
        return Finding("card", Status.NOTE, f"{card.index}: not readable ({card.error})", details={"index": card.index})
    left_out = machine.left_out(machine.visible.index(card)) if card in machine.visible else None
    memory = f"{format_bytes(card.free_bytes)} of {format_bytes(card.total_bytes)} free" if card.total_bytes else ""
    others = describe_others(card)
    parts = [
        f"{card.index}: {card.name}",
        f"compute capability {card.capability[0]}.{card.capability[1]}",
        memory,
        f"others on it: {others}" if others else "",
        "hidden by CUDA_VISIBLE_DEVICES" if card not in machine.visible else "",
        f"left out by `device: auto`: {left_out.what}" if left_out else "",
    ]
    details: dict[str, Detail] = {
        "index": card.index,
        "name": card.name,
        "capability": f"{card.capability[0]}.{card.capability[1]}",
        "total_bytes": card.total_bytes,
        "free_bytes": card.free_bytes,
        "others": others,
    }
    status = Status.NOTE if left_out or card not in machine.visible else Status.OK
    return Finding("card", status, ", ".join(part for part in parts if part), details=details)


def _cores() -> list[Finding]:
    cores = read_cores()
    quota = "" if cores.quota is None else f", a quota of {cores.quota:g}"
    nodes = "" if len(cores.per_node) == 1 else f" on {len(cores.per_node)} NUMA nodes"
    details = {"usable": cores.num_usable, "quota": cores.quota}
    return [Finding("cores", Status.OK, f"{sum(cores.per_node)} physical{nodes}{quota}", details=details)]


def _memory() -> list[Finding]:
    total, free = psutil.virtual_memory().total, available_host_bytes()
    text = f"{format_bytes(free)} of {format_bytes(total)} can be used"
    details = {"total_bytes": total, "usable_bytes": free}
    if free >= _LITTLE_MEMORY:
        return [Finding("memory", Status.OK, text, details=details)]
    mend = "leave 2 GiB for the gateway" + (
        "; in WSL2, raise `memory` in .wslconfig" if read_machine().surroundings.is_wsl else ""
    )
    return [Finding("memory", Status.NOTE, text, mend, details)]


def _disks(settings: Settings) -> Iterator[Finding]:
    folders = {
        "HF_HOME": ("models", cache_folder()),
        variable("cache_dir"): ("compiled copies", settings.compiled_folder),
        variable("state_dir"): ("outcomes", settings.state_dir),
    }
    for setting, (what, folder) in folders.items():
        if folder is None:
            continue
        free = free_bytes(folder)
        details: dict[str, Detail] = {"folder": str(folder), "free_bytes": free}
        text = f"{format_size(free)} free for {what} in {folder}"
        here = next(path for path in (folder, *folder.parents) if path.exists())
        mend = f"set {setting} to a folder that this user may write to"
        if not here.is_dir():
            yield Finding("disk", Status.TODO, f"{folder}: {here} is not a folder", mend, details)
        elif not os.access(here, os.W_OK):
            yield Finding("disk", Status.TODO, f"{folder}: {here} may not be written to", mend, details)
        elif free < _LITTLE_DISK:
            yield Finding("disk", Status.NOTE, text, f"make room, or set {setting}", details)
        else:
            yield Finding("disk", Status.OK, text, details=details)


def _ports(settings: Settings) -> Iterator[Finding]:
    for name, port in (("port", settings.port), ("admin_port", settings.admin_port)):
        if port is not None:
            yield check_port(settings.host, port, name)


def check_port(host: str, port: int, setting: str) -> Finding:
    details: dict[str, Detail] = {"host": host, "port": port}
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except UnicodeError as error:  # a name that no host can have
        mend = f"another one: {variable('host')}=..."
        return Finding("port", Status.TODO, f"{host[:80]}:{port}: {error}", mend, details)
    except OSError as error:
        if error.errno == errno.EADDRINUSE and _is_gateway(port):
            return Finding("port", Status.OK, f"{host}:{port}: a gateway serves here already", details=details)
        what = variable("host") if error.errno not in {errno.EADDRINUSE, errno.EACCES} else variable(setting)
        mend = f"another one: {what}=..."
        return Finding("port", Status.TODO, f"{host}:{port}: {error.strerror or error}", mend, details)
    return Finding("port", Status.OK, f"{host}:{port} is free", details=details)


def _is_gateway(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health/live")
        answer = connection.getresponse()
        return answer.status == 200 and answer.headers.get("x-request-id") is not None
    except (OSError, HTTPException):  # including servers that do not speak HTTP
        return False
    finally:
        connection.close()

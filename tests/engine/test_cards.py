"""The cards of a machine are found, and a card that cannot be used is reported with the reason and the remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pynvml
import pytest

from gateway.engine.cards import (
    CUDA_12_INDEX,
    Machine,
    Reason,
    TorchBuild,
    describe_others,
    read_machine,
    read_torch,
    torch_index,
)
from gateway.engine.nvml import Card, Driver, Failure, Process, read_driver
from tests.nvml import GIB, FakeCard, FakeDriver, install, install_surroundings, install_torch

NVIDIA, AMD, INTEL = "0x10de", "0x1002", "0x8086"
GT_1030 = FakeCard("NVIDIA GeForce GT 1030", (6, 1), 2 * GIB, 2 * GIB, "GPU-1030")
RTX_2080 = FakeCard("NVIDIA GeForce RTX 2080 Ti", (7, 5), 11 * GIB, 11 * GIB, "GPU-2080")
RTX_5090 = FakeCard("NVIDIA GeForce RTX 5090", (12, 0), 32 * GIB, 32 * GIB, "GPU-5090")

Look = Callable[..., Machine]


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Look:
    """Return a function that looks at a machine with these cards, driver and torch; by default all fit a 3090."""

    def look(
        *cards: FakeCard,
        version: str = "580.95.05",
        cuda: int = 13000,
        error: int = 0,
        torch: str = "2.13.0",
        torch_cuda: str | None = "13.0",
        vendors: tuple[str, ...] = (INTEL, NVIDIA),
        where: str = "",
        hidden: str | None = None,
    ) -> Machine:
        install(monkeypatch, FakeDriver(list(cards), version, cuda, error))
        install_torch(monkeypatch, tmp_path, torch, cuda=torch_cuda)
        install_surroundings(monkeypatch, tmp_path / "root", vendors=vendors, where=where)
        return read_machine({} if hidden is None else {"CUDA_VISIBLE_DEVICES": hidden})

    return look


def test_a_card_that_fits_is_used(look: Look) -> None:
    machine = look(FakeCard(free=20 * GIB, processes=((1, "/usr/lib/xorg/Xorg", 3 * 2**20, False),)))

    assert machine.driver == Driver("580.95.05", (13, 0), machine.visible)
    assert machine.visible == (
        Card(
            index=0,
            uuid="GPU-3090",
            name="NVIDIA GeForce RTX 3090",
            capability=(8, 6),
            total_bytes=24 * GIB,
            free_bytes=20 * GIB,
            others=(Process(1, "Xorg", 3 * 2**20),),
        ),
    )
    assert machine.torch == TorchBuild("2.13.0", (13, 0))
    for setting in ("auto", "cuda", "cuda:0"):
        assert machine.obstacle_to(setting) is None
    assert not machine.is_unsure


# Machines, and the gateway's message about each: the reason, and the whole sentence.
OBSTACLES: dict[str, tuple[dict[str, object], Reason, str]] = {
    "driver 550, torch from PyPI": (
        {"version": "550.54.14", "cuda": 12040},
        Reason.DRIVER_TOO_OLD,
        "an NVIDIA GeForce RTX 3090 is here, but driver 550.54.14 (CUDA 12.4) is too old for torch 2.13.0, which is built "
        "for CUDA 13.0 and needs driver 580 or newer: install the build that fits, `make clean run "
        "TORCH_INDEX=https://download.pytorch.org/whl/cu126`, or upgrade the driver to 580 or newer",
    ),
    "driver 525, in a container": (
        {"version": "525.60.13", "cuda": 12000, "where": "container"},
        Reason.DRIVER_TOO_OLD,
        "an NVIDIA GeForce RTX 3090 is here, but driver 525.60.13 (CUDA 12.0) is too old for torch 2.13.0, which is built "
        "for CUDA 13.0 and needs driver 580 or newer: install the build that fits, `docker build --build-arg "
        "TORCH_INDEX=https://download.pytorch.org/whl/cu126 .`, or upgrade the driver to 580 or newer",
    ),
    "driver 470": (
        {"version": "470.256.02", "cuda": 11040},
        Reason.DRIVER_TOO_OLD,
        "an NVIDIA GeForce RTX 3090 is here, but driver 470.256.02 (CUDA 11.4) is too old for torch 2.13.0, which is built "
        "for CUDA 13.0 and needs driver 580 or newer: upgrade the driver to 580 or newer (now 470.256.02)",
    ),
    "driver 470, torch for CUDA 12": (
        {"version": "470.256.02", "cuda": 11040, "torch": "2.13.0+cu126", "torch_cuda": "12.6"},
        Reason.DRIVER_TOO_OLD,
        "an NVIDIA GeForce RTX 3090 is here, but driver 470.256.02 (CUDA 11.4) is too old for torch 2.13.0+cu126, which is "
        "built for CUDA 12.6 and needs driver 525 or newer: upgrade the driver to 580 or newer (now 470.256.02)",
    ),
    "driver 470, in WSL": (
        {"version": "470.256.02", "cuda": 11040, "where": "wsl"},
        Reason.DRIVER_TOO_OLD,
        "an NVIDIA GeForce RTX 3090 is here, but driver 470.256.02 (CUDA 11.4) is too old for torch 2.13.0, which is built "
        "for CUDA 13.0 and needs driver 580 or newer: upgrade the driver to 580 or newer (now 470.256.02) on Windows, not "
        "in WSL",
    ),
    "torch for the CPU, driver 580": (
        {"torch": "2.13.0+cpu", "torch_cuda": None},
        Reason.TORCH_WITHOUT_CUDA,
        "an NVIDIA GeForce RTX 3090 is here, but torch 2.13.0+cpu is a build without CUDA: install the build that fits, "
        "`make clean run`",
    ),
    "torch for the CPU, driver 560": (
        {"torch": "2.13.0+cpu", "torch_cuda": None, "version": "560.35.03", "cuda": 12060},
        Reason.TORCH_WITHOUT_CUDA,
        "an NVIDIA GeForce RTX 3090 is here, but torch 2.13.0+cpu is a build without CUDA: install the build that fits, "
        "`make clean run TORCH_INDEX=https://download.pytorch.org/whl/cu126`, or upgrade the driver to 580 or newer",
    ),
    "torch for AMD's cards": (
        {"torch": "2.13.0+rocm7.1", "torch_cuda": None},
        Reason.TORCH_WITHOUT_CUDA,
        "an NVIDIA GeForce RTX 3090 is here, but torch 2.13.0+rocm7.1 is built for AMD's cards (ROCm): install the build "
        "that fits, `make clean run`",
    ),
    "hidden": (
        {"hidden": ""},
        Reason.HIDDEN,
        "an NVIDIA GeForce RTX 3090 is here, but CUDA_VISIBLE_DEVICES='' hides it: unset it, or list numbers that "
        "`nvidia-smi -L` shows",
    ),
    "no CUDA in the container": (
        {"cuda": 0, "where": "container"},
        Reason.NO_CUDA_LIBRARY,
        "an NVIDIA GeForce RTX 3090 is here, but driver 580.95.05 comes without its CUDA library: "
        "NVIDIA_DRIVER_CAPABILITIES must be `compute,utility` for this container",
    ),
    "no CUDA": (
        {"cuda": 0},
        Reason.NO_CUDA_LIBRARY,
        "an NVIDIA GeForce RTX 3090 is here, but driver 580.95.05 comes without its CUDA library: install the driver's "
        "compute part (libcuda.so.1)",
    ),
    "no driver": (
        {"error": pynvml.NVML_ERROR_LIBRARY_NOT_FOUND},
        Reason.NO_DRIVER,
        "an NVIDIA card is here, but its driver is not: install NVIDIA's driver, 580 or newer",
    ),
    "a container without --gpus": (
        {"error": pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "where": "container"},
        Reason.NO_DRIVER,
        "an NVIDIA card is here, but its driver is not: start the container with `--gpus all`; the host needs NVIDIA's "
        "container toolkit",
    ),
    "a container without its devices": (
        {"error": pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "where": "container"},
        Reason.DRIVER_FAILED,
        "NVIDIA's driver does not answer (Driver Not Loaded): start the container with `--gpus all`; the host needs "
        "NVIDIA's container toolkit",
    ),
    "a container that lost its cards": (
        {"error": pynvml.NVML_ERROR_UNKNOWN, "where": "container"},
        Reason.DRIVER_FAILED,
        "NVIDIA's driver does not answer (Unknown Error): restart the container: the host has taken its cards away "
        "(`systemctl daemon-reload` does that)",
    ),
    "WSL without a driver on Windows": (
        {"error": pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "where": "wsl", "vendors": ()},
        Reason.NO_DRIVER,
        "an NVIDIA card is here, but its driver is not: install NVIDIA's driver on Windows, not in WSL, and run `wsl "
        "--update`",
    ),
    "updated": (
        {"error": pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH},
        Reason.DRIVER_FAILED,
        "NVIDIA's driver does not answer (RM has detected an NVML/RM version mismatch.): the driver was updated while its "
        "old module is loaded: restart the machine",
    ),
    "not loaded": (
        {"error": pynvml.NVML_ERROR_DRIVER_NOT_LOADED},
        Reason.DRIVER_FAILED,
        "NVIDIA's driver does not answer (Driver Not Loaded): load the module with `sudo modprobe nvidia`; after an update "
        "of the kernel or the driver, restart the machine",
    ),
    "no permission": (
        {"error": pynvml.NVML_ERROR_NO_PERMISSION},
        Reason.DRIVER_FAILED,
        "NVIDIA's driver does not answer (Insufficient Permissions): let this user read and write /dev/nvidia* (groups "
        "`video` and `render`)",
    ),
    "another failure": (
        {"error": pynvml.NVML_ERROR_IRQ_ISSUE},
        Reason.DRIVER_FAILED,
        "NVIDIA's driver does not answer (Interrupt Request Issue): `nvidia-smi` must work first; restarting the machine "
        "often helps",
    ),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_a_machine_whose_card_cannot_be_used_says_why(look: Look, name: str) -> None:
    facts, reason, sentence = OBSTACLES[name]

    machine = look(FakeCard(), **facts)

    for setting in ("auto", "cuda", "cuda:0"):
        obstacle = machine.obstacle_to(setting)
        assert obstacle is not None
        assert (obstacle.reason, str(obstacle)) == (reason, sentence)


@pytest.mark.parametrize(
    ("vendors", "where", "reason", "sentence"),
    [
        ((INTEL,), "", Reason.NO_CARD, "no accelerator is present"),
        ((), "container", Reason.NO_CARD, "no accelerator is present"),
        (
            (INTEL, AMD),
            "",
            Reason.NOT_NVIDIA,
            "no accelerator is present that is supported; AMD's cards (ROCm) are not",
        ),
        ((), "mac", Reason.NOT_NVIDIA, "no accelerator is present that is supported; Apple's GPU (MPS) is not"),
    ],
)
def test_a_machine_without_a_card(
    look: Look, vendors: tuple[str, ...], where: str, reason: Reason, sentence: str
) -> None:
    machine = look(error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, vendors=vendors, where=where)

    obstacle = machine.obstacle_to("auto")

    assert obstacle is not None
    assert (obstacle.reason, str(obstacle)) == (reason, sentence)


def test_a_driver_without_cards(look: Look) -> None:
    obstacle = look(vendors=(INTEL,)).obstacle_to("cuda")

    assert obstacle is not None
    assert obstacle.reason is Reason.NO_CARD


@pytest.mark.parametrize(("version", "cuda", "index"), [("580.1", 13000, ""), ("525.1", 12000, CUDA_12_INDEX)])
def test_torch_for_a_driver(look: Look, version: str, cuda: int, index: str) -> None:
    fitting = {"": ("2.13.0", "13.0"), CUDA_12_INDEX: ("2.13.0+cu126", "12.6")}
    torch, torch_cuda = fitting[index]

    machine = look(FakeCard(), version=version, cuda=cuda, torch=torch, torch_cuda=torch_cuda)

    assert machine.obstacle_to("auto") is None
    assert isinstance(machine.driver, Driver)
    assert torch_index(machine.driver) == index
    assert torch_index(Driver("470.1", (11, 4), ())) is None
    assert torch_index(Driver("470.1", None, ())) is None


# ------------------------------------------------------------------------------------------------------- several cards


def test_an_old_second_card_is_left_out(look: Look) -> None:
    machine = look(GT_1030, FakeCard())

    assert machine.obstacle_to("auto") is None
    assert machine.obstacle_to("cuda:1") is None
    assert machine.left_out(1) is None
    sentence = (
        "torch for CUDA 13.0 has no kernels for an NVIDIA GeForce GT 1030 (compute capability 6.1): install the build for "
        "CUDA 12.6, `make clean run TORCH_INDEX=https://download.pytorch.org/whl/cu126`"
    )
    for obstacle in (machine.left_out(0), machine.obstacle_to("cuda:0")):
        assert obstacle is not None
        assert (obstacle.reason, str(obstacle)) == (Reason.CARD_TOO_OLD, sentence)


def test_builds_for_arm_have_no_kernels_for_older_cards(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")

    obstacle = look(FakeCard("NVIDIA T4G", (7, 5))).obstacle_to("cuda:0")

    assert obstacle is not None
    assert (obstacle.reason, obstacle.mend) == (Reason.CARD_TOO_OLD, "")
    assert str(obstacle) == "torch for CUDA 13.0 has no kernels for an NVIDIA T4G (compute capability 7.5)"
    assert look(FakeCard("NVIDIA GB10", (12, 1))).obstacle_to("cuda:0") is None


def test_a_card_that_texts_cannot_be_packed_on_is_used_only_when_asked_for(look: Look) -> None:
    machine = look(RTX_2080)

    assert machine.obstacle_to("cuda") is None
    assert machine.obstacle_to("cuda:0") is None
    obstacle = machine.obstacle_to("auto")
    assert obstacle is not None
    assert obstacle.reason is Reason.NOT_CHOSEN
    assert str(obstacle) == (
        "an NVIDIA GeForce RTX 2080 Ti has compute capability 7.5, and packing texts needs 8.0: `device: cuda:0` in "
        "models.yaml uses it anyway, with padding"
    )


def test_a_card_that_is_too_new_for_the_torch_of_an_old_driver(look: Look) -> None:
    machine = look(RTX_5090, version="570.1", cuda=12080, torch="2.13.0+cu126", torch_cuda="12.6")

    obstacle = machine.obstacle_to("auto")

    assert obstacle is not None
    assert obstacle.reason is Reason.CARD_TOO_NEW
    assert str(obstacle) == (
        "torch for CUDA 12.6 has no kernels for an NVIDIA GeForce RTX 5090 (compute capability 12.0): upgrade the driver "
        "to 580 or newer, then `make clean run`"
    )
    assert look(RTX_5090).obstacle_to("auto") is None


def test_a_card_off_the_bus_is_left_out(look: Look) -> None:
    machine = look(FakeCard(error=pynvml.NVML_ERROR_GPU_IS_LOST), FakeCard(uuid="GPU-other"))

    assert machine.obstacle_to("auto") is None
    obstacle = machine.left_out(0)
    assert obstacle is not None
    assert obstacle.reason is Reason.CARD_FAILED
    assert str(obstacle) == (
        "the driver cannot read card 0 (GPU is lost): look for `Xid` in `dmesg`, and restart the machine"
    )


def test_a_number_beyond_the_cards(look: Look) -> None:
    obstacle = look(FakeCard(), RTX_5090).obstacle_to("cuda:2")

    assert str(obstacle) == (
        "there is no cuda:2 here, only cuda:0 NVIDIA GeForce RTX 3090, cuda:1 NVIDIA GeForce RTX 5090"
    )


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("1", ["GPU-5090"]),
        ("1,0", ["GPU-5090", "GPU-3090"]),
        (" 0 , 1 ", ["GPU-3090", "GPU-5090"]),
        ("GPU-50", ["GPU-5090"]),
        ("0,7,1", ["GPU-3090"]),
        ("0,0", []),
        ("1,0,1", []),
        ("+0,01", ["GPU-3090", "GPU-5090"]),
        ("1gpu,0", ["GPU-5090", "GPU-3090"]),
        ("1,-1,0", ["GPU-5090"]),
        ("GPU-", []),
        ("G", []),
        ("GPU-3090,GPU-30", []),
        ("GPU-3090,GPU-x,GPU-5090", ["GPU-3090"]),
        ("-1", []),
        ("", []),
        ("none", []),
        ("0,,1", ["GPU-3090"]),
    ],
)
def test_cuda_visible_devices_chooses_and_orders_the_cards(look: Look, setting: str, names: list[str]) -> None:
    machine = look(FakeCard(), RTX_5090, hidden=setting)

    assert [card.uuid for card in machine.visible] == names
    assert len(machine.cards) == 2


def test_the_slices_of_a_divided_card_are_its_cards(look: Look) -> None:
    parts = [FakeCard("NVIDIA H100 MIG 1g.10gb", (0, 0), 10 * GIB, 9 * GIB, f"MIG-{n}") for n in range(2)]
    machine = look(FakeCard("NVIDIA H100", (9, 0), 80 * GIB, 80 * GIB, "GPU-h100", slices=parts))

    assert [(card.uuid, card.capability, card.free_bytes) for card in machine.visible] == [
        ("MIG-0", (9, 0), 9 * GIB),
        ("MIG-1", (9, 0), 9 * GIB),
    ]
    assert machine.obstacle_to("auto") is None


def test_a_card_that_shares_the_memory_of_the_cpu_is_a_card(look: Look) -> None:
    machine = look(FakeCard("NVIDIA GB10", (12, 1), has_memory=False))

    assert machine.obstacle_to("auto") is None
    assert machine.visible[0].total_bytes == machine.visible[0].free_bytes == 0


# ----------------------------------------------------------------------------------------------------- who else is here


def test_other_processes_are_named(look: Look) -> None:
    processes = (
        (os.getpid(), "python", GIB, True),
        (7, "/usr/bin/ollama", 5 * GIB, True),
        (8, "/usr/lib/xorg/Xorg", 300 * 2**20, False),
        (9, "", None, True),
    )
    [card] = look(FakeCard(processes=processes)).visible

    assert describe_others(card) == "ollama (pid 7) 5,120 MiB, unknown (pid 9), Xorg (pid 8) 300 MiB"
    assert describe_others(Card(0)) == ""


# ----------------------------------------------------------------------------------------------------------- torch


def test_the_name_of_another_process_may_be_any_bytes(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    look(FakeCard(processes=((812, "x", GIB, True),)))
    monkeypatch.setattr(pynvml, "nvmlSystemGetProcessName", lambda _pid: b"/opt/\xff\xfe".decode())

    assert describe_others(read_machine({}).visible[0]) == "unknown (pid 812) 1,024 MiB"


def test_the_build_of_torch_is_read_without_importing_it() -> None:
    code = (
        "import sys; from gateway.engine.cards import read_machine, read_torch; print(read_torch().version, "
        "read_torch().cuda, read_torch().is_rocm); read_machine(); "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    import torch

    cuda = torch.version.cuda and tuple(map(int, torch.version.cuda.split(".")))
    assert run.stdout.strip() == f"{torch.__version__} {cuda} {torch.version.hip is not None}"


def test_a_machine_without_torch(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    look(FakeCard())
    monkeypatch.setattr("gateway.engine.cards.find_spec", lambda _name: None)
    machine = read_machine({})

    assert read_torch() is None
    assert str(machine.obstacle_to("auto")) == (
        "an NVIDIA GeForce RTX 3090 is here, but torch is not installed: `make install`"
    )


@pytest.mark.parametrize(("torch_cuda", "is_unsure"), [("13.0", True), (None, False)])
def test_only_torch_can_tell_where_the_driver_does_not_answer(
    look: Look, torch_cuda: str | None, is_unsure: bool
) -> None:
    """Some small boards have CUDA without NVML."""
    machine = look(error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, torch_cuda=torch_cuda, vendors=())

    assert machine.is_unsure == is_unsure


def test_a_driver_that_is_installed_later_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver([FakeCard()], error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    install(monkeypatch, driver)
    assert read_driver() == Failure(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "NVML Shared Library Not Found")

    driver.error = 0

    assert isinstance(read_driver(), Driver)

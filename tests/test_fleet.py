"""Models do not wait for each other without need, and a model that differs from its declaration is stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gateway.backends.base import Report
from gateway.backends.enabled import why_disabled
from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import ModelEntry, Registry
from gateway.errors import LoadError, StartError
from gateway.fleet import Fleet, Model
from gateway.telemetry import metrics
from gateway.types import ModelInfo, ModelState
from tests.nvml import FakeCard, FakeDriver, install, install_torch

PATIENCE_S = 30


class Backend(FakeBackend):
    """A fake that starts when its gate opens, and records its events."""

    def __init__(self, info: ModelInfo, order: list[str]) -> None:
        super().__init__(info)
        self.gate = asyncio.Event()
        self.has_begun = asyncio.Event()
        self.error: Exception | None = None
        self.num_stops = 0
        self._order = order

    async def start(self, report: Report = lambda _state, _reason: None) -> ModelInfo:
        self._order.append(self._info.id)
        self.has_begun.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return await super().start(report)

    async def stop(self) -> None:
        self.num_stops += 1
        await super().stop()


class Models:
    """A fleet whose models are made one by one."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.models: list[Model] = []

    def add(self, name: str, *, is_remote: bool = True, same_space_as: str | None = None, **info: object) -> Backend:
        where = {"backend": "tei", "upstream": {"urls": ("http://127.0.0.1:9",)}} if is_remote else {}
        entry = ModelEntry.model_validate(
            {"id": name, "source": f"./{name}", "enabled": True, "same_space_as": same_space_as, **where},
            context={"folder": Path()},
        )
        backend = Backend(fake_info(name, **info), self.order)
        self.models.append(Model(entry, backend))
        return backend

    def fleet(self) -> Fleet:
        return Fleet(self.models)

    def states(self) -> dict[str, str]:
        return {model.id: model.state.value for model in self.models}


@pytest.fixture
def made() -> Models:
    return Models()


async def wait_until(look: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not look():  # noqa: ASYNC110  the condition has no event
            await asyncio.sleep(0.01)


async def test_servers_that_hang_hold_up_no_other_model(made: Models) -> None:
    hung, other, here = made.add("hung"), made.add("other"), made.add("here", is_remote=False)
    other.gate.set()
    here.gate.set()
    fleet = made.fleet()
    loading = asyncio.create_task(fleet.start())

    await wait_until(lambda: list(made.states().values()) == ["loading", "ready", "ready"])
    assert hung.has_begun.is_set()
    assert not fleet.started.is_set()
    hung.error = LoadError("no answer")
    hung.gate.set()
    await loading

    assert list(made.states().values()) == ["failed", "ready", "ready"]


async def test_models_of_this_process_are_loaded_one_after_the_other(made: Models) -> None:
    """Each must see the memory that the others left."""
    first, second = made.add("first", is_remote=False), made.add("second", is_remote=False)
    loading = asyncio.create_task(made.fleet().start())
    await asyncio.wait_for(first.has_begun.wait(), PATIENCE_S)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not second.has_begun.is_set()

    first.gate.set()
    second.gate.set()
    await loading

    assert made.order == ["first", "second"]


@pytest.mark.parametrize("is_remote", [False, True])
async def test_a_model_is_compared_with_one_that_comes_later_in_the_file(made: Models, is_remote: bool) -> None:
    far = made.add("far", same_space_as="near", max_tokens=64)
    near = made.add("near", is_remote=is_remote)
    last = made.add("last", is_remote=False)
    for backend in (far, near, last):
        backend.gate.set()

    await made.fleet().start()

    assert made.order.index("near") < made.order.index("far")
    assert set(made.states().values()) == {"ready"}
    infos = {model.id: model.info for model in made.models}
    assert infos["far"] is not None
    assert infos["near"] is not None
    assert infos["far"].fingerprint == infos["near"].fingerprint


async def test_a_model_that_is_not_of_the_space_it_claims_is_stopped(made: Models) -> None:
    made.add("near", is_remote=False).gate.set()
    far = made.add("far", same_space_as="near", width=16, dimensions=(16,))
    far.gate.set()

    await made.fleet().start()

    assert made.states() == {"near": "ready", "far": "failed"}
    assert "its vectors have 16 dimensions, but those of near have 8" in made.models[1].reason
    assert made.models[1].info is None
    assert far.num_stops == 1


async def test_a_model_whose_other_cannot_be_loaded_fails_and_does_not_hang(made: Models) -> None:
    far, near = made.add("far", same_space_as="near"), made.add("near", is_remote=False)
    near.error = LoadError("torn")
    for backend in (far, near):
        backend.gate.set()

    async with asyncio.timeout(PATIENCE_S):
        await made.fleet().start()

    assert made.states() == {"far": "failed", "near": "failed"}
    assert far.num_stops == 1


async def test_loading_that_is_given_up_leaves_no_task_behind(made: Models) -> None:
    hung = made.add("hung")
    loading = asyncio.create_task(made.fleet().start())
    await asyncio.wait_for(hung.has_begun.wait(), PATIENCE_S)
    num_tasks = len(asyncio.all_tasks())

    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading

    assert len(asyncio.all_tasks()) < num_tasks
    assert made.models[0].state is ModelState.LOADING


# ---------------------------------------------------------------------------------------------------------------- a model


async def test_a_model_that_is_ready_says_since_when(made: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.fleet.time.time", lambda: 1_234.9)
    made.add("here", is_remote=False).gate.set()

    await made.fleet().start()

    assert (made.models[0].created, made.models[0].reason) == (1234, "")


async def test_loading_is_logged(made: Models) -> None:
    made.add("here", is_remote=False).gate.set()
    far = made.add("far")
    far.error = LoadError("no answer")
    far.gate.set()
    fleet = made.fleet()

    with capture_logs() as lines:
        await fleet.start()
        first = lines.copy()
        await fleet.load_one(made.models[1])
        again = lines[len(first) :]
        far.error = RuntimeError("another reason")
        await fleet.load_one(made.models[1])
        changed = lines[len(first) + len(again) :]
        await fleet.load()  # nothing is left to load

    assert sorted((line["event"], line["log_level"], line.get("model")) for line in first) == [
        ("model_failed", "error", "far"),
        ("model_loading", "info", "far"),
        ("model_loading", "info", "here"),
        ("model_ready", "info", "here"),
        ("models_loading", "info", None),
    ]
    # A model that stays wrong is logged when its reason changes.
    assert [(line["event"], line["log_level"]) for line in again] == [
        ("model_loading", "debug"),
        ("model_failed", "debug"),
    ]
    assert [line["log_level"] for line in changed if line["event"] == "model_failed"] == ["error"]
    assert made.models[1].reason == "failed to load: RuntimeError: another reason"
    assert not lines[len(first) + len(again) + len(changed) :]


async def test_a_required_model_that_fails_ends_the_start(made: Models) -> None:
    far = made.add("far")
    far.error = LoadError("no answer")
    for backend in (far, made.add("near", is_remote=False)):
        backend.gate.set()
    for model in made.models:
        model.entry = model.entry.model_copy(update={"required": True})
    fleet = made.fleet()

    with pytest.raises(StartError, match=r"^far is required, but failed to load: no answer$"):
        await fleet.start()

    assert fleet.started.is_set()
    assert not fleet.is_ready


async def test_the_fleet_is_ready_when_one_model_and_all_required_ones_are(made: Models) -> None:
    for name in ("one", "two"):
        made.add(name, is_remote=False, max_tokens={"one": 64, "two": 512}[name]).gate.set()
    fleet = made.fleet()
    assert (fleet.is_ready, fleet.max_tokens) == (False, 0)

    await fleet.start()
    assert (fleet.is_ready, fleet.max_tokens) == (True, 512)
    made.models[0].report(ModelState.FAILED, "of this test")
    assert fleet.is_ready
    made.models[0].entry = made.models[0].entry.model_copy(update={"required": True})
    assert not fleet.is_ready
    made.models[1].report(ModelState.FAILED, "of this test")
    assert not fleet.is_ready


async def test_ready_models_are_stopped_at_the_end_and_failed_ones_stay_failed(made: Models) -> None:
    well, torn = made.add("well", is_remote=False), made.add("torn", is_remote=False)
    torn.error = LoadError("torn")
    for backend in (well, torn):
        backend.gate.set()
    fleet = made.fleet()
    await fleet.start()

    await fleet.stop()

    assert made.states() == {"well": "stopped", "torn": "failed"}
    assert made.models[0].reason == "the gateway is shutting down"
    assert (well.num_stops, torn.num_stops) == (1, 1)


async def test_a_model_is_retired_when_its_last_user_has_gone(made: Models) -> None:
    backend = made.add("here", is_remote=False)
    model = made.models[0]
    with model.in_use():
        pass
    with model.in_use():
        with model.in_use():
            retiring = asyncio.create_task(model.retire(3600))
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        assert backend.num_stops == 0

    await asyncio.wait_for(retiring, PATIENCE_S)

    assert backend.num_stops == 1


async def test_a_model_that_no_client_uses_is_retired_at_once(made: Models) -> None:
    backend = made.add("here", is_remote=False)

    async with asyncio.timeout(PATIENCE_S):
        await made.models[0].retire(3600)

    assert backend.num_stops == 1


def test_a_successor_keeps_the_models_that_are_well_and_unchanged(made: Models) -> None:
    for name in ("same", "torn", "changed", "dropped"):
        made.add(name, is_remote=False)
    same, torn, changed, _dropped = made.models
    for model in made.models:
        model.report(ModelState.FAILED if model is torn else ModelState.READY, "")
    entries = (
        changed.entry.model_copy(update={"source": "./elsewhere"}),
        same.entry.model_copy(update={"required": True}),  # which changes nothing about the load
        torn.entry,
        same.entry.model_copy(update={"id": "new"}),
    )
    registry = Registry(path=Path("models.yaml"), version=1, models=entries)

    successor = made.fleet().successor(registry, lambda entry: FakeBackend(fake_info(entry.id)))

    assert [model.id for model in successor] == ["changed", "same", "torn", "new"]
    assert [model.id for model in successor if model in made.models] == ["same"]
    assert all(model.entry == entry for model, entry in zip(successor, entries, strict=True) if model is not same)


def test_a_model_is_a_reference_once_it_has_been_read_with_its_golden_vectors_if_it_runs_here(made: Models) -> None:
    for name, is_remote in (("here", False), ("far", True)):
        made.add(name, is_remote=is_remote)
    golden = {"golden": "/golden.json"}
    here, far = made.models
    assert here.as_reference() is None

    for model in made.models:
        model.entry = model.entry.model_copy(update=golden)
        model.info = fake_info(model.id)

    references = [model.as_reference() for model in (here, far)]
    assert [reference and reference.golden for reference in references] == [Path("/golden.json"), None]


async def test_a_user_that_does_not_go_holds_up_a_model_for_the_grace_alone(made: Models) -> None:
    backend = made.add("here", is_remote=False)

    with made.models[0].in_use():
        async with asyncio.timeout(PATIENCE_S):
            await made.models[0].retire(0.01)

    assert backend.num_stops == 1


async def test_the_state_of_a_model_is_shown_until_it_is_retired(made: Models) -> None:
    made.add("here", is_remote=False)
    [model] = made.models

    def shown() -> tuple[float | None, list[str]]:
        value = metrics.REGISTRY.get_sample_value
        states = [s.value for s in ModelState if value("gateway_model_state", {"model": "here", "state": s.value})]
        return value("gateway_model_ready", {"model": "here"}), states

    model.report(ModelState.LOADING, "")
    assert shown() == (0, ["loading"])
    model.report(ModelState.READY, "")
    assert shown() == (1, ["ready"])
    await model.retire(0)
    model.report(ModelState.STOPPED, "of this test")
    assert shown() == (1, ["ready"])  # it is the successor's


@pytest.mark.parametrize(
    ("enabled", "has_card", "reason"),
    [
        (True, False, ""),
        (False, True, "switched off in models.yaml (`enabled: false`)"),
        ("auto", True, ""),
        ("auto", False, "no accelerator is present (`enabled: true` in models.yaml runs it on the CPU)"),
    ],
)
def test_a_model_is_enabled_as_the_registry_says(
    made: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, enabled: object, has_card: bool, reason: str
) -> None:
    install(monkeypatch, FakeDriver([FakeCard()] if has_card else []))
    install_torch(monkeypatch, tmp_path, "2.13.0", cuda="13.0")
    made.add("here", is_remote=False)
    made.add("far")

    here, far = (model.entry.model_copy(update={"enabled": enabled}) for model in made.models)

    assert why_disabled(here) == reason
    assert why_disabled(far) == (reason if enabled is False else "")  # no card is needed here


@pytest.mark.parametrize(
    ("enabled", "device", "cards", "level", "reason"),
    [
        (False, "auto", [FakeCard()], "info", "switched off in models.yaml (`enabled: false`)"),
        ("auto", "auto", [], "info", "no accelerator is present (`enabled: true` in models.yaml runs it on the CPU)"),
        (
            "auto",
            "auto",
            [FakeCard()],
            "warning",
            "an NVIDIA GeForce RTX 3090 is here, but driver 550.54.14 (CUDA 12.4)",
        ),
        ("auto", "cuda:0", [FakeCard()], "warning", "an NVIDIA GeForce RTX 3090 is here, but driver 550.54.14"),
    ],
)
async def test_a_model_that_a_card_would_run_says_in_the_log_why_none_does(
    made: Models,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    enabled: object,
    device: str,
    cards: list[FakeCard],
    level: str,
    reason: str,
) -> None:
    install(monkeypatch, FakeDriver(cards, "550.54.14", 12040))
    install_torch(monkeypatch, tmp_path, "2.13.0", cuda="13.0")
    made.add("here", is_remote=False)
    [model] = made.models
    model.entry = model.entry.model_copy(update={"enabled": enabled, "device": device})

    with capture_logs() as lines:
        await made.fleet().start()

    [line] = [line for line in lines if line["event"] == "model_disabled"]
    assert (line["model"], line["log_level"], line["reason"]) == ("here", level, model.reason)
    assert model.reason.startswith(reason)
    assert model.reason.endswith("in models.yaml runs it on the CPU)") == (enabled == "auto" and device == "auto")


async def test_a_model_that_is_switched_off_is_not_loaded(made: Models) -> None:
    backend = made.add("off", is_remote=False)
    backend.gate.set()
    made.models[0].entry = made.models[0].entry.model_copy(update={"enabled": False})

    await made.fleet().start()

    assert made.states() == {"off": "disabled"}
    assert made.order == []


# ------------------------------------------------------------------------------------------------------- absent models


class Pauses:
    """The pauses of a fleet that seeks a model. They take no time; ``then`` has something happen in the nth."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds: list[float] = []
        self.then: dict[int, Callable[[], object]] = {}
        monkeypatch.setattr("gateway.fleet.asyncio.sleep", self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.then.get(len(self.seconds), lambda: None)()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Pauses:
    return Pauses(monkeypatch)


async def absent(made: Models) -> tuple[Fleet, Model, Backend]:
    """Return a fleet with a model whose server does not answer."""
    backend = made.add("far")
    backend.gate.set()
    backend.error = LoadError("no answer")
    fleet = made.fleet()
    await fleet.start()
    assert fleet.is_absent(made.models[0])
    return fleet, made.models[0], backend


def accept() -> list[str]:
    return []


async def test_an_absent_model_is_sought_after_pauses_that_double_up_to_a_minute(made: Models, pauses: Pauses) -> None:
    fleet, model, backend = await absent(made)
    pauses.then[8] = lambda: setattr(backend, "error", None)

    await fleet.seek(model, accept)

    assert pauses.seconds == [2, 4, 8, 16, 32, 60, 60, 60]
    assert len(made.order) == 1 + 8
    assert model.state is ModelState.READY
    assert not fleet.is_absent(model)


async def test_a_found_model_that_breaks_a_rule_has_failed_and_is_sought_further(made: Models, pauses: Pauses) -> None:
    fleet, model, backend = await absent(made)
    backend.error = None
    pauses.then[2] = lambda: (reasons.append(model.reason), problems.clear())
    problems, reasons = ["it is in another space", "it is too short"], list[str]()

    await fleet.seek(model, lambda: problems)

    assert reasons == ["failed to load: it is in another space; it is too short"]
    assert (model.state, backend.num_stops) == (ModelState.READY, 1)


async def test_a_model_is_not_sought_any_more_once_its_fleet_is_replaced(made: Models, pauses: Pauses) -> None:
    fleet, model, _backend = await absent(made)
    registry = Registry(path=Path("models.yaml"), version=1, models=(model.entry,))
    successor = fleet.successor(registry, lambda entry: FakeBackend(fake_info(entry.id)))
    pauses.then[2] = lambda: successor.take_over(fleet, registry)

    await fleet.seek(model, accept)

    assert pauses.seconds == [2, 4]
    assert made.order == ["far", "far"]


async def test_a_model_that_is_found_after_its_fleet_was_replaced_is_stopped(made: Models, pauses: Pauses) -> None:
    fleet, model, backend = await absent(made)
    registry = Registry(path=Path("models.yaml"), version=1, models=(model.entry,))
    successor = fleet.successor(registry, lambda entry: FakeBackend(fake_info(entry.id)))
    backend.gate.clear()
    backend.has_begun.clear()
    backend.error = None
    seeking = asyncio.create_task(fleet.seek(model, accept))
    await asyncio.wait_for(backend.has_begun.wait(), PATIENCE_S)

    successor.take_over(fleet, registry)
    backend.gate.set()
    await asyncio.wait_for(seeking, PATIENCE_S)

    assert backend.num_stops == 1


async def test_only_models_on_other_servers_are_sought(made: Models) -> None:
    here = made.add("here", is_remote=False)
    here.gate.set()
    here.error = LoadError("torn")
    fleet = made.fleet()
    await fleet.start()

    assert made.states() == {"here": "failed"}
    assert not fleet.is_absent(made.models[0])

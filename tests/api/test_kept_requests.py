"""Latency and errors of the arms: kept in the file of experiments over restarts, and added up over replicas."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from gateway.app import create_app
from gateway.backends.fake import FakeBackend, fake_info
from gateway.cli.experiment_report import print_evidence, read_evidence
from gateway.config.registry import Experiment, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import Overloaded
from gateway.experiments.exposures import iso
from gateway.experiments.split import Split
from gateway.fleet import Fleet, Model
from gateway.outcomes.files import read_requests
from gateway.outcomes.served import read_served
from gateway.outcomes.store import Reader
from gateway.outcomes.traffic import Traffic
from gateway.types import EmbedJob

Report = dict[str, Any]


def experiment(*weights: float, **fields: Any) -> Experiment:
    named = zip(("mini", "other"), weights or (1, 1), strict=True)
    arms = tuple({"model": model, "weight": weight} for model, weight in named)
    content = {"id": "exp", "kind": "cross_space", "unit": ("body:user",), "force": "header:x-arm", "arms": arms}
    return Experiment.model_validate({**content, **fields})


class Gateway:
    """A gateway in this process."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(create_app(deployment)), base_url="http://gateway"
        )

    async def embed(self, units: Iterable[object], text: str = "a", **headers: str) -> None:
        for unit in units:
            body = {"model": "exp", "input": text, "user": f"user-{unit}"}
            answer = await self.client.post("/v1/embeddings", json=body, headers=headers)
            assert answer.status_code == (429 if text == "full" else 200), answer.text

    async def report(self) -> Report:
        found: Report = (await self.client.get("/v1/experiments/exp")).json()
        return found

    async def stop(self) -> None:
        await self.client.aclose()
        await self.deployment.resources.aclose()


Start = Callable[..., Awaitable[Gateway]]


@pytest.fixture
async def start(make_model: Callable[..., Model], tmp_path: Path) -> AsyncIterator[Start]:
    """Return a function that starts a gateway with a state folder."""

    def refuse(job: EmbedJob) -> None:
        if "full" in job.texts:
            raise Overloaded("full")

    async with contextlib.AsyncExitStack() as stack:

        async def start(one: Experiment | None = None, *, weights: str = "0", **settings: Any) -> Gateway:
            infos = [fake_info("mini"), fake_info("other", fingerprint=weights * 64)]
            models = [make_model(info.id, backend=FakeBackend(info, on_embed=refuse)) for info in infos]
            registry = Registry(
                path=Path("models.yaml"),
                version=1,
                models=tuple(model.entry for model in models),
                experiments=(one or experiment(),),
            )
            fleet = Fleet(models)
            for model in fleet:
                model.info = await model.backend.start()
            fleet.started.set()
            gateway = Gateway(Deployment(registry, Settings(**{"state_dir": tmp_path, **settings}), fleet))
            stack.push_async_callback(gateway.stop)
            return gateway

        yield start


def requests(report: Report) -> list[tuple[int, int]]:
    return [(arm["requests"], arm["server_errors"]) for arm in report["evidence"]]


async def test_the_figures_survive_a_restart(start: Start) -> None:
    first = await start()
    await first.embed(range(240))
    await first.embed(range(40), "full")
    await first.embed(range(5), **{"x-arm": "other"})
    before = await first.report()
    await first.stop()

    second = await start()
    after = await second.report()

    assert sum(map(sum, requests(before))) == 280 + 40
    assert [guardrail["units"] for guardrail in before["guardrails"]] == [240, 240]
    assert before["guardrails"][1]["estimate"] is not None  # requests take too little time here for one of latencies
    before["outcomes"]["as_of"] = after["outcomes"]["as_of"]
    assert after == before | {"evidence": after["evidence"], "guardrails": after["guardrails"]}
    for kind in ("evidence", "guardrails"):
        for row, earlier in zip(after[kind], before[kind], strict=True):
            assert row == {
                key: pytest.approx(value) if isinstance(value, float) else value for key, value in earlier.items()
            }
    await second.embed(range(10))
    assert sum(num for num, _errors in requests(await second.report())) == 290


async def test_they_survive_a_kill_a_few_seconds_later(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.outcomes.traffic._WRITE_EVERY_S", 0.0)
    killed = await start()
    await killed.embed(range(4))
    await killed.report()  # writes what is left

    assert sum(num for num, _errors in requests(await (await start()).report())) == 4


async def test_replicas_that_share_a_folder_report_the_same_figures(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.outcomes.traffic._MAX_AGE_S", 0.0)
    replicas = [await start(), await start()]
    for turn in range(3):
        await replicas[turn % 2].embed(range(20))
        await replicas[turn % 2].embed([1], "full")

    reports = [await replica.report() for replica in [*replicas, replicas[0]]]

    assert [sum(num for num, _ in requests(report)) for report in reports[1:]] == [63, 63]
    assert [sum(errors for _, errors in requests(report)) for report in reports[1:]] == [3, 3]
    for report in reports[1:]:
        assert [guardrail["units"] for guardrail in report["guardrails"]] == [20, 20]
    assert reports[1]["since"] == reports[2]["since"]


async def test_a_report_of_one_experiment_does_not_delay_that_of_another(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.outcomes.traffic._MAX_AGE_S", 0.0)
    reader, writer = await start(), await start()
    monkeypatch.setattr("gateway.outcomes.traffic._MAX_AGE_S", 10.0)
    monkeypatch.setattr("gateway.outcomes.traffic._AGE_PER_READING", 1e9)
    sibling = experiment(id="sibling")
    both = reader.deployment.registry.model_copy(update={"experiments": (experiment(), sibling)})
    reader.deployment._serve(both, reader.deployment.fleet)
    await writer.embed(range(3))
    await writer.report()
    await reader.client.get("/v1/experiments/sibling")

    assert sum(num for num, _errors in requests(await reader.report())) == 3


async def test_a_reload_that_removes_the_experiment_during_a_report(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report that has begun is that of the old registry; the next one is refused."""
    gateway = await start()
    deployment = gateway.deployment
    refresh = Traffic.refresh

    async def reload_first(traffic: Traffic, *args: Any) -> None:
        deployment._serve(deployment.registry.model_copy(update={"experiments": ()}), deployment.fleet)
        await refresh(traffic, *args)

    monkeypatch.setattr(Traffic, "refresh", reload_first)
    answers = [await gateway.client.get("/v1/experiments/exp") for _ in range(2)]

    assert [answer.status_code for answer in answers] == [200, 404]


async def test_the_files_of_several_machines_are_added_up(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, units in (("one", range(130)), ("two", range(100, 230))):
        gateway = await start(state_dir=tmp_path / name)
        await gateway.embed(units)
        await gateway.embed(range(4), "full")
        await gateway.stop()
    files = [tmp_path / name / "experiments.sqlite3" for name in ("one", "two", "one")]

    report = read_evidence(gateway.deployment.registry, "exp", files)
    print_evidence(report, is_of_files=True)

    assert sum(num for num, _errors in requests(report.model_dump())) == 268
    assert [guardrail.units for guardrail in report.guardrails] == [230, 230]
    printed = capsys.readouterr().out
    assert "latency of other against mini" in printed  # whether the times of so short requests differ enough is chance
    assert "errors of the server" in printed
    assert f"requests since {report.since}" in printed


async def test_other_weights_count_from_zero_and_earlier_weights_have_their_figures_back(start: Start) -> None:
    for weights, before, units in (((1, 1), 0, 20), ((1, 3), 0, 10), ((1, 1), 20, 5)):
        gateway = await start(experiment(*weights))
        assert sum(num for num, _errors in requests(await gateway.report())) == before
        await gateway.embed(range(units))
        await gateway.stop()

    counted = await start(experiment(counts_from=datetime.now(UTC)))
    report = await counted.report()

    assert requests(report) == [(0, 0), (0, 0)]
    assert [guardrail["units"] for guardrail in report["guardrails"]] == [0, 0]


async def test_a_model_that_changes_under_its_id_is_noticed(start: Start, tmp_path: Path) -> None:
    """Its arm would have the figures of two models."""
    one = experiment(outcome={"name": "kept"})
    for weights in "0101":
        gateway = await start(one, weights=weights)
        await gateway.embed(range(3))
        report = await gateway.report()
        await gateway.stop()
        if weights == "0" and not report["warnings"]:
            continue  # the first run

        [warning] = report["warnings"]
        [comparison] = report["outcomes"]["outcomes"][0]["comparisons"]
        assert warning.startswith(f"the model of arm 'other' changed on {datetime.now(UTC):%Y-}")
        assert (comparison["verdict"], comparison["reason"]) == (None, warning)

    file = tmp_path / "experiments.sqlite3"
    assert read_evidence(gateway.deployment.registry, "exp", [file]).warnings == [warning]
    again = await start(experiment(counts_from=datetime.now(UTC)), weights="1")
    await again.embed(range(3))
    assert (await again.report())["warnings"] == []


async def test_experiments_with_the_same_salt_and_arms_are_all_kept(start: Start, tmp_path: Path) -> None:
    gateway = await start()
    registry = gateway.deployment.registry
    both = (experiment(id="sibling", salt="both"), experiment(salt="both"))
    gateway.deployment._serve(registry.model_copy(update={"experiments": both}), gateway.deployment.fleet)
    await gateway.embed(range(3))
    body = {"model": "sibling", "input": "a", "user": "user-1"}
    assert (await gateway.client.post("/v1/embeddings", json=body)).status_code == 200
    await gateway.stop()

    file = tmp_path / "experiments.sqlite3"
    kept = [read_requests([file], one.id, Split(one).generation) for one in both]

    assert [sum(arm.requests for arm in counts.arms.values()) for counts in kept] == [1, 3]


async def test_a_reload_to_weights_of_an_earlier_run_counts_what_it_has(start: Start) -> None:
    earlier = await start(experiment(1, 3))
    await earlier.embed(range(7))
    await earlier.stop()
    gateway = await start(experiment(1, 1))
    await gateway.embed(range(2))

    deployment = gateway.deployment
    deployment._serve(deployment.registry.model_copy(update={"experiments": (experiment(1, 3),)}), deployment.fleet)
    await gateway.embed(range(2))

    assert sum(num for num, _errors in requests(await gateway.report())) == 9


async def test_a_return_to_earlier_weights_is_known_since_the_reload(start: Start, tmp_path: Path) -> None:
    """Even if no request followed."""
    gateway = await start(experiment(1, 1))
    deployment, since = gateway.deployment, []
    for weights in ((1, 3), (1, 1)):
        await gateway.embed(range(2))
        await gateway.report()  # writes
        changed = deployment.registry.model_copy(update={"experiments": (experiment(*weights),)})
        deployment._serve(changed, deployment.fleet)
        since.append(deployment.counting_since["exp"])
        await asyncio.sleep(0.01)  # the change is noted later, but not its time
    await gateway.report()

    with Reader(tmp_path / "experiments.sqlite3") as reader:
        served = read_served(reader, "exp")
    assert [iso(change.time) for change in served[1:]] == since
    assert served[0].generation == served[2].generation


async def test_a_file_that_cannot_be_written_delays_the_counts(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.outcomes.store._BUSY_S", 0.01)
    gateway = await start()
    await gateway.embed(range(3))
    with contextlib.closing(sqlite3.connect(tmp_path / "experiments.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with capture_logs() as lines:
            await gateway.embed(range(3))
            delayed = await gateway.report()
        other.execute("ROLLBACK")
    await gateway.embed(range(3))
    await gateway.stop()

    counts = read_requests([tmp_path / "experiments.sqlite3"], "exp", Split(experiment()).generation)

    assert "requests_not_kept" in [line["event"] for line in lines if line["log_level"] == "error"]
    assert sum(num for num, _errors in requests(delayed)) == 6
    assert sum(arm.requests for arm in counts.arms.values()) == 9


async def test_a_file_of_an_earlier_version_gets_the_tables(start: Start, tmp_path: Path) -> None:
    first = await start()
    await first.embed(range(3))
    await first.stop()
    file = tmp_path / "experiments.sqlite3"
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("DROP TABLE traffic")
        other.execute("DROP TABLE unit_sums")
    generation = Split(experiment()).generation
    assert not read_requests([file], "exp", generation).arms

    second = await start()
    await second.embed(range(2))
    report = await second.report()

    assert sum(arm["units"] for arm in report["evidence"]) == 3
    assert sum(num for num, _errors in requests(report)) == 2
    assert report["since"] > report["units_since"]


async def test_units_with_sums_are_bounded_in_the_file(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known units still add to their sums."""
    monkeypatch.setattr("gateway.outcomes.traffic.MAX_SUMS", 10)
    for units in (range(8), range(30), range(4)):
        gateway = await start()
        await gateway.embed(units)
        await gateway.stop()
    counts = read_requests([tmp_path / "experiments.sqlite3"], "exp", Split(experiment()).generation)

    sums = [arm.sums.columns()[0] for arm in counts.arms.values()]
    assert 8 <= sum(map(len, sums)) <= 10
    assert 8 + 8 + 4 <= sum(map(sum, sums)) <= 8 + 10 + 4
    assert sum(arm.requests for arm in counts.arms.values()) == 8 + 30 + 4


async def test_processes_that_share_a_folder_share_the_bound(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.outcomes.traffic.MAX_SUMS", 10)
    processes = [await start(), await start()]
    for turn in range(6):
        await processes[turn % 2].embed(range(3 * turn, 3 * turn + 3))
        await processes[turn % 2].report()  # writes the counts
    counts = read_requests([tmp_path / "experiments.sqlite3"], "exp", Split(experiment()).generation)

    assert sum(len(arm.sums) for arm in counts.arms.values()) == 10

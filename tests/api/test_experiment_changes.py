"""New weights and the end of an experiment: the units that move, the keys that may change them, and the written file."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from gateway.app import create_app
from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import load_registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.fleet import Fleet

CheckError = Callable[..., str]
ADMIN = {"authorization": "Bearer operator-key"}
REGISTRY = """\
version: 1
models:
  - {id: one, source: ./one, enabled: true}
  - {id: two, source: ./two, enabled: true}
experiments:
  - id: exp          # a comment
    kind: cross_space
    unit: {from: [model]}
    arms:
      - {model: one, weight: 80}
      - {model: two, weight: 20}
"""


class File:
    """A registry's file, as a test reads and writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write(REGISTRY)

    def write(self, text: str) -> None:
        self.path.write_text(text)

    @property
    def text(self) -> str:
        return self.path.read_text()


@asynccontextmanager
async def serving(file: File, **settings: object) -> AsyncIterator[httpx.AsyncClient]:
    path = file.path
    registry = load_registry(path, {})

    def make_backend(entry: object) -> FakeBackend:
        return FakeBackend(fake_info(entry.id, width=4 if entry.id == "one" else 8))

    deployment = Deployment(
        registry,
        Settings(admin_key="operator-key", models=path, **settings),
        Fleet.from_registry(registry, make_backend),
        read_registry=lambda: load_registry(path, {}),
        make_backend=make_backend,
    )
    await deployment.start()
    transport = httpx.ASGITransport(create_app(deployment))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path / "models.yaml")


async def test_previews_are_computed_in_one_thread_however_many_are_asked_for(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each hashes thousands of units, and several threads at once would hold up the event loop."""
    threads = set()

    def moved_units(*_values: object) -> dict[str, float]:
        threads.add(threading.current_thread().name)
        return {}

    monkeypatch.setattr("gateway.api.experiment_changes.moved_units", moved_units)
    async with serving(file) as client:
        asked = (client.post("/v1/experiments/exp/preview", json={"weights": {"two": 80}}) for _ in range(8))
        answers = await asyncio.gather(*asked)

    assert [answer.status_code for answer in answers] == [200] * 8
    assert threads == {"tokens_0"}


async def test_a_preview_says_who_moves_and_changes_nothing(file: File) -> None:
    async with serving(file) as client:
        answer = await client.post("/v1/experiments/exp/preview", json={"weights": {"two": 80}})
        same = await client.post("/experiments/exp/preview", json={"weights": {}})

    body = answer.json()
    assert body["weights"] == {"one": 80.0, "two": 80.0}
    assert list(body["moves"]) == ["one -> two"]
    assert body["moves"]["one -> two"] == pytest.approx(0.3, abs=0.02)
    assert body["counts_begin_again"]
    assert (same.json()["moves"], same.json()["counts_begin_again"]) == ({}, False)
    assert file.text == REGISTRY


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"three": 1}, "has no arm 'three'; available: one, two"),
        ({"one": -1}, "must be a number from 0 to"),
        ({"one": 1e300}, "must be a number from 0 to"),
        ({"one": 0, "two": 0}, "at least one arm needs a weight above 0"),
        ({"one": "many"}, "weights"),
        ([1, 2], "weights"),
    ],
)
async def test_wrong_weights_are_refused(file: File, check_error: CheckError, weights: object, message: str) -> None:
    async with serving(file) as client:
        for url in ("/v1/experiments/exp/preview", "/admin/experiments/exp/weights"):
            answer = await client.post(url, json={"weights": weights}, headers=ADMIN)
            assert message in check_error(answer, 400, "invalid_input", param="weights")
    assert file.text == REGISTRY


async def test_the_operator_changes_weights_in_the_file_and_at_once(file: File) -> None:
    async with serving(file) as client:
        answer = await client.post("/admin/experiments/exp/weights", json={"weights": {"two": 60}}, headers=ADMIN)
        report = (await client.get("/v1/experiments/exp")).json()

    assert answer.status_code == 200, answer.text
    assert "one 80, two 20 -> one 80, two 60" in answer.json()["experiments"]["exp"]
    assert [arm["weight"] for arm in report["arms"]] == [80, 60]
    assert file.text == REGISTRY.replace("weight: 20", "weight: 60")


async def test_the_operator_ends_an_experiment_once(file: File, check_error: CheckError) -> None:
    async with serving(file) as client:
        answer = await client.post("/admin/experiments/exp/end", headers=ADMIN)
        assigned = (await client.get("/v1/experiments/exp/assignment", params={"unit": "ada"})).json()
        again = await client.post("/admin/experiments/exp/end", headers=ADMIN)

    assert answer.json()["experiments"]["exp"] == "changed; counts continue"
    assert (assigned["arm"], assigned["reason"], assigned["counted"]) == ("one", "ended", False)
    assert " ended on " in check_error(again, 400, "invalid_input")
    assert "    end: 2" in file.text


async def test_the_counts_begin_again_and_units_stay_in_their_arms(file: File, tmp_path: Path) -> None:
    units = [f"unit-{number}" for number in range(20)]
    async with serving(file, state_dir=tmp_path / "state") as client:

        async def embed() -> list[str]:
            answers = [await client.post("/v1/embeddings", json={"model": f"exp/{u}", "input": "a"}) for u in units]
            return [answer.headers["x-gateway-arm"] for answer in answers]

        async def outcome() -> dict:
            [found] = (await client.get("/v1/experiments/exp/outcomes")).json()["outcomes"]
            return {"units": [arm["units"] for arm in found["arms"]], "posted": (found["outcomes"], found["unmatched"])}

        arms = await embed()
        kept = [{"unit": unit, "name": "kept", "value": 1, "id": unit} for unit in units]
        await client.post("/v1/experiments/exp/outcomes", json=kept)
        before = await outcome()
        await asyncio.sleep(1 - time.time() % 1)  # times in the file are whole seconds
        answer = await client.post("/admin/experiments/exp/count-again", headers=ADMIN)
        report = (await client.get("/v1/experiments/exp")).json()
        after = await outcome()
        arms_after = await embed()
        counted = (await client.get("/v1/experiments/exp")).json()
        async with asyncio.timeout(30):  # a report is not computed again at once
            while (again := await outcome())["units"] == [0, 0]:  # noqa: ASYNC110  the report has no event
                await asyncio.sleep(0.01)
        refused = await client.post("/admin/experiments/exp/count-again")

    assert "counts start over" in answer.json()["experiments"]["exp"]
    assert sum(before["units"]) == 20
    assert [(arm["units"], arm["requests"]) for arm in report["evidence"]] == [(0, 0), (0, 0)]
    assert before["posted"] == (20, 0)
    assert after == {"units": [0, 0], "posted": (0, 0)}
    assert arms_after == arms
    assert sum(arm["units"] for arm in counted["evidence"]) == 20
    assert again["units"] == before["units"]
    assert "    counts_from: 2" in file.text
    assert refused.status_code == 403


async def test_changes_at_once_are_made_one_after_another(file: File) -> None:
    async with serving(file) as client:
        path = "/admin/experiments/exp/weights"
        changes = [client.post(path, json={"weights": {"two": weight}}, headers=ADMIN) for weight in range(21, 27)]
        answers = await asyncio.gather(*changes)
        served = (await client.get("/v1/experiments/exp")).json()

    assert [answer.status_code for answer in answers] == [200] * 6
    (weight,) = [arm["weight"] for arm in served["arms"] if arm["model"] == "two"]
    assert file.text == REGISTRY.replace("weight: 20", f"weight: {weight:g}")


async def test_only_the_operator_may(file: File, check_error: CheckError) -> None:
    async with serving(file) as client:
        for name in ("weights", "end"):
            answer = await client.post(f"/admin/experiments/exp/{name}", json={"weights": {"two": 1}})
            check_error(answer, 403, "forbidden", type_="permission_error")
        unknown = await client.post("/admin/experiments/none/end", headers=ADMIN)
    assert "'none'" in check_error(unknown, 404, "experiment_not_found")
    assert file.text == REGISTRY


async def test_a_change_that_is_refused_leaves_the_file_as_it_was(
    file: File, check_error: CheckError, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(file) as client:
        monkeypatch.setattr("gateway.deployment.broken_rules", lambda *_: ["a rule is broken"])
        answer = await client.post("/admin/experiments/exp/weights", json={"weights": {"two": 60}}, headers=ADMIN)

    assert "a rule is broken" in check_error(answer, 400, "reload_refused")
    assert file.text == REGISTRY


async def test_a_file_that_was_edited_by_hand_is_read_first(file: File, check_error: CheckError) -> None:
    async with serving(file) as client:
        file.write(REGISTRY.replace("weight: 80", "weight: 70"))
        answer = await client.post("/admin/experiments/exp/weights", json={"weights": {"two": 60}}, headers=ADMIN)

    assert "has changes that are not served yet" in check_error(answer, 400, "invalid_input")
    assert "weight: 70" in file.text
    assert "weight: 60" not in file.text

"""Comparisons over HTTP: their data, their judge, and their progress as events."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from gateway.comparisons.jobs import Jobs, Wanted
from gateway.config.capture import Capture
from gateway.config.registry import Arm, Experiment

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
OPERATOR = {"authorization": "Bearer operator-key"}
BODY = {"name": "new", "arms": ["mini", "jina"], "data": "mine"}


@pytest.fixture
async def operator(connect: Connect, tmp_path: Path) -> httpx.AsyncClient:
    client = await connect(admin_key="operator-key", api_keys="client-key", runs_dir=tmp_path)
    client.headers.update(OPERATOR)
    return client


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[Wanted]:
    """Make a Python program the command of all comparisons: progress, the judge's question, and the end."""
    program = (
        "import json, os, sys\n"
        "def say(**line): print(json.dumps(line), file=sys.stderr, flush=True)\n"
        "say(step='mini: documents', done=1, total=9)\n"
        "say(question='It costs ' + os.environ.get('JUDGE_API_KEY', 'nothing'))\n"
        "sys.exit('the answer was ' + sys.stdin.readline())\n"
    )
    wanted: list[Wanted] = []

    def command(_jobs: Jobs, asked: Wanted, _url: str) -> list[str]:
        wanted.append(asked)
        return [sys.executable, "-c", program]

    monkeypatch.setattr(Jobs, "_command", command)
    return wanted


def upload(name: str = "mine") -> dict[str, dict[str, object]]:
    files = {
        "documents": ("docs.csv", "text\na document\n"),
        "queries": ("queries.txt", "a query\n"),
        "judgments": ("", b""),
    }
    return {"data": {"name": name}, "files": files}


def read_events(text: str) -> list[tuple[str, dict]]:
    lines = [event.split("\n") for event in text.strip().split("\n\n") if not event.startswith(":")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in lines]


async def test_uploaded_tables_are_a_data_set(operator: httpx.AsyncClient, tmp_path: Path) -> None:
    answer = await operator.post("/admin/data-sets", **upload())
    assert answer.json() == {"object": "data_set", "name": "mine", "documents": 1, "queries": 1, "judgments": 0}
    assert (await operator.get("/admin/comparisons")).json()["data_sets"] == ["mine"]
    again = await operator.post("/admin/data-sets", **upload())
    assert (again.status_code, "already" in again.json()["message"]) == (400, True)
    wrong = await operator.post("/admin/data-sets", json={})
    assert (wrong.status_code, "multipart/form-data" in wrong.json()["message"]) == (400, True)
    assert (await operator.delete("/admin/data-sets/mine")).json()["deleted"]
    assert (await operator.delete("/admin/data-sets/mine")).status_code == 404
    assert not list((tmp_path / "data").iterdir())


async def test_only_the_operator_uploads_and_follows(operator: httpx.AsyncClient) -> None:
    headers = {"authorization": "Bearer client-key"}
    for method, path in (
        ("POST", "/admin/data-sets"),
        ("DELETE", "/admin/data-sets/mine"),
        ("GET", "/admin/comparisons/new/events"),
        ("POST", "/admin/comparisons/new/answer"),
    ):
        assert (await operator.request(method, path, headers=headers)).status_code == 403


async def test_events_follow_a_comparison_and_its_judge_is_asked_only_after_consent(
    operator: httpx.AsyncClient, commands: list[Wanted]
) -> None:
    await operator.post("/admin/data-sets", **upload())
    judge = {"url": "http://127.0.0.1:1/v1", "model": "judge", "key": "judge-secret"}
    started = await operator.post("/admin/comparisons", json={**BODY, "judge": judge})
    assert started.json()["state"] == "running"
    following = asyncio.create_task(operator.get("/admin/comparisons/new/events"))
    async with asyncio.timeout(60):
        while (card := (await operator.get("/admin/comparisons/new")).json())["question"] is None:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert card["question"] == "It costs judge-secret"
    assert (await operator.post("/admin/comparisons/new/answer", json={"agree": False})).json()["question"] is None

    events = await following

    assert events.headers["content-type"].startswith("text/event-stream")
    found = read_events(events.text)
    assert {name for name, _card in found[:-1]} == {"progress"}
    name, last = found[-1]
    assert (name, last["state"], last["problem"]) == ("end", "failed", "the answer was no\n")
    assert "judge-secret" not in repr(commands)
    after = read_events((await operator.get("/admin/comparisons/new/events")).text)
    assert [name for name, _card in after] == ["end"]
    assert (await operator.get("/admin/comparisons/none/events")).status_code == 404
    assert (await operator.post("/admin/comparisons/new/answer", json={"agree": True})).status_code == 404


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"judge": {"url": "ftp://x", "model": "m"}}, "'ftp://x' is not the address of an API"),
        ({"judge": {"url": "http://[", "model": "m"}}, "is not the address of an API"),
        ({"judge": {"url": "http://a:b@host/v1", "model": "m"}}, "contains a password"),
        ({"judge": {"url": "http://host", "model": ""}}, "needs the address of an API, and the name of a model"),
        ({"judge": {"url": "http://host", "model": "m", "key": "a\nb"}}, "only printable ASCII characters"),
        ({"judge": {"url": "http://host"}}, "judge"),
        ({"captured": "mini"}, "'mini' has no `capture` in models.yaml; available: none"),
    ],
)
async def test_a_wrong_judge_or_capture_is_refused_before_anything_runs(
    operator: httpx.AsyncClient, commands: list[Wanted], more: dict, message: str
) -> None:
    await operator.post("/admin/data-sets", **upload())
    answer = await operator.post("/admin/comparisons", json={**BODY, **more})
    assert answer.status_code == 400
    assert message in answer.json()["message"]
    assert not commands


async def test_captured_queries_replace_those_of_the_data_set(
    connect: Connect, commands: list[Wanted], tmp_path: Path
) -> None:
    capture = Capture(queries=0.1, to=str(tmp_path / "captured.jsonl"))
    arms = (Arm(model="mini", weight=1), Arm(model="jina", weight=1))
    search = Experiment(id="search", kind="cross_space", unit=("body:user",), arms=arms, capture=capture)
    client = await connect(experiments=[search], admin_key="operator-key", runs_dir=tmp_path)
    client.headers.update(OPERATOR)
    await client.post("/admin/data-sets", **upload())
    assert (await client.get("/admin/comparisons")).json()["captured"] == ["search"]

    await client.post("/admin/comparisons", json={**BODY, "captured": "search"})

    async with asyncio.timeout(60):
        while not commands:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert commands[0].queries is not None
    assert commands[0].queries.file == tmp_path / "captured.jsonl"
    await client.post("/admin/comparisons/new/stop")

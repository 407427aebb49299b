"""The examples end with a reason when the gateway, the experiment or a library is not as they need it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import httpx
import pytest

from gateway.config.registry import Experiment
from tests.console.served import Gateway, serving

EXAMPLES = Path(__file__).parents[2] / "examples"


def experiment(**fields: Any) -> Experiment:
    content = {
        "id": "mem0-ab",
        "kind": "cross_space",
        "unit": ("model",),
        "outcome": {"name": "helped", "margin": 0.05},
        "arms": ({"model": "jina", "weight": 1}, {"model": "bge", "weight": 1}),
        **fields,
    }
    return Experiment.model_validate(content)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    import mem0_ab

    return mem0_ab


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Gateway]:
    with serving(experiments=(experiment(),), state_dir=tmp_path / "state") as gateway:
        yield gateway


def run(*options: object) -> tuple[int, str]:
    command = [sys.executable, EXAMPLES / "mem0_ab.py", *map(str, options)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=180)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_an_experiment_that_has_ended_is_said_before_anything_is_stored(tmp_path: Path) -> None:
    ended = experiment(end=datetime(2026, 1, 1, tzinfo=UTC))
    with serving(experiments=(ended,), state_dir=tmp_path / "state") as gateway:
        code, said = run("--base-url", f"{gateway.url}/v1")
    assert (code, said) == (1, "The experiment does not count user-0: ended\n")


def test_outcomes_that_are_turned_off_are_said_before_the_work() -> None:
    with serving(experiments=(experiment(),)) as gateway:
        code, said = run("--base-url", f"{gateway.url}/v1")
    assert code == 1
    assert said.startswith("The gateway refuses: outcomes are turned off: set GATEWAY_STATE_DIR")


def test_a_gateway_that_is_down_is_said() -> None:
    code, said = run("--base-url", "http://127.0.0.1:1/v1")
    assert code == 1
    assert said.startswith("No gateway answers at http://127.0.0.1:1/v1/: ")


def test_an_address_that_is_not_the_gateways_is_said() -> None:
    class Other(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(502)

        def log_message(self, *_arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = Thread(target=server.handle_request)
        thread.start()
        code, said = run("--base-url", f"http://127.0.0.1:{server.server_port}/v1")
        thread.join()
    assert code == 1
    assert "answers 502 without JSON: is it the address of the gateway?" in said


def test_a_number_of_users_that_makes_no_sense_is_refused() -> None:
    code, said = run("--users", 0)
    assert code == 2
    assert "--users must be at least 1, got 0" in said


def test_more_users_than_one_request_may_have_are_assigned(running: Gateway, example: ModuleType) -> None:
    users = [f"user-{i}" for i in range(2_500)]
    with httpx.Client(base_url=f"{running.url}/v1") as client:
        assignments = example.assign(client, users)
    assert list(assignments) == users


def test_outcomes_that_do_not_count_are_said(
    running: Gateway, example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(outcomes: dict[str, bool]) -> list[str]:
        example.post(client, outcomes)
        lines = capsys.readouterr().out.splitlines()  # with those of the gateway's log
        return [line for line in lines if line.startswith("of ")]

    with httpx.Client(base_url=f"{running.url}/v1") as client:
        client.post("/embeddings", json={"model": "mem0-ab/ada", "input": "a"}).raise_for_status()
        assert printed({"ada": True}) == []
        assert printed({"ada": False}) == ["of 1 outcomes, left out: 1 conflicting"]
        (unseen,) = printed({"bob": True})
        assert unseen.startswith("of 1 stored outcomes, 1 unseen: their users sent no request to this gateway")


def test_an_experiment_without_a_declared_outcome_has_no_decision(tmp_path: Path, example: ModuleType) -> None:
    undeclared = experiment(outcome=None)
    with (
        serving(experiments=(undeclared,), state_dir=tmp_path / "state") as gateway,
        httpx.Client(base_url=f"{gateway.url}/v1") as client,
        pytest.raises(SystemExit, match="declares no `outcome` for the experiment"),
    ):
        example.report(client)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # Mem0 cannot close its connections
def test_a_gateway_that_stops_in_between_is_said(
    running: Gateway, example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    live = example.live

    def without_gateway(memory: Any, user: str) -> bool:
        memory.embedding_model.client.base_url = "http://127.0.0.1:1/v1"
        answer: bool = live(memory, user)
        return answer

    monkeypatch.setattr(example, "live", without_gateway)
    monkeypatch.setattr("sys.argv", ["mem0_ab.py", "--base-url", f"{running.url}/v1", "--dir", str(tmp_path / "mem0")])

    with pytest.raises(SystemExit, match="The gateway did not embed: Connection error"):
        example.main()


@pytest.mark.parametrize("name", ["mem0_ab", "mem0_memory"])
def test_an_old_mem0_is_named(example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    import mem0_memory

    module = example if name == "mem0_ab" else mem0_memory
    monkeypatch.setattr(module, "version", lambda _name: "1.0.5")
    with pytest.raises(SystemExit, match=r"needs mem0ai 2 or later, and 1\.0\.5 is installed"):
        example.open_memories(None, {}, tmp_path) if name == "mem0_ab" else mem0_memory.import_mem0()

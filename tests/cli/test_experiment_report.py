"""``gateway experiments``: its output, from a gateway's answer or from exposure logs, and its errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from gateway.cli.experiment_report import ask_evidence
from gateway.cli.main import app
from gateway.config.registry import Experiment, load_registry
from gateway.errors import StartError
from gateway.experiments.arms import RequestRecord
from gateway.experiments.exposures import Exposure, ExposureLog
from gateway.experiments.split import Split
from gateway.experiments.stats import ExperimentStats

REGISTRY = """\
version: 1
models:
  - {id: one, source: ./one}
  - {id: two, source: ./two}
experiments:
  - id: exp
    kind: cross_space
    unit: {from: [header:x-unit]}
    arms:
      - {model: one, weight: 75}
      - {name: second, model: two, weight: 25}
"""
Answering = Callable[[Callable[[httpx.Request], httpx.Response]], None]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text(REGISTRY, encoding="utf-8")
    return path


@pytest.fixture
def experiment(models: Path) -> Experiment:
    return load_registry(models, {}).experiments[0]


@pytest.fixture
def gateway_answers(monkeypatch: pytest.MonkeyPatch) -> Answering:
    """Return a function that sets the gateway's answer."""

    def answer(respond: Callable[[httpx.Request], httpx.Response]) -> None:
        transport = httpx.MockTransport(respond)
        monkeypatch.setattr("gateway.cli.client.httpx.AsyncClient", partial(httpx.AsyncClient, transport=transport))

    return answer


def run(*arguments: object) -> tuple[int, str, str]:
    """Run the command; return its status, and its output with single spaces and without the table's lines."""
    result = CliRunner().invoke(app, ["experiments", *map(str, arguments)])
    assert not isinstance(result.exception, Exception), result.exception
    bare = "".join(" " if char in "│┃┏┓┗┛┡┩┳╇┴━─├┤┼└┘┌┐" else char for char in result.stdout)
    return result.exit_code, " ".join(bare.split()), result.stderr


def write_log(path: Path, experiment: Experiment, numbers: range, weights_changed: int = 0) -> Path:
    """Write the exposures of some units, three of four in the first arm."""
    log = ExposureLog(path, 10**6, 3)
    generation = Split(experiment).generation
    arms = [experiment.arms[number % 4 == 0] for number in numbers]
    for number, arm in zip(numbers, arms, strict=True):
        time = f"2026-11-01T00:{number // 60:02}:{number % 60:02}.000+00:00"
        log.write(Exposure(time, "exp", generation, arm.label, f"{number:016x}", arm.model, "space@0123456789ab"))
    for number in range(weights_changed):
        log.write(Exposure(time, "exp", "before00", "one", f"{number:016x}", "one", "space@0123456789ab"))
        log.write(Exposure(time, "exp-2", generation, "one", f"{number:016x}", "one", "space@0123456789ab"))
    return path


def evidence_json(experiment: Experiment, num_units: tuple[int, int]) -> str:
    """Return the answer of a gateway that has seen some units in each arm, and one error."""
    stats = ExperimentStats(None)
    seen = RequestRecord(
        experiment="exp",
        generation=Split(experiment).generation,
        arm="one",
        reason="unit",
        is_counted=True,
        unit="0" * 16,
        model="one",
        space="space@0123456789ab",
        elapsed_s=0.02,
        num_texts=3,
        num_tokens=100,
        queue_s=0.002,
    )
    numbered = [
        (number / num, number, arm)
        for arm, num in zip(experiment.arms, num_units, strict=True)
        for number in range(num)
    ]
    for _, number, arm in sorted(numbered, key=lambda one: one[0]):  # evenly spaced, like their arrival
        record = dataclasses.replace(
            seen, arm=arm.label, model=arm.model, unit=f"{number:016x}", share=arm.weight / 100
        )
        stats.record(dataclasses.replace(record, elapsed_s=0.018 + number % 2 * 0.004))
    stats.record(dataclasses.replace(seen, space=None, error_code="overloaded", is_server_error=True))
    stats.record(dataclasses.replace(seen, is_counted=False, reason="forced"))
    return stats.report(experiment, seen.generation).model_dump_json()


def test_the_arms_of_a_running_gateway_are_shown_side_by_side(
    gateway_answers: Answering, experiment: Experiment
) -> None:
    asked: list[httpx.Request] = []

    def respond(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, text=evidence_json(experiment, (1_499, 500)))

    gateway_answers(respond)

    status, printed, errors = run("exp", "--url", "http://gateway:9000/v1/")

    assert (status, errors) == (0, "")
    assert str(asked[0].url) == "http://gateway:9000/v1/experiments/exp"
    assert "authorization" not in asked[0].headers
    assert printed.startswith("exp (cross_space) runs; arms, weights and salt: ")
    for row in (
        "one second model one two weight 75 25",
        "units 1,499 500",
        "share of units 74.99% 25.01%",
        "expected share 75.00% 25.00%",
        "requests 1,500 500",
        "errors of the server 1 0 errors of clients 0 0 error rate 0.07% 0.00%",
        "units without an answer 0 0",
        "texts 4,497 1,500",
        "tokens 149,900 50,000",
        "tokens/s of a request 5,000 5,000",
        "p95 in the queue 2.0 ms 2.0 ms",
        "not counted: forced 1",
        "split of the units: no mismatch found, p = 1 at any look (chi-square 0.00, degrees of freedom 1)",
        "latency of second against one, by unit: x ",
        "at equal length of the texts: no difference found",
        "errors of second against one: not yet; needs 100 units in each arm, and enough of them must differ",
    ):
        assert row in printed
    assert " ms p99 (descriptive) " in printed


def test_a_mismatch_is_shown(gateway_answers: Answering, experiment: Experiment) -> None:
    gateway_answers(lambda _: httpx.Response(200, text=evidence_json(experiment, (500, 300))))

    _, printed, _ = run("exp")

    assert "split of the units: sample ratio mismatch (p = " in printed
    assert "do not trust a comparison of the arms" in printed


def test_without_an_id_the_experiments_are_listed(gateway_answers: Answering, experiment: Experiment) -> None:
    arms = [{"arm": arm.label, "model": arm.model, "task": None, "weight": arm.weight} for arm in experiment.arms]
    card = {"id": "exp", "object": "experiment", "kind": "cross_space", "start": None, "end": None, "arms": arms}
    gateway_answers(lambda _: httpx.Response(200, json={"object": "list", "data": [card | {"running": True}]}))

    status, printed, _ = run()

    assert status == 0
    assert "exp cross_space yes - - one: 75, second: 25" in printed


def test_without_experiments_it_says_where_to_declare_them(gateway_answers: Answering) -> None:
    gateway_answers(lambda _: httpx.Response(200, json={"object": "list", "data": []}))

    assert run()[1] == "no experiments; declare them under `experiments` in models.yaml"


def test_the_key_comes_from_the_environment(
    gateway_answers: Answering, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []

    def respond(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["authorization"])
        return httpx.Response(200, text=evidence_json(experiment, (1, 1)))

    gateway_answers(respond)
    monkeypatch.setenv("EMBEDDINGS_API_KEY", "usual")
    monkeypatch.setenv("MY_KEY", "mine\n")
    monkeypatch.setenv("NO_TEXT", "\udcff")  # a byte that is not UTF-8

    run("exp")
    run("exp", "--api-key-env", "MY_KEY")
    run("exp", "--api-key-env", "NO_TEXT")

    assert keys == ["Bearer usual", "Bearer mine", "Bearer \xff"]


def refuse(_: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("[Errno 111] Connection refused")


def never(_: httpx.Request) -> httpx.Response:
    raise httpx.ReadTimeout("timed out")


def break_off(_: httpx.Request) -> httpx.Response:
    raise httpx.RemoteProtocolError("secret")


def error(message: str) -> dict[str, dict[str, str]]:
    return {"error": {"message": message}}


@pytest.mark.parametrize(
    ("respond", "reason"),
    [
        (refuse, "no gateway answers at http://127.0.0.1:8000: [Errno 111] Connection refused"),
        (never, "the gateway (http://127.0.0.1:8000) has not answered for 10 s"),
        (break_off, "the gateway (http://127.0.0.1:8000) dropped the connection: RemoteProtocolError"),
        (
            lambda _: httpx.Response(404, json=error("no experiment is called 'exp'; available: none")),
            "the gateway (http://127.0.0.1:8000) answers 404: no experiment is called 'exp'; available: none",
        ),
        (
            lambda _: httpx.Response(401, json=error("an API key is required")),
            "the gateway (http://127.0.0.1:8000) answers 401: an API key is required; "
            "--api-key-env names the environment variable with the key",
        ),
        (
            lambda _: httpx.Response(404, json={"detail": "Not Found"}),
            'the gateway (http://127.0.0.1:8000) answers 404: Not Found; is it a gateway? It says: {"detail":"Not Found"}',
        ),
        (
            lambda _: httpx.Response(502, text="<html>"),
            "the gateway (http://127.0.0.1:8000) answers 502: Bad Gateway; is it a gateway? It says: <html>",
        ),
        (
            lambda _: httpx.Response(200, text="<html>"),
            "http://127.0.0.1:8000 is not a gateway of this version: its answer to /v1/experiments/exp cannot be read",
        ),
    ],
)
def test_a_failure_is_one_line(
    gateway_answers: Answering, respond: Callable[[httpx.Request], httpx.Response], reason: str
) -> None:
    gateway_answers(respond)

    assert run("exp") == (1, "", f"{reason}\n")


@pytest.mark.parametrize("url", ["gateway:8000", "ftp://gateway", "http://gateway:port"])
def test_an_invalid_address_is_an_error(url: str) -> None:
    with pytest.raises(
        StartError, match=f"^--url {url}: (must be an address such as http://127.0.0.1:8000|Invalid port)"
    ):
        ask_evidence(url, "exp", None)


def test_the_units_of_several_logs_are_united(models: Path, experiment: Experiment, tmp_path: Path) -> None:
    first = write_log(tmp_path / "1.jsonl", experiment, range(60), weights_changed=3)
    second = write_log(tmp_path / "2.jsonl", experiment, range(40, 100))

    status, printed, errors = run("exp", "--models", models, "--exposures", second, first)

    assert (status, errors) == (0, "")
    assert "units since 2026-11-01T00:00:00.000+00:00" in printed
    assert "units 75 25 share of units 75.00% 25.00% expected share 75.00% 25.00%" in printed
    assert "requests" not in printed
    assert "not counted: other_weights 3" in printed
    assert "split of the units: no mismatch found, p = 1 at any look" in printed


def test_the_weights_come_from_the_registry_of_the_settings(
    models: Path, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_MODELS", str(models))

    status, printed, _ = run("exp", "--exposures", write_log(tmp_path / "1.jsonl", experiment, range(3)))

    assert status == 0
    assert "split of the units: no mismatch found, p = 1 at any look" in printed


def test_wrong_arguments_are_errors(models: Path, tmp_path: Path) -> None:
    log = tmp_path / "none.jsonl"

    assert run("exp", "exp-2")[2] == "only one experiment can be shown at a time, but got also exp-2\n"
    assert run("--exposures", log)[2].startswith("--exposures needs an experiment: ")
    assert run("x", "--models", models, "--exposures", log)[2] == f"{models}: no experiment 'x'; known: exp\n"
    assert run("exp", "--models", models, "--exposures", log) == (
        1,
        "",
        f"the file {log} cannot be read: No such file or directory\n",
    )

"""Requests of an experiment: their unit, their answers, and the arm that counts their errors."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from structlog.testing import capture_logs

from gateway.backends.fake import FakeBackend, fake_info
from gateway.cli.experiment_report import ask_evidence, ask_experiments
from gateway.config.registry import Experiment
from gateway.errors import StartError
from gateway.experiments.exposures import read_exposures
from gateway.experiments.split import Split
from gateway.fleet import Model
from gateway.telemetry import metrics
from gateway.types import EmbedJob, ModelKind, ModelState

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
CheckError = Callable[..., str]
MakeModel = Callable[..., Model]
Serve = Callable[..., contextlib.AbstractContextManager[tuple[str, int]]]
VectorsOf = Callable[..., np.ndarray]
HeaderTypes = dict[str, str] | list[tuple[bytes, bytes]]
UNITS = [f"user-{i}" for i in range(12)]


def experiment(**fields: Any) -> Experiment:
    """Return an experiment between `mini` and `jina`, which has tasks and another size."""
    content = {
        "id": "exp",
        "kind": "cross_space",
        "unit": ("header:x-unit", "body:user", "api_key"),
        "force": "header:x-arm",
        "arms": ({"model": "mini", "weight": 1}, {"name": "new", "model": "jina", "weight": 1}),
        **fields,
    }
    return Experiment.model_validate(content)


SPLIT = Split(experiment())


def arm_of(unit: str) -> str:
    return SPLIT.arm_of(unit).label


def unit_in(arm: str) -> str:
    """Return a unit of an arm."""
    return next(unit for unit in UNITS if arm_of(unit) == arm)


async def embed(
    client: httpx.AsyncClient, headers: HeaderTypes | None = None, *, model: str = "exp", **fields: object
) -> httpx.Response:
    return await client.post("/v1/embeddings", json={"model": model, "input": "a b", **fields}, headers=headers)


async def evidence_of(client: httpx.AsyncClient, arm: str) -> dict[str, Any]:
    shown = (await client.get("/v1/experiments/exp")).json()
    (found,) = [one for one in shown["evidence"] if one["arm"] == arm]
    return found


@pytest.fixture
async def client(connect: Connect) -> httpx.AsyncClient:
    return await connect(experiments=[experiment()])


# ----------------------------------------------------------------------------------------------------- the answer


@pytest.mark.parametrize(("arm", "model", "width"), [("mini", "mini", 8), ("new", "jina", 32)])
async def test_an_answer_says_its_experiment_arm_and_why(
    client: httpx.AsyncClient, vectors_of: VectorsOf, arm: str, model: str, width: int
) -> None:
    answer = await embed(client, {"x-unit": unit_in(arm)})

    assert answer.status_code == 200, answer.text
    assert answer.headers["x-gateway-experiment"] == "exp"
    assert answer.headers["x-gateway-arm"] == arm
    assert answer.headers["x-gateway-assignment"] == "unit"
    assert answer.headers["x-gateway-model"] == answer.json()["model"] == model
    assert answer.headers["x-gateway-space"] == (await client.get(f"/v1/models/{model}")).json()["space"]
    raw = vectors_of(["a b"], width)[0]
    np.testing.assert_allclose(answer.json()["data"][0]["embedding"], raw / np.linalg.norm(raw), rtol=1e-5)


async def test_other_names_say_nothing_of_experiments(client: httpx.AsyncClient) -> None:
    answer = await embed(client, {"x-unit": "u", "x-arm": "new"}, model="mini")

    assert not [name for name in answer.headers if name in ("x-gateway-experiment", "x-gateway-arm")]
    assert "x-gateway-assignment" not in answer.headers


async def test_the_task_of_a_request_holds_in_the_arm_that_has_it(client: httpx.AsyncClient) -> None:
    for arm, task in (("mini", None), ("new", "retrieval.query")):
        answer = await embed(client, {"x-unit": unit_in(arm)}, task="query")
        assert answer.headers.get("x-gateway-task") == task


# ------------------------------------------------------------------------------------------------------ the unit


@pytest.mark.parametrize("unit", UNITS[:6])
async def test_a_unit_has_the_same_arm_by_header_and_body(client: httpx.AsyncClient, unit: str) -> None:
    by_header, by_body = await embed(client, {"x-unit": unit}), await embed(client, user=unit)

    assert by_header.headers["x-gateway-arm"] == by_body.headers["x-gateway-arm"] == arm_of(unit)
    assert sum([(await evidence_of(client, arm))["units"] for arm in ("mini", "new")]) == 1


async def test_a_unit_in_any_script_is_the_same_by_header_body_and_key(connect: Connect, tmp_path: Path) -> None:
    """Also one that is written in two code points, or with blanks around it."""
    path = tmp_path / "exposures.jsonl"
    client = await connect(experiments=[experiment()], exposure_log=path)

    for unit in ("Jos\u00e9", "Jose\u0301", " Jos\u00e9 "):
        for answer in (await embed(client, [(b"x-unit", unit.encode())]), await embed(client, user=unit)):
            assert answer.headers["x-gateway-arm"] == arm_of("Jos\u00e9")

    (logged,) = read_exposures([path])
    assert logged.unit == hashlib.sha256(json.dumps(["unit", "exp", "Jos\u00e9"]).encode()).hexdigest()[:16]
    assert logged.source == "header:x-unit"


async def test_a_header_with_two_units_is_refused(client: httpx.AsyncClient) -> None:
    twice = await embed(client, [(b"x-unit", b"ann"), (b"x-unit", b"ann")])
    two = await embed(client, [(b"x-unit", b"ann"), (b"x-unit", b"bob")])

    assert twice.headers["x-gateway-arm"] == arm_of("ann")
    assert two.status_code == 400
    assert two.json()["message"] == "the header x-unit occurs 2 times with different values; send it once"


async def test_the_header_comes_before_the_body(client: httpx.AsyncClient) -> None:
    answer = await embed(client, {"x-unit": unit_in("new")}, user=unit_in("mini"))

    assert answer.headers["x-gateway-arm"] == "new"


@pytest.mark.parametrize("number", [0, 1, 17, -4, 2**53 + 1, 17.0, -4.0])
async def test_a_user_that_is_a_number_is_the_unit_of_its_digits(client: httpx.AsyncClient, number: float) -> None:
    answer = await embed(client, user=number)

    assert answer.headers["x-gateway-arm"] == arm_of(str(int(number)))
    assert answer.headers["x-gateway-assignment"] == "unit"


@pytest.mark.parametrize("key", ["key-1", "key-2", "key-3"])
async def test_the_key_is_a_unit_where_none_is_asked_for(connect: Connect, key: str) -> None:
    client = await connect(experiments=[experiment()])

    answer = await embed(client, {"authorization": f"Bearer {key}"})

    assert answer.headers["x-gateway-assignment"] == "unit"
    assert answer.headers["x-gateway-arm"] == arm_of(hashlib.sha256(key.encode()).hexdigest())


async def test_a_client_stays_in_its_arm_when_its_key_is_exchanged(connect: Connect, tmp_path: Path) -> None:
    keys = [f"key-{number}" for number in range(8)]
    file = tmp_path / "keys.yaml"
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    file.write_text(f"version: 1\nkeys: [{{name: team, sha256: {digests}}}]")
    client = await connect(experiments=[experiment()], api_keys_file=file)

    answers = [await embed(client, {"authorization": f"Bearer {key}"}) for key in keys]

    assert {answer.headers["x-gateway-assignment"] for answer in answers} == {"unit"}
    assert {answer.headers["x-gateway-arm"] for answer in answers} == {arm_of("team")}


@pytest.mark.parametrize(
    ("headers", "fields"),
    [
        ({}, {}),
        ({"x-unit": ""}, {"user": ""}),
        ({"x-unit": " \t"}, {"user": "\u00a0"}),
        ({"authorization": "Bearer "}, {"user": None}),
        ({"authorization": 'Bearer ""'}, {}),
    ],
)
async def test_an_empty_value_is_not_a_unit(
    client: httpx.AsyncClient, headers: dict[str, str], fields: dict[str, object]
) -> None:
    answer = await embed(client, headers, **fields)

    assert answer.headers["x-gateway-arm"] == "mini"
    assert answer.headers["x-gateway-assignment"] == "no_unit"


async def test_the_log_has_the_units_as_salted_hashes(connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "exposures.jsonl"
    client = await connect(experiments=[experiment(salt="pepper")], exposure_log=path)

    answer = await embed(client, user="ann@example.com")

    (logged,) = read_exposures([path])
    # Made as docs/ab.md describes.
    assert logged.unit == hashlib.sha256(b'["unit", "pepper", "ann@example.com"]').hexdigest()[:16]
    assert logged.space == answer.headers["x-gateway-space"]
    assert "ann" not in path.read_text()


# -------------------------------------------------------------------------------------------------------- by force


async def test_a_tester_forces_an_arm_and_is_not_counted(client: httpx.AsyncClient) -> None:
    answer = await embed(client, {"x-unit": unit_in("mini"), "x-arm": "new"})

    assert answer.headers["x-gateway-arm"] == "new"
    assert answer.headers["x-gateway-assignment"] == "forced"
    shown = (await client.get("/v1/experiments/exp")).json()
    assert [(arm["requests"], arm["units"]) for arm in shown["evidence"]] == [(0, 0), (0, 0)]
    assert shown["uncounted"] == {"forced": 1}


async def test_an_unknown_arm_is_a_400(client: httpx.AsyncClient, check_error: CheckError) -> None:
    message = check_error(await embed(client, {"x-arm": "jina"}), 400, "invalid_input")

    assert message == "the header `x-arm` requests arm 'jina' of experiment 'exp'; its arms: mini, new"


async def test_before_its_start_the_control_arm_answers(connect: Connect) -> None:
    client = await connect(experiments=[experiment(start="2126-11-01T00:00:00Z")])

    answer = await embed(client, {"x-unit": unit_in("new")})

    assert (answer.headers["x-gateway-arm"], answer.headers["x-gateway-assignment"]) == ("mini", "not_started")
    assert (await client.get("/v1/experiments/exp")).json()["uncounted"] == {"not_started": 1}


@pytest.mark.parametrize("user", [True, False, 1.5, ["a"], {"id": "a"}])
async def test_a_user_must_be_text_or_a_whole_number_to_be_a_unit(client: httpx.AsyncClient, user: object) -> None:
    answer = await embed(client, user=user)

    assert answer.headers["x-gateway-assignment"] == "no_unit"


# ---------------------------------------------------------------------------------------------------------- errors


async def test_the_space_that_is_expected_guards_against_the_other_arm(
    client: httpx.AsyncClient, check_error: CheckError
) -> None:
    """A client whose collection belongs to one arm gets no vectors of another arm."""
    space = (await embed(client, {"x-unit": unit_in("mini")})).headers["x-gateway-space"]
    expecting = {"x-gateway-expect-space": space}

    check_error(await embed(client, {"x-unit": unit_in("new"), **expecting}), 412, "space_mismatch")
    assert (await embed(client, {"x-unit": unit_in("mini"), **expecting})).status_code == 200

    evidence = await evidence_of(client, "new")
    assert (evidence["requests"], evidence["client_errors"], evidence["server_errors"]) == (1, 1, 0)
    assert (evidence["units"], evidence["unanswered_units"]) == (1, 1)


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (ModelState.LOADING, "model_not_ready"),
        (ModelState.RECOVERING, "model_recovering"),
        (ModelState.FAILED, "model_unavailable"),
    ],
)
async def test_an_arm_that_cannot_answer_is_an_error_and_no_other_arm_steps_in(
    connect: Connect, make_model: MakeModel, check_error: CheckError, state: ModelState, code: str
) -> None:
    models = [make_model("mini"), make_model("jina", state=state, reason="for a reason")]
    client = await connect(*models, aliases={}, experiments=[experiment()])
    units = [unit for unit in UNITS if arm_of(unit) == "new"]

    for unit in units:
        check_error(await embed(client, {"x-unit": unit}), 503, code, type_="server_error")
    assert (await embed(client, {"x-unit": unit_in("mini")})).status_code == 200

    broken, sound = await evidence_of(client, "new"), await evidence_of(client, "mini")
    assert (broken["requests"], broken["server_errors"], broken["client_errors"]) == (len(units), len(units), 0)
    assert (broken["units"], broken["unanswered_units"]) == (len(units), len(units))
    assert (sound["requests"], sound["errors"], sound["units"]) == (1, 0, 1)


async def test_an_arm_that_fails_keeps_its_units_and_is_called_worse(connect: Connect, make_model: MakeModel) -> None:
    models = [make_model("mini"), make_model("jina", state=ModelState.FAILED, reason="failed to load")]
    client = await connect(*models, aliases={}, experiments=[experiment()])

    for i in range(240):
        await embed(client, {"x-unit": f"user-{i}"})

    shown = (await client.get("/v1/experiments/exp")).json()
    assert shown["mismatch"] is False
    assert sum(arm["units"] for arm in shown["evidence"]) == 240
    latency, errors = shown["guardrails"]
    assert (latency["metric"], latency["verdict"]) == ("latency", "not yet")  # no request was timed
    assert (errors["metric"], errors["arm"], errors["verdict"]) == ("errors", "new", "worse")
    assert 0 < errors["low"] < errors["estimate"] < errors["high"]
    assert errors["estimate"] == pytest.approx(1, abs=0.2)


# --------------------------------------------------------------------------------------------------------- metrics


def counted(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, {"task": "", **labels}) or 0.0


async def test_metrics_have_the_experiment_and_the_arm(client: httpx.AsyncClient) -> None:
    mini = {"model": "mini", "experiment": "exp", "arm": "mini"}
    new = {"model": "jina", "task": "text-matching", "experiment": "exp", "arm": "new"}
    samples = [
        ("gateway_embed_requests_total", mini | {"outcome": "ok"}, 2),
        ("gateway_embed_requests_total", mini | {"outcome": "unsupported_dimensions"}, 1),
        ("gateway_embed_requests_total", new | {"outcome": "ok"}, 1),
        ("gateway_embed_duration_seconds_count", mini, 2),
        ("gateway_stage_duration_seconds_count", mini | {"stage": "queue"}, 2),
        ("gateway_texts_total", mini, 4),
        ("gateway_tokens_total", mini, 8),
        ("gateway_texts_total", new, 2),
        # A request by the model's own name is not part of the experiment.
        ("gateway_embed_requests_total", {"model": "mini", "experiment": "", "arm": "", "outcome": "ok"}, 1),
    ]
    before = [counted(name, **labels) for name, labels, _ in samples]

    for unit in (unit_in("mini"), unit_in("mini"), unit_in("new")):
        await embed(client, {"x-unit": unit}, input=["a b", "c d"])
    await embed(client, {"x-unit": unit_in("mini")}, dimensions=3)
    await embed(client, model="mini")

    for (name, labels, num), was in zip(samples, before, strict=True):
        assert counted(name, **labels) - was == num, (name, labels)


# ----------------------------------------------------------------------------------------------------- the command


def test_the_command_asks_a_gateway_that_is_served(serve: Serve) -> None:
    """Over a real socket; another test checks the printed text."""
    num_new = sum(arm_of(unit) == "new" for unit in UNITS)
    with serve(experiments=[experiment()], api_keys=["key-1"]) as (host, port):
        url = f"http://{host}:{port}"
        for unit in UNITS:
            headers = {"authorization": "Bearer key-1", "x-unit": unit}
            httpx.post(f"{url}/v1/embeddings", json={"model": "exp", "input": "a"}, headers=headers).raise_for_status()

        assert [one.id for one in ask_experiments(url, "key-1").data] == ["exp"]
        shown = ask_evidence(f"{url}/v1/", "exp", "key-1\n")
        with pytest.raises(StartError, match=r"answers 404: no experiment is called 'other'; available: exp$"):
            ask_evidence(url, "other", "key-1")
        for key in (None, "wrong", "schlüssel"):
            with pytest.raises(
                StartError, match=r"answers 401: .*; --api-key-env names the environment variable with the key"
            ):
                ask_evidence(url, "exp", key)
        with pytest.raises(StartError, match=r"answers 404: no such path: /elsewhere/v1/experiments"):
            ask_experiments(f"{url}/elsewhere", "key-1")
    with pytest.raises(StartError, match=f"no gateway answers at {url}: "):
        ask_experiments(url, "key-1")

    assert [(arm.arm, arm.units) for arm in shown.evidence] == [("mini", len(UNITS) - num_new), ("new", num_new)]
    assert shown.sample_ratio.p is not None
    assert [guardrail.verdict for guardrail in shown.guardrails] == ["not yet", "not yet"]


# --------------------------------------------------------------------------------------------------------- crashes


def num_requests(model: str, arm: str, outcome: str) -> float:
    name, labels = "gateway_embed_requests_total", {"model": model, "task": "", "experiment": "exp", "arm": arm}
    samples = [
        metrics.REGISTRY.get_sample_value(name, {**labels, "task": task, "outcome": outcome})
        for task in ("", "text-matching")
    ]
    return sum(sample or 0 for sample in samples)


@pytest.mark.parametrize("crash", [RuntimeError("of the library"), MemoryError(), KeyError("x")])
@pytest.mark.parametrize("is_rerank", [False, True])
async def test_an_arm_that_crashes_is_not_taken_for_one_that_is_not_asked(
    connect: Connect, make_model: MakeModel, check_error: CheckError, crash: Exception, is_rerank: bool
) -> None:
    def raise_it(_job: EmbedJob) -> None:
        raise crash

    info = {"kind": ModelKind.RERANK, "width": 1} if is_rerank else {}
    broken = make_model("jina", backend=FakeBackend(fake_info("jina", **info), on_embed=raise_it), **info)
    client = await connect(make_model("mini", **info), broken, aliases={}, experiments=[experiment()])
    before = num_requests("jina", "new", "internal_error")
    body = {"query": "q", "documents": ["a"]} if is_rerank else {"input": "a"}
    path = "/v1/rerank" if is_rerank else "/v1/embeddings"

    with capture_logs():  # else the traceback is drawn, which takes seconds
        for _ in range(3):
            answer = await client.post(path, json={"model": "exp", **body}, headers={"x-unit": unit_in("new")})
            check_error(answer, 500, "internal_error", type_="server_error")

    found = await evidence_of(client, "new")
    assert (found["requests"], found["server_errors"], found["error_rate"]) == (3, 3, 1.0)
    assert (found["units"], found["unanswered_units"]) == (1, 1)
    assert num_requests("jina", "new", "internal_error") - before == 3


@pytest.mark.parametrize(
    ("state", "code"), [(ModelState.LOADING, "model_not_ready"), (ModelState.DISABLED, "model_disabled")]
)
async def test_so_is_one_that_is_not_ready(
    connect: Connect, make_model: MakeModel, state: ModelState, code: str
) -> None:
    models = [make_model("mini"), make_model("jina", state=state)]
    client = await connect(*models, aliases={}, experiments=[experiment()])
    before = num_requests("jina", "new", code)

    answer = await embed(client, {"x-unit": unit_in("new")})

    assert answer.json()["error"]["code"] == code
    found = await evidence_of(client, "new")
    assert (found["requests"], found["errors"]) == (1, 1)
    assert num_requests("jina", "new", code) - before == 1


async def test_an_arm_with_invalid_vectors_too(connect: Connect, make_model: MakeModel) -> None:
    """The mismatch is found only after the model has answered."""
    narrow = make_model("jina", backend=FakeBackend(fake_info("jina", width=4)), width=8)
    client = await connect(make_model("mini"), narrow, aliases={}, experiments=[experiment()])

    answer = await embed(client, {"x-unit": unit_in("new")})

    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "invalid_vectors")
    found = await evidence_of(client, "new")
    assert (found["requests"], found["errors"]) == (1, 1)

"""The arm of a unit before anything is embedded, and requests whose name holds a unit and a space."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from structlog.testing import capture_logs

from gateway.config.registry import Experiment
from gateway.experiments.split import Split
from gateway.fleet import Model
from gateway.telemetry import metrics, tracing
from gateway.types import ModelState

Connect = Callable[..., Awaitable[httpx.AsyncClient]]
CheckError = Callable[..., str]
MakeModel = Callable[..., Model]
PATH = "/v1/experiments/exp/assignment"
UNITS = [f"user-{i}" for i in range(12)]
# Each could be read as something else: a path, a task, a space, a part of a URL, another encoding.
ODD_UNITS = [
    "a/b",
    "tenant:42",
    "ada@example.com",
    "a@0123456789ab",
    "50% off",
    "Zoë ☕",
    "a+b",
    "x?y=1&z#",
    "..",
    "latest",
]


def experiment(**fields: Any) -> Experiment:
    """Return an experiment between `mini` and `jina`, which has tasks and another size."""
    content = {
        "id": "exp",
        "kind": "cross_space",
        "unit": ("model", "header:x-unit", "body:user", "api_key"),
        "force": "header:x-arm",
        "arms": ({"model": "mini", "weight": 1}, {"name": "new", "model": "jina", "weight": 1}),
        **fields,
    }
    return Experiment.model_validate(content)


SPLIT = Split(experiment())


def arm_of(unit: str) -> str:
    return SPLIT.arm_of(unit).label


def unit_in(arm: str) -> str:
    return next(unit for unit in UNITS if arm_of(unit) == arm)


async def ask(client: httpx.AsyncClient, unit: str, **headers: str) -> dict[str, Any]:
    answer = await client.get(PATH, params={"unit": unit}, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def embed(client: httpx.AsyncClient, model: str, **headers: str) -> httpx.Response:
    return await client.post("/v1/embeddings", json={"model": model, "input": "a b"}, headers=headers)


async def counted(client: httpx.AsyncClient) -> dict[str, int]:
    shown = (await client.get("/v1/experiments/exp")).json()
    return {arm["arm"]: arm["units"] for arm in shown["evidence"]} | shown["uncounted"]


@pytest.fixture
async def client(connect: Connect) -> httpx.AsyncClient:
    return await connect(experiments=[experiment()])


# ------------------------------------------------------------------------------------------------- the assignment


async def test_an_assignment_names_arm_model_width_and_space(client: httpx.AsyncClient) -> None:
    unit = unit_in("new")
    card = (await client.get("/v1/models/jina")).json()

    assigned = await ask(client, unit)

    assert assigned == {
        "object": "assignment",
        "experiment": "exp",
        "generation": SPLIT.generation,
        "unit": unit,
        "arm": "new",
        "model": "jina",
        "task": "text-matching",
        "width": 32,
        "space": card["space"],
        "state": "ready",
        "reason": "unit",
        "counted": True,
        "send": {
            "model": f"exp/{unit}@{card['space'].partition('@')[2]}",
            "headers": {"x-gateway-expect-space": card["space"]},
            "unit_from": ["model", "header:x-unit", "body:user", "api_key"],
        },
    }


async def test_asking_counts_nothing_until_something_is_embedded(client: httpx.AsyncClient) -> None:
    unit = unit_in("new")
    for _ in range(3):
        sent = (await ask(client, unit))["send"]
    assert await counted(client) == {"mini": 0, "new": 0}

    answer = await embed(client, sent["model"], **sent["headers"])

    assert answer.status_code == 200, answer.text
    assert answer.headers["x-gateway-arm"] == "new"
    assert await counted(client) == {"mini": 0, "new": 1}


async def test_a_unit_is_the_same_in_a_name_a_header_and_a_body(client: httpx.AsyncClient) -> None:
    for unit in UNITS:
        arm = (await ask(client, unit))["arm"]
        by_name, by_header = await embed(client, f"exp/{unit}"), await embed(client, "exp", **{"x-unit": unit})
        by_user = await client.post("/v1/embeddings", json={"model": "exp", "input": "a", "user": unit})
        assert {answer.headers["x-gateway-arm"] for answer in (by_name, by_header, by_user)} == {arm}

    assert sum((await counted(client)).values()) == len(UNITS)


async def test_without_a_unit_the_one_of_the_request_is_assigned(client: httpx.AsyncClient) -> None:
    unit = unit_in("new")

    answer = await client.get(PATH, headers={"x-unit": unit})

    assert (answer.json()["arm"], answer.json()["reason"], answer.json()["unit"]) == ("new", "unit", None)


async def test_without_any_unit_the_control_arm_is_assigned(client: httpx.AsyncClient) -> None:
    assigned = (await client.get(PATH)).json()

    assert (assigned["arm"], assigned["reason"], assigned["counted"]) == ("mini", "no_unit", False)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"start": "2126-11-01T00:00:00Z"}, "not_started"),
        ({"end": "2020-11-01T00:00:00Z"}, "ended"),
        ({"exclude": (unit_in("new"),)}, "excluded"),
    ],
)
async def test_a_unit_outside_the_split_gets_the_control_arm_and_the_reason(
    connect: Connect, fields: dict[str, Any], reason: str
) -> None:
    client = await connect(experiments=[experiment(**fields)])

    assigned = await ask(client, unit_in("new"))
    answer = await embed(client, assigned["send"]["model"])

    assert (assigned["arm"], assigned["reason"], assigned["counted"]) == ("mini", reason, False)
    assert answer.headers["x-gateway-assignment"] == reason


async def test_a_forced_arm_is_the_arm_of_a_request_with_that_header(
    client: httpx.AsyncClient, check_error: CheckError
) -> None:
    assigned = await ask(client, unit_in("mini"), **{"x-arm": "new"})
    assert (assigned["arm"], assigned["reason"], assigned["counted"]) == ("new", "forced", False)

    check_error(await client.get(PATH, params={"unit": "u"}, headers={"x-arm": "?"}), 400, "invalid_input")


async def test_many_units_are_assigned_at_once_in_their_order(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json={"units": UNITS})

    assert [(one["unit"], one["arm"]) for one in answer.json()["data"]] == [(unit, arm_of(unit)) for unit in UNITS]
    assert answer.json()["data"][0] == await ask(client, UNITS[0])
    assert await counted(client) == {"mini": 0, "new": 0}


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([], "`units` has 0 units; it must have 1 to 1000"),
        (["u"] * 1001, "`units` has 1001 units; it must have 1 to 1000"),
        (["u", ""], "a unit must have 1 to 256 bytes, got 0"),
        ([" "], "must not be blank"),
        ([" "], "a unit must not be blank"),
        (["é" * 129], "a unit must have 1 to 256 bytes, got 258"),
        ("u", "`units` must be a list of strings, got the string 'u'"),
        (["u", 3], "`units` must be a list of strings"),
    ],
)
async def test_bad_units_are_a_400(
    client: httpx.AsyncClient, check_error: CheckError, units: object, message: str
) -> None:
    assert message in check_error(await client.post(PATH, json={"units": units}), 400, "invalid_input", param="units")


async def test_a_unit_has_the_same_limit_wherever_it_is_read(connect: Connect, check_error: CheckError) -> None:
    client = await connect(experiments=[experiment(unit=("header:x-unit",))])
    longest, longer = "é" * 512, "é" * 512 + "x"
    body = {"model": "exp", "input": "a"}

    embedded = await client.post("/v1/embeddings", json=body, headers={"x-unit": longest.encode()})
    assert (await ask(client, longest))["arm"] == embedded.headers["x-gateway-arm"] == arm_of(longest)

    refused = await client.post("/v1/embeddings", json=body, headers={"x-unit": longer.encode()})
    message = check_error(refused, 400, "invalid_input")
    assert message.startswith(
        "the unit in `header:x-unit` of experiment 'exp' has 1,025 bytes; the limit is 1,024: send a hash"
    )
    assert longer not in message
    asked = check_error(await client.get(PATH, params={"unit": longer}), 400, "invalid_input", param="unit")
    assert asked == "a unit must have 1 to 1024 bytes, got 1025"


async def test_a_model_that_loads_has_an_arm_and_no_space_yet(connect: Connect, make_model: MakeModel) -> None:
    models = [make_model("mini"), make_model("jina", state=ModelState.LOADING)]
    client = await connect(*models, aliases={}, experiments=[experiment()])

    assigned = await ask(client, unit_in("new"))

    assert (assigned["model"], assigned["state"], assigned["space"], assigned["width"]) == (
        "jina",
        "loading",
        None,
        None,
    )
    assert assigned["send"]["model"] == f"exp/{unit_in('new')}"
    assert assigned["send"]["headers"] == {}


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("unit=Jos%E9", "`unit` is not UTF-8"),  # would be the unit of every such name
        ("unit=%ED%A0%80", "`unit` is not UTF-8"),
        ("unit=ada&unit=bob", "`unit` is given 2 times"),
    ],
)
async def test_a_unit_that_would_be_read_as_another_is_refused(
    client: httpx.AsyncClient, check_error: CheckError, query: str, message: str
) -> None:
    assert message in check_error(await client.get(f"{PATH}?{query}"), 400, "invalid_input", param="unit")


async def test_other_parameters_may_hold_anything(client: httpx.AsyncClient) -> None:
    answer = await client.get(f"{PATH}?x=%FF&x=1&unit=ada")

    assert (answer.status_code, answer.json()["unit"]) == (200, "ada")


async def test_requests_that_are_split_at_random_have_no_assignment(connect: Connect, check_error: CheckError) -> None:
    arms = ({"model": "mini", "weight": 1}, {"name": "other", "model": "mini", "weight": 1})
    client = await connect(experiments=[experiment(kind="same_space", unit=(), arms=arms)])

    message = check_error(await client.get(PATH, params={"unit": "u"}), 400, "invalid_input", param="unit")

    assert "at random" in message


async def test_an_unknown_experiment_is_a_404(client: httpx.AsyncClient, check_error: CheckError) -> None:
    for answer in (
        await client.get("/v1/experiments/exq/assignment", params={"unit": "u"}),
        await client.post("/v1/experiments/exq/assignment", json={"units": ["u"]}),
    ):
        assert "no experiment is called 'exq'; available: exp" in check_error(answer, 404, "experiment_not_found")


async def test_a_key_for_another_model_may_not_ask(connect: Connect, tmp_path: Path, check_error: CheckError) -> None:
    digest = hashlib.sha256(b"key-of-mini").hexdigest()
    file = tmp_path / "keys.yaml"
    file.write_text(f"version: 1\nkeys: [{{name: team, sha256: {digest}, models: [mini]}}]")
    client = await connect(experiments=[experiment()], api_keys_file=file)

    answer = await client.get(PATH, headers={"authorization": "Bearer key-of-mini"})
    without = await client.get(PATH)

    check_error(answer, 403, "model_not_allowed", param="model", type_="permission_error")
    assert without.status_code == 401


# ------------------------------------------------------------------------------------------- the unit in the name


@pytest.mark.parametrize("unit", ODD_UNITS)
async def test_any_unit_can_be_written_in_a_name(client: httpx.AsyncClient, unit: str) -> None:
    sent = (await ask(client, unit))["send"]["model"]

    for model in (sent, f"exp/{quote(unit, safe='')}", f"{sent}:latest"):
        answer = await embed(client, model)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-gateway-arm"] == arm_of(unit)
    assert sum((await counted(client)).values()) == 1


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "must have a unit after 'exp/'"),
        ("%20%09", "is blank"),
        ("a b", "all other characters as %XX"),
        ("a/b", "all other characters as %XX"),
        ("ada@example.com", "all other characters as %XX"),
        ("tenant:ada", "write the colon as %3A"),
        ("50%", "all other characters as %XX"),
        ("Zoë", "all other characters as %XX"),
        ("%FF", "is not UTF-8"),
        ("x" * 257, "has 257 bytes; the limit is 256"),
        ("x" * 20_000, "the limit is 256"),
    ],
)
async def test_a_unit_that_is_not_encoded_is_a_400_that_says_how(
    client: httpx.AsyncClient, check_error: CheckError, written: str, message: str
) -> None:
    assert message in check_error(await embed(client, f"exp/{written}"), 400, "invalid_input", param="model")


async def test_an_experiment_takes_no_unit_from_a_name_unless_its_entry_says_so(
    connect: Connect, check_error: CheckError
) -> None:
    client = await connect(experiments=[experiment(unit=("header:x-unit", "api_key"))])

    message = check_error(await embed(client, "exp/ada"), 400, "invalid_input", param="model")

    assert "takes its unit from header:x-unit, api_key, not from the name" in message
    sent = (await ask(client, "ada"))["send"]
    assert sent["model"].startswith("exp@")
    assert (await embed(client, sent["model"], **{"x-unit": "ada"})).headers["x-gateway-arm"] == arm_of("ada")


async def test_an_experiment_may_take_units_from_names_alone(connect: Connect) -> None:
    client = await connect(experiments=[experiment(unit=("model",))])
    unit, key = unit_in("new"), {"authorization": "Bearer key"}

    assigned = await ask(client, unit, **key)
    answer, without = await embed(client, assigned["send"]["model"], **key), await embed(client, "exp", **key)

    assert (assigned["arm"], assigned["reason"]) == ("new", "unit")
    assert (answer.headers["x-gateway-arm"], answer.headers["x-gateway-assignment"]) == ("new", "unit")
    assert (without.headers["x-gateway-arm"], without.headers["x-gateway-assignment"]) == ("mini", "no_unit")


async def test_names_with_a_slash_keep_their_meaning(connect: Connect) -> None:
    """An experiment may have the id of a model's owner, and another the id of the first and a slash."""
    arms = ({"model": "mini", "weight": 1}, {"model": "jina", "weight": 1})
    experiments = [experiment(id=name, arms=arms) for name in ("owner", "team", "exp", "exp/two")]
    client = await connect(experiments=experiments)

    for name, answered_by in (("owner/mini", "owner/mini"), ("team/small", "team/small")):
        answer = await embed(client, name)
        assert answer.json()["model"] == answered_by
        assert "x-gateway-arm" not in answer.headers
    assert (await embed(client, "owner/minis")).headers["x-gateway-experiment"] == "owner"
    assert (await embed(client, "exp/two/ada")).headers["x-gateway-experiment"] == "exp/two"
    assert (await embed(client, "exp/ada")).headers["x-gateway-experiment"] == "exp"


async def test_a_task_may_follow_the_unit(client: httpx.AsyncClient) -> None:
    unit = unit_in("new")

    answer = await embed(client, f"exp/{unit}:retrieval.query")

    assert answer.headers["x-gateway-task"] == "retrieval.query"
    assert answer.headers["x-gateway-arm"] == "new"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"model": "exp/{}", "input": "a"}),
        ("/embeddings", {"model": "exp/{}", "input": "a"}),
        ("/api/embed", {"model": "exp/{}", "input": "a"}),
        ("/openai/deployments/exp/{}/embeddings", {"input": "a"}),
        ("/tei/exp/{}/embed", {"inputs": "a"}),
        ("/tei/exp/{}", {"inputs": "a"}),
        ("/tei/exp/{}/v1/embeddings", {"input": "a"}),
        ("/tei/exp/{}/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"]}}),
    ],
)
async def test_every_dialect_takes_a_unit_in_its_name(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    for unit in (unit_in("mini"), unit_in("new")):
        sent = {name: value.format(unit) if name == "model" else value for name, value in body.items()}
        answer = await client.post(path.format(unit), json=sent)
        assert answer.status_code == 200, answer.text
        assert (answer.headers["x-gateway-arm"], answer.headers["x-gateway-assignment"]) == (arm_of(unit), "unit")


async def test_an_odd_unit_in_a_path_is_encoded_twice(client: httpx.AsyncClient) -> None:
    name = f"exp/{quote('a/b', safe='')}"

    answer = await client.post(f"/tei/{quote(name)}/embed", json={"inputs": "a"})

    assert answer.headers["x-gateway-arm"] == arm_of("a/b")


async def test_the_answer_names_the_model_that_answered(client: httpx.AsyncClient) -> None:
    assert (await embed(client, f"exp/{unit_in('new')}")).json()["model"] == "jina"


async def test_the_card_of_a_name_with_a_unit_is_that_of_the_experiment(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/models/exp/ada")).json()["kind"] == "experiment"


# ------------------------------------------------------------------------------------------ the space in the name


@pytest.mark.parametrize("name", ["mini", "owner/mini", "default", "mini:retrieval.query"])
async def test_a_name_can_say_the_space_of_its_vectors(client: httpx.AsyncClient, name: str) -> None:
    space = (await client.get("/v1/models/mini")).json()["space"]

    answer = await embed(client, f"{name}@{space.rpartition('@')[2]}")

    assert answer.status_code == 200, answer.text
    assert answer.headers["x-gateway-space"] == space


async def test_the_id_of_a_space_is_a_name_of_its_model(client: httpx.AsyncClient) -> None:
    card = (await client.get("/v1/models/jina")).json()

    assert (await embed(client, card["space"])).json()["model"] == card["space"]


async def test_vectors_of_another_space_than_the_name_says_are_a_412(
    client: httpx.AsyncClient, check_error: CheckError
) -> None:
    other = (await client.get("/v1/models/jina")).json()["space"].rpartition("@")[2]

    for name in (f"mini@{other}", f"exp/{unit_in('mini')}@{other}", f"mini@{'0' * 12}:latest"):
        message = check_error(await embed(client, name), 412, "space_mismatch")
    tei = await client.post(f"/tei/mini@{other}/embed", json={"inputs": "a"})

    assert "vectors would be in space" in message
    assert tei.status_code == 412


async def test_a_unit_that_has_moved_gets_no_vectors_for_its_old_collection(
    connect: Connect, check_error: CheckError
) -> None:
    unit = unit_in("mini")
    before = await ask(await connect(experiments=[experiment()]), unit)
    only_new = ({"model": "mini", "weight": 0}, {"name": "new", "model": "jina", "weight": 1})
    client = await connect(experiments=[experiment(arms=only_new)])

    message = check_error(await embed(client, before["send"]["model"]), 412, "space_mismatch")

    assert "is in arm 'new' of the experiment now: ask GET /v1/experiments/exp/assignment" in message
    assert (await embed(client, (await ask(client, unit))["send"]["model"])).status_code == 200


async def test_a_name_that_only_looks_like_a_space_is_unknown(
    client: httpx.AsyncClient, check_error: CheckError
) -> None:
    for name in ("mini@0123", "mini@", "mini@0123456789AB", "@0123456789ab"):
        check_error(await embed(client, name), 404, "model_not_found", param="model")


# ---------------------------------------------------------------------------------------- where a unit never appears


SECRET = "ada-lovelace"


@dataclasses.dataclass
class Seen:
    """The traces of a request: its log lines, and its spans as JSON."""

    lines: list[Any]
    spans: list[str]


Observe = Callable[[], contextlib.AbstractContextManager[Seen]]


@pytest.fixture
def observed() -> Iterator[Observe]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)

    @contextlib.contextmanager
    def observe() -> Iterator[Seen]:
        exporter.clear()
        seen = Seen([], [])
        with capture_logs() as lines:
            yield seen
        seen.lines = list(lines)
        seen.spans = [span.to_json() for span in exporter.get_finished_spans()]

    yield observe
    tracing.use(None)
    provider.shutdown()


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/embeddings", {"model": f"exp/{SECRET}", "input": "a"}, 200),
        ("/v1/embeddings", {"model": f"exp/{SECRET}", "input": []}, 400),
        ("/v1/embeddings", {"model": f"exp/{SECRET}", "input": "a", "dimensions": 7}, 400),
        ("/v1/embeddings", {"model": f"exp/{SECRET}:unheard", "input": "a"}, 400),
        ("/v1/embeddings", {"model": f"exp/tenant:{SECRET}", "input": "a"}, 400),
        ("/v1/embeddings", {"model": f"exp/tenant/{SECRET}", "input": "a"}, 400),
        ("/v1/embeddings", {"model": f"exp/{SECRET}@example.com", "input": "a"}, 400),
        ("/v1/embeddings", {"model": f"exp/{SECRET}@{'0' * 12}", "input": "a"}, 412),
        ("/v1/embeddings", {"model": f"exq/{SECRET}", "input": "a"}, 404),
        ("/v1/embeddings", {"model": f"gone-2026/{SECRET}", "input": "a"}, 404),
        ("/v1/embeddings", {"model": f"gone/tenant/{SECRET}", "input": "a"}, 404),
        ("/v1/rerank", {"model": f"exp/{SECRET}", "query": "a", "documents": ["b"]}, 400),
        ("/v1/classify", {"model": f"exp/{SECRET}", "input": "a"}, 400),
        ("/api/embed", {"model": f"exp/{SECRET}", "input": []}, 400),
        (f"/openai/deployments/exp/{SECRET}/embeddings", {"input": 1}, 400),
        (f"/tei/exp/{SECRET}/embed", {"inputs": 1}, 422),
        (f"/tei/exp/{SECRET}", {"inputs": "a"}, 200),
        (f"/tei/exp/{SECRET}/tokenize", {"inputs": "a"}, 422),
        (f"/tei/gone/{SECRET}", {"inputs": "a"}, 404),
        (f"/tei/gone/{SECRET}/embed", {"inputs": "a"}, 404),
        (PATH, {"units": SECRET}, 400),
        (PATH, {"units": [SECRET, 7]}, 400),
        (PATH, {"units": [SECRET * 100]}, 400),
    ],
)
async def test_a_unit_is_in_no_log_line_and_no_span(
    client: httpx.AsyncClient, observed: Observe, path: str, body: dict[str, Any], status: int
) -> None:
    with observed() as seen:
        answer = await client.post(path, json=body)

    assert answer.status_code == status, answer.text
    assert seen.lines
    assert seen.spans
    assert SECRET not in str(seen.lines)
    assert SECRET not in str(seen.spans)


@pytest.mark.parametrize(
    "path",
    [f"{PATH}?unit={SECRET}", f"/v1/models/exp/{SECRET}", f"/v1/models/gone/{SECRET}", f"/tei/exp/{SECRET}/info"],
)
async def test_a_unit_that_is_read_about_is_in_no_log_line_and_no_span(
    client: httpx.AsyncClient, observed: Observe, path: str
) -> None:
    with observed() as seen:
        await client.get(path)

    assert SECRET not in str(seen.lines)
    assert SECRET not in str(seen.spans)


async def test_units_make_no_time_series(client: httpx.AsyncClient) -> None:
    async def use(name: str) -> None:
        for number in range(40):
            await embed(client, f"exp/{name}-{number}")
            await embed(client, f"exp/{name}-{number}@{'0' * 12}")
            await embed(client, f"gone/{name}-{number}")
            await ask(client, f"{name}-{number}")
            await client.post(f"/tei/exp/{name}-{number}/embed", json={"inputs": "a"})

    await use("ada")
    before = metrics.render().decode()
    await use("bob")
    after = metrics.render().decode()

    assert len(after.splitlines()) == len(before.splitlines())
    assert "ada-" not in after
    assert "bob-" not in after


async def test_a_misspelled_name_with_a_slash_stays_in_the_log(client: httpx.AsyncClient, observed: Observe) -> None:
    for name in ("owner/minni", "openai/mini"):
        with observed() as seen:
            await embed(client, name)
        assert name in str(seen.lines)


async def test_many_units_are_hashed_in_one_thread_however_many_requests_come(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand units in each of many requests would hold the event loop."""
    threads = set()
    assign = Split.assign

    def noted(split: Split, *values: Any) -> Any:
        threads.add(threading.current_thread())
        return assign(split, *values)

    monkeypatch.setattr(Split, "assign", noted)
    client = await connect(experiments=[experiment()])
    units = [f"user-{i}" for i in range(1_000)]

    answers = await asyncio.gather(*(client.post(PATH, json={"units": units}) for _ in range(4)))

    assert [[card["arm"] for card in answer.json()["data"]] for answer in answers] == [[arm_of(u) for u in units]] * 4
    assert len(threads) == 1
    assert threading.main_thread() not in threads

    assert (await client.post(PATH, json={"units": [*units[:60], " "]})).status_code == 400

"""``/v1/experiments/{id}/outcomes``: posted, kept, joined with the arms, and compared."""

from __future__ import annotations

import contextlib
import math
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from structlog.testing import capture_logs

from gateway.app import create_app
from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import Experiment, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.experiments.split import Split
from gateway.fleet import Fleet, Model
from gateway.outcomes import keeper as keeper_module
from gateway.outcomes import store as store_module
from gateway.outcomes.files import report_files

CheckError = Callable[..., str]
Start = Callable[..., Awaitable[httpx.AsyncClient]]
PATH = "/v1/experiments/exp/outcomes"


def experiment(**fields: Any) -> Experiment:
    content = {
        "id": "exp",
        "kind": "cross_space",
        "unit": ("body:user",),
        "force": "header:x-arm",
        "outcome": {"name": "kept"},
        "arms": ({"model": "mini", "weight": 1}, {"name": "new", "model": "other", "weight": 1}),
        **fields,
    }
    return Experiment.model_validate(content)


SPLIT = Split(experiment())


@pytest.fixture
async def start(make_model: Callable[..., Model], tmp_path: Path) -> AsyncIterator[Start]:
    """Return a function that starts a gateway, which keeps outcomes in a folder, and returns a client of it."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(*experiments: Experiment, **settings: Any) -> httpx.AsyncClient:
            models = [make_model(name, backend=FakeBackend(fake_info(name, width=8))) for name in ("mini", "other")]
            registry = Registry(
                path=Path("models.yaml"),
                version=1,
                models=tuple(model.entry for model in models),
                experiments=experiments or (experiment(),),
            )
            fleet = Fleet(models)
            for model in fleet:
                await model.backend.start()
            fleet.started.set()
            deployment = Deployment(registry, Settings(**{"state_dir": tmp_path / "state", **settings}), fleet)
            client = httpx.AsyncClient(transport=httpx.ASGITransport(create_app(deployment)), base_url="http://gateway")
            stack.push_async_callback(deployment.resources.aclose)
            return await stack.enter_async_context(client)

        yield start


@pytest.fixture
async def client(start: Start) -> httpx.AsyncClient:
    return await start()


async def embed_for(client: httpx.AsyncClient, units: Sequence[str], **headers: str) -> None:
    for unit in units:
        answer = await client.post("/v1/embeddings", json={"model": "exp", "input": "a", "user": unit}, headers=headers)
        assert answer.status_code == 200, answer.text


def outcome(unit: object, value: object = 1, **fields: object) -> dict[str, object]:
    return {"unit": unit, "value": value, "id": f"{unit}-{fields.get('name')}-{fields.get('before')}", **fields}


async def post(client: httpx.AsyncClient, *outcomes: object) -> dict[str, Any]:
    answer = await client.post(PATH, json=list(outcomes))
    assert answer.status_code == 202, answer.text
    content: dict[str, Any] = answer.json()
    return content


async def report_of(client: httpx.AsyncClient, name: str = "kept") -> dict[str, Any]:
    shown = (await client.get(PATH)).json()
    found: dict[str, Any] = next(one for one in shown["outcomes"] if one["name"] == name)
    return found


UNITS = [f"user-{i}" for i in range(300)]


async def test_outcomes_are_joined_with_the_arms_and_compared(client: httpx.AsyncClient) -> None:
    """The arithmetic by hand: units without an outcome have 0."""
    await embed_for(client, UNITS)
    kept = [unit for i, unit in enumerate(UNITS) if i % (2 if SPLIT.arm_of(unit).label == "new" else 3) == 0]

    answer = await post(client, *(outcome(unit) for unit in kept))
    found = await report_of(client)

    assert answer == {
        "object": "outcomes.posted",
        "received": len(kept),
        "stored": len(kept),
        "unseen": 0,
        "repeated": 0,
        "conflicting": 0,
        "excluded": 0,
        "too_many_of_unit": 0,
        "unknown_unit": 0,
        "too_many_names": 0,
    }
    arms: dict[str, list[int]] = {"mini": [], "new": []}
    for unit in UNITS:
        arms[SPLIT.arm_of(unit).label].append(int(unit in kept))
    assert (found["primary"], found["per"], found["outcomes"], found["unmatched"]) == (True, "unit", len(kept), 0)
    assert [(arm["arm"], arm["units"], arm["units_with_outcome"]) for arm in found["arms"]] == [
        (name, len(values), sum(values)) for name, values in arms.items()
    ]
    assert [arm["mean"] for arm in found["arms"]] == [pytest.approx(np.mean(values)) for values in arms.values()]
    (comparison,) = found["comparisons"]
    mean = len(kept) / len(UNITS)
    new, control = ([value - mean for value in arms[name]] for name in ("new", "mini"))
    assert comparison["estimate"] == pytest.approx((sum(new) - sum(control)) / 0.5 / len(UNITS))
    assert comparison["low"] < comparison["estimate"] < comparison["high"]
    assert (comparison["arm"], comparison["control"], comparison["units"]) == ("new", "mini", 300)
    assert comparison["verdict"] == "not yet"
    assert comparison["units_needed"] > 300
    shown = (await client.get("/v1/experiments/exp")).json()
    assert shown["outcomes"]["outcomes"] == [found]


async def test_an_outcome_that_is_sent_again_counts_once(client: httpx.AsyncClient) -> None:
    await embed_for(client, ["ada"])

    first = await post(client, outcome("ada", 2), outcome("ada", 2))
    second = await post(client, outcome("ada", 2), outcome("ada", 5, id="another"))

    assert (first["stored"], first["repeated"]) == (1, 1)
    assert (second["stored"], second["repeated"]) == (1, 1)
    assert sum(arm["mean"] or 0 for arm in (await report_of(client))["arms"]) == 7


@pytest.mark.parametrize("other", [{"unit": "bob"}, {"value": 3}, {"of": 2}, {"before": True}])
async def test_an_id_of_another_outcome_is_counted_apart(client: httpx.AsyncClient, other: dict[str, object]) -> None:
    """An application that numbers the outcomes of each unit from 1 would lose nearly all of them without a word."""
    await embed_for(client, ["ada", "bob"])
    row = {"unit": "ada", "value": 2, "id": "evt-1"}

    answer = await post(client, row, row | other, row)

    assert (answer["stored"], answer["repeated"], answer["conflicting"]) == (1, 1, 1)
    assert sum(arm["mean"] or 0 for arm in (await report_of(client))["arms"]) == 2


async def test_they_survive_a_kill_and_a_restart(start: Start, tmp_path: Path) -> None:
    """Outcomes that got a 202 are on disk: a second process can read them while the first still has the file open."""
    client = await start()
    await embed_for(client, UNITS[:40])
    await post(client, *(outcome(unit) for unit in UNITS[:20]))

    restarted = await start()
    repeated = await post(restarted, outcome(UNITS[0]), outcome(UNITS[39]))
    found = await report_of(restarted)

    assert (repeated["repeated"], repeated["stored"]) == (1, 1)
    assert sum(arm["units_with_outcome"] for arm in found["arms"]) == 21
    assert sum(arm["units"] for arm in (await restarted.get("/v1/experiments/exp")).json()["evidence"]) == 40
    assert (tmp_path / "state" / "experiments.sqlite3").is_file()


async def test_replicas_that_share_the_folder_are_united(start: Start) -> None:
    first, second = await start(), await start()
    await embed_for(first, UNITS[:30])
    await embed_for(second, UNITS[20:50])
    await post(second, *(outcome(unit) for unit in UNITS[:10]))  # of units that the other one has had

    for client in (first, second):
        shown = (await client.get("/v1/experiments/exp")).json()
        assert sum(arm["units"] for arm in shown["evidence"]) == 50
        (found,) = shown["outcomes"]["outcomes"]
        assert sum(arm["units"] for arm in found["arms"]) == 50
        assert sum(arm["units_with_outcome"] for arm in found["arms"]) == 10


async def test_only_outcomes_after_the_first_request_count(client: httpx.AsyncClient) -> None:
    await post(client, outcome("early"))
    await embed_for(client, ["early", "late"])
    await post(client, outcome("late"))

    found = await report_of(client)

    assert (found["outcomes"], found["unmatched"]) == (2, 1)
    assert sum(arm["units_with_outcome"] for arm in found["arms"]) == 1


async def test_units_that_are_written_differently_are_noticed_at_the_first_post(client: httpx.AsyncClient) -> None:
    """Otherwise an application finds out weeks later that none of its outcomes counted."""
    await embed_for(client, ["ada"])

    answer = await post(
        client, outcome("ada"), outcome("Ada"), outcome("bob"), outcome("later", before=True), outcome("excluded")
    )

    assert (answer["stored"], answer["unseen"]) == (5, 3)
    assert (await report_of(client))["unmatched"] == 3


async def test_a_unit_whose_requests_failed_counts_too(start: Start) -> None:
    client = await start()
    body = {"model": "exp", "input": "a", "user": "ada", "dimensions": 3}
    assert (await client.post("/v1/embeddings", json=body)).status_code == 400

    await post(client, outcome("ada"))

    assert sum(arm["units_with_outcome"] for arm in (await report_of(client))["arms"]) == 1


async def test_forced_and_excluded_units_do_not_count(start: Start) -> None:
    client = await start(experiment(exclude=("staff",)))
    await embed_for(client, ["staff"])
    await embed_for(client, ["tester"], **{"x-arm": "new"})

    answer = await post(client, outcome("staff"), outcome("tester"))
    found = await report_of(client)

    assert (answer["excluded"], answer["stored"]) == (1, 1)
    assert found["unmatched"] == 1
    assert sum(arm["units"] for arm in found["arms"]) == 0


async def test_a_unit_is_read_as_in_requests(client: httpx.AsyncClient) -> None:
    await embed_for(client, ["Jos\u00e9", "17", "18"])

    await post(client, outcome(" Jose\u0301 "), outcome(17), outcome(18.0, id=18.0))

    found = await report_of(client)
    assert found["unmatched"] == 0
    assert sum(arm["units_with_outcome"] for arm in found["arms"]) == 3


async def test_units_are_stored_as_hashes_alone(client: httpx.AsyncClient, tmp_path: Path) -> None:
    await embed_for(client, ["ann@example.com"])
    await post(client, outcome("ann@example.com", id="ann's first"))

    for file in (tmp_path / "state").iterdir():
        assert b"ann" not in file.read_bytes()


async def test_outcomes_of_other_names_get_no_verdict(client: httpx.AsyncClient) -> None:
    await embed_for(client, UNITS)
    await post(client, *(outcome(unit, name="clicks") for unit in UNITS if SPLIT.arm_of(unit).label == "new"))

    assert [one["name"] for one in (await client.get(PATH)).json()["outcomes"]] == ["kept", "clicks"]
    (comparison,) = (await report_of(client, "clicks"))["comparisons"]
    assert comparison["low"] > 0
    assert (comparison["verdict"], comparison["reason"]) == (None, "models.yaml declares another outcome")


async def test_a_clear_difference_is_found_and_the_first_verdict_stays(
    client: httpx.AsyncClient, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.outcomes.keeper._MAX_AGE_S", 0.0)
    await embed_for(client, UNITS)
    new, control = ([unit for unit in UNITS if SPLIT.arm_of(unit).label == arm] for arm in ("new", "mini"))
    await post(client, *(outcome(unit) for unit in [*new[::2], *control[::10]]))

    (first,) = (await report_of(client))["comparisons"]
    await post(client, *(outcome(unit, 0.6, id=f"{unit} again") for unit in control))
    (second,) = (await report_of(client))["comparisons"]
    (restarted,) = (await report_of(await start()))["comparisons"]

    assert (first["verdict"], first["reason"]) == ("better", "the interval excludes 0")
    assert first["low"] > 0
    assert second["estimate"] < 0
    assert (second["verdict"], second["decided"]) == ("better", first["decided"])
    assert second["reason"].startswith("decided on 20")
    assert restarted == second


@pytest.mark.parametrize("change", [{"name": "clicks"}, {"margin": 0.5}, {"better": "less"}, {"per": "mean"}])
async def test_an_outcome_that_is_chosen_when_its_result_is_known_gets_no_verdict(
    client: httpx.AsyncClient, start: Start, change: dict[str, object]
) -> None:
    """Of twenty outcomes, or of several margins, one shows a difference by chance: the choice must come first."""
    await embed_for(client, UNITS)
    new, control = ([unit for unit in UNITS if SPLIT.arm_of(unit).label == arm] for arm in ("new", "mini"))
    helped = [*new[::2], *control[::10]]
    await post(client, *(outcome(unit, name=name) for unit in helped for name in ("kept", "clicks")))
    changed = await start(experiment(outcome={"name": "kept", **change}))
    name = str(change.get("name", "kept"))

    before_the_next_post = (await report_of(changed, name))["comparisons"][0]
    await post(changed, outcome(new[0], 0, name=name, id="another"))
    (comparison,) = (await report_of(changed, name))["comparisons"]
    (restored,) = (await report_of(await start()))["comparisons"]

    for found in (before_the_next_post, comparison):
        assert found["verdict"] is None
        assert found["reason"].startswith("`outcome` in models.yaml was changed by 20")
        assert f"after {len(helped)} of its outcomes had been posted: change it back, or count again" in found["reason"]
    assert restored["verdict"] == "better"


@pytest.mark.parametrize("file", ["x.jsonl", "state/experiments.sqlite3"])
async def test_the_files_of_a_gateway_say_which_outcome_was_declared(start: Start, tmp_path: Path, file: str) -> None:
    """For outcomes that are never posted, and compared from a CSV file."""
    client = await start(exposure_log=tmp_path / "x.jsonl")
    await embed_for(client, UNITS)
    await client.get(PATH)  # after which the exposures are on the disk
    new = [unit for unit in UNITS if SPLIT.arm_of(unit).label == "new"]
    csv = tmp_path / "x.csv"
    csv.write_text("\n".join(["unit,value", *(f"{unit},1" for unit in new[::2])]))

    (declared,) = report_files(experiment(), [tmp_path / file], [csv]).outcomes[0].comparisons
    late = experiment(outcome={"name": "kept", "margin": 0.5})
    (changed,) = report_files(late, [tmp_path / file], [csv]).outcomes[0].comparisons

    assert declared.verdict == "better"
    assert (changed.verdict, changed.reason[:35]) == (None, "`outcome` in models.yaml was change")


async def test_the_file_of_one_gateway_has_its_verdict(
    client: httpx.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.outcomes.keeper._MAX_AGE_S", 0.0)
    await embed_for(client, UNITS)
    new, control = ([unit for unit in UNITS if SPLIT.arm_of(unit).label == arm] for arm in ("new", "mini"))
    await post(client, *(outcome(unit) for unit in [*new[::2], *control[::10]]))
    await report_of(client)
    await post(client, *(outcome(unit, 0.6, id=f"{unit} again") for unit in control))
    (shown,) = (await report_of(client))["comparisons"]

    (found,) = report_files(experiment(), [tmp_path / "state/experiments.sqlite3"], []).outcomes[0].comparisons

    assert found.model_dump() == shown
    assert (found.verdict, found.decided is None) == ("better", False)


async def test_experiments_that_share_a_salt_share_no_declaration(start: Start) -> None:
    """Otherwise only the first of them that is posted to has a declaration to compare a later one with."""
    client = await start(experiment(id="sibling", salt="exp"), experiment(salt="exp"))
    await embed_for(client, UNITS)
    sibling = await client.post("/v1/experiments/sibling/outcomes", json=[outcome(UNITS[0])])
    assert sibling.status_code == 202
    await post(client, *(outcome(unit) for unit in UNITS if SPLIT.arm_of(unit).label == "new"))

    changed = await start(experiment(salt="exp", outcome={"name": "kept", "margin": 0.5}))
    await post(changed, outcome(UNITS[0], 0, id="another"))
    (comparison,) = (await report_of(changed))["comparisons"]

    assert comparison["verdict"] is None
    assert comparison["reason"].startswith("`outcome` in models.yaml was changed by 20")


async def test_after_counting_again_a_changed_outcome_is_that_of_a_new_experiment(
    client: httpx.AsyncClient, start: Start
) -> None:
    await embed_for(client, UNITS)
    await post(client, *(outcome(unit) for unit in UNITS))
    again = await start(experiment(outcome={"name": "kept", "margin": 0.5}, counts_from=datetime.now(UTC)))
    await embed_for(again, UNITS)
    await post(again, *(outcome(unit, id=f"{unit} again") for unit in UNITS[::2]))

    (comparison,) = (await report_of(again))["comparisons"]

    assert comparison["verdict"] is not None
    assert comparison["units"] == 300


async def test_another_salt_is_another_experiment(start: Start) -> None:
    """The same users in other arms: their outcomes under the old salt are known, and may be why the salt was changed."""
    client = await start()
    await embed_for(client, UNITS)
    await post(client, *(outcome(unit) for unit in UNITS if SPLIT.arm_of(unit).label == "new"))
    assert (await report_of(client))["comparisons"][0]["verdict"] == "better"
    again = experiment(salt="another", outcome={"name": "kept", "margin": 0.2})
    salted = await start(again)
    await embed_for(salted, UNITS)
    new = [unit for unit in UNITS if Split(again).arm_of(unit).label == "new"]
    await post(salted, *(outcome(unit, id=f"{unit} again") for unit in UNITS[::2]))

    shown = await report_of(salted)

    (comparison,) = shown["comparisons"]
    assert comparison["verdict"] is not None
    assert abs(comparison["estimate"]) < 0.2
    assert (comparison["units"], comparison["generations"]) == (len(UNITS), 1)
    assert shown["arms"][1]["units"] == len(new)


async def test_a_first_declaration_of_an_outcome_without_results_is_accepted(start: Start) -> None:
    client = await start(experiment(outcome=None))
    await embed_for(client, UNITS)
    await post(client, outcome(UNITS[0], name="clicks"))
    declared = await start()
    await post(declared, *(outcome(unit) for unit in UNITS if SPLIT.arm_of(unit).label == "new"))

    (comparison,) = (await report_of(declared))["comparisons"]

    assert comparison["verdict"] == "better"


async def test_after_the_end_no_units_are_promised(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.outcomes.verdicts._LEAST_SECONDS", 0.0)
    client = await start()
    await embed_for(client, UNITS)
    await post(client, *(outcome(unit) for unit in UNITS[::2]))
    (running,) = (await report_of(client))["comparisons"]
    assert running["look_again"] is not None
    end = datetime.now(UTC)

    ended = await start(experiment(end=end))
    (comparison,) = (await report_of(ended))["comparisons"]

    assert (comparison["verdict"], comparison["look_again"]) == ("not yet", None)
    assert comparison["reason"].endswith(f"; the experiment ended on {end:%Y-%m-%d}, so no more units arrive")


async def test_less_may_be_better(start: Start) -> None:
    client = await start(experiment(outcome={"name": "kept", "better": "less"}))
    await embed_for(client, UNITS)
    await post(client, *(outcome(unit, i % 7) for i, unit in enumerate(UNITS) if SPLIT.arm_of(unit).label == "new"))

    (comparison,) = (await report_of(client))["comparisons"]

    assert comparison["verdict"] == "worse"


async def test_numbers_and_booleans_are_accepted_as_text_too(client: httpx.AsyncClient) -> None:
    same = [
        ("a", 1, {}),
        ("b", "1", {"of": ""}),
        ("c", True, {"of": "1"}),
        ("d", "true", {"name": "", "before": "False"}),
    ]
    await embed_for(client, ["a", "b", "c"])

    with pytest.raises(AssertionError, match="value"):  # only a boolean is one
        await post(client, *(outcome(unit, value, **fields) for unit, value, fields in same))
    await post(client, *(outcome(unit, value, **{**fields, "id": 7}) for unit, value, fields in same[:1]))
    repeated = await post(client, outcome("a", 1.0, id="7"))

    assert (repeated["stored"], repeated["repeated"]) == (0, 1)
    stored = await post(client, *(outcome(unit, value, **fields) for unit, value, fields in same[1:3]))
    assert stored["stored"] == 2


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ([], "outcomes", "the body has 0 outcomes; 1 to 1,000 are accepted"),
        ([outcome("u")] * 1001, "outcomes", "the body has 1,001 outcomes; 1 to 1,000 are accepted"),
        ({}, "outcomes", "the body must be a list of outcomes, got null in `outcomes`"),
        ({"outcomes": [3]}, "[0]", "`[0]` must be an object with unit, value and id, got the number `3`"),
        (
            [outcome("u"), {"value": 1, "id": "x"}],
            "[1].unit",
            "`[1].unit` is required: it must be the unit as requests",
        ),
        ([outcome(" ")], "[0].unit", "`[0].unit` must be the unit as requests send it, a text of 1 to 1,024 bytes"),
        (
            [outcome("\u00e9" * 513, id="x")],
            "[0].unit",
            "`[0].unit` must be the unit as requests send it, a text of 1 to 1,024",
        ),
        ([outcome({"a": 1})], "[0].unit", "`[0].unit` must be the unit as requests send it"),
        ([outcome("u", "many")], "[0].value", "`[0].value` must be a number from -1e12 to 1e12, got the string 'many'"),
        ([outcome("u", "NaN")], "[0].value", "`[0].value` must be a number from -1e12 to 1e12, got the string 'NaN'"),
        ([outcome("u", "")], "[0].value", "`[0].value` must be a number from -1e12 to 1e12, got the string ''"),
        ([outcome("u", 1e13)], "[0].value", "`[0].value` must be a number from -1e12 to 1e12, got the number"),
        ([outcome("u", [1])], "[0].value", "`[0].value` must be a number from -1e12 to 1e12, got a list"),
        ([outcome(True)], "[0].unit", "`[0].unit` must be the unit as requests send it"),
        ([outcome(1.5)], "[0].unit", "`[0].unit` must be the unit as requests send it"),
        ([outcome("u", None)], "[0].value", "`[0].value` "),
        ([outcome("u", of=-1)], "[0].of", "`[0].of` must be a number of chances: 0, or from 1e-6 to 1e12, got"),
        ([outcome("u", of=1e-300)], "[0].of", "`[0].of` must be a number of chances: 0, or from 1e-6 to 1e12, got"),
        ([outcome("u", name="a b")], "[0].name", "`[0].name` must have 1 to 64 letters, digits and `.`, `_`, `-`, got"),
        ([outcome("u", id="")], "[0].id", "`[0].id` must be a text of 1 to 200 characters, the same if"),
        ([outcome("u", id=True)], "[0].id", "`[0].id` must be a text of 1 to 200 characters"),
        (
            [outcome("u", before="perhaps")],
            "[0].before",
            "`[0].before` must be true or false, got the string 'perhaps'",
        ),
    ],
)
async def test_a_wrong_outcome_is_a_400_and_none_of_its_request_is_kept(
    client: httpx.AsyncClient, check_error: CheckError, body: object, param: str, message: str
) -> None:
    answer = await client.post(PATH, json=body)

    assert check_error(answer, 400, "invalid_input", param=param).startswith(message)
    assert (await report_of(client))["outcomes"] == 0


async def test_a_body_that_is_too_large_is_a_413(client: httpx.AsyncClient, check_error: CheckError) -> None:
    answer = await client.post(PATH, json=[outcome("u", id="x" * 2_000_000)])

    assert "the limit is 1048576" in check_error(answer, 413, "body_too_large")


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_without_a_folder_the_error_says_what_to_set(start: Start, check_error: CheckError, method: str) -> None:
    with capture_logs() as lines:
        client = await start(state_dir=None)

    assert [line["experiments"] for line in lines if line["event"] == "outcomes_not_kept"] == [["exp"]]
    message = check_error(await client.request(method, PATH, json=[outcome("u")]), 404, "not_found")

    assert message == "outcomes are turned off: set GATEWAY_STATE_DIR to a folder on a local disk"
    assert (await client.get("/v1/experiments/exp")).json()["outcomes"] is None


async def test_a_key_for_another_model_may_neither_post_nor_read(
    start: Start, check_error: CheckError, tmp_path: Path
) -> None:
    file = tmp_path / "keys.yaml"
    digest = "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"  # of "key"
    file.write_text(f"version: 1\nkeys: [{{name: team, sha256: {digest}, models: [mini]}}]")
    client = await start(api_keys_file=file)
    headers = {"authorization": "Bearer key"}

    for method in ("GET", "POST"):
        answer = await client.request(method, PATH, json=[outcome("u")], headers=headers)
        check_error(answer, 403, "model_not_allowed", param="model", type_="permission_error")
    assert (await client.post(PATH, json=[outcome("u")])).status_code == 401


async def test_posting_counts_for_the_quota_of_requests(start: Start) -> None:
    client = await start(requests_per_minute=2)

    codes = [(await client.post(PATH, json=[outcome("u")])).status_code for _ in range(3)]

    assert codes == [202, 202, 429]


async def test_an_outcome_without_a_name_needs_a_declared_one(start: Start, check_error: CheckError) -> None:
    client = await start(experiment(outcome=None))

    message = check_error(await client.post(PATH, json=[outcome("u")]), 400, "invalid_input", param="[0].name")

    assert message == "`[0].name` is required, as models.yaml declares no `outcome` for the experiment"


# -------------------------------------------------------------------------------------------------------------- bounds


async def test_made_up_units_and_names_and_repetitions_are_bounded(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_PER_UNIT", 3)
    monkeypatch.setattr(store_module, "MAX_UNKNOWN", 5)
    monkeypatch.setattr(store_module, "MAX_NAMES", 2)
    await embed_for(client, ["ada"])

    of_one = await post(client, *(outcome("ada", id=str(i)) for i in range(10)))
    made_up = await post(client, *(outcome(f"bot-{i}") for i in range(10)))
    named = await post(client, *(outcome("ada", name=f"n{i}") for i in range(10)))

    assert (of_one["stored"], of_one["too_many_of_unit"]) == (3, 7)
    assert (made_up["stored"], made_up["unseen"], made_up["unknown_unit"]) == (5, 5, 5)
    assert (named["stored"], named["too_many_names"]) == (2, 8)


async def test_other_names_cannot_crowd_out_the_deciding_outcome(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_NAMES", 2)
    await embed_for(client, ["ada"])

    others = await post(client, *(outcome("ada", name=f"n{i}") for i in range(3)))
    deciding = await post(client, outcome("ada"))

    assert (others["stored"], others["too_many_names"]) == (2, 1)
    assert deciding["stored"] == 1
    assert (await report_of(client))["outcomes"] == 1


async def test_a_full_file_is_a_permanent_503_and_requests_continue(start: Start, check_error: CheckError) -> None:
    client = await start(state_max_bytes=1024 * 1024)
    refused = None
    for number in range(40):
        rows = [outcome(f"u{number}-{i}", id=f"{number}-{i}-{'x' * 100}") for i in range(1_000)]
        answer = await client.post(PATH, json=rows)
        if answer.status_code != 202:
            refused = answer
            break

    assert refused is not None
    message = check_error(refused, 503, "outcomes_unavailable", type_="server_error")
    assert "GATEWAY_STATE_MAX_BYTES" in message
    assert refused.headers["x-should-retry"] == "false"
    await embed_for(client, ["ada"])
    assert math.isfinite((await report_of(client))["outcomes"])


async def test_the_largest_values_out_of_the_fewest_chances_still_make_a_report(start: Start) -> None:
    exp = experiment(outcome={"name": "kept", "per": "mean"})
    client = await start(exp)
    units = [f"u{i}" for i in range(260)]
    await embed_for(client, units)
    rows = [outcome(u, 1e12 * (-1) ** i, id=u, of=1e-6 if i % 3 else 1e12) for i, u in enumerate(units)]
    assert (await client.post(PATH, json=rows)).status_code == 202

    answer = await client.get(PATH)

    assert answer.status_code == 200, answer.text
    [comparison] = answer.json()["outcomes"][0]["comparisons"]
    assert comparison["low"] < comparison["estimate"] < comparison["high"]


@pytest.mark.parametrize("field", ["unit", "id"])
async def test_the_error_about_a_unit_or_an_id_does_not_repeat_it(
    client: httpx.AsyncClient, check_error: CheckError, field: str
) -> None:
    """It may identify a person, and clients log error messages."""
    answer = await client.post(PATH, json=[outcome("u") | {field: 1709.25}])

    message = check_error(answer, 400, "invalid_input", param=f"[0].{field}")
    assert "1709" not in message


async def test_a_unit_may_have_1024_bytes(client: httpx.AsyncClient) -> None:
    longest = "\u00e9" * 512
    await embed_for(client, [longest])

    assert (await post(client, outcome(longest, id="x")))["stored"] == 1
    assert (await report_of(client))["unmatched"] == 0


async def test_no_text_of_a_wrong_outcome_comes_into_the_list_of_errors(client: httpx.AsyncClient) -> None:
    for field in ("value", "name", "of", "before", "unit", "id"):
        row = outcome("u") | {field: "secret 'of\" ada` @"}
        await client.post(PATH, json=[row | ({"unit": ["secret"]} if field == "unit" else {})])
        await client.post(PATH, json=[row | ({"id": "secret" * 50} if field == "id" else {})])

        assert "secret" not in (await client.get("/v1/errors")).text


async def test_a_damaged_file_is_a_503_and_requests_and_the_shutdown_still_work(
    start: Start, check_error: CheckError, tmp_path: Path
) -> None:
    client = await start()
    await embed_for(client, ["ada"])
    path = tmp_path / "state" / "experiments.sqlite3"
    other = store_module.Store(path, 10**8)
    rows = [store_module.NewOutcome("kept", i.to_bytes(16), i, 1.0, 1.0, 9.0, is_before=False) for i in range(2_000)]
    other.keep("exp", rows)
    other.close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as program:
        program.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as content:  # the first pages have the schema
        content.seek(20 * 4096)
        content.write(b"\xff" * (path.stat().st_size - 20 * 4096))

    answer = await client.post(PATH, json=[outcome(f"u{i}") for i in range(100)])

    assert "cannot be written at the moment" in check_error(answer, 503, "outcomes_unavailable", type_="server_error")
    check_error(await client.get(PATH), 503, "outcomes_unavailable", type_="server_error")
    await embed_for(client, ["bob"])


async def test_a_disk_that_hangs_ends_in_a_503_that_says_what_to_do(
    start: Start, check_error: CheckError, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start()
    free = threading.Event()
    keep = store_module.Store.keep
    monkeypatch.setattr(store_module.Store, "keep", lambda *args: (free.wait(30), keep(*args))[1])
    monkeypatch.setattr(keeper_module, "_PATIENCE_S", 0.05)

    answer = await client.post(PATH, json=[outcome("ada", id="once")])

    assert "with the same ids" in check_error(answer, 503, "outcomes_unavailable", type_="server_error")
    free.set()
    monkeypatch.setattr(keeper_module, "_PATIENCE_S", 30.0)
    assert (await client.post(PATH, json=[outcome("ada", id="once")])).json()["repeated"] == 1

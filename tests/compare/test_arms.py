"""A name on the command line determines how an arm's texts are embedded."""

from __future__ import annotations

import asyncio
import re

import pytest

from gateway.compare.arms import ArmName, parse_arms, plan_arm
from gateway.errors import CompareError, StartError
from gateway.precision import Precision
from gateway.types import ModelState
from tests.compare.conftest import RETRIEVAL_TASKS, MakeModel, StartGateway


def arm(text: str) -> ArmName:
    return parse_arms([text, "another"])[0]


def test_names() -> None:
    assert parse_arms(["jina", "jina@256", "team/mini:retrieval.query@8"]) == [
        ArmName("jina", "jina", None),
        ArmName("jina@256", "jina", 256),
        ArmName("team/mini:retrieval.query@8", "team/mini:retrieval.query", 8),
    ]
    assert parse_arms(
        ["jina:int8", "jina@256:binary", "jina:retrieval.query:uint8", "a:query@8:ubinary", "a:float"]
    ) == [
        ArmName("jina:int8", "jina", None, Precision.INT8),
        ArmName("jina@256:binary", "jina", 256, Precision.BINARY),
        ArmName("jina:retrieval.query:uint8", "jina:retrieval.query", None, Precision.UINT8),
        ArmName("a:query@8:ubinary", "a:query", 8, Precision.UBINARY),
        ArmName("a:float", "a", None),
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "a comparison needs at least two models"),
        (["a"], "a comparison needs at least two models"),
        (["a", "b", "a"], "'a' is named twice"),
        (["a", "b@"], "'b@': must be MODEL, MODEL@DIMENSIONS, MODEL:PRECISION or MODEL@DIMENSIONS:PRECISION, such as"),
        (["a", "b@0"], "'b@0': must be MODEL"),
        (["a", "b@-1"], "'b@-1': must be MODEL"),
        (["a", "b@many"], "'b@many': must be MODEL"),
        (["a", "b@8@8"], "'b@8@8': must be MODEL"),
        (["a", "@8"], "'@8': must be MODEL"),
        (["a", "b@8:int4"], "precisions are float, int8, uint8, binary, ubinary"),
        (["a", "b@:int8"], "'b@:int8': must be MODEL"),
        (["a", ""], "'': must be MODEL"),
    ],
)
def test_invalid_names_are_errors(names: list[str], message: str) -> None:
    with pytest.raises(CompareError, match=re.escape(message)):
        parse_arms(names)


@pytest.mark.parametrize(
    ("name", "asked", "tasks"),
    [
        # Without tasks none is sent.
        ("plain", (None, None), (None, None)),
        # The retrieval tasks are sent if the model has them.
        ("tasks", ("retrieval.query", "retrieval.passage"), ("retrieval.query", "retrieval.passage")),
        ("queries", ("retrieval.query", None), ("retrieval.query", None)),
        # A name with a task is for both sides, whether it is written out or an alias's.
        ("tasks:text-matching", (None, None), ("text-matching", "text-matching")),
        ("symmetric", (None, None), ("text-matching", "text-matching")),
        ("searcher", ("retrieval.query", None), ("retrieval.query", "retrieval.query")),
        # An alias without a task behaves like the model.
        ("alias", ("retrieval.query", "retrieval.passage"), ("retrieval.query", "retrieval.passage")),
    ],
)
async def test_tasks(
    start_gateway: StartGateway,
    name: str,
    asked: tuple[str | None, str | None],
    tasks: tuple[str | None, str | None],
) -> None:
    aliases = {"symmetric": ("tasks", "text-matching"), "searcher": ("tasks", "retrieval.query"), "alias": "tasks"}
    gateway = await start_gateway(aliases=aliases)
    planned = await plan_arm(gateway.client, arm(name))
    assert (planned.queries.asked_task, planned.passages.asked_task) == asked
    assert (planned.queries.task, planned.passages.task) == tasks


async def test_a_smaller_size_has_its_own_space(start_gateway: StartGateway) -> None:
    gateway = await start_gateway()
    whole, cut = [await plan_arm(gateway.client, arm(name)) for name in ("tasks", "tasks@8")]
    assert (whole.dimensions, whole.width) == (64, 64)
    assert (cut.dimensions, cut.width) == (8, 64)
    assert whole.queries.native_space == cut.queries.native_space == whole.space
    assert cut.space != whole.space
    assert cut.passages.space == cut.space


async def test_a_size_that_the_model_does_not_have_is_refused(start_gateway: StartGateway) -> None:
    gateway = await start_gateway()
    with pytest.raises(
        CompareError,
        match=r"tasks@32: tasks returns vectors of 64, 8 dimensions, not of 32; if it was trained for 32, list that",
    ):
        await plan_arm(gateway.client, arm("tasks@32"))


async def test_sides_in_two_spaces_are_refused(start_gateway: StartGateway, make_words_model: MakeModel) -> None:
    """A document with a task for something else could be near a query by chance only."""
    tasks = {"retrieval.query": "find: ", "classification": "sort: "}
    gateway = await start_gateway(make_words_model("mixed", tasks=tasks, default_task="classification"))
    with pytest.raises(CompareError, match=r"mixed: its queries would be in space mixed@\w+ \(task retrieval.query\)"):
        await plan_arm(gateway.client, arm("mixed"))


async def test_a_model_that_loads_is_waited_for(
    start_gateway: StartGateway, make_words_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_words_model("late", width=8, tasks=RETRIEVAL_TASKS)
    info, model.state, model.info = model.info, ModelState.LOADING, None
    gateway = await start_gateway(model)
    pauses = []

    async def load(seconds: float) -> None:
        pauses.append(seconds)
        await model.backend.start()
        model.state, model.info = ModelState.READY, info

    monkeypatch.setattr(asyncio, "sleep", load)
    assert (await plan_arm(gateway.client, arm("late"))).width == 8
    assert pauses[0] == 5  # as the gateway reports; the model itself does not pause
    assert not any(pauses[1:])


async def test_a_failed_model_is_an_error_at_once(start_gateway: StartGateway, make_model: MakeModel) -> None:
    gateway = await start_gateway(make_model("broken", state=ModelState.FAILED, reason="no weights"))
    with pytest.raises(StartError, match=r"answers 503: .*no weights"):
        await plan_arm(gateway.client, arm("broken"))


async def test_an_unknown_model_is_an_error(start_gateway: StartGateway) -> None:
    gateway = await start_gateway()
    with pytest.raises(StartError, match=r"answers 404: no model is called 'absent'; available: plain, tasks"):
        await plan_arm(gateway.client, arm("absent"))


async def test_int8_without_ranges_is_refused_with_the_line_that_fixes_it(start_gateway: StartGateway) -> None:
    gateway = await start_gateway()

    with pytest.raises(StartError, match=r"set `ranges: ranges/plain.json` on it in models.yaml"):
        await plan_arm(gateway.client, arm("plain:int8"))


@pytest.mark.parametrize(
    ("name", "size"), [("tasks", 256), ("tasks@8", 32), ("tasks:int8", 64), ("tasks:binary", 8), ("raw@4:ubinary", 1)]
)
async def test_the_size_of_a_stored_vector(start_quantized: StartGateway, name: str, size: int) -> None:
    gateway = await start_quantized()

    assert (await plan_arm(gateway.client, arm(name))).bytes_per_vector == size

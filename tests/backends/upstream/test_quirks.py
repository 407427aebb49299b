"""The differences between servers: tasks, encodings, blank texts, the order of vectors; and the size limit of answers."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog.testing
from starlette.responses import JSONResponse, Response, StreamingResponse

from gateway import golden
from gateway.backends.upstream.backend import UpstreamBackend
from gateway.config.model_entry import ModelEntry
from gateway.config.settings import Settings
from gateway.errors import (
    BadInput,
    LoadError,
    NotReachable,
    Overloaded,
    RequestError,
    ShuttingDown,
    UpstreamFailed,
)
from gateway.types import ModelInfo, ModelState, Truncate
from tests.backends.remote import TEXTS, States, entry, expected, job, loaded, wait_until
from tests.backends.stand_in import MODEL, WIDTH, StandIn, vector_of

TASKS = {"retrieval.query": "query", "retrieval.passage": "passage"}


async def why_not_loaded(backend: UpstreamBackend) -> str:
    with pytest.raises(LoadError) as caught:
        await backend.plan()
    return str(caught.value)


async def info_of(model: ModelEntry) -> ModelInfo:
    async with loaded(model) as backend:
        return await backend.plan()


def fingerprint(server: StandIn, kind: str = "openai", **changes: Any) -> str:
    backend = UpstreamBackend(entry(server, kind=kind, **changes), Settings())
    backend._tasks = backend_tasks(backend)
    return backend.base_fingerprint()


def backend_tasks(backend: UpstreamBackend) -> Any:
    from gateway.backends.upstream.tasks import read_tasks

    return read_tasks(backend._entry, backend._upstream)


# -------------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("kind", ["openai", "tei"])
async def test_the_task_is_sent_in_the_field_that_the_server_reads(server: StandIn, kind: str) -> None:
    server.task_field = "input_type"
    model = entry(server, kind=kind, upstream={"tasks": TASKS, "task_field": "input_type"})
    async with loaded(model) as backend:
        embeddings = await backend.embed(job(task="retrieval.passage"))
        assert server.bodies[-1]["input_type"] == "passage"
        assert not {"task", "prompt_name"} & set(server.bodies[-1])
        np.testing.assert_allclose(embeddings.vectors[0], vector_of(f"[passage] {TEXTS[0]}"), rtol=1e-6)

        await backend.embed(job(task=None))
        assert "input_type" not in server.bodies[-1]


@pytest.mark.parametrize(("kind", "field"), [("openai", "task"), ("tei", "prompt_name")])
async def test_a_server_that_ignores_tasks_is_refused(server: StandIn, kind: str, field: str) -> None:
    server.task_field = "input_type"
    reason = await why_not_loaded(UpstreamBackend(entry(server, kind=kind, upstream={"tasks": TASKS}), Settings()))

    assert f"gives the same vectors for the tasks 'query' and 'passage', sent as `{field}`" in reason
    assert "Set `upstream.task_field`" in reason


async def test_each_two_tasks_must_differ(server: StandIn) -> None:
    """One of three is not known to the server, and gets the vectors of another one."""
    server.rewrite = None
    known = {"query": "query", "passage": "passage", "clustering": "query"}
    plain = server.vector
    server.vector = lambda text, task: plain(text, known.get(task or "", task))  # type: ignore[method-assign]
    tasks = {**TASKS, "separation": "clustering"}
    reason = await why_not_loaded(UpstreamBackend(entry(server, upstream={"tasks": tasks}), Settings()))

    assert "the tasks 'query' and 'clustering'" in reason


async def test_two_tasks_of_one_name_may_give_the_same_vectors(server: StandIn) -> None:
    tasks = {"retrieval.query": "search", "text-matching": "search"}
    async with loaded(entry(server, upstream={"tasks": tasks})) as backend:
        await backend.embed(job(task="text-matching"))

    assert server.bodies[-1]["task"] == "search"


@pytest.mark.parametrize("tasks", [{"query": "search"}, {"query": "search", "text-matching": "search"}])
async def test_a_server_that_ignores_the_only_task_is_refused(server: StandIn, tasks: dict[str, str]) -> None:
    server.task_field = ""
    reason = await why_not_loaded(UpstreamBackend(entry(server, upstream={"tasks": tasks}), Settings()))

    assert "gives the same vectors with the task 'search', sent as `task`, and without a task" in reason


async def test_a_task_may_equal_the_servers_behavior_without_one(server: StandIn) -> None:
    plain = server.vector
    server.vector = lambda text, task: plain(text, task or "passage")  # type: ignore[method-assign]
    async with loaded(entry(server, upstream={"tasks": TASKS})) as backend:
        await backend.embed(job(task="retrieval.query"))


async def test_a_server_that_does_one_task_differently_is_refused(servers: tuple[StandIn, StandIn]) -> None:
    """Without a task both give the same."""
    plain = servers[1].vector
    servers[1].vector = lambda text, task: plain(text, "other" if task == "passage" else task)  # type: ignore[method-assign]
    reason = await why_not_loaded(UpstreamBackend(entry(*servers, upstream={"tasks": TASKS}), Settings()))

    assert f"127.0.0.1:{servers[1].port} gives different vectors than 127.0.0.1:{servers[0].port}" in reason
    assert "(task retrieval.passage)" in reason


async def test_a_server_that_forgets_the_tasks_is_shut_out(server: StandIn) -> None:
    states = States()
    async with loaded(entry(server, upstream={"tasks": TASKS}), states, golden_interval_s=0.2):
        server.task_field = ""
        reason = await states.wait_for(ModelState.RECOVERING)
        assert "gives different vectors than before" in reason
        server.task_field = None
        await states.wait_for(ModelState.READY)


async def test_a_prompt_is_probed_as_well(servers: tuple[StandIn, StandIn]) -> None:
    plain = servers[1].vector
    servers[1].vector = lambda text, task: plain(text.removeprefix("query: "), task)  # type: ignore[method-assign]
    reason = await why_not_loaded(UpstreamBackend(entry(*servers, prompts={"query": "query: "}), Settings()))

    assert "(task retrieval.query)" in reason


@pytest.mark.parametrize("key", ["tasks", "prompts"])
async def test_two_names_of_a_task_that_say_different_things_are_refused(server: StandIn, key: str) -> None:
    values = {"query": "a", "search_query": "b"}
    changes = {"prompts": values} if key == "prompts" else {"upstream": {"tasks": values}}
    reason = await why_not_loaded(UpstreamBackend(entry(server, **changes), Settings()))

    assert "has two different values for the task 'retrieval.query'" in reason
    same = {"query": "a", "search_query": "a"}
    changes = {"prompts": same} if key == "prompts" else {"upstream": {"tasks": same}}
    assert list((await info_of(entry(server, **changes))).tasks) == ["retrieval.query", "retrieval.passage"]


@pytest.mark.parametrize("changes", [{"prompts": {"query": "find: "}}, {"upstream": {"tasks": {"query": "search"}}}])
@pytest.mark.parametrize("kind", ["openai", "tei"])
async def test_a_model_with_a_task_for_queries_alone_takes_documents_as_they_are(
    server: StandIn, kind: str, changes: dict[str, Any]
) -> None:
    """As one in this process does, and sentence-transformers: an A/B by the name of the model works."""
    async with loaded(entry(server, kind=kind, **changes)) as backend:
        assert (await backend.plan()).tasks.get("retrieval.passage") == ""
        await backend.embed(job(["a"], task="retrieval.passage"))

    body = server.bodies[-1]
    assert (body["input"] if kind == "openai" else body["inputs"]) == ["a"]
    assert not {"task", "prompt_name"} & body.keys()


async def test_an_empty_prompt_adds_only_its_own_task(server: StandIn) -> None:
    assert list((await info_of(entry(server, prompts={"query": ""}))).tasks) == ["retrieval.query"]


async def test_a_default_task_that_the_model_does_not_have_is_refused(server: StandIn) -> None:
    for changes, known in [({}, "none"), ({"upstream": {"tasks": TASKS}}, "retrieval.query, retrieval.passage")]:
        reason = await why_not_loaded(UpstreamBackend(entry(server, default_task="separation", **changes), Settings()))
        assert reason == f"default_task is 'separation', but the model's tasks are: {known}"


def test_fields_that_are_sent_next_to_a_text_are_part_of_the_models_identity(server: StandIn) -> None:
    plain = {"upstream": {"tasks": TASKS}}
    variants = [
        fingerprint(server, **plain),
        fingerprint(server, **plain, source="acme/other"),
        fingerprint(server, upstream={"tasks": TASKS, "model": "renamed"}),
        fingerprint(server, upstream={"tasks": {**TASKS, "retrieval.query": "search"}}),
        fingerprint(server, upstream={"tasks": {"retrieval.query": "query"}}),
        fingerprint(server, upstream={"tasks": TASKS, "task_field": "input_type"}),
        fingerprint(server, upstream={"tasks": TASKS, "extra_body": {"dimensions": 8}}),
        fingerprint(server, upstream={"tasks": TASKS, "extra_body": {"dimensions": 9}}),
        fingerprint(server, upstream={"tasks": TASKS, "extra_body": {"dimensions": None}}),
    ]
    assert len(set(variants)) == len(variants)

    same = [
        fingerprint(server, upstream={"tasks": TASKS, "extra_body": {"encoding_format": encoding}})
        for encoding in ("float", "base64", None)
    ]
    assert set(same) == {variants[0]}  # how a vector is written does not change it
    assert fingerprint(server, upstream={"tasks": TASKS, "model": MODEL}) == variants[0]


async def test_a_golden_file_of_other_extra_fields_is_refused(server: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "far.json"
    async with loaded(entry(server, upstream={"extra_body": {"dimensions": 16}})) as backend:
        golden.write(path, backend.base_fingerprint(), backend.probe)
        space = (await backend.plan()).fingerprint
    for size, is_right in ((16, True), (8, False)):
        model = entry(server, golden=str(path), upstream={"extra_body": {"dimensions": size}})
        backend = UpstreamBackend(model, Settings())
        if is_right:
            assert (await backend.plan()).fingerprint != space  # the recorded vectors are part of it
        else:
            assert "recorded from another checkpoint" in await why_not_loaded(backend)
        await backend.stop()


@pytest.mark.parametrize("tasks", [TASKS, {"retrieval.query": "query"}])
async def test_a_golden_file_of_a_server_that_ignored_tasks_is_refused(
    server: StandIn, tmp_path: Path, tasks: dict[str, str]
) -> None:
    """It may have been recorded before this was checked."""
    path = tmp_path / "far.json"
    model = entry(server, golden=str(path), upstream={"tasks": tasks})
    async with loaded(entry(server, upstream={"tasks": tasks})) as backend:
        bare = [one.vector for one in backend.probe if one.task is None]
        rows = [(text, task, bare[i]) for task in (None, *tasks) for i, text in enumerate(golden.TEXTS)]
        fingerprint = backend.base_fingerprint()
        golden.write(path, fingerprint, backend.probe)
        async with loaded(model):
            pass
        golden.write(path, fingerprint, [golden.GoldenVector(*row) for row in rows])
    server.task_field = ""

    reason = await why_not_loaded(UpstreamBackend(model, Settings()))

    assert "its golden file was recorded from a server that gives the same vectors" in reason
    golden.write(path, fingerprint, [golden.GoldenVector(*row) for row in rows[:-1]])
    assert "gives the same vectors" in await why_not_loaded(UpstreamBackend(model, Settings())), "of fewer texts"


async def test_a_model_without_golden_vectors_says_once_that_an_exchange_goes_unnoticed(
    server: StandIn, tmp_path: Path
) -> None:
    path = tmp_path / "far.json"
    with structlog.testing.capture_logs() as logs:
        async with loaded(entry(server)) as backend:
            golden.write(path, backend.base_fingerprint(), backend.probe)
            await backend.start(States())
        assert [line["event"] for line in logs].count("upstream_not_pinned") == 1
        async with loaded(entry(server, golden=str(path))):
            pass

    assert [line["event"] for line in logs].count("upstream_not_pinned") == 1


async def test_golden_vectors_alone_do_not_serve(server: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "far.json"
    async with loaded(entry(server)) as backend:
        golden.write(path, backend.base_fingerprint(), backend.probe)
    server.fault = "503"
    with pytest.raises(NotReachable, match=r"is unready \(503\)"):
        await UpstreamBackend(entry(server, golden=str(path)), Settings()).plan()


# ------------------------------------------------------------------------------------------------------------ encodings


@pytest.mark.parametrize(
    ("taken", "sent"),
    [
        (("base64", "float", None), "base64"),
        (("float", None), "float"),
        (("float",), "float"),
        ((None,), None),
        (("base64",), "base64"),
    ],
)
@pytest.mark.parametrize("speaks_base64", [True, False])
async def test_a_server_is_asked_as_it_can_be_asked(
    server: StandIn, taken: tuple[str | None, ...], sent: str | None, speaks_base64: bool
) -> None:
    server.encodings, server.speaks_base64 = taken, speaks_base64
    async with loaded(entry(server)) as backend:
        server.bodies.clear()
        for _ in range(3):
            np.testing.assert_array_equal((await backend.embed(job())).vectors, expected())

    assert [body.get("encoding_format", None) for body in server.bodies] == [sent] * 3  # remembered
    assert all(("encoding_format" in body) == (sent is not None) for body in server.bodies)


@pytest.mark.parametrize("encoding", ["float", "base64", None])
async def test_the_operator_decides_how_a_server_is_asked(server: StandIn, encoding: str | None) -> None:
    async with loaded(entry(server, upstream={"extra_body": {"encoding_format": encoding}})) as backend:
        await backend.embed(job())

    assert {body.get("encoding_format", None) for body in server.bodies} == {encoding}
    assert all(("encoding_format" in body) == (encoding is not None) for body in server.bodies)


async def test_a_server_that_crashes_at_base64_is_asked_for_numbers(server: StandIn) -> None:
    def crash(body: dict[str, Any]) -> Response | None:
        return Response(status_code=500) if body.get("encoding_format") == "base64" else None

    server.respond = crash
    async with loaded(entry(server)) as backend:
        await backend.embed(job())

    assert server.bodies[-1]["encoding_format"] == "float"


async def test_a_server_that_refuses_everything_says_why(server: StandIn) -> None:
    server.respond = lambda body: JSONResponse({"error": {"message": f"no {body.get('encoding_format')}"}}, 400)
    with pytest.raises(NotReachable, match="refuses the request: no base64"):
        await UpstreamBackend(entry(server), Settings()).plan()


async def test_a_server_that_is_too_busy_to_be_asked_is_not_judged(server: StandIn) -> None:
    server.fault = "429"
    with pytest.raises(NotReachable, match=r"is overloaded \(429\)"):
        await UpstreamBackend(entry(server), Settings()).plan()
    assert len(server.bodies) == 1


async def test_a_server_that_comes_back_is_tested_again(server: StandIn) -> None:
    states = States()
    async with loaded(entry(server), states) as backend:
        server.fault = "500"
        with pytest.raises(UpstreamFailed):
            await backend.embed(job())
        await states.wait_for(ModelState.RECOVERING)
        server.fault, server.encodings, server.refused = "", ("float",), ("",)
        await states.wait_for(ModelState.READY)
        await backend.embed(job(["", "b"]))

    assert server.bodies[-1] == {"model": MODEL, "input": [" ", "b"], "encoding_format": "float"}


async def test_fields_that_a_server_does_not_know_are_left_out(server: StandIn) -> None:
    extra = {"truncation_direction": None, "truncate": None, "priority": 3}
    async with loaded(entry(server, kind="tei", upstream={"extra_body": extra})) as backend:
        await backend.embed(job(truncate=Truncate.START))

    assert server.bodies[-1] == {"inputs": TEXTS, "normalize": False, "priority": 3}


# -------------------------------------------------------------------------------------------------------- blank texts


@pytest.mark.parametrize("kind", ["openai", "tei"])
async def test_blank_texts_are_sent_as_they_are_where_they_are_taken(server: StandIn, kind: str) -> None:
    async with loaded(entry(server, kind=kind)) as backend:
        embeddings = await backend.embed(job(["a", "", " ", "\n"]))

    np.testing.assert_allclose(embeddings.vectors, expected(["a", "", " ", "\n"]), rtol=1e-6)


def refuses_empty(server: StandIn, kind: str) -> None:
    server.refused = ("",)


def crashes_at_empty(server: StandIn, kind: str) -> None:
    def crash(body: dict[str, Any]) -> Response | None:
        return Response(status_code=500) if "" in body.get("input", body.get("inputs")) else None

    server.respond = crash


def gives_for_empty(vector: object) -> Callable[[StandIn, str], None]:
    def spoil(server: StandIn, kind: str) -> None:
        def rewrite(answer: Any) -> Any:
            texts = server.bodies[-1]["inputs" if kind == "tei" else "input"]
            if kind == "tei":
                return [vector if text == "" else row for text, row in zip(texts, answer, strict=True)]
            for item in answer["data"]:
                if texts[item["index"]] == "":
                    item["embedding"] = vector
            return answer

        server.rewrite = rewrite

    return spoil


@pytest.mark.parametrize("kind", ["openai", "tei"])
@pytest.mark.parametrize(
    "spoil",
    [
        refuses_empty,
        crashes_at_empty,
        gives_for_empty([0.0] * WIDTH),
        gives_for_empty([]),
        gives_for_empty(None),
        gives_for_empty([1.0] * 4),
    ],
    ids=["refused", "500", "zeros", "empty", "null", "narrow"],
)
async def test_a_server_that_takes_no_empty_text_is_sent_a_space(
    server: StandIn, kind: str, spoil: Callable[[StandIn, str], None]
) -> None:
    spoil(server, kind)
    states = States()
    async with loaded(entry(server, kind=kind), states) as backend:
        server.bodies.clear()
        for _ in range(4):
            embeddings = await backend.embed(job(["a", "", "c", "\n"]))
            np.testing.assert_allclose(embeddings.vectors, expected(["a", " ", "c", "\n"]), rtol=1e-6)

    assert len(server.bodies) == 4
    assert states.reported == []


@pytest.mark.parametrize("kind", ["openai", "tei"])
async def test_where_no_blank_text_is_taken_the_text_is_named_before_it_is_sent(server: StandIn, kind: str) -> None:
    server.refused = ("", " ", ".")
    states = States()
    async with loaded(entry(server, kind=kind, upstream={"max_batch_texts": 4}), states) as backend:
        server.bodies.clear()
        for blank, place in (("", 1), ("\n\t", 2), ("\u3000", 7)):
            texts = list(TEXTS)
            texts[place] = blank
            with pytest.raises(BadInput, match=f"text {place} is blank, and .* rejects blank texts: leave it out"):
                await backend.embed(job(texts))
        sent = [text for body in server.bodies for text in body.get("input", body.get("inputs"))]
        await backend.embed(job())

    assert all(text.strip() for text in sent)
    assert states.reported == []


@pytest.mark.parametrize("kind", ["openai", "tei"])
@pytest.mark.parametrize("spoil", [None, [0.0] * WIDTH, []])
async def test_a_server_that_takes_no_blank_text_is_sent_a_full_stop(
    server: StandIn, kind: str, spoil: list[float] | None
) -> None:
    """It refuses them, or returns zeros or nothing for them."""
    name = "inputs" if kind == "tei" else "input"

    def refuse(body: dict[str, Any]) -> Response | None:
        return Response(status_code=400) if not all(text.strip() for text in body[name]) else None

    def rewrite(answer: Any) -> Any:
        texts = server.bodies[-1][name]
        if kind == "tei":
            return [row if text.strip() else spoil for text, row in zip(texts, answer, strict=True)]
        for item in answer["data"]:
            if not texts[item["index"]].strip():
                item["embedding"] = spoil
        return answer

    server.respond, server.rewrite = (refuse, None) if spoil is None else (None, rewrite)
    async with loaded(entry(server, kind=kind)) as backend:
        embeddings = await backend.embed(job(["a", "", " \n", "\u3000", " b "]))

    np.testing.assert_allclose(embeddings.vectors, expected(["a", ".", ".", ".", " b "]), rtol=1e-6)


async def test_an_empty_text_with_an_instruction_is_not_blank(server: StandIn) -> None:
    server.refused = ("", " ")
    async with loaded(entry(server, prompts={"query": "find: "})) as backend:
        embeddings = await backend.embed(job(["a", ""], task="retrieval.query"))

    np.testing.assert_array_equal(embeddings.vectors, expected(["find: a", "find: "]))


# --------------------------------------------------------------------------------------------------------------- order


def without_index(*, is_reversed: bool = False, is_turned: bool = False) -> Callable[[Any], Any]:
    def rewrite(answer: Any) -> Any:
        items = sorted(answer["data"], key=lambda item: item["index"], reverse=is_reversed)
        if is_turned:
            items.append(items.pop(0))
        return {**answer, "data": [{"embedding": item["embedding"]} for item in items]}

    return rewrite


async def test_vectors_without_an_index_are_taken_in_order(server: StandIn) -> None:
    server.rewrite = without_index()
    async with loaded(entry(server, upstream={"tasks": TASKS})) as backend:
        # The test of its abilities, then all texts with each task, and each text once alone.
        assert sorted(len(body["input"]) for body in server.bodies) == [1] * (3 + 6) + [6] * 3
        np.testing.assert_array_equal((await backend.embed(job())).vectors, expected())


async def test_a_server_that_leaves_out_the_index_0_is_understood(server: StandIn) -> None:
    def rewrite(answer: Any) -> Any:
        for item in answer["data"]:
            if item["index"] == 0:
                del item["index"]
        return answer

    server.rewrite = rewrite
    async with loaded(entry(server)) as backend:
        np.testing.assert_array_equal((await backend.embed(job())).vectors, expected())


@pytest.mark.parametrize("disorder", [{"is_reversed": True}, {"is_turned": True}])
@pytest.mark.parametrize("has_index", [False, True])
@pytest.mark.parametrize("kind", ["openai", "tei"])
async def test_a_server_that_gives_texts_the_vectors_of_others_is_refused(
    server: StandIn, kind: str, has_index: bool, disorder: dict[str, bool]
) -> None:
    """An ``index`` can be wrong; TEI's answer has none."""

    def rewrite(answer: Any) -> Any:
        if kind == "tei":
            return answer[::-1] if disorder.get("is_reversed") else [*answer[1:], *answer[:1]]
        items = without_index(**disorder)(answer)["data"]
        return {**answer, "data": [{**item, "index": i} for i, item in enumerate(items)] if has_index else items}

    server.rewrite = rewrite
    reason = await why_not_loaded(UpstreamBackend(entry(server, kind=kind), Settings()))

    assert "alone than among several texts" in reason


@pytest.mark.parametrize("is_constant", [True, False])
async def test_vectors_that_say_nothing_of_a_text_are_refused(server: StandIn, is_constant: bool) -> None:
    def rewrite(answer: Any) -> Any:
        for item in answer["data"]:
            random = np.random.default_rng().normal(size=WIDTH).tolist()
            item["embedding"] = [1.0, *[0.5] * (WIDTH - 1)] if is_constant else random
        return answer

    server.rewrite = rewrite
    reason = await why_not_loaded(UpstreamBackend(entry(server), Settings()))

    assert ("the same vector for every text" if is_constant else "alone than among several texts") in reason


async def test_tasks_of_different_widths_are_refused(server: StandIn) -> None:
    def respond(body: dict[str, Any]) -> Response:
        width = 24 if body.get("task") == "passage" else WIDTH
        rows = [vector_of(f"{body.get('task')} {text}", width=width).tolist() for text in body["input"]]
        return JSONResponse({"data": [{"index": i, "embedding": row} for i, row in enumerate(rows)]})

    server.respond = respond
    reason = await why_not_loaded(UpstreamBackend(entry(server, upstream={"tasks": TASKS}), Settings()))

    assert "gives vectors of 16 and 24 dimensions for different tasks" in reason


@pytest.mark.parametrize("status", [201, 203])
async def test_an_answer_with_another_status_of_success_is_one(server: StandIn, status: int) -> None:
    def respond(body: dict[str, Any]) -> Response:
        rows = [vector_of(text).tolist() for text in body["input"]]
        return JSONResponse({"data": [{"index": i, "embedding": row} for i, row in enumerate(rows)]}, status)

    server.respond = respond
    async with loaded(entry(server)) as backend:
        np.testing.assert_allclose((await backend.embed(job())).vectors, expected(), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------- its description


async def test_a_server_without_a_description_may_return_vectors(server: StandIn) -> None:
    for response in (Response(status_code=500), Response(status_code=403), Response(b"<html>")):
        server.models_response = response
        info = await info_of(entry(server))
        assert info.max_tokens == 8192


async def test_the_limits_of_all_servers_are_those_of_the_weakest(servers: tuple[StandIn, StandIn]) -> None:
    servers[0].max_texts, servers[1].max_texts = 8, 3
    async with loaded(entry(*servers, kind="tei")) as backend:
        for server in servers:
            server.bodies.clear()
        await backend.embed(job())
        sizes = [len(body["inputs"]) for server in servers for body in server.bodies]

    assert sorted(sizes) == [1, 3, 3, 3]


async def test_numbers_are_asked_for_in_small_parts(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take long to read, and block everything else."""
    monkeypatch.setattr("gateway.backends.upstream.backend._MAX_NUMBERS", WIDTH * 4)
    sizes = []
    for server.speaks_base64 in (True, False):
        async with loaded(entry(server)) as backend:
            server.bodies.clear()
            np.testing.assert_array_equal((await backend.embed(job())).vectors, expected())
            sizes.append(sorted(len(body["input"]) for body in server.bodies))

    assert sizes == [[10], [2, 4, 4]]


async def test_a_server_that_changes_to_numbers_is_asked_in_small_parts(
    server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version was started behind the same name; or a server that was away when the model was loaded."""
    monkeypatch.setattr("gateway.backends.upstream.backend._MAX_NUMBERS", WIDTH * 4)
    states = States()
    async with loaded(entry(server), states) as backend:
        server.fault = "500"
        with pytest.raises(UpstreamFailed):
            await backend.embed(job())
        await states.wait_for(ModelState.RECOVERING)
        server.fault, server.speaks_base64 = "", False
        await states.wait_for(ModelState.READY)
        server.bodies.clear()
        np.testing.assert_array_equal((await backend.embed(job())).vectors, expected())

    assert sorted(len(body["input"]) for body in server.bodies) == [2, 4, 4]


# --------------------------------------------------------------------------------------------------------------- size

MEGABYTE = 1 << 20


def endless(num_megabytes: int) -> Response:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(num_megabytes):
            yield b" " * MEGABYTE

    return StreamingResponse(pieces(), media_type="application/json")


def bomb(num_megabytes: int) -> Response:
    packed = gzip.compress(b" " * MEGABYTE * num_megabytes)
    return Response(packed, headers={"content-encoding": "gzip"}, media_type="application/json")


@pytest.mark.parametrize("make", [endless, bomb])
async def test_an_answer_is_read_up_to_the_size_that_vectors_can_have(
    server: StandIn, make: Callable[[int], Response]
) -> None:
    states = States()
    response = make(200)
    async with loaded(entry(server), states) as backend:
        server.respond = lambda body: response if body["input"] == TEXTS else None
        tracemalloc.start()
        try:
            with pytest.raises(UpstreamFailed, match=r"gives an answer of more than \d+ bytes for 10 texts") as caught:
                await backend.embed(job())
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        await backend.embed(job(["other"]))

    limit = int(caught.value.message.split("more than ")[1].split(" bytes")[0])
    vectors = len(TEXTS) * (1024 + 32 * WIDTH)
    assert 0 < limit - 64 * 1024 - vectors < 1000  # the rest is the size of the request
    assert peak < 20 * MEGABYTE
    assert states.reported == []


async def test_the_limit_accepts_every_form_of_vectors(server: StandIn) -> None:
    """Numbers of twenty places, indented, with each text repeated."""

    def rewrite(answer: Any) -> Any:
        for item in answer["data"]:
            item["text"] = server.bodies[-1]["input"][item["index"]]
            item["embedding"] = [float(f"{number:.17e}") for number in item["embedding"]]
        return answer

    def respond_indented(content: Any, **_: Any) -> str:
        return json_dumps(content, indent=8)

    json_dumps = json.dumps
    server.speaks_base64 = False
    texts = ["word " * 20_000] * 4
    async with loaded(entry(server)) as backend:
        server.rewrite = rewrite
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.backends.stand_in.json.dumps", respond_indented)
            embeddings = await backend.embed(job(texts))

    np.testing.assert_allclose(embeddings.vectors, expected(texts), rtol=1e-6)


async def test_a_packed_answer_is_read(server: StandIn) -> None:
    def pack(body: dict[str, Any]) -> Response | None:
        data = [{"index": i, "embedding": vector_of(text).tolist()} for i, text in enumerate(body["input"])]
        packed = gzip.compress(json.dumps({"data": data}).encode())
        return Response(packed, headers={"content-encoding": "gzip"})

    async with loaded(entry(server)) as backend:
        server.respond = pack
        np.testing.assert_array_equal((await backend.embed(job())).vectors, expected())


@pytest.mark.parametrize("status", [500, 400, 429])
async def test_an_error_is_read_no_further_than_its_message_can_be(server: StandIn, status: int) -> None:
    async with loaded(entry(server, upstream={"max_retries": 0})) as backend:
        response = endless(200)
        response.status_code = status
        server.respond = lambda body: response if body["input"] == TEXTS else None
        tracemalloc.start()
        try:
            with pytest.raises((UpstreamFailed, BadInput, Overloaded)):
                await backend.embed(job())
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    assert peak < 20 * MEGABYTE


async def test_a_servers_description_is_read_up_to_a_limit(server: StandIn) -> None:
    server.models_response = endless(200)
    tracemalloc.start()
    try:
        info = await info_of(entry(server))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert info.max_tokens == 8192
    assert peak < 30 * MEGABYTE


async def test_an_answer_that_never_ends_ends_with_the_time(server: StandIn) -> None:
    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.02)

    async with loaded(entry(server, upstream={"timeout_s": 0.5, "max_retries": 0})) as backend:
        server.respond = lambda body: StreamingResponse(drip()) if body["input"] == TEXTS else None
        started = time.monotonic()
        with pytest.raises(UpstreamFailed, match=r"has not answered within 0\.5 s"):
            await backend.embed(job())

    assert time.monotonic() - started < 10


# -------------------------------------------------------------------------------------------------- not even HTTP


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x" * 100_000 + b": 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 999 Odd\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-encoding: br\r\ncontent-length: 4\r\n\r\nabcd",
    ],
)
async def test_a_server_that_does_not_speak_http_is_a_failed_upstream(server: StandIn, answer: bytes) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with loaded(entry(server, upstream={"max_retries": 0})) as backend:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with await asyncio.start_server(speak, sock=listener):
                backend.servers[0].url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
                with pytest.raises(RequestError) as caught:
                    await backend.embed(job())

    assert type(caught.value) is UpstreamFailed
    assert any(words in caught.value.message for words in ("dropped the connection", "999", "is not JSON"))


@pytest.mark.parametrize("path", ["/v1", "/some/prefix/v1"])
async def test_a_server_may_be_at_an_ipv6_address_and_below_a_prefix(path: str) -> None:
    asked: list[str] = []

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        asked.append(head.split(" ")[1])
        size = next((int(line[15:]) for line in head.lower().split("\r\n") if line.startswith("content-length:")), 0)
        texts = json.loads(await reader.readexactly(size))["input"] if size else []
        content = json.dumps({"data": [{"index": i, "embedding": vector_of(t).tolist()} for i, t in enumerate(texts)]})
        writer.write(
            f"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {len(content)}\r\n\r\n{content}".encode()
        )
        await writer.drain()
        writer.close()

    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    url = f"http://[::1]:{listener.getsockname()[1]}{path}"
    async with await asyncio.start_server(speak, sock=listener), loaded(entry(upstream={"urls": (url,)})) as backend:
        np.testing.assert_allclose((await backend.embed(job())).vectors, expected(), rtol=1e-6)
        assert backend.servers[0].name == f"[::1]:{listener.getsockname()[1]}"

    assert set(asked) == {f"{path}/models", f"{path}/embeddings"}


async def test_a_wait_for_a_server_can_be_ended(server: StandIn) -> None:
    """The watch ends with its trials."""
    backend = UpstreamBackend(entry(server), Settings())
    await backend.plan()
    await backend.start(States())
    server.delay_s = 60
    server.bodies.clear()
    backend.servers[0].breaker.note_failure(is_grave=True)
    await wait_until(lambda: len(server.bodies) > 0)
    await backend.stop()

    with pytest.raises(RequestError, match="is shutting down"):
        await backend.embed(job())


async def test_a_request_that_waits_for_a_server_when_the_gateway_stops_gets_an_error(server: StandIn) -> None:
    backend = UpstreamBackend(entry(server, upstream={"max_connections": 1}), Settings())
    await backend.plan()
    await backend.start(States())
    server.delay_s = 60
    server.bodies.clear()
    waiting = [asyncio.create_task(backend.embed(job())) for _ in range(3)]  # one at the server, two for its turn
    await wait_until(lambda: len(server.bodies) > 0)
    await backend.stop()
    results = await asyncio.gather(*waiting, return_exceptions=True)

    assert [type(result) for result in results] == [ShuttingDown] * 3


async def test_a_request_between_two_attempts_when_the_gateway_stops_gets_an_error(
    server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.backends.upstream.backend.random.uniform", lambda _least, _most: 0.5)
    backend = UpstreamBackend(entry(server), Settings())
    await backend.plan()
    await backend.start(States())
    server.fault = "502"
    server.bodies.clear()
    waiting = asyncio.create_task(backend.embed(job()))
    await wait_until(lambda: len(server.bodies) > 0 and backend.servers[0].num_texts == 0)
    await backend.stop()

    with pytest.raises(ShuttingDown):
        await waiting

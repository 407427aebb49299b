"""A task's prompt is the one that the checkpoint has for it under any name, unless the registry says otherwise."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.config.registry import ModelEntry
from gateway.engine.checkpoint.prompts import jina_prompts, tasks_of
from gateway.engine.loading import LoadPlan, plan_load
from gateway.errors import LoadError

MakeCheckpoint = Callable[..., Path]


def entry(source: Path, **changes: Any) -> ModelEntry:
    fields: dict[str, Any] = {"id": "tiny", "source": str(source), "enabled": True, "device": "cpu", "dtype": "float32"}
    return ModelEntry(**{**fields, **changes})


Plan = Callable[..., LoadPlan]


@pytest.fixture
def plan(make_checkpoint: MakeCheckpoint) -> Plan:
    """Return a function that plans a model whose ``config_sentence_transformers.json`` holds ``sentence``."""
    folder = make_checkpoint()

    def plan(sentence: Mapping[str, object], **changes: Any) -> LoadPlan:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(sentence))
        return plan_load(entry(folder, **changes))

    return plan


@pytest.mark.parametrize(
    ("prompts", "query", "passage"),
    [
        pytest.param(
            {"query": "query: ", "passage": "passage: ", "document": ""}, "query: ", "passage: ", id="empty last"
        ),
        pytest.param(
            {"document": "", "query": "query: ", "passage": "passage: "}, "query: ", "passage: ", id="empty first"
        ),
        pytest.param(
            {"search_query": "search_query: ", "search_document": "search_document: ", "query": "", "document": ""},
            "search_query: ",
            "search_document: ",
            id="all other names empty",
        ),
        pytest.param({"query": "q: ", "passage": "p: ", "document": None}, "q: ", "p: ", id="null"),
        pytest.param({"query": "q: ", "search_query": "q: ", "passage": "p: "}, "q: ", "p: ", id="twice the same"),
        pytest.param({"query": "q: "}, "q: ", "", id="queries alone"),
        pytest.param({"query": "q: ", "document": None}, "q: ", "", id="queries alone, null"),
        pytest.param({"passage": "p: "}, "", "p: ", id="passages alone"),
    ],
)
def test_an_empty_prompt_hides_no_other(prompts: Mapping[str, object], query: str, passage: str, plan: Plan) -> None:
    assert plan({"prompts": prompts}).tasks == {"retrieval.query": query, "retrieval.passage": passage}


@pytest.mark.parametrize("prompts", [None, {}, {"query": "", "document": ""}, {"query": None}])
def test_without_any_text_there_are_no_tasks(prompts: object, plan: Plan) -> None:
    assert plan({"prompts": prompts}).tasks == {}


def test_a_prompt_for_another_task_leaves_queries_and_passages_bare(plan: Plan) -> None:
    tasks = plan({"prompts": {"clustering": "c: "}}).tasks

    assert tasks == {"separation": "c: ", "retrieval.query": "", "retrieval.passage": ""}


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        (
            {"prompts": {"query": "q: ", "search_query": "s: "}},
            "the checkpoint's prompts 'query' and 'search_query' are different texts for one task, retrieval.query",
        ),
        (
            {"prompts": {"passage": "p: ", "query": "q: ", "search_document": "", "document": "d: "}},
            "the checkpoint's prompts 'passage' and 'document' are different texts for one task, retrieval.passage",
        ),
        ({"prompts": ["query: "]}, "prompts must be an object of texts by name, got list"),
        ({"prompts": "query: "}, "prompts must be an object of texts by name, got str"),
        ({"prompts": {"query": 5}}, "the prompt 'query' must be text, got 5"),
        ({"prompts": {"query": ["q: "]}}, "the prompt 'query' must be text, got ['q: ']"),
        ({"prompts": {"query": False}}, "the prompt 'query' must be text, got False"),
        ({"prompts": {"a": "b"}, "default_prompt_name": "c"}, "default_prompt_name is 'c', but the prompts are: a"),
        ({"prompts": None, "default_prompt_name": "c"}, "default_prompt_name is 'c', but the prompts are: none"),
        ({"prompts": {"a": "b"}, "default_prompt_name": 5}, "default_prompt_name is 5, but the prompts are: a"),
        ({"prompts": {"a": "b"}, "default_prompt_name": ""}, "default_prompt_name is '', but the prompts are: a"),
    ],
)
def test_prompts_that_contradict_each_other_or_are_malformed_are_refused(
    sentence: Mapping[str, object], reason: str, plan: Plan
) -> None:
    with pytest.raises(LoadError, match=re.escape(reason)):
        plan(sentence)


def test_the_registry_overrides_a_checkpoints_ambiguous_prompts(plan: Plan) -> None:
    sentence = {"prompts": {"query": "q: ", "search_query": "s: ", "passage": "p: "}}

    tasks = plan(sentence, prompts={"query": "mine: ", "document": ""}).tasks

    # An empty prompt in the registry is intentional: it overrides the checkpoint's text.
    assert tasks == {"retrieval.query": "mine: ", "retrieval.passage": ""}


def test_two_texts_for_one_task_are_both_shown(plan: Plan) -> None:
    with pytest.raises(LoadError, match=r"retrieval\.query: 'q: ' and 's: '\. Choose one in the registry: prompts: "):
        plan({"prompts": {"query": "q: ", "search_query": "s: "}})


def test_a_registry_that_contradicts_itself_is_refused(plan: Plan) -> None:
    with pytest.raises(LoadError, match="the registry's prompts 'query' and 'search_query' are different texts"):
        plan({}, prompts={"query": "q: ", "search_query": "s: "})


@pytest.mark.parametrize(
    ("sentence", "prompts", "instruction"),
    [
        ({"prompts": {"query": "q: "}, "default_prompt_name": None}, {}, ""),
        ({"prompts": {"query": "q: "}, "default_prompt_name": "query"}, {}, "q: "),
        ({"prompts": {"query": "q: "}, "default_prompt_name": "query"}, {"search_query": "mine: "}, "mine: "),
        ({"prompts": {"query": "q: "}, "default_prompt_name": "document"}, {}, ""),
        ({"prompts": {}, "default_prompt_name": "query"}, {}, ""),
        ({"prompts": {"sts": "sts: "}, "default_prompt_name": "sts"}, {}, "sts: "),
    ],
)
def test_the_default_prompt_stands_before_texts_without_a_task(
    sentence: Mapping[str, object], prompts: Mapping[str, str], instruction: str, plan: Plan
) -> None:
    assert plan(sentence, prompts=prompts).instruction == instruction


def test_a_query_and_a_passage_without_a_prompt_are_in_one_space(plan: Plan) -> None:
    info = plan({"prompts": {"query": "q: "}}).info
    bare = plan({}).info

    spaces = info.spaces_by_task()

    assert spaces["retrieval.query"] == spaces["retrieval.passage"]
    assert spaces["retrieval.query"] != bare.space()
    assert spaces == plan({"prompts": {"document": "", "query": "q: "}}).info.spaces_by_task()


def test_tasks_of_adapters_are_those_of_the_adapters_alone() -> None:
    assert tasks_of({"retrieval.query": "q: "}, {}, ["retrieval.query"]) == {"retrieval.query": "q: "}


JINA = ["retrieval.query", "retrieval.passage", "text-matching"]
QUERY = "Represent the query for retrieving evidence documents: "
PASSAGE = "Represent the document for retrieval: "


@pytest.mark.parametrize(
    ("prompts", "query", "passage", "matching"),
    [
        pytest.param({}, QUERY, PASSAGE, "", id="none"),
        pytest.param(
            {"query": "", "document": ""}, QUERY, PASSAGE, "", id="sentence-transformers' empty ones say nothing"
        ),
        pytest.param({"query": "q: "}, "q: ", PASSAGE, "", id="another name of the task"),
        pytest.param({"retrieval.query": "q: ", "document": "d: "}, "q: ", "d: ", "", id="both names"),
        pytest.param({"retrieval.query": "", "document": ""}, "", PASSAGE, "", id="empty under the task's own name"),
        pytest.param(
            {"text-matching": "t: ", "clustering": "c: "}, QUERY, PASSAGE, "t: ", id="a task without an adapter"
        ),
    ],
)
def test_jinas_instructions_are_the_published_ones_unless_the_checkpoint_has_others(
    prompts: Mapping[str, str], query: str, passage: str, matching: str
) -> None:
    tasks = tasks_of(jina_prompts(JINA, prompts), {}, JINA)

    assert tasks == {"retrieval.query": query, "retrieval.passage": passage, "text-matching": matching}

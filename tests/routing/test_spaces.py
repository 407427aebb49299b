"""A space changes with everything that makes vectors incomparable, and with nothing else."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from gateway import types
from gateway.backends.fake import fake_info
from gateway.ranges import between
from gateway.routing.spaces import is_same_space, why_not_interchangeable, why_other_ranges
from gateway.types import ModelInfo, Output

TASKS = {"retrieval.query": "query: ", "retrieval.passage": "passage: ", "text-matching": "match: ", "separation": ""}
JINA = fake_info("jina", width=32, dimensions=(32, 16), tasks=TASKS, default_task="text-matching")
PLAIN = fake_info("plain", instruction="")


def space(
    info: ModelInfo = JINA, task: str | None = "text-matching", dimensions: int = 32, normalized: bool = True
) -> str:
    return info.space(task, dimensions, is_normalized=normalized)


def with_instruction(task: str, text: str) -> ModelInfo:
    return dataclasses.replace(JINA, tasks={**TASKS, task: text})


@pytest.mark.parametrize("model_id", ["jina", "team/jina", "a.b_c-d"])
def test_a_space_is_a_name_for_people_and_a_hash(model_id: str) -> None:
    info = dataclasses.replace(JINA, id=model_id)

    assert re.fullmatch(r"[A-Za-z0-9._-]+@[0-9a-f]{12}", space(info))
    assert space(info).startswith(model_id.replace("/", "-"))


def test_a_space_is_the_same_in_every_process() -> None:
    """Stored vectors are labeled with it: if this fails, PREPROCESSING_VERSION or the format has changed."""
    assert space() == "jina@e6787dd4cc4a"
    assert PLAIN.space() == "plain@0540f4a90e77"


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(space(dataclasses.replace(JINA, fingerprint="0" * 64)), id="weights, tokenizer or pooling"),
        pytest.param(space(dimensions=16), id="dimensions"),
        pytest.param(space(normalized=False), id="normalization"),
        pytest.param(space(task="separation"), id="task"),
        pytest.param(space(task="retrieval.query"), id="task family"),
        pytest.param(space(dataclasses.replace(JINA, default_task=None), task=None), id="no task"),
        pytest.param(space(with_instruction("text-matching", "match:")), id="a space in the instruction"),
    ],
)
def test_every_setting_that_makes_vectors_incomparable_changes_the_space(other: str) -> None:
    assert other.partition("@")[2] != space().partition("@")[2]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(dataclasses.replace(JINA, device="cuda:0"), id="device"),
        pytest.param(dataclasses.replace(JINA, dtype="float16"), id="dtype"),
        pytest.param(dataclasses.replace(JINA, engine="other"), id="engine"),
        pytest.param(dataclasses.replace(JINA, memory_bytes=1), id="memory"),
        pytest.param(dataclasses.replace(JINA, max_tokens=1), id="max_tokens"),
        pytest.param(dataclasses.replace(JINA, source="/copy", revision="0" * 40), id="where the weights came from"),
        pytest.param(dataclasses.replace(JINA, dimensions=(32,)), id="other accepted dimensions"),
        pytest.param(dataclasses.replace(JINA, outputs=(Output.DENSE, Output.SPARSE)), id="other outputs"),
        pytest.param(dataclasses.replace(JINA, default_task="separation"), id="default task"),
        pytest.param(with_instruction("separation", "sort: "), id="instruction of another task"),
        pytest.param(dataclasses.replace(JINA, tasks=dict(reversed(TASKS.items()))), id="order of the tasks"),
        pytest.param(dataclasses.replace(JINA, instruction="unused: "), id="instruction of requests without a task"),
    ],
)
def test_what_leaves_vectors_comparable_leaves_the_space(other: ModelInfo) -> None:
    assert space(other) == space()


def test_a_space_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    info = dataclasses.replace(JINA)
    known = [info.space(), info.space("separation"), info.space(dimensions=16)]
    assert len(set(known)) == 3
    monkeypatch.setattr(types, "json", None)
    assert [info.space(), info.space("separation"), info.space(dimensions=16)] == known
    assert info == JINA


def test_a_query_and_a_passage_share_a_space() -> None:
    assert space(task="retrieval.query") == space(task="retrieval.passage")


@pytest.mark.parametrize("changed", ["retrieval.query", "retrieval.passage"])
@pytest.mark.parametrize("asked", ["retrieval.query", "retrieval.passage"])
def test_either_instruction_of_a_family_changes_the_space_of_both(changed: str, asked: str) -> None:
    assert space(with_instruction(changed, "other: "), asked) != space(task=asked)


def test_the_instruction_of_a_model_without_tasks_changes_its_space() -> None:
    other = dataclasses.replace(PLAIN, instruction="embed: ")

    assert space(other, None, 8) != space(PLAIN, None, 8)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        pytest.param("jina@0123456789ab", "jina@0123456789ab", True, id="equal"),
        pytest.param("jina@0123456789ab", "renamed@0123456789ab", True, id="another name"),
        pytest.param("jina@0123456789ab", "0123456789ab", True, id="the hash alone"),
        pytest.param("jina@0123456789ab", "jina@0123456789ac", False, id="another hash"),
        pytest.param("jina@0123456789ab", "jina", False, id="a name alone"),
        pytest.param("jina@0123456789ab", "jina@", False, id="no hash"),
    ],
)
def test_only_the_hash_decides_whether_spaces_are_the_same(one: str, other: str, expected: bool) -> None:
    assert is_same_space(one, other) is expected
    assert is_same_space(other, one) is expected


# ------------------------------------------------------------------------------------------------------- fallbacks


def changed(info: ModelInfo = JINA, **changes: object) -> ModelInfo:
    return dataclasses.replace(info, id="other", **changes)  # type: ignore[arg-type]


def test_each_task_has_its_space_and_a_request_without_one_that_of_the_default() -> None:
    assert JINA.spaces_by_task() == {task: space(JINA, task) for task in TASKS}
    assert dataclasses.replace(JINA, default_task=None).spaces_by_task().keys() == {*TASKS, None}
    assert PLAIN.spaces_by_task() == {None: space(PLAIN, None, 8)}


@pytest.mark.parametrize("info", [JINA, PLAIN], ids=["tasks", "no tasks"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"max_tokens": 512},
        {"outputs": (Output.DENSE, Output.SPARSE)},
        {"dimensions": (32, 16, 8, 4)},
        {"device": "cuda:0", "dtype": "float16"},
    ],
    ids=["the same", "longer texts", "more outputs", "more dimensions", "elsewhere"],
)
def test_a_model_that_can_do_as_much_may_be_a_fallback(info: ModelInfo, more: dict[str, object]) -> None:
    assert why_not_interchangeable(info, changed(info, **more)) == ""


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        pytest.param(
            changed(tasks={"retrieval.query": "query: ", "retrieval.passage": "passage: "}, default_task=None),
            "other has no task 'text-matching'",
            id="a task less",
        ),
        pytest.param(
            changed(tasks={**TASKS, "separation": "apart: "}),
            rf"jina is in space {space(JINA, 'separation')}, and other in other@[0-9a-f]{{12}} \(separation\)",
            id="another instruction",
        ),
        pytest.param(
            changed(default_task="separation"),
            "the default task of jina is text-matching, and that of other is separation",
            id="another default",
        ),
        pytest.param(
            changed(max_tokens=255), "other would cut texts to 255 tokens, and jina to 256", id="shorter texts"
        ),
        pytest.param(changed(dimensions=(32,)), "other does not allow vectors of 16 dimensions", id="fewer dimensions"),
    ],
)
def test_a_difference_is_why_a_model_may_not_be_a_fallback(other: ModelInfo, reason: str) -> None:
    assert re.fullmatch(reason, why_not_interchangeable(JINA, other))


def test_a_model_without_tasks_cannot_replace_one_with_tasks_nor_the_other_way_round() -> None:
    assert why_not_interchangeable(JINA, PLAIN) == "plain has no task 'retrieval.query'"
    assert why_not_interchangeable(PLAIN, JINA) == "jina has tasks, and plain has none"
    other = changed(PLAIN, fingerprint="0" * 64)
    one, two = space(PLAIN, None, 8), space(other, None, 8)
    assert why_not_interchangeable(PLAIN, other) == f"plain is in space {one}, and other in {two}"


def test_a_model_that_returns_less_cannot_be_a_fallback() -> None:
    outputs = (Output.DENSE, Output.SPARSE, Output.MULTIVECTOR)
    info = dataclasses.replace(JINA, outputs=outputs)

    assert why_not_interchangeable(info, changed(outputs=outputs[:1])) == "other does not return sparse, multivector"
    assert why_not_interchangeable(changed(outputs=outputs[:1]), info) == ""


def test_int8_vectors_are_in_one_space_where_the_sizes_that_both_have_were_measured_alike() -> None:
    def with_ranges(model_id: str, **highs: float) -> ModelInfo:
        sizes = {int(name.removeprefix("d")): high for name, high in highs.items()}
        ranges = {n: between(np.zeros(n, np.float32), np.full(n, high, np.float32)) for n, high in sizes.items()}
        return dataclasses.replace(JINA, id=model_id, dimensions=tuple(sizes), ranges=ranges)

    one = with_ranges("one", d32=1.0, d16=2.0)

    assert why_other_ranges(one, with_ranges("other", d32=1.0, d16=2.0)) == ""
    assert why_other_ranges(one, with_ranges("other", d32=1.0, d8=5.0)) == ""
    other = with_ranges("other", d32=1.0, d16=3.0)
    assert why_other_ranges(one, other) == "one and other have different `ranges` for int8 vectors"
    assert why_not_interchangeable(one, other) == "one and other have different `ranges` for int8 vectors"

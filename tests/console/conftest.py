"""A browser for the pages: a message on its console is a failure, and so is a request to another host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.console.served import OPERATOR, Gateway, serving
from tests.peers import find, is_missing

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

AXE = Path(__file__).parent / "vendor" / "axe-core-4.14.1.min.js"
_WIDE = {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Serve a gateway without keys for all tests of a module."""
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start Chromium for a module.

    Playwright keeps an event loop running in this thread for as long, in which no async test can run: in a module it has to
    come before the tests with a browser, and the browser may not outlive the module.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        is_missing("playwright is not installed (make install-dev)")
    chromium = find("chromium", "chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


OpenPage = Callable[..., "contextmanager[Page]"]


@pytest.fixture
def visit(browser: Browser) -> Callable[..., Any]:
    """Return a context manager that yields an empty page, and checks at its end that the browser reported no errors."""

    @contextmanager
    def visit(url: str, *, theme: str = "light", expected: tuple[str, ...] = (), **options: Any) -> Iterator[Page]:
        context: BrowserContext = browser.new_context(**{"viewport": _WIDE, "color_scheme": theme, **options})
        page = context.new_page()
        page.set_default_timeout(60_000)
        complaints: list[str] = []
        elsewhere: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: None if request.url.startswith(url) else elsewhere.append(request.url))
        try:
            yield page
        finally:
            context.close()
        unexpected = [text for text in complaints if not any(part in text for part in expected)]
        assert not unexpected
        assert not elsewhere

    return visit


@pytest.fixture
def operator(visit: Callable[..., Any]) -> Callable[..., Any]:
    """Return a context manager that gives a page of a reader who has signed in with the operator's key."""

    @contextmanager
    def operator(url: str, path: str, **options: Any) -> Iterator[Page]:
        with visit(url, **options) as page:
            page.goto(f"{url}/console/sign-in?next=/console{path}")
            # Chromium complains about an autofocus that comes after a field has been filled. A selector, because the page's
            # policy forbids the function that Playwright would evaluate again and again.
            page.wait_for_selector("#key:focus")
            page.locator("#key").fill(OPERATOR)
            page.locator("main").get_by_role("button", name="Sign in").click()
            page.wait_for_url(f"{url}/console{path}")
            yield page

    return operator


@pytest.fixture(scope="session")
def check_accessibility() -> Callable[[Page], None]:
    """Return a function that checks a page with axe-core."""
    axe = AXE.read_text(encoding="utf-8")

    def check(page: Page) -> None:
        if not page.evaluate("'axe' in window"):
            page.evaluate(axe)  # past the page's CSP, which allows no such script
        results = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        found = [(rule["id"], [node["target"] for node in rule["nodes"]][:5]) for rule in results["violations"]]
        assert not found

    return check


@pytest.fixture(scope="session")
def picture_folder() -> Path:
    """Return the folder of the screenshots, which people look at after a change."""
    folder = Path(__file__).parents[2] / "build" / "console"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def check_everywhere(check_accessibility: Callable[[Page], None], picture_folder: Path) -> Callable[[Page, str], None]:
    """Return a function that checks a page in both themes, narrow and wide, and takes its pictures."""

    def check(page: Page, name: str) -> None:
        page.wait_for_load_state()  # a click before it may have left an empty document
        for width in (1280, 380):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            for theme in ("light", "dark"):
                page.emulate_media(color_scheme=theme)
                page.screenshot(path=picture_folder / f"{name}-{width}-{theme}.png", full_page=True)
                check_accessibility(page)
        page.set_viewport_size(_WIDE)

    return check

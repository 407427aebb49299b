"""Access to the console by key, and protection against requests that other sites make a browser send."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from jinja2 import Environment
from starlette.testclient import TestClient

from gateway.access.keyring import Keyring, key_digest
from gateway.app import create_admin_app, create_app
from gateway.config.settings import Settings
from gateway.console.access import Gate
from gateway.deployment import Deployment
from gateway.fleet import Fleet
from gateway.telemetry import metrics
from tests.console.served import Gateway, registry_of, serving, usual_models

ADMIN, CLIENT = "operator-secret", "client-secret"
HTML = {"accept": "text/html"}


@contextmanager
def reader(gateway: Gateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, headers={**HTML, "origin": gateway.url}) as client:
        yield client


def sign_in(client: httpx.Client, key: str) -> httpx.Response:
    return client.post("/console/sign-in", data={"key": key, "next": "/console/playground"})


@pytest.fixture(scope="module")
def with_keys() -> Iterator[Gateway]:
    with serving(admin_key=ADMIN, api_keys=f"{CLIENT},another-secret") as gateway:
        yield gateway


def test_an_api_client_gets_json_where_a_browser_gets_pages(gateway: Gateway) -> None:
    for accept, status in (("*/*", 404), ("application/json", 404), ("text/html,*/*;q=0.8", 303)):
        answer = httpx.get(gateway.url, headers={"accept": accept})
        assert answer.status_code == status
    assert answer.headers["location"] == "/console"
    assert httpx.get(gateway.url).json()["error"]["code"] == "not_found"


def test_every_page_forbids_scripts_and_styles_from_elsewhere(gateway: Gateway) -> None:
    for path in ("/console", "/console/sign-in", "/console/static/console.css", "/console/models/x/load"):
        answer = httpx.get(f"{gateway.url}{path}", headers=HTML)
        if answer.status_code == 200:
            policy = answer.headers["content-security-policy"]
            assert policy == (
                "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
                "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
            )


def test_templates_are_not_compiled_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest takes longer than the loop may be held."""
    compile_, threads = Environment.compile, []

    def compile_here(self: Environment, *args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return compile_(self, *args, **options)

    monkeypatch.setattr(Environment, "compile", compile_here)
    with serving() as gateway:
        assert httpx.get(f"{gateway.url}/console", headers=HTML).status_code == 200
    assert len(threads) > 10
    assert all(name.startswith("asyncio_") for name in threads)  # the loop's executor


def test_pages_have_no_inline_script_or_style(gateway: Gateway) -> None:
    page = httpx.get(f"{gateway.url}/console", headers=HTML).text
    assert not re.search(r"<style|\sstyle=|\son\w+=\"|<script(?![^>]*\ssrc=)", page.replace("onerror=alert", ""))
    assert not re.findall(r"(?:src|href|action)=\"(?:https?:)?//", page)


def test_without_keys_the_console_is_as_open_as_the_api(gateway: Gateway) -> None:
    with reader(gateway) as client:
        assert client.get("/console").status_code == 200
        refused = client.post("/console/reload")
        assert refused.status_code == 403
        assert "set GATEWAY_ADMIN_KEY" in refused.text


OPEN_TO_READERS = {
    ("GET", "/console"),
    ("GET", "/console/static/x"),
    ("GET", "/console/sign-in"),
    ("POST", "/console/sign-in"),
    ("POST", "/console/sign-out"),
    ("POST", "/console/theme"),
    ("GET", "/console/playground"),
    ("POST", "/console/playground"),
    ("GET", "/console/experiments"),
    ("GET", "/console/experiments/x"),
    ("POST", "/console/experiments/x/assignment"),
    ("POST", "/console/experiments/x/weights"),  # a preview
    ("GET", "/console/compare"),  # these two only determine who may see more
    ("GET", "/console/duel"),
}


@pytest.mark.parametrize("key", ["", CLIENT], ids=["without keys", "with a client's key"])
def test_the_pages_of_the_operators_api_need_the_operators_key_as_well(tmp_path: Path, key: str) -> None:
    models = usual_models()
    settings = Settings(**({"api_keys": key} if key else {}), console="public", runs_dir=str(tmp_path))
    deployment = Deployment(registry_of(models), settings, Fleet(models))
    deployment.fleet.started.set()
    app = create_app(deployment)
    routes = {
        (method, re.sub(r"\{[^}]*\}", "x", path))
        for path, methods in app.state.methods.items()
        if path.startswith(("/console", "/admin"))
        for method in methods
    }
    with TestClient(app, base_url="http://reader", follow_redirects=False) as client:
        client.headers.update({**HTML, "origin": "http://reader"})
        sign_in(client, key)
        client.headers["authorization"] = f"Bearer {key}"
        last = sorted(routes, key=lambda route: route[1].endswith("sign-out"))
        opened = {(method, path) for method, path in last if client.request(method, path).status_code != 403}
    assert opened == OPEN_TO_READERS
    assert len(routes - opened) > 50


def test_with_keys_a_reader_signs_in_first(with_keys: Gateway) -> None:
    with reader(with_keys) as client:
        asked = client.get("/console")
        assert asked.status_code == 303
        assert asked.headers["location"] == "/console/sign-in?next=%2Fconsole"
        assert "jina" not in client.get("/console/sign-in").text


def test_the_operators_key_is_exchanged_for_a_cookie_that_scripts_cannot_read(with_keys: Gateway) -> None:
    with reader(with_keys) as client:
        answer = sign_in(client, ADMIN)
        assert answer.status_code == 303
        assert answer.headers["location"] == "/console/playground"
        cookie = answer.headers["set-cookie"]
        assert {"HttpOnly", "SameSite=strict", "Path=/console"} <= set(cookie.split("; "))
        assert ADMIN not in cookie
        assert "All" in client.get("/console").text or "models answer" in client.get("/console").text
        assert client.post("/console/sign-out").status_code == 303
        assert client.get("/console").status_code == 303


@pytest.mark.parametrize("key", ["", "wrong-secret", CLIENT])
def test_no_other_key_opens_the_operators_console(with_keys: Gateway, key: str) -> None:
    with reader(with_keys) as client:
        answer = sign_in(client, key)
        assert answer.status_code == 401
        assert "not the operator" in answer.text
        assert client.get("/console").status_code == 303


def test_a_made_up_cookie_opens_nothing(with_keys: Gateway) -> None:
    with reader(with_keys) as client:
        sign_in(client, ADMIN)
        [name] = client.cookies
        assert httpx.get(f"{with_keys.url}/console", headers=HTML, cookies={name: "made-up"}).status_code == 303


@pytest.mark.parametrize("place", ["https://evil.example", "//evil.example", "/console\\evil", "/v1/models", ""])
def test_signing_in_leads_to_no_other_site(with_keys: Gateway, place: str) -> None:
    with reader(with_keys) as client:
        answer = client.post("/console/sign-in", data={"key": ADMIN, "next": place})
        assert answer.headers["location"] == "/console"


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://["},
        {"origin": "http://[::1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {},
    ],
)
def test_a_form_of_another_site_changes_nothing(with_keys: Gateway, headers: dict[str, str]) -> None:
    with reader(with_keys) as client:
        sign_in(client, ADMIN)
        del client.headers["origin"]
        refused = client.post("/console/reload", headers=headers)
        assert refused.status_code == 403
        assert "must come from the console itself" in refused.text
        assert client.post("/console/sign-out", headers=headers).status_code == 403


def test_the_operator_reads_the_registry_again(with_keys: Gateway) -> None:
    with reader(with_keys) as client:
        sign_in(client, ADMIN)
        assert "Read models.yaml again" in client.get("/console").text
        assert client.post("/console/reload").status_code == 303
        page = client.get("/console").text
        assert "models.yaml was read. loaded: broken" in page  # a model that has failed is loaded again
        assert "models.yaml was read" not in client.get("/console").text  # said once


def test_a_public_console_gives_a_key_its_own_rights(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        "version: 1\nkeys:\n"
        f"  - {{name: narrow, models: [jina], sha256: {key_digest('narrow-secret-0123')}}}\n"
        f"  - {{name: wide, sha256: {key_digest('wide-secret-01234')}}}\n"
    )
    with serving(api_keys_file=str(keys), console="public") as gateway, reader(gateway) as client:
        bearer = {"authorization": "Bearer wide-secret-01234"}
        httpx.post(f"{gateway.url}/v1/embeddings", json={"model": "bge", "input": "overload"}, headers=bearer)
        assert sign_in(client, "narrow-secret-0123").status_code == 303
        page = client.get("/console").text
        assert "jina" in page
        assert ">bge<" not in page
        assert not re.search(r"\b429\b", page)  # another client's; a random id may contain these digits
        assert "Read models.yaml again" not in page


def test_without_an_operators_key_a_locked_console_says_what_to_do() -> None:
    with serving(api_keys=CLIENT) as gateway, reader(gateway) as client:
        assert "Set <code>GATEWAY_ADMIN_KEY</code>" in client.get("/console/sign-in").text
        assert sign_in(client, CLIENT).status_code == 401


def test_without_any_key_the_page_to_sign_in_says_what_to_do(gateway: Gateway) -> None:
    page = httpx.get(f"{gateway.url}/console/sign-in").text
    assert "This gateway requires no key" in page
    assert "set <code>GATEWAY_ADMIN_KEY</code>" in page


def test_a_console_that_is_off_is_not_there() -> None:
    with serving(console="off") as gateway:
        assert httpx.get(f"{gateway.url}/console", headers=HTML).status_code == 404
        assert httpx.get(gateway.url, headers=HTML).status_code == 404


def test_with_an_operators_port_the_clients_port_has_no_console() -> None:
    with serving(admin_port=1) as gateway:
        assert httpx.get(f"{gateway.url}/console", headers=HTML).status_code == 404


def test_a_prefix_of_a_proxy_is_in_every_link(gateway: Gateway) -> None:
    headers = {**HTML, "x-forwarded-prefix": "/ai/embed"}
    page = httpx.get(f"{gateway.url}/console", headers=headers).text
    links = re.findall(r"(?:href|src|action)=\"(/[^\"]*)\"", page)
    assert links
    assert all(link.startswith("/ai/embed/console") for link in links)
    assert httpx.get(gateway.url, headers=headers).headers["location"] == "/ai/embed/console"


def test_a_form_that_is_too_large_costs_only_its_request(gateway: Gateway) -> None:
    with reader(gateway) as client:
        for content, status in (("a" * 1_100_000, 413), ("&".join(f"a{i}=1" for i in range(400)), 400)):
            answer = client.post(
                "/console/sign-in",
                content=content,
                headers={"content-type": "application/x-www-form-urlencoded"},
            )
            assert answer.status_code == status
        assert client.post("/console/sign-in", json={"key": "x"}).status_code == 400


def test_the_operators_port_has_the_console() -> None:
    models = usual_models()
    deployment = Deployment(registry_of(models), Settings(admin_port=1, admin_key=ADMIN), Fleet(models))
    deployment.fleet.started.set()
    with TestClient(create_admin_app(deployment), base_url="http://operator") as client:
        client.headers.update({**HTML, "origin": "http://operator"})
        assert client.get("/", follow_redirects=False).headers["location"] == "/console"
        assert client.get("/console", follow_redirects=False).status_code == 303
        sign_in(client, ADMIN)
        page = client.get("/console").text
        assert "models answer" in page
        assert "curl http://operator:8000/v1/embeddings" in page  # the API is on the other port
        fields = {"kind": "texts", "candidates": "one\ntwo", "arm": ["nothing"]}
        assert "404 model_not_found" in client.post("/console/playground", data=fields).text


async def test_a_client_that_signs_in_again_and_again_signs_no_other_client_out() -> None:
    settings = Settings(admin_key=ADMIN, api_keys=CLIENT, console="public")
    gate = Gate(settings, Keyring(settings), 1)
    tokens = [await gate.sign_in(key, "address") for key in (ADMIN, *[CLIENT] * 1_100)]

    def is_known(token: str) -> bool:
        return gate._find(token) is not None

    assert is_known(tokens[0])
    assert [is_known(token) for token in (tokens[1], tokens[-51], tokens[-50], tokens[-1])] == [
        False,
        False,
        True,
        True,
    ]


def test_a_page_has_its_path_in_the_metrics_and_all_its_methods_in_a_405(gateway: Gateway) -> None:
    """The path without its parameters: else each model or experiment would be another series."""
    with reader(gateway) as client:
        client.get("/console/static/console.css")
        client.get("/console/experiments/none")
        refused = client.delete("/console/sign-in")

    seen = {labels[0] for labels in metrics.values(metrics.REQUESTS)}
    assert {"/console/static/{name}", "/console/experiments/{experiment_id:path}"} <= seen
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, POST")

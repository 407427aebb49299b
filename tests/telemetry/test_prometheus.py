"""A real Prometheus scrapes a gateway that serves, evaluates the rules, and answers the dashboard's queries."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.watch.promql import promql
from deploy.watch.rows import ROWS
from tests.listener import make_listener
from tests.peers import needs
from tests.telemetry.observed import PROMETHEUS

pytestmark = needs("prometheus", "prometheus")

WAIT_S = 120

# Panels that must have something to show when two models are there and one of them answers requests.
SHOWN = {
    "Availability",
    "Models ready",
    "In flight",
    "Texts per second",
    "Versions",
    "Requests",
    "Latency of requests",
    "Tokens by model",
    "Latency",
    "Texts",
    "Where the time goes",
    "p95 of stages",
    "State",
    "Models",
    "Resident memory",
    "CPU",
    "Open files",
}


@contextmanager
def serving(log: Path) -> Iterator[str]:
    """Serve one model that answers and one that does not; return the address, host and port."""
    script = Path(__file__).with_name("scraped_gateway.py")
    with make_listener() as listener, log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, script, str(listener.fileno())],
            pass_fds=[listener.fileno()],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            process.terminate()
            process.wait(WAIT_S)


def write_files(folder: Path, address: str) -> None:
    """Put our own files there, with the address of the test's gateway.

    Ten minutes, for which a model may be missing, become two seconds; the other times stay: on a busy machine a scrape may
    fail.
    """
    config = (PROMETHEUS / "prometheus.yml").read_text()
    config = config.replace("gateway:9000", address).replace("15s", "2s")
    (folder / "prometheus.yml").write_text(config)
    rules = (PROMETHEUS / "rules.yml").read_text()
    (folder / "rules.yml").write_text(rules.replace("for: 10m", "for: 2s"))


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Run a gateway under a little load, and a Prometheus that scrapes it; yield a client of Prometheus."""
    folder = tmp_path_factory.mktemp("prometheus")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serving(folder / "gateway.log") as address:
        write_files(folder, address)
        command = [
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ]
        is_over = threading.Event()
        load = threading.Thread(target=send_requests, args=(address, is_over))
        load.start()
        with (
            subprocess.Popen(command) as process,
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client,
        ):
            try:
                yield client
            finally:
                is_over.set()
                load.join()
                process.terminate()


def send_requests(address: str, is_over: threading.Event) -> None:
    with httpx.Client(base_url=f"http://{address}", timeout=WAIT_S) as client:
        while not is_over.wait(0.05):
            client.post("/v1/embeddings", json={"model": "scraped", "input": ["a", "b c"]}).raise_for_status()


def ask(prometheus: httpx.Client, expression: str) -> list[dict[str, Any]]:
    response = prometheus.get("/api/v1/query", params={"query": expression})
    if response.status_code == 503:  # it has not read its data yet
        response.raise_for_status()
    answer = response.json()
    assert answer["status"] == "success", answer
    result: list[dict[str, Any]] = answer["data"]["result"]
    return result


def wait_for(found: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            if found():
                return
        except httpx.HTTPError:
            pass  # it is still starting
        time.sleep(0.2)
    raise AssertionError(f"{what} did not come in {WAIT_S} s")


def test_the_alert_of_a_model_that_cannot_be_loaded_fires_and_no_other(prometheus: httpx.Client) -> None:
    def firing() -> list[tuple[str, ...]]:
        found = [result["metric"] for result in ask(prometheus, 'ALERTS{alertstate="firing"}')]
        return [(one["alertname"], one["severity"], one.get("model", "")) for one in found]

    expected = [("GatewayModelNotReady", "page", "broken")]
    wait_for(firing, "an alert")
    time.sleep(3)  # and no other joins it

    assert firing() == expected


def test_every_rule_is_evaluated_without_an_error(prometheus: httpx.Client) -> None:
    def rules() -> list[dict[str, Any]]:
        groups = prometheus.get("/api/v1/rules").raise_for_status().json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    wait_for(lambda: all(rule["health"] != "unknown" for rule in rules()), "an evaluation")

    assert {rule["health"] for rule in rules()} == {"ok"}
    assert len(rules()) >= 25


def test_every_panel_is_answered_and_the_main_ones_have_something_to_show(prometheus: httpx.Client) -> None:
    wait_for(lambda: ask(prometheus, "sum(rate(gateway_texts_total[30s])) > 0"), "a rate")
    empty = set()
    for row in ROWS:
        for panel in row.panels:
            for series in panel.series:
                asked = (
                    promql(series.expression)
                    .replace("$__rate_interval", "30s")
                    .replace("$__range", "5m")
                    .replace("$model", ".*")
                )
                result = ask(prometheus, asked)
                empty |= {panel.title} if not result else set()

    assert not empty & SHOWN

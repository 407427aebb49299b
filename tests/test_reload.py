"""A gateway in its own process: reloads under load, refusals, restarts, and two replicas that agree."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from gateway.routing.spaces import is_same_space
from tests.models.checkpoints import make_transformer, wordpiece_tokenizer

KEY = "operator-of-the-tests"
ENTRY = "  - {{id: {name}, source: ./checkpoint, enabled: true, dtype: float32, runtime: torch{more}}}\n"
ONE = "version: 1\nmodels:\n" + ENTRY.format(name="one", more="")
TWO = ENTRY.format(name="two", more=", prompts: {query: 'query: '}, default_task: query")
EXPERIMENT = """\
experiments:
  - id: exp
    kind: cross_space
    unit: {from: [header:x-unit, body:user]}
    salt: tests
    force: header:x-arm
    arms:
      - {model: one, weight: 1}
      - {model: two, weight: 1}
"""


@dataclass
class Gateway:
    """A gateway process and its registry."""

    process: subprocess.Popen[bytes]
    folder: Path
    client: httpx.Client

    def write(self, text: str) -> None:
        (self.folder / "models.yaml").write_text(text, encoding="utf-8")

    def reload(self) -> httpx.Response:
        return self.client.post("/admin/reload", headers={"authorization": f"Bearer {KEY}"})

    def embed(self, model: str, headers: dict[str, str] | None = None, **fields: object) -> httpx.Response:
        return self.client.post("/v1/embeddings", json={"model": model, "input": "a text", **fields}, headers=headers)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a small model, which loads at once."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_transformer(folder / "transformer", "bert", wordpiece_tokenizer())
    modules = [Transformer(str(folder / "transformer")), Pooling(64, pooling_mode="mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "model"), create_model_card=False)
    return folder / "model"


@contextmanager
def running(folder: Path, checkpoint: Path, registry: str, **environ: str) -> Iterator[Gateway]:
    """Run a gateway on a free port; it has to end with 0."""
    folder.mkdir(exist_ok=True)
    (folder / "checkpoint").symlink_to(checkpoint)
    (folder / "models.yaml").write_text(registry, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "gateway",
        "serve",
        "--port",
        "0",
        "--models",
        str(folder / "models.yaml"),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"PATH": "", "PYTHONUNBUFFERED": "1", "GATEWAY_ADMIN_KEY": KEY, "HOME": str(folder), **environ},
        )
    try:
        with httpx.Client(base_url=wait_for_url(process, folder / "log"), timeout=60) as client:
            yield Gateway(process, folder, client)
        process.terminate()
        assert process.wait(30) == 0, (folder / "log").read_text()
    finally:
        process.kill()
        process.wait()


def wait_for_url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"Serving on (http://\S+?),", log.read_text()):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    log = str(folder / "exposures.jsonl")
    with running(folder / "g", checkpoint, ONE, GATEWAY_EXPOSURE_LOG=log) as gateway:
        yield gateway


class Load:
    """Clients that ask without a pause, and keep every answer's status, model and space."""

    def __init__(self, gateway: Gateway, num_clients: int = 4) -> None:
        self._url = str(gateway.client.base_url)
        self._is_over = threading.Event()
        self.answers: list[tuple[int, str, str]] = []
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(num_clients)]

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._is_over.is_set():
                body = {"model": "name" if number % 2 else "one", "input": f"client {number}, {len(self.answers)}"}
                answer = client.post("/v1/embeddings", json=body)
                self.answers.append((answer.status_code, answer.text[-80:], answer.headers.get("x-gateway-space", "")))

    def wait_for_answers(self, number: int) -> None:
        """Wait until so many more answers have come."""
        wanted = len(self.answers) + number
        wait_until(lambda: len(self.answers) >= wanted)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


def test_reloads_under_load_fail_no_request(gateway: Gateway) -> None:
    """Models come, change and go, by HTTP and by SIGHUP; every request is answered, all in one space."""
    named = "aliases: {name: one}\n"
    gateway.write(ONE + named)
    assert gateway.reload().json()["kept"] == ["one"]

    with Load(gateway) as load:
        load.wait_for_answers(20)
        gateway.write(ONE + TWO + named)
        assert gateway.reload().json()["loaded"] == ["two"]
        # The model that is being asked is exchanged for another engine of the same weights.
        gateway.write(ONE.replace("float32", "float32, max_batch_tokens: 4096") + TWO + named)
        assert gateway.reload().json()["loaded"] == ["one"]
        # By SIGHUP: the alias goes to a twin of the same space, and a model goes away.
        twin = ENTRY.format(name="twin", more="")
        gateway.write(ONE.replace("float32", "float32, max_batch_tokens: 4096") + twin + "aliases: {name: twin}\n")
        gateway.process.send_signal(signal.SIGHUP)
        wait_until(lambda: gateway.embed("name").json().get("model") == "twin")
        gateway.write("not: a registry")
        assert gateway.reload().status_code == 400
        load.wait_for_answers(20)

    assert {status for status, _text, _space in load.answers} == {200}, load.answers
    spaces = {space for _status, _text, space in load.answers}
    assert all(is_same_space(space, next(iter(spaces))) for space in spaces)
    assert gateway.embed("two").status_code == 404


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_refused_reload_says_why_and_changes_nothing(gateway: Gateway) -> None:
    gateway.write(ONE + "aliases: {name: one}\n")
    gateway.reload()
    gateway.write(ONE + TWO + "aliases: {name: two}\n")

    answer = gateway.reload()

    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "reload_refused"
    assert "'name' would move from space one@" in answer.json()["error"]["message"]
    assert gateway.embed("name").json()["model"] == "one"
    assert gateway.embed("two").status_code == 404
    gateway.process.send_signal(signal.SIGHUP)
    wait_until(lambda: gateway.log.count("'name' would move from space") >= 2)
    assert gateway.embed("name").json()["model"] == "one"


def test_the_last_of_many_hangups_is_not_lost(gateway: Gateway) -> None:
    for number in range(30):
        gateway.write(ONE + f"aliases: {{name: one, storm{number}: one}}\n")
        gateway.process.send_signal(signal.SIGHUP)

    wait_until(lambda: gateway.embed("storm29").status_code == 200)
    assert gateway.embed("name").json()["model"] == "one"


def test_the_operators_key_is_asked_for(gateway: Gateway) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}):
        answer = gateway.client.post("/admin/reload", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


def test_units_keep_their_arm_after_a_restart_and_on_another_replica(
    gateway: Gateway, tmp_path: Path, checkpoint: Path
) -> None:
    """Nothing is shared but the registry; the exposure log brings the counts back."""
    registry = ONE + TWO + EXPERIMENT
    units = [f"user-{i}" for i in range(24)]
    log = gateway.folder.parent / "exposures.jsonl"

    def arms(gateway: Gateway) -> dict[str, str]:
        return {unit: gateway.embed("exp", user=unit).headers["x-gateway-arm"] for unit in units}

    gateway.write(registry)
    assert gateway.reload().status_code == 200
    before = arms(gateway)
    by_header = {u: gateway.embed("exp", {"x-unit": u}).headers["x-gateway-arm"] for u in units[:5]}
    forced = gateway.embed("exp", {"x-arm": "two"}, user=units[0])
    without = gateway.embed("exp")
    report = gateway.client.get("/v1/experiments/exp").json()
    with running(tmp_path / "second", checkpoint, registry, GATEWAY_EXPOSURE_LOG=str(log)) as second:
        restarted = second.client.get("/v1/experiments/exp").json()
        after = arms(second)

    assert set(before.values()) == {"one", "two"}
    assert after == before
    assert by_header == {unit: before[unit] for unit in units[:5]}
    assert forced.headers["x-gateway-arm"] == "two"
    assert forced.json()["model"] == "two"
    assert (without.headers["x-gateway-arm"], without.headers["x-gateway-assignment"]) == ("one", "no_unit")
    assert [arm["units"] for arm in report["evidence"]] == [list(before.values()).count(arm) for arm in ("one", "two")]
    assert [arm["units"] for arm in restarted["evidence"]] == [arm["units"] for arm in report["evidence"]]
    text = log.read_text(encoding="utf-8")
    assert text.count("\n") == len(units)
    assert "user-" not in text

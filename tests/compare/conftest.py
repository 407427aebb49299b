"""A gateway in this process that counts its requests, and whose models only count words."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from gateway.app import create_app
from gateway.backends.fake import FakeBackend, fake_info
from gateway.cli.client import GatewayClient
from gateway.compare.arms import PROBE
from gateway.config.registry import Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.fleet import Fleet, Model
from gateway.ranges import Meter
from gateway.types import Embeddings, EmbedJob, ModelState
from tests.peers import find

MakeModel = Callable[..., Model]
MakeFleet = Callable[..., tuple[Registry, Fleet]]
RETRIEVAL_TASKS = {"retrieval.query": "query: ", "retrieval.passage": "passage: ", "text-matching": ""}


class WordsBackend(FakeBackend):
    """A text is the sum of a random vector for each of its words, so that texts with the same words are near."""

    async def embed(self, job: EmbedJob) -> Embeddings:
        embedded = await super().embed(job)
        return dataclasses.replace(embedded, vectors=word_vectors(job.texts, self._info.width, self._info.id))


def word_vectors(texts: Sequence[str], width: int, model: str) -> np.ndarray:
    def of_word(word: str) -> np.ndarray:
        return np.random.default_rng(zlib.crc32(word.encode())).standard_normal(width)

    # The first "word" is in every text, so that an empty one has a vector as well.
    vectors = [sum(map(of_word, text.split()), start=of_word(model)) for text in texts]
    return np.array(vectors, dtype=np.float32)


class CountingTransport(httpx.AsyncBaseTransport):
    """Passes requests on to an application and keeps the requests; ``before`` may answer or raise in its place."""

    def __init__(self, app: object) -> None:
        self._inner = httpx.ASGITransport(app)
        self.embedded: list[dict[str, Any]] = []
        self.expected_spaces: list[str | None] = []
        self.before: Callable[[dict[str, Any]], httpx.Response | None] = lambda _body: None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path != "/v1/embeddings":
            return await self._inner.handle_async_request(request)
        body = json.loads(request.content)
        if (answer := self.before(body)) is not None:
            return answer
        self.embedded.append(body)
        self.expected_spaces.append(request.headers.get("x-gateway-expect-space"))
        return await self._inner.handle_async_request(request)

    def texts(self, model: str | None = None) -> list[str]:
        """Return every text that was embedded, less those that only ask for a model's description."""
        bodies = [body for body in self.embedded if model in (None, body["model"])]
        return [text for body in bodies for text in body["input"] if text != PROBE]


@dataclass(frozen=True, slots=True)
class FakeGateway:
    """A gateway, a client of it, and the requests that it received."""

    client: GatewayClient
    transport: CountingTransport
    fleet: Fleet


StartGateway = Callable[..., Awaitable[FakeGateway]]


@pytest.fixture
def make_words_model(make_model: MakeModel) -> MakeModel:
    """Return a function that makes a model with a :class:`WordsBackend`."""

    def make(model_id: str, **info: object) -> Model:
        return make_model(model_id, backend=WordsBackend(fake_info(model_id, **info)), **info)

    return make


@pytest.fixture
async def start_gateway(make_words_model: MakeModel, make_fleet: MakeFleet) -> AsyncIterator[StartGateway]:
    """Return a function that starts a gateway: of ``plain``, ``tasks``, ``raw`` and ``queries``, unless it gets others.

    ``plain`` has no tasks; ``tasks`` has those of retrieval, and sizes to choose from; ``raw`` does not normalize;
    ``queries`` has an instruction for queries only.
    """
    async with contextlib.AsyncExitStack() as stack:

        async def start(*models: Model, aliases: object = None) -> FakeGateway:
            models = models or (
                make_words_model("plain", width=32),
                make_words_model(
                    "tasks", width=64, dimensions=(64, 8), tasks=RETRIEVAL_TASKS, default_task="text-matching"
                ),
                make_words_model("raw", width=16, dimensions=(16, 4), is_normalized=False),
                make_words_model("queries", width=16, tasks={"retrieval.query": "find: "}),
            )
            registry, fleet = make_fleet(*models, aliases=aliases)
            for model in fleet:
                if model.state is ModelState.READY:
                    await model.backend.start()
            fleet.started.set()
            transport = CountingTransport(create_app(Deployment(registry, Settings(), fleet)))
            http = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://gateway"))
            return FakeGateway(GatewayClient(http, "http://gateway", patience_s=600), transport, fleet)

        yield start


@pytest.fixture
def start_quantized(start_gateway: StartGateway, make_words_model: MakeModel) -> StartGateway:
    """Return a function that starts a gateway of ``tasks``, which is calibrated, and of ``raw``."""
    meter = Meter((64, 8), is_normalized=True)
    meter.add(word_vectors([f"{a} {b}" for a in DOCUMENTS.values() for b in DOCUMENTS], 64, "tasks"))
    sizes = {"width": 64, "dimensions": (64, 8), "ranges": meter.ranges()}

    async def start() -> FakeGateway:
        return await start_gateway(
            make_words_model("tasks", tasks=RETRIEVAL_TASKS, default_task="text-matching", **sizes),
            make_words_model("raw", width=16, dimensions=(16, 4), is_normalized=False),
        )

    return start


DOCUMENTS = {
    "d0": "a train leaves the station at noon",
    "d1": "bread is baked with flour and water",
    "d2": "the station has two platforms",
    "d3": "water boils at one hundred degrees",
    "d4": "a bicycle needs no fuel",
}
QUERIES = {"q0": "train station", "q1": "flour for bread", "q2": "how hot is boiling water"}
JUDGMENTS = {("q0", "d0"): 2, ("q0", "d2"): 1, ("q1", "d1"): 1, ("q2", "d3"): 1, ("q2", "d4"): 0}

WriteData = Callable[..., Path]


@pytest.fixture
def write_data(tmp_path: Path) -> WriteData:
    """Return a function that writes a data set in BEIR's layout, by default a very small one."""

    def write(
        documents: dict[str, str] = DOCUMENTS,
        queries: dict[str, str] = QUERIES,
        judgments: dict[tuple[str, str], int] | None = JUDGMENTS,
    ) -> Path:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        for name, texts in (("corpus", documents), ("queries", queries)):
            lines = [json.dumps({"_id": id_, "text": text}) for id_, text in texts.items()]
            (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        if judgments is not None:
            (folder / "qrels").mkdir(exist_ok=True)
            rows = [f"{query}\t{document}\t{score}" for (query, document), score in judgments.items()]
            (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]))
        return folder

    return write


Browse = Callable[[str], tuple[str, str]]


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Return a function that opens a page in Chromium and returns the result, and its errors."""
    chromium = find("chromium", "chromium")

    def open_page(html: str) -> tuple[str, str]:
        path = tmp_path / "page.html"
        path.write_text(html, encoding="utf-8")
        command = [
            chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000",
            "--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=240, check=True)
        return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)

    return open_page

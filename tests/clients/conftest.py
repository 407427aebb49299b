"""Gateways for clients, expected vectors, and a guard against connections to anything else."""

from __future__ import annotations

import gc
import socket
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.clients.gateway_process import Gateway, experiments, more_models, running_gateway
from tests.clients.reranker import save_reranker
from tests.postgres import postgres as postgres  # noqa: PLC0414

KEY = "sk-of-the-tests"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Free resources that a test left open while it ignored ResourceWarning, or a later test would get the warning."""
    result = yield
    if any("ResourceWarning" in mark.args[0] for mark in item.iter_markers("filterwarnings")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
    return result


@pytest.fixture(scope="session", autouse=True)
def _quiet_clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Switch telemetry off. Clients read these when they are imported: tests import them inside themselves."""
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("MEM0_TELEMETRY", "False")
        environ.setenv("MEM0_DIR", str(tmp_path_factory.mktemp("mem0")))
        environ.setenv("ANONYMIZED_TELEMETRY", "False")
        environ.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
        environ.setenv("DO_NOT_TRACK", "1")
        for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
            environ.delenv(name, raising=False)
        for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2", "OPENAI_PROXY"):
            environ.delenv(name, raising=False)
        environ.setenv("NO_PROXY", "127.0.0.1")
        yield


@pytest.fixture(autouse=True)
def _only_this_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test in which anything looked up another host: OpenAI, a language model, telemetry, a download."""
    look_up = socket.getaddrinfo
    others: list[object] = []

    def look_up_here(host: object, *args: object, **kwargs: object) -> object:
        if host not in ("127.0.0.1", "localhost", None):
            others.append(host)
            raise socket.gaierror(f"a test must not look up {host!r}")
        return look_up(host, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(socket, "getaddrinfo", look_up_here)
    yield
    assert not others


@pytest.fixture(scope="session")
def gateway(_quiet_clients: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with the bundled model, the same with tasks, and a model that reranks."""
    folder = tmp_path_factory.mktemp("gateway")
    save_reranker(folder / "reranker")
    with running_gateway(
        folder, models=more_models(folder / "reranker"), GATEWAY_BATCH_DIR=str(folder / "batches")
    ) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def furnished_gateway(_quiet_clients: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that asks for ``KEY``, with experiments."""
    folder = tmp_path_factory.mktemp("furnished")
    with running_gateway(folder, models=experiments(), GATEWAY_API_KEYS=KEY) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def vocabulary() -> Path:
    """A tiktoken cache folder with cl100k_base; LlamaIndex ships one."""
    package = find_spec("llama_index.core")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "_static" / "tiktoken_cache"
    assert (folder / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4").is_file(), "LlamaIndex no longer ships cl100k_base"
    return folder


@pytest.fixture
def embed(gateway: Gateway) -> Callable[..., np.ndarray]:
    """Return a function that embeds texts without a client, for comparisons: ``(n, d)`` float32."""

    def embed(*texts: str) -> np.ndarray:
        answer = httpx.post(f"{gateway.base_url}/embeddings", json={"model": "default", "input": texts})
        assert answer.status_code == 200, answer.text
        return np.array([item["embedding"] for item in answer.json()["data"]], dtype=np.float32)

    return embed


@pytest.fixture
def assert_same_vectors() -> Callable[[Sequence[object], Sequence[object]], None]:
    """Return a function that compares vectors of one model; batches of other shapes round otherwise."""

    def compare(actual: Sequence[object], expected: Sequence[object]) -> None:
        one, other = np.array(actual, dtype=np.float32), np.array(expected, dtype=np.float32)
        assert one.shape == other.shape
        cosines = (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)
        assert cosines.min() >= 0.9999

    return compare

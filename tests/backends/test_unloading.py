"""A real engine that is loaded and unloaded again and again: the memory comes back, and the vectors stay the same."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import shutil
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from gateway.backends.infinity import InfinityBackend
from gateway.backends.on_demand import OnDemandBackend
from gateway.backends.residents import Residents
from gateway.config.registry import ModelEntry
from gateway.config.settings import Settings
from gateway.errors import ModelUnavailable
from gateway.types import EmbedJob, ModelState, Truncate
from tests.models.checkpoints import make_transformer, wordpiece_tokenizer

MIB = 2**20
NUM_CYCLES = 5


def job(text: str = "Berlin is the capital of Germany.") -> EmbedJob:
    return EmbedJob([text], None, Truncate.END, time.monotonic() + 60, "someone")


def make_backend(folder: Path, runtime: str) -> OnDemandBackend:
    entry = ModelEntry.model_validate(
        {
            "id": "large",
            "source": str(folder),
            "enabled": True,
            "device": "cpu",
            "dtype": "float32",
            "runtime": runtime,
            "load": "on_demand",
            "max_batch_tokens": 64,
        }
    )
    residents = Residents()
    return OnDemandBackend(entry, InfinityBackend(entry, Settings(), residents), Settings(), residents)


def resident_mib() -> float:
    return psutil.Process().memory_info().rss / MIB


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a checkpoint of about 150 MB, almost all of it in the layers: a forward pass reads them whole."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3, "num_attention_heads": 8}
    make_transformer(folder, "bert", wordpiece_tokenizer(), max_position_embeddings=64, **sizes)
    num_bytes = (folder / "model.safetensors").stat().st_size
    assert 150e6 < num_bytes < 160e6
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    make_transformer(folder, "bert", wordpiece_tokenizer())
    return folder


async def cycles(large: Path, small: Path, runtime: str) -> tuple[list[np.ndarray], list[str], list[float]]:
    """Load, use and unload a large model; return its vectors, its states, and MiB: before, loaded, unloaded, loaded, ..."""
    first = make_backend(small, runtime)  # the libraries keep some memory permanently from now on
    await first.start(lambda _state, _reason: None)
    await first.embed(job())
    await first.unload()
    backend = make_backend(large, runtime)
    states: list[str] = []
    await backend.start(lambda state, _reason: states.append(state.value))
    assert backend.info.memory_bytes > 150e6
    vectors, mib = [], [resident_mib()]
    for _ in range(NUM_CYCLES):
        vectors.append((await backend.embed(job())).vectors)
        mib.append(resident_mib())
        await backend.unload()
        mib.append(resident_mib())
    await backend.stop()
    return vectors, states, mib


def run_cycles(large: Path, small: Path, runtime: str) -> tuple[list[np.ndarray], list[str], list[float]]:
    return asyncio.run(cycles(large, small, runtime))


@pytest.mark.parametrize("runtime", ["openvino", "torch"])
def test_unloading_returns_the_memory(large: Path, small: Path, runtime: str) -> None:
    # In a separate process, because memory that other tests leave comes and goes.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        vectors, states, mib = pool.submit(run_cycles, large, small, runtime).result()

    base, loaded, unloaded = mib[0], mib[1::2], mib[2::2]
    figures = f"{runtime}: MiB before {base:.0f}, loaded {loaded}, unloaded {unloaded}"
    assert min(loaded) > base + 140, figures
    assert max(unloaded) < base + 80, figures
    assert unloaded[-1] < unloaded[0] + 40, figures
    assert states == [state.value for state in (ModelState.LOADING, ModelState.READY, ModelState.UNLOADED)] * NUM_CYCLES
    assert all(np.array_equal(other, vectors[0]) for other in vectors)


async def test_nothing_of_an_engine_is_left(small: Path) -> None:
    backend = make_backend(small, "torch")
    await backend.start(lambda _state, _reason: None)
    await backend.embed(job())
    inner = backend.inner
    assert isinstance(inner, InfinityBackend)
    assert inner.engine is not None
    left = [weakref.ref(inner.engine), *(weakref.ref(encoder) for encoder in inner.engine.encoders)]

    await backend.unload()

    assert [reference() for reference in left] == [None] * len(left)


@pytest.mark.parametrize("runtime", ["openvino", "torch"])
async def test_unloading_does_not_stop_other_requests(
    small: Path, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full collection holds the interpreter for some tenths of a second; the weights are freed without one."""
    backend = make_backend(small, runtime)
    await backend.start(lambda _state, _reason: None)
    await backend.embed(job())
    await backend.unload()  # the imports of a first load leave cycles that hold it
    await backend.embed(job())
    await asyncio.gather(*(backend.embed(job(text)) for text in ("a", "b c", "")))
    inner = backend.inner
    assert isinstance(inner, InfinityBackend)
    assert inner.engine is not None
    holders = inner.engine.holders()
    collections: list[object] = []
    monkeypatch.setattr(gc, "collect", collections.append)

    await backend.unload()

    assert len(holders) > (10 if runtime == "torch" else 1)
    assert [holder() for holder in holders] == [None] * len(holders)
    assert collections == []


async def test_a_checkpoint_that_has_changed_is_not_loaded_again(tmp_path: Path, small: Path) -> None:
    """Clients know the space of the files that existed at the start."""
    folder = tmp_path / "changing"
    shutil.copytree(small, folder)
    backend = make_backend(folder, "torch")
    await backend.start(lambda _state, _reason: None)
    make_transformer(folder, "bert", wordpiece_tokenizer(), initializer_range=0.5)

    with pytest.raises(ModelUnavailable, match="the checkpoint's files have changed"):
        await backend.embed(job())

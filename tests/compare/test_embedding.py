"""Every text is embedded once, by the model that was planned, and comes back in its place."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.cache.files import CacheFolder
from gateway.compare.arms import PlannedArm, parse_arms, plan_arm
from gateway.compare.embedding import _batches, embed_side
from gateway.compare.progress import Silent
from gateway.errors import CompareError, StartError
from gateway.types import Output, Vectors
from tests.compare.conftest import FakeGateway, StartGateway, word_vectors

TEXTS = [f"{'word ' * (i % 7)}number {i}" for i in range(300)]


async def planned(gateway: FakeGateway, name: str) -> PlannedArm:
    return await plan_arm(gateway.client, parse_arms([name, "another"])[0])


async def embed(gateway: FakeGateway, arm: PlannedArm, folder: Path, texts: list[str] = TEXTS) -> Vectors:
    with CacheFolder(folder) as cache:
        outputs = [Output.DENSE]
        found = await embed_side(gateway.client, arm, arm.passages, outputs, texts, cache, Silent(), "documents")
        assert found.dense is not None
        return found.dense


def num_vectors(folder: Path, width: int) -> int:
    (path,) = folder.glob("*.rows")
    return path.stat().st_size // (4 * width)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


async def test_vectors_are_those_of_the_model_in_the_order_of_the_texts(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway()
    arm = await planned(gateway, "tasks")
    vectors = await embed(gateway, arm, tmp_path)
    np.testing.assert_array_equal(vectors, unit(word_vectors(TEXTS, 64, "tasks")))
    assert sorted(gateway.transport.texts()) == sorted(TEXTS)
    bodies = [body for body in gateway.transport.embedded if len(body["input"]) > 1]
    assert {(body["model"], body["task"], "dimensions" in body) for body in bodies} == {
        ("tasks", "retrieval.passage", False)
    }
    assert set(gateway.transport.expected_spaces[-len(bodies) :]) == {arm.passages.native_space}


async def test_a_cut_vector_equals_the_gateways_vector_of_that_size(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    """But for rounding. Native vectors are embedded once for all sizes, normalized or not."""
    gateway = await start_gateway()
    for name, size in (("tasks", 8), ("raw", 4)):
        await embed(gateway, await planned(gateway, name), tmp_path)
        gateway.transport.embedded.clear()
        cut = await embed(gateway, await planned(gateway, f"{name}@{size}"), tmp_path)
        assert gateway.transport.texts() == []
        task = "retrieval.passage" if name == "tasks" else None
        served = (await gateway.client.embed(name, TEXTS, task, size)).vectors
        np.testing.assert_allclose(cut, served, rtol=1e-6, atol=1e-6)


async def test_a_second_run_embeds_nothing(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    arm = await planned(gateway, "plain")
    first = await embed(gateway, arm, tmp_path)
    gateway.transport.embedded.clear()
    np.testing.assert_array_equal(await embed(gateway, arm, tmp_path), first)
    assert gateway.transport.embedded == []
    await embed(gateway, arm, tmp_path, [*TEXTS, "one more"])
    assert gateway.transport.texts() == ["one more"]


async def test_equal_texts_are_embedded_once(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    vectors = await embed(gateway, await planned(gateway, "plain"), tmp_path, ["a", "b", "a"])
    assert sorted(gateway.transport.texts()) == ["a", "b"]
    assert vectors[0].tolist() == vectors[2].tolist() != vectors[1].tolist()


async def test_an_interrupted_run_continues_where_it_was(start_gateway: StartGateway, tmp_path: Path) -> None:
    """At most the requests in flight are lost: three of them."""
    gateway = await start_gateway()
    arm = await planned(gateway, "plain")
    num_batches = 0

    def refuse_the_fourth(_body: dict[str, Any]) -> httpx.Response | None:
        nonlocal num_batches
        num_batches += 1
        return httpx.Response(500, text="out of order") if num_batches > 3 else None

    gateway.transport.before = refuse_the_fourth
    gateway.transport.embedded.clear()
    with pytest.raises(StartError, match=r"answers 500: .*out of order"):
        await embed(gateway, arm, tmp_path)
    embedded = gateway.transport.texts()
    assert 0 < len(embedded) < len(TEXTS)
    num_stored = num_vectors(tmp_path, arm.width)
    assert num_stored >= len(embedded) - 2 * 64
    gateway.transport.before = lambda _body: None
    gateway.transport.embedded.clear()
    vectors = await embed(gateway, arm, tmp_path)
    np.testing.assert_array_equal(vectors, unit(word_vectors(TEXTS, 32, "plain")))
    assert len(gateway.transport.texts()) == len(TEXTS) - num_stored


@pytest.mark.parametrize("status", [413, 504])
async def test_a_request_that_is_too_much_is_sent_in_halves(
    start_gateway: StartGateway, tmp_path: Path, status: int
) -> None:
    """A gateway with a small limit for bodies, or one that needs minutes for a batch."""
    gateway = await start_gateway()
    arm = await planned(gateway, "plain")
    gateway.transport.before = lambda body: httpx.Response(status) if len(body["input"]) > 10 else None
    gateway.transport.embedded.clear()
    vectors = await embed(gateway, arm, tmp_path)
    np.testing.assert_array_equal(vectors, unit(word_vectors(TEXTS, 32, "plain")))
    assert sorted(gateway.transport.texts()) == sorted(TEXTS)


async def test_a_single_text_that_is_too_much_is_an_error(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    arm = await planned(gateway, "plain")
    gateway.transport.before = lambda _body: httpx.Response(413, text="the body is too large")
    with pytest.raises(StartError, match=r"answers 413: .*the body is too large"):
        await embed(gateway, arm, tmp_path)


async def test_a_canceled_run_leaves_no_request_behind(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    arm = await planned(gateway, "plain")
    has_begun = asyncio.Event()
    gateway.transport.before = lambda _body: has_begun.set()
    run = asyncio.create_task(embed(gateway, arm, tmp_path))
    await has_begun.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_model_that_is_exchanged_in_between_is_noticed(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    arm = await planned(gateway, "plain")
    other = await planned(gateway, "raw")
    gateway.fleet.get("plain").info = gateway.fleet.get("raw").info
    gateway.fleet.get("plain").backend = gateway.fleet.get("raw").backend
    with pytest.raises(StartError, match=f"answers 412: the vectors would be in space {other.space}"):
        await embed(gateway, arm, tmp_path)


async def test_a_gateway_that_does_not_check_the_space_is_checked(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    arm = await planned(gateway, "plain")
    answer = {"data": [{"embedding": "AACAPw=="}], "usage": {"prompt_tokens": 1}}
    gateway.transport.before = lambda _body: httpx.Response(
        200, json=answer, headers={"x-gateway-space": "plain@0123456789ab"}
    )
    with pytest.raises(
        CompareError, match="plain changed during the comparison: vectors of 1 dimensions in space plain@0"
    ):
        await embed(gateway, arm, tmp_path, ["a"])


@given(st.lists(st.integers(min_value=0, max_value=250_000), max_size=200))
def test_batches_are_bounded_and_leave_nothing_out(lengths: list[int]) -> None:
    texts = ["x" * length for length in sorted(lengths)]
    for has_multivectors, max_texts, max_characters in ((False, 64, 100_000), (True, 8, 12_500)):
        batches = list(_batches(texts, has_multivectors=has_multivectors))
        assert [text for batch in batches for text in batch] == texts
        assert all(len(batch) <= max_texts for batch in batches)
        assert all(len(batch) == 1 or sum(map(len, batch)) <= max_characters for batch in batches)


# ------------------------------------------------------------------------------------------------------- small vectors


@pytest.mark.parametrize("name", ["tasks:int8", "tasks@8:uint8"])
async def test_integers_are_those_that_clients_get(start_quantized: StartGateway, tmp_path: Path, name: str) -> None:
    gateway = await start_quantized()
    arm = await planned(gateway, name)

    vectors = await embed(gateway, arm, tmp_path)

    served = await gateway.client.embed(
        "tasks", TEXTS, "retrieval.passage", arm.dimensions, expect_space=arm.space, precision=arm.precision
    )
    np.testing.assert_array_equal(vectors, served.vectors)
    assert np.abs(vectors).max() > 100
    assert arm.space == arm.passages.space != (await planned(gateway, name.partition(":")[0])).space
    gateway.transport.embedded.clear()
    np.testing.assert_array_equal(await embed(gateway, arm, tmp_path), vectors)
    assert gateway.transport.texts() == []


@pytest.mark.parametrize(("precision", "size"), [("binary", 64), ("ubinary", 8)])
async def test_signs_are_ordered_by_their_hamming_distance_and_embed_nothing_again(
    start_quantized: StartGateway, tmp_path: Path, precision: str, size: int
) -> None:
    gateway = await start_quantized()
    floats = await embed(gateway, await planned(gateway, f"tasks@{size}"), tmp_path)
    gateway.transport.embedded.clear()

    vectors = await embed(gateway, await planned(gateway, f"tasks@{size}:{precision}"), tmp_path)

    assert gateway.transport.texts() == []
    bits = np.packbits(floats > 0, axis=1)
    distances = np.bitwise_count(bits[:, None] ^ bits[None]).sum(axis=2)
    np.testing.assert_array_equal(vectors @ vectors.T, size - 2.0 * distances)

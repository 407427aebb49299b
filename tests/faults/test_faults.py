"""Faults of a model in a gateway, over a real socket and while others are served."""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import pytest

from gateway.telemetry import metrics
from tests.faults.scripted import Bystanders, Gateway, ScriptedEncoder


@pytest.mark.parametrize(
    ("text", "code"),
    [("please raise", "inference_failed"), ("please nan", "invalid_vectors"), ("please narrow", "invalid_vectors")],
)
def test_a_text_that_breaks_the_forward_costs_its_own_request_only(
    gateway: Gateway, bystanders: Bystanders, text: str, code: str
) -> None:
    with bystanders:
        for number in itertools.count():
            if number >= 10 and len(bystanders.statuses) > 20:
                break
            broken = gateway.embed("a good text", text)
            assert broken.status_code == 500
            assert broken.json()["error"]["code"] == code
            assert broken.json()["error"]["message"].startswith("input[1]: ")
            assert broken.headers.get("x-should-retry") == ("false" if code == "invalid_vectors" else None)
            assert gateway.embed("a good text").status_code == 200

    assert set(bystanders.statuses) == {200}
    assert not bystanders.wrong
    assert gateway.backend.num_loads == 1


def test_a_batch_that_is_out_of_memory_is_halved_until_it_fits(gateway: Gateway) -> None:
    gateway.backend.encoder.memory_tokens = 20

    answer = gateway.embed(*(f"text{number} has four tokens" for number in range(40)))

    assert answer.status_code == 200
    assert len(answer.json()["data"]) == 40
    assert gateway.backend.num_loads == 1


def test_only_the_text_that_is_too_large_alone_is_out_of_memory(gateway: Gateway, bystanders: Bystanders) -> None:
    gateway.backend.encoder.memory_tokens = 25

    with bystanders:
        for _ in range(10):
            large = gateway.embed(" ".join(["many"] * 30))
            gateway.embed("a good text")

    assert large.status_code == 500
    assert large.json()["error"]["code"] == "out_of_memory"
    assert "a text of 30 tokens" in large.json()["message"]
    assert large.headers["x-should-retry"] == "false"
    assert set(bystanders.statuses) == {200}
    assert not bystanders.wrong


@pytest.mark.parametrize("gateway", [2.0], indirect=True)
def test_a_process_that_was_paused_during_a_forward_has_no_hung_engine(gateway: Gateway) -> None:
    """As by `docker pause`, a debugger, or a laptop that sleeps."""
    encoder = gateway.backend.encoder
    encoder.is_hanging.set()
    before = encoder.num_forwards
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(gateway.embed, "please hang")
        gateway.wait_for(lambda: encoder.num_forwards > before)
        pause = f"kill -STOP {os.getpid()}; sleep 2.5; kill -CONT {os.getpid()}"
        subprocess.run(["sh", "-c", pause], check=True)
        time.sleep(0.6)  # the watchdog looks every half second
        encoder.let_go.set()
        answer = waiting.result()

    assert answer.status_code == 200
    assert gateway.backend.num_loads == 1


def test_a_hung_forward_is_answered_and_the_engine_replaced(gateway: Gateway, bystanders: Bystanders) -> None:
    hung = gateway.backend.encoder
    hung.is_hanging.set()
    with bystanders, ThreadPoolExecutor() as pool:
        waiting = [pool.submit(gateway.embed, "please hang"), pool.submit(gateway.embed, "behind it")]
        answers = [one.result() for one in waiting]
        assert not hung.let_go.is_set()  # the answer came while the forward was hanging
        gateway.wait_for(lambda: gateway.state() == "ready" and gateway.backend.num_loads == 2)
        after = gateway.embed("a good text")

    assert {answer.status_code for answer in answers} <= {200, 503}
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["code"] == "model_recovering"
    assert 1 <= int(answers[0].headers["retry-after"]) <= 120
    assert after.status_code == 200
    assert set(bystanders.statuses) == {200, 503}
    assert bystanders.statuses[-1] == 200
    assert not bystanders.wrong

    hung.let_go.set()  # no request waits for the result any more
    assert gateway.embed("a good text").status_code == 200


def test_readiness_is_accurate_while_the_engine_is_replaced(gateway: Gateway) -> None:
    gateway.backend.encoder.is_hanging.set()
    gateway.backend.failing_loads = 2
    hung = gateway.embed("please hang")

    ready = gateway.client.get("/health/ready")
    live = gateway.client.get("/health/live")
    refused = gateway.embed("a good text")
    gateway.wait_for(lambda: gateway.state() == "ready")

    assert hung.status_code == 503
    assert ready.status_code == 503
    assert ready.json()["models"][0]["state"] == "recovering"
    assert "has been running" in ready.json()["models"][0]["reason"]
    assert live.status_code == 200
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "model_recovering"
    assert gateway.backend.num_loads == 4  # one at the start, two that failed, one that did not
    assert gateway.embed("a good text").status_code == 200


def test_a_model_that_fails_on_everything_is_replaced(gateway: Gateway) -> None:
    gateway.backend.encoder.is_broken = True

    for _ in range(3):
        assert gateway.embed("a good text").status_code == 500
    gateway.wait_for(lambda: gateway.backend.num_loads == 2 and gateway.state() == "ready")

    assert gateway.embed("a good text").status_code == 200


def test_a_poisoned_text_sent_again_and_again_does_not_replace_the_engine(gateway: Gateway) -> None:
    for _ in range(20):
        assert gateway.embed("please raise").status_code == 500
    time.sleep(1.0)  # several looks of the watchdog

    assert gateway.backend.num_loads == 1
    assert gateway.state() == "ready"


def test_a_client_that_goes_away_has_its_queued_texts_dropped(gateway: Gateway) -> None:
    slow = [
        "slow" + " word" * (22 + number) for number in range(40)
    ]  # of different lengths, because equal ones are computed once
    encoder = gateway.backend.encoder
    before = encoder.num_items
    with pytest.raises(httpx.ReadTimeout):
        gateway.client.post("/v1/embeddings", json={"input": slow}, timeout=0.3)

    assert gateway.embed("a good text").status_code == 200
    time.sleep(0.5)
    begun = encoder.num_items
    time.sleep(0.5)

    assert encoder.num_items == begun
    assert begun - before < len(slow)


def test_a_hundred_clients_with_every_fault_at_once_all_get_an_answer(gateway: Gateway) -> None:
    texts = ["please raise", "please nan", "please narrow", "please slow", *(f"good {n}" for n in range(6))] * 20
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(gateway.embed, texts))

    assert len(answers) == len(texts)
    for text, answer in zip(texts, answers, strict=True):
        is_poisoned = any(word in text for word in ("raise", "nan", "narrow"))
        assert answer.status_code == (500 if is_poisoned else 200)


def test_equal_texts_in_flight_are_computed_once(gateway: Gateway) -> None:
    with ThreadPoolExecutor(16) as pool:
        for _ in range(20):  # until a busy machine has all of them in the queue before the watchdog acts
            gateway.wait_for(lambda: gateway.state() == "ready")
            encoder = gateway.backend.encoder
            encoder.is_hanging.set()
            encoder.let_go.clear()
            num_forwards, num_items = encoder.num_forwards, encoder.num_items
            first = pool.submit(gateway.embed, "please hang")
            gateway.wait_for(partial(_has_begun, encoder, num_forwards))
            waiting = [pool.submit(gateway.embed, "the same text") for _ in range(12)]
            deadline = time.monotonic() + 0.3
            while (num_texts := _queued()) < 13 and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(0.05)  # admitted, and now tokenized
            encoder.let_go.set()
            answers = [answer.result() for answer in (first, *waiting)]
            if num_texts == 13 and {answer.status_code for answer in answers} == {200}:
                break

    assert num_texts == 13
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["data"][0]["embedding"][0] for answer in answers[1:]}) == 1
    assert encoder.num_items - num_items <= 3  # the first; the others once, or twice if one was tokenized too late


def _has_begun(encoder: ScriptedEncoder, num_forwards: int) -> bool:
    return encoder.num_forwards > num_forwards


def _queued() -> float:
    return metrics.REGISTRY.get_sample_value("gateway_queue_texts", {"model": "scripted"}) or 0.0

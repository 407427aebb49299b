"""Users of locust: one class for each target, so that a shape can load one target at a time."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gevent
import orjson
from gevent.pool import Pool
from geventhttpclient.client import HTTPClientPool
from locust import FastHttpUser, constant, task

from loadtest.answers import Checker, WrongAnswer
from loadtest.options import Options
from loadtest.plan import Target
from loadtest.recorder import Recorder
from loadtest.texts import Texts
from loadtest.workloads import WORKLOADS, Ask

_TIMEOUT_S = 330.0  # the gateway's own limit is 300
# In open arrivals, turns that may be on their way at once for each turn a second; beyond, they are given up and counted.
_MAX_TURNS_AT_ONCE = 60


@dataclass(slots=True)
class Run:
    """What all users of a process share."""

    options: Options
    recorder: Recorder
    texts: Mapping[str, Texts]
    checkers: Mapping[str, Checker]


class EmbeddingUser(FastHttpUser):
    """Takes turns of a workload on one target."""

    abstract = True
    wait_time = constant(0)
    connection_timeout = 30.0
    network_timeout = _TIMEOUT_S
    target: Target
    run_state: Run
    numbers: Iterator[int]

    def on_start(self) -> None:
        options = self.run_state.options
        # The n-th user of each target does the same at the same times.
        self.rng = random.Random(f"{options.seed} {next(self.numbers)}")  # noqa: S311  not for secrets
        self.request_headers = {"content-type": "application/json"}
        if options.api_key:
            self.request_headers["authorization"] = f"Bearer {options.api_key}"

    def take_turn(self, due: float) -> None:
        """Send the requests of a turn, one after another.

        Args:
            due: the time at which the first should be sent, by ``time.perf_counter``; a delay counts as latency.
        """
        run = self.run_state
        for ask in WORKLOADS[run.options.workload](run.texts[self.target.label], self.rng):
            run.recorder.offer(int(time.time()), self.target.label)
            self.send(ask, due)
            due = time.perf_counter()

    def send(self, ask: Ask, due: float) -> None:
        """Send a request, check its response, and record the result."""
        run, label = self.run_state, self.target.label
        with self.client.request(
            "POST",
            self.target.path,
            name=f"{ask.kind} [{label}]",
            data=self._body(ask),  # type: ignore[arg-type]  # bytes are as good
            headers=self.request_headers,
            catch_response=True,
        ) as response:
            milliseconds = 1000 * (time.perf_counter() - due)
            response.request_meta["response_time"] = milliseconds
            cause = _cause(response)
            second = int(time.time())
            if not cause:
                try:
                    answer = run.checkers[label].check(ask.texts, response.content, response.headers)
                except WrongAnswer as error:
                    cause = f"wrong answer: {error}"
                else:
                    run.recorder.answer(
                        second,
                        label,
                        milliseconds=milliseconds,
                        texts=len(ask.texts),
                        tokens=answer.tokens,
                        stages_ms=answer.stages_ms,
                    )
            if cause:
                run.recorder.fail(second, label, cause)
                response.failure(cause)

    def _body(self, ask: Ask) -> bytes:
        options = self.run_state.options
        body: dict[str, Any] = {"model": self.target.model, "input": ask.texts}
        if options.encoding != "float":
            body["encoding_format"] = options.encoding
        if options.sends_task:
            body["task"] = ask.task
        return orjson.dumps(body)


class ClosedUser(EmbeddingUser):
    """Sends when its last answer has come: as many requests are on their way as there are users."""

    abstract = True

    @task
    def turn(self) -> None:
        """Take a turn."""
        self.take_turn(time.perf_counter())


class OpenUser(EmbeddingUser):
    """Begins one turn a second on average, at random times, whether or not those before have ended.

    N of these are a Poisson process of N turns a second. A server that is slow then has as much to do as a fast one, and
    its queue is seen, where a closed loop would wait with it.
    """

    abstract = True

    def on_start(self) -> None:
        super().on_start()
        self.turns = Pool(_MAX_TURNS_AT_ONCE)
        self.due = time.perf_counter() + self.rng.expovariate(1.0)

    @task
    def arrive(self) -> None:
        """Wait for the time of the next turn, and begin it."""
        gevent.sleep(max(0.0, self.due - time.perf_counter()))
        if self.turns.full():
            run, second = self.run_state, int(time.time())
            run.recorder.offer(second, self.target.label)
            run.recorder.fail(
                second, self.target.label, f"not sent: {_MAX_TURNS_AT_ONCE} turns of this user are on their way"
            )
        else:
            self.turns.spawn(self.take_turn, self.due)
        self.due += self.rng.expovariate(1.0)

    def on_stop(self) -> None:
        """Let running requests end."""
        self.turns.join()


def make_user_classes(run: Run) -> dict[str, type[EmbeddingUser]]:
    """Return a class of users for each target, by label."""
    base = OpenUser if run.options.loop == "open" else ClosedUser
    return {
        target.label: type(
            f"User{number}",
            (base,),
            {
                "host": target.url,
                "target": target,
                "run_state": run,
                "numbers": itertools.count(),
                # Connections are shared where users do not wait for their answers.
                "client_pool": HTTPClientPool(concurrency=10_000, network_timeout=_TIMEOUT_S)
                if base is OpenUser
                else None,
            },
        )
        for number, target in enumerate(run.options.targets)
    }


def _cause(response: Any) -> str:
    """Return why a request failed; empty if its status is 200."""
    if response.status_code == 200:
        return ""
    if response.status_code == 0:
        return f"no answer: {type(response.error).__name__}"
    try:
        code = orjson.loads(response.content)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        code = ""
    return f"{response.status_code} {code}".strip()

"""How long one text takes while a bulk load keeps the queue full, by the kind of the load.

python -m bench.priority              about three minutes

One client sends one text after the other to a gateway with the bundled model. In turns, there is no other load; a batch of
the Batches API with 64 texts per line; four clients that send 64 texts at a time with `x-gateway-priority: low`; and the
same four without it. The goal for batches and low priority: at p99, one text comes at most one batch of texts later than
without load. Exits 1 if it is missed. The figures are valid only on a machine without other work.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import httpx
import orjson

from bench.load import Group, Load, LoadGenerator, Sample, raise_file_limit
from bench.machine import describe_machine
from bench.report import number, table
from bench.servers import Server, clean_environ, start_gateway_with_batches
from bench.stats import median, percentile
from bench.texts import Sentences

NO_LOAD, BATCH, LOW, NORMAL = KINDS = ("no bulk load", "a batch", "low priority", "normal priority")
_PRIORITIES = {LOW: "low", NORMAL: ""}
_START_S = 60.0
_ROUNDS, _SECONDS = 5, 6.0
_TEXTS = 60_000
_LINE_TEXTS = 64


@contextmanager
def running_batch(url: str, model: str, seed: int) -> Iterator[None]:
    """Run a batch of the Batches API within the context, and cancel it then.

    Raises:
        RuntimeError: it does not start, or it ended before the context.
    """
    texts = Sentences(seed).take(_TEXTS)
    bodies = [{"model": model, "input": texts[i : i + _LINE_TEXTS]} for i in range(0, _TEXTS, _LINE_TEXTS)]
    lines = [
        orjson.dumps(
            {
                "custom_id": str(number),
                "method": "POST",
                "url": "/v1/embeddings",
                "body": {**body, "encoding_format": "base64"},
            }
        )
        for number, body in enumerate(bodies)
    ]
    with httpx.Client(base_url=f"{url}/v1", timeout=_START_S) as client:
        form = {"file": ("requests.jsonl", b"\n".join(lines))}
        file = client.post("/files", files=form, data={"purpose": "batch"}).raise_for_status().json()
        request = {"input_file_id": file["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
        path = f"/batches/{client.post('/batches', json=request).raise_for_status().json()['id']}"
        deadline = time.monotonic() + _START_S
        while not (batch := client.get(path).raise_for_status().json())["request_counts"]["completed"]:
            if time.monotonic() > deadline or batch["status"] == "failed":
                raise RuntimeError(f"the batch has not begun: {batch}")
            time.sleep(0.05)
        yield
        if (batch := client.get(path).raise_for_status().json())["status"] != "in_progress":
            raise RuntimeError(f"the batch ended too early: it needs more than {_TEXTS:,} texts")
        client.post(f"{path}/cancel").raise_for_status()


def computed(url: str) -> tuple[float, float]:
    """Return the number of texts and of batches of texts that the gateway has computed."""
    page = httpx.get(f"{url}/metrics", timeout=_START_S).raise_for_status().text

    def total(name: str) -> float:
        return sum(map(float, re.findall(rf"^gateway_batch_texts_{name}\{{.*\}} (\S+)$", page, re.MULTILINE)))

    return total("sum"), total("count")


def measure(server: Server, generator: LoadGenerator, kind: str, seed: int) -> tuple[list[Sample], float, float]:
    """Load the server for a while.

    Returns:
        the results of the single client and of other clients, the bulk load's texts per second, and the mean time that one
        batch of its texts takes, in milliseconds.
    """
    url = f"http://127.0.0.1:{server.port}"
    groups = [Group(1, 1, Sentences(seed).take(5_000))]
    if kind in _PRIORITIES:
        groups.append(Group(4, _LINE_TEXTS, Sentences(seed + 1).take(_TEXTS), priority=_PRIORITIES[kind]))
    load = Load(server.port, server.path, server.model, _SECONDS, groups, "base64")
    with running_batch(url, server.model, seed + 1) if kind == BATCH else nullcontext():
        before = computed(url)
        samples = generator.run(load)
        texts, batches = (now - then for now, then in zip(computed(url), before, strict=True))
    one = samples[0]
    if kind == NO_LOAD:
        return samples, 0.0, 0.0
    num_bulk = max(1.0, batches - one.num_texts)  # each of the single texts is a batch too
    return samples, (texts - one.num_texts) / one.seconds, 1000 * one.seconds / num_bulk


def batches_later(p99_ms: float, alone_ms: float, batch_ms: float) -> float:
    """Return how many batches of texts later one text comes at p99 than without load."""
    return (p99_ms - alone_ms) / batch_ms if batch_ms else 0.0


def main() -> int:
    """Measure in turns, print the table of medians, and compare them with the goal."""
    raise_file_limit()
    figures: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    with (
        tempfile.TemporaryDirectory() as folder,
        LoadGenerator(clean_environ()) as generator,
        start_gateway_with_batches(Path(folder)) as server,
    ):
        measure(server, generator, LOW, 1)
        for number_of_round in range(_ROUNDS):
            kinds = KINDS if number_of_round % 2 == 0 else KINDS[::-1]
            for i, kind in enumerate(kinds):
                seed = 10 + 10 * number_of_round + 2 * i
                (one, *bulk), texts_per_s, batch_ms = measure(server, generator, kind, seed)
                if any(sample.failures for sample in (one, *bulk)):
                    raise RuntimeError(f"failures: {[sample.failures for sample in (one, *bulk)]}")
                quantiles = [percentile(one.latencies_ms, share) for share in (0.5, 0.99)]
                figures[kind].append([*quantiles, texts_per_s, batch_ms])
                print(number_of_round, kind, *map(number, figures[kind][-1]), flush=True)
    medians = {kind: [median(column) for column in zip(*found, strict=True)] for kind, found in figures.items()}
    alone_ms = medians[NO_LOAD][1]
    later = {kind: batches_later(found[1], alone_ms, found[3]) for kind, found in medians.items()}
    header = ("bulk load", "p50 of one text, ms", "p99, ms", "bulk texts/s", "one batch, ms", "p99 later, batches")
    rows = [[kind, *map(number, (*found, later[kind]))] for kind, found in medians.items()]
    print(f"\n{describe_machine()}\n\n{table(header, rows)}")
    missed = [kind for kind in (BATCH, LOW) if later[kind] > 1]
    print(f"\ngoal: at most 1 batch later; {'missed with ' + ', '.join(missed) if missed else 'met'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

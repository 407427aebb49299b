"""Measure the costs of a request besides the model if there are many fronts: quotas in Redis, and the bytes of vectors.

With it, the numbers of cards, fronts and Redis servers for 1,000 to a million texts per second: computed from
measurements here and in docs/performance.md, and from one figure that is not measured, the texts per second of a card.

python -m bench.fronts             half a minute; needs redis-server on the PATH
python -m bench.fronts --update    also writes the tables into docs/scale.md
"""

from __future__ import annotations

import argparse
import asyncio
import math
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from bench.fake_gateway import MODEL, RandomBackend
from bench.load import HOST
from bench.machine import describe_machine
from bench.report import note, number, table, update_page
from bench.servers import free_port
from bench.simulate import MEASURED, PAGE
from bench.stats import median
from gateway.access.keyring import Client
from gateway.access.quotas import Quotas
from gateway.app import create_app
from gateway.config.registry import ModelEntry, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.telemetry.logs import configure_logs

_ROUNDS = 5
_AT_ONCE = 16
_START_S = 10.0
_NUM_TEXTS = 32
# Not measured: half of the rate that an RTX 3090's operations per second allow for texts of 60 tokens (docs/operations.md).
CARD_TEXTS_S = 900
# As a share of each part's capacity; the simulation shows why.
OVER_TCP = "Redis over TCP"
LOAD = 0.7
RATES = (1_000, 10_000, 100_000, 1_000_000)
_FORMATS = ("float", "base64", "binary")


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of counting one request: its latency alone, and the processor time of both sides under load, in ms."""

    alone_ms: float
    front_ms: float
    storage_ms: float


async def count_requests(uri: str, storage: psutil.Process | None, requests: int) -> Cost:
    """Count requests as the gateway does for a client that has both quotas: one after the other, then many at once.

    Args:
        storage: the process that counts, if it is another one.
    """
    quotas = Quotas(uri)
    client = Client("bench", requests_per_minute=10**9, tokens_per_minute=10**12)

    async def request() -> None:
        await quotas.admit(client, {})
        async with quotas.reserve(client, {}, [100], 512):
            pass
        await quotas.charge(client, {}, 25)

    async def some(count: int) -> None:
        for _ in range(count):
            await request()

    await some(20)
    alone = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        await some(requests // 10)
        alone.append((time.perf_counter() - started) / (requests // 10))
    before, front = _cpu_s(storage), time.process_time()
    await asyncio.gather(*(some(requests // _AT_ONCE) for _ in range(_AT_ONCE)))
    count = requests // _AT_ONCE * _AT_ONCE
    front_s, storage_s = time.process_time() - front, _cpu_s(storage) - before
    await quotas.close()
    return Cost(1000 * median(alone), 1000 * front_s / count, 1000 * storage_s / count)


def _cpu_s(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def redis() -> Iterator[tuple[int, Path, psutil.Process]]:
    """Run a Redis that keeps nothing, and yield its port, its socket and its process.

    Raises:
        FileNotFoundError: there is no redis-server.
    """
    program = shutil.which("redis-server")
    if program is None:
        raise FileNotFoundError("redis-server is not on the PATH: install it (Debian: redis-server)")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "socket"
        command = [
            program,
            "--port",
            str(port),
            "--bind",
            HOST,
            "--save",
            "",
            "--dir",
            folder,
            "--unixsocket",
            str(path),
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + _START_S
            while not path.exists():
                if time.monotonic() > deadline or process.poll() is not None:
                    raise RuntimeError("redis-server does not start")
                time.sleep(0.02)
            yield port, path, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()


def quota_table(requests: int) -> tuple[str, float]:
    """Return the cost of counting a request, by where it is counted, and the requests/s that one Redis can count.

    The rate is that over TCP, because fronts on several machines reach Redis in no other way.
    """
    rows = []
    rates: dict[str, float] = {}
    with redis() as (port, path, process):
        for name, uri, storage in (
            ("`memory://`, in the front", "memory://", None),
            (OVER_TCP, f"redis://{HOST}:{port}/0", process),
            ("Redis over a socket", f"unix://{path}?db=0", process),
        ):
            note(f"quotas: {name}")
            cost = asyncio.run(count_requests(uri, storage, requests))
            if storage:
                rates[name] = 1000 / cost.storage_ms
            times = (number(1000 * value) for value in (cost.alone_ms, cost.front_ms))
            rows.append(
                [name, *times, *((number(1000 * cost.storage_ms), number(rates[name])) if storage else ("", ""))]
            )
    header = ("counted in", "added to a request, us", "processor time of the front, us")
    return table((*header, "of Redis, us", "requests/s that one Redis can count"), rows), rates[OVER_TCP]


async def bytes_per_vector() -> dict[str, float]:
    """Return the bytes of a vector of 1,024 dimensions in a response of 32, by its format, without headers."""
    entry = ModelEntry(id=MODEL, source="package:fake/model", enabled=True)
    registry = Registry(path=Path("models.yaml"), version=1, models=(entry,), aliases={})
    deployment = Deployment(registry, Settings(), make_backend=lambda _entry: RandomBackend())
    await deployment.start()
    found = {}
    transport = httpx.ASGITransport(create_app(deployment))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        for name in _FORMATS:
            body = {"model": MODEL, "input": ["a text"] * _NUM_TEXTS, "encoding_format": name}
            response = await client.post("/v1/embeddings", json=body)
            found[name] = len(response.raise_for_status().content) / _NUM_TEXTS
    await deployment.stop()
    return found


def bytes_table(found: dict[str, float]) -> str:
    """Return the bytes of a vector by format, and the bandwidth of a million of them per second."""
    rows = [[f"`{name}`", f"{size:,.0f}", number(size * 8e6 / 1e9)] for name, size in found.items()]
    return table(("`encoding_format`", "bytes per vector", "Gbit/s for a million texts/s"), rows)


def front_rates(page: Path = MEASURED) -> dict[int, float]:
    """Return the requests/s of a front whose models are elsewhere, by the texts of a request, from `bench.upstream`.

    Raises:
        ValueError: the page has no such table.
    """
    found = re.findall(
        r"^\| a gateway without a model \| \d+ x (\d+) \|(?:[^|]*\|){4} ([\d,.]+) \|$", page.read_text(), re.MULTILINE
    )
    rates: dict[int, float] = {}
    for texts, rate in found:
        rates[int(texts)] = max(rates.get(int(texts), 0.0), float(rate.replace(",", "")))
    if set(rates) != {1, _NUM_TEXTS}:
        raise ValueError(f"{page} has no table of bench.upstream")
    return rates


def plan_table(per_front: dict[int, float], per_redis: float, per_vector: dict[str, float]) -> str:
    """Return the numbers of everything, by texts per second."""
    rows = []
    for rate in RATES:
        fronts = [_needed(rate / texts, per_front[texts]) for texts in (1, _NUM_TEXTS)]
        counters = [_needed(rate / texts, per_redis) for texts in (1, _NUM_TEXTS)]
        bits = [number(rate * per_vector[name] * 8 / 1e9) for name in ("float", "base64")]
        rows.append(
            [f"{rate:,}", f"{_needed(rate, CARD_TEXTS_S):,}", *(f"{count:,}" for count in (*fronts, *counters)), *bits]
        )
    header = (
        "texts/s",
        "cards",
        "fronts, 1 text per request",
        f"{_NUM_TEXTS} texts",
        "Redis servers, 1 text per request",
    )
    return table((*header, f"{_NUM_TEXTS} texts", "Gbit/s of vectors, `float`", "`base64`"), rows)


def _needed(rate: float, of_one: float) -> int:
    return math.ceil(rate / (LOAD * of_one))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=8000, help="to count in each storage")
    parser.add_argument("--update", action="store_true", help="write the tables into docs/scale.md")
    options = parser.parse_args(arguments)
    configure_logs("warning", "json")
    per_vector = asyncio.run(bytes_per_vector())
    quotas, per_redis = quota_table(options.requests)
    per_front = front_rates()
    rates = " or ".join(
        f"{number(rate)} requests/s of {texts} text{'s' if texts > 1 else ''}" for texts, rate in per_front.items()
    )
    parts = [
        describe_machine(),
        "**Counting one request of a client with both quotas**",
        quotas,
        "**A vector of 1,024 dimensions in a response of 32**",
        bytes_table(per_vector),
        f"**Computed from that**, with {LOAD:.0%} load everywhere: a front does {rates} (measured by `bench.upstream`), and "
        f"a card {CARD_TEXTS_S} texts/s of 60 tokens (not measured)",
        plan_table(per_front, per_redis, per_vector),
    ]
    text = "\n\n".join(parts)
    print(f"\n{text}")
    if options.update:
        update_page("bench.fronts", text, PAGE)


if __name__ == "__main__":
    main()

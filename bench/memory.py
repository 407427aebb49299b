"""Measure whether the gateway's memory stays flat over many texts of mixed lengths.

Sends texts of 1 to 400 words in requests of mixed sizes to a separate gateway, and prints the resident memory on the
way. Ends with exit code 1 when the second half of the run took more than 5 % on top of the first.

    python -m bench.memory [--texts 100000]
"""

from __future__ import annotations

import argparse
import random
import sys
import time

import httpx

from bench.load import HOST
from bench.machine import describe_machine
from bench.servers import start_gateway
from bench.texts import Sentences

_REQUEST_SIZES = (1, 3, 32, 100, 256)
_MAX_WORDS = 400
_NUM_SAMPLES = 10
_MAX_GROWTH = 1.05
_TIMEOUT_S = 300.0


def measure(num_texts: int) -> list[tuple[int, float]]:
    """Embed ``num_texts`` texts; return (texts so far, resident MiB) at ten points on the way."""
    shuffle = random.Random(20)  # noqa: S311  not for secrets
    words = " ".join(Sentences(seed=20).take(500)).split()
    samples: list[tuple[int, float]] = []
    with start_gateway() as server, httpx.Client(base_url=f"http://{HOST}:{server.port}", timeout=_TIMEOUT_S) as client:
        sent = 0
        while sent < num_texts:
            # Most texts are short, and a few exceed the model's limit.
            lengths = [
                min(_MAX_WORDS, int(shuffle.lognormvariate(2.5, 1)) + 1) for _ in range(shuffle.choice(_REQUEST_SIZES))
            ]
            texts = [" ".join(shuffle.choices(words, k=length)) for length in lengths]
            client.post("/v1/embeddings", json={"input": texts, "encoding_format": "base64"}).raise_for_status()
            sent += len(texts)
            if sent >= (len(samples) + 1) * num_texts / _NUM_SAMPLES:
                samples.append((sent, server.memory_mib))
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=100_000)
    num_texts = parser.parse_args().texts
    started = time.monotonic()
    samples = measure(num_texts)
    print(f"{describe_machine()}\n\n| texts embedded | resident memory, MiB |\n|---|---|")
    for sent, resident in samples:
        print(f"| {sent:,} | {resident:.0f} |")
    growth = samples[-1][1] / samples[len(samples) // 2 - 1][1]
    print(f"\n{time.monotonic() - started:.0f} s; the second half took {100 * (growth - 1):+.1f} %.")
    sys.exit(growth > _MAX_GROWTH)


if __name__ == "__main__":
    main()

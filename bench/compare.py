"""Compare the gateway with its alternatives, side by side, and check its goals.

Infinity's own server, sentence-transformers in a loop, and the gateway's encoder in a loop run the bundled model in turns
(A B A B) on the same texts. No text is sent twice to the same one. The table shows medians over the rounds, and ratios
are medians of the ratios of neighboring runs. The first run installs Infinity's server in a separate environment, under
``build/``. Everything is bound to 127.0.0.1.

    python -m bench.compare              about 10 minutes
    python -m bench.compare --quick      two to three minutes: one short round
    python -m bench.compare --update     also writes the result into docs/performance.md
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from dataclasses import asdict

import orjson

from bench import findings, rounds, servers
from bench.bare import BareLoop
from bench.load import LoadGenerator, raise_file_limit
from bench.processes import RESULTS, bounded
from bench.report import note, update_page
from bench.texts import Sentences

_SEED = 20
_LIMIT_S = 1200


def compare(effort: rounds.Effort) -> findings.Findings:
    """Start everything, measure it, and end it."""
    servers.install_infinity()
    sentences = Sentences(_SEED)
    with ExitStack() as running:
        generator = running.enter_context(LoadGenerator(servers.clean_environ()))
        note("starting: the servers")
        infinity = rounds.Served(servers.INFINITY, running.enter_context(servers.start_infinity()), generator)
        gateway = rounds.Served(findings.GATEWAY, running.enter_context(servers.start_gateway()), generator)
        float32 = rounds.Served(
            findings.GATEWAY_FLOAT32, running.enter_context(servers.start_gateway_float32()), generator
        )
        note("starting: the bare loops")
        ours = running.enter_context(BareLoop("gateway", servers.clean_environ()))
        theirs = running.enter_context(BareLoop("sentence-transformers", servers.clean_environ(), ours.num_threads))
        subjects = (
            infinity,
            gateway,
            float32,
            rounds.Bare(findings.OUR_LOOP, ours),
            rounds.Bare(findings.THEIR_LOOP, theirs),
        )
        model = rounds.run_rounds(subjects, rounds.SHAPES, effort, sentences)
        note("one text next to a bulk client")
        bulk = rounds.run_bulk(gateway, ours, effort, sentences)
        note("1,000 clients")
        crowd = rounds.run_crowd(gateway, effort, sentences)
    return findings.Findings(
        model=model,
        front_end=_compare_front_ends(effort, sentences),
        bulk=bulk,
        crowd=crowd,
        about=(
            f"all-MiniLM-L6-v2, sentences of 3 to 60 words. Gateway: {ours.about}, {_count_threads(ours)}. "
            f"{servers.INFINITY} and sentence-transformers: float32; the former with its own defaults, the latter with "
            "as many threads as the gateway."
        ),
    )


def _count_threads(loop: BareLoop) -> str:
    return (
        "1 thread"
        if loop.num_threads == 1
        else f"{loop.num_threads} threads for {loop.num_replicas} forward(s) at a time"
    )


def _compare_front_ends(effort: rounds.Effort, sentences: Sentences) -> rounds.Results:
    with ExitStack() as running:
        generator = running.enter_context(LoadGenerator(servers.clean_environ()))
        note("starting: the servers without a model")
        infinity, gateway = (
            running.enter_context(start()) for start in (servers.start_debug_infinity, servers.start_fake_gateway)
        )
        subjects = [
            rounds.Served(name + suffix, server, generator, repeats=True, encoding=encoding, shapes=shapes)
            for encoding, suffix, shapes in (
                ("float", "", (rounds.Shape(16, 1), rounds.FULL)),
                ("base64", findings.AS_BASE64, (rounds.FULL,)),
            )
            for name, server in ((findings.FAKE_INFINITY, infinity), (findings.FAKE_GATEWAY, gateway))
        ]
        return rounds.run_rounds(subjects, (rounds.Shape(16, 1), rounds.FULL), effort, sentences)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="Results in full: bench/results/compare-*.json"
    )
    parser.add_argument("--quick", action="store_true", help="one short round: two to three minutes, and less certain")
    parser.add_argument("--update", action="store_true", help="write the tables into docs/performance.md")
    parser.add_argument("--limit-s", type=int, default=_LIMIT_S, help="stop after so many seconds (%(default)s)")
    options = parser.parse_args()
    effort = rounds.QUICK_EFFORT if options.quick else rounds.FULL_EFFORT
    raise_file_limit()
    with bounded(options.limit_s):
        measured = compare(effort)
    path = RESULTS / f"compare-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_bytes(orjson.dumps({"effort": asdict(effort), **measured.as_json()}))
    markdown = measured.markdown(effort)
    print(markdown)
    if options.update:
        update_page("bench.compare", markdown)


if __name__ == "__main__":
    main()

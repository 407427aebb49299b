"""The gateway and Infinity's own server under the same locust files, in turns: ``docs/performance.md``, Under locust.

python -m loadtest.peers              about 10 minutes
python -m loadtest.peers --quick      a minute: one short round, to see that it works
python -m loadtest.peers --update     also writes the tables into docs/performance.md

Both serve the bundled model with their defaults, and both are there the whole time; the one whose turn it is not is idle.
The first run makes the environment of Infinity's server under ``build/``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.load import raise_file_limit
from bench.machine import describe_machine
from bench.processes import ROOT
from bench.report import number, table, update_page
from bench.servers import INFINITY, Server, clean_environ, start_gateway, start_infinity
from loadtest.run import locust_command

GATEWAY: Final = "gateway"
WORKLOADS: Final = ("search", "mixed")


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured.

    Attributes:
        users: each number of users that is tried.
        slot_s: seconds of a turn, of which the first two are not counted.
    """

    users: Sequence[int]
    slot_s: float
    rounds: int


FULL: Final = Extent((1, 16, 64, 256), slot_s=10, rounds=3)
QUICK: Final = Extent((1, 16), slot_s=5, rounds=1)


def compare(peer: Server, gateway: Server, workload: str, users: int, extent: Extent) -> list[dict[str, Any]]:
    """Load both in turns, and return what locust found of each, the peer first.

    Raises:
        RuntimeError: locust has left no results; the message shows its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            *("--target", f"{INFINITY}={_url(peer)}#{peer.model}"),
            *("--target", f"{GATEWAY}={_url(gateway)}#{gateway.model}"),
            # Infinity's server refuses fields that it does not know.
            "--no-task",
            *("--workload", workload, "--load-profile", "steady", "--peak", str(users)),
            *("--slot-s", str(extent.slot_s), "--rounds", str(extent.rounds)),
            *("--max-fail-ratio", "1", "--loglevel", "ERROR", "--out", folder),
        ]
        done = subprocess.run(
            locust_command(arguments), env=clean_environ(), cwd=ROOT, capture_output=True, text=True, check=False
        )
        results = Path(folder, "results.json")
        if not results.exists():
            raise RuntimeError(f"locust has left no results:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        targets: list[dict[str, Any]] = json.loads(results.read_text())["targets"]
        return targets


def _url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}{server.path}"


def measure(extent: Extent) -> Iterator[tuple[str, list[list[str]]]]:
    """Measure every workload; gives its name and the rows of its table."""
    raise_file_limit()
    with start_infinity() as peer, start_gateway() as gateway:
        for workload in WORKLOADS:
            found: list[list[str]] = []
            for users in extent.users:
                for target in compare(peer, gateway, workload, users, extent):
                    found.append(_row(users, target))
                    print(workload, *found[-1], sep="  ", flush=True)
            yield workload, found


def _row(users: int, target: dict[str, Any]) -> list[str]:
    figures = [
        target[name] if target[name] is not None else float("nan")
        for name in ("rps", "texts_per_s", "p50_ms", "p95_ms", "p99_ms")
    ]
    ratio, ratio_p95 = (target["ratios"][name] for name in ("rps", "p95"))
    return [
        str(users),
        target["label"],
        *map(number, figures),
        number(ratio) if ratio else "1.00",
        number(ratio_p95) if ratio_p95 else "1.00",
        ", ".join(f"{count} x {cause}" for cause, count in target["failures"].items()) or "0",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--update", action="store_true", help="write the tables into docs/performance.md")
    options = parser.parse_args(arguments)
    header = (
        "users",
        "",
        "requests/s",
        "texts/s",
        "p50, ms",
        "p95, ms",
        "p99, ms",
        "x requests/s",
        "x p95",
        "failures",
    )
    parts = [describe_machine()]
    extent = QUICK if options.quick else FULL
    for workload, rows in measure(extent):
        parts += [f"**`--workload {workload}`**, {extent.rounds} turns of {extent.slot_s:g} s", table(header, rows)]
    markdown = "\n\n".join(parts)
    print(f"\n{markdown}")
    if options.update:
        update_page("loadtest.peers", markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())

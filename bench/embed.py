"""Measure ``gateway embed``: its speed against the bare encoder loop, and its memory over many rows.

The job reads JSON lines and writes Parquet files and a manifest, in a separate process; the bare loop only encodes the same
texts, in another one, with as many threads. They run in turns (A B A B).

    python -m bench.embed                two minutes: the speed, and the memory over 300,000 rows with a fake encoder
    python -m bench.embed --full         ten minutes: the memory over 1,000,000 rows, and over 100,000 with the real encoder
    python -m bench.embed --clock cpu    for a machine that others use: rates of the processor time that was spent
    python -m bench.embed --update       also writes the tables into docs/performance.md
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import orjson
import psutil

from bench.bare import MODEL, BareLoop
from bench.machine import describe_machine
from bench.processes import RESULTS, Process, Worker, bounded
from bench.report import Goal, goals_table, note, number, table, update_page
from bench.servers import clean_environ
from bench.texts import Sentences
from gateway.bulk.job import SHARD_ROWS

_ROUNDS = 5
_TEXTS = 6_000
_BLOCK = 2_000
_SEED = 19
_LIMIT_S = 1200
_MIN_SHARE = 0.95
_MAX_GROWTH = 1.05


@dataclass(frozen=True, slots=True)
class Speed:
    """Texts per second of the job and of the bare loop, in neighboring runs."""

    job: Sequence[float]
    bare: Sequence[float]
    about: str

    @property
    def share(self) -> float:
        """The median of the ratios of neighbors."""
        return median(job / bare for job, bare in zip(self.job, self.bare, strict=True))


@dataclass(frozen=True, slots=True)
class Flatness:
    """The resident memory over the rows of one job.

    Attributes:
        samples: rows that were done, and MiB.
    """

    encoder: str
    rows: int
    seconds: float
    samples: Sequence[tuple[int, float]]

    def median_mib(self, first: float, last: float) -> float:
        """Return the median over the rows between two shares of all."""
        between = [mib for rows, mib in self.samples if first * self.rows <= rows <= last * self.rows]
        return median(between) if between else float("nan")

    @property
    def growth(self) -> float:
        """The memory of the last quarter of the rows against that of the second one."""
        return self.median_mib(0.75, 1) / self.median_mib(0.25, 0.5)

    @property
    def peak_mib(self) -> float:
        return max(mib for _, mib in self.samples)


class _Clock:
    """Measures seconds of a process: of the wall, or of the processors, shared by so many threads."""

    def __init__(self, name: str, process: Process, num_threads: int) -> None:
        self._process = psutil.Process(process.pid) if name == "cpu" else None
        self._num_threads = num_threads
        self._before = self._read()

    def _read(self) -> float:
        if self._process is None:
            return 0.0
        times = self._process.cpu_times()
        return (times.user + times.system) / self._num_threads

    def seconds(self, wall_s: float) -> float:
        """Return the seconds since this clock was made.

        Args:
            wall_s: those of the wall, as the process has measured them.
        """
        return wall_s if self._process is None else self._read() - self._before


def measure_speed(num_rounds: int, num_texts: int, clock: str = "wall") -> Speed:
    """Run both in turns on the same texts, after one round that does not count."""
    sentences = Sentences(_SEED)
    job_rates, bare_rates = [], []
    with (
        BareLoop("gateway", clean_environ()) as bare,
        Worker("embed-real", "bench.embed_job", ("real",), clean_environ()) as job,
    ):
        for index in range(num_rounds + 1):
            texts = sentences.take(num_texts)
            timer = _Clock(clock, bare, bare.num_threads)
            sample = bare.in_blocks(texts, 1e9, _BLOCK)
            bare_s = timer.seconds(sample.seconds)
            timer = _Clock(clock, job, bare.num_threads)
            answer = job.ask({"texts": texts})
            job_s = timer.seconds(answer["seconds"])
            if index:
                bare_rates.append(sample.num_texts / bare_s)
                job_rates.append(answer["rows"] / job_s)
            note(f"speed: round {index} of {num_rounds}")
        time_of = "" if clock == "wall" else "; rates of the processor time that was spent"
        return Speed(job_rates, bare_rates, f"{bare.about}, {bare.num_threads} threads{time_of}")


def measure_memory(encoder: str, num_rows: int, shard_rows: int = SHARD_ROWS) -> Flatness:
    """Embed rows in one job, and watch its process."""
    note(f"memory: {num_rows:,} rows, {encoder} encoder")
    with Worker(f"embed-{encoder}", "bench.embed_job", (encoder,), clean_environ()) as job:
        answer = job.ask({"rows": num_rows, "shard_rows": shard_rows})
    if answer["rows"] != num_rows:
        raise RuntimeError(f"{answer['rows']} rows were embedded, and the source has {num_rows}")
    return Flatness(encoder, num_rows, answer["seconds"], [(rows, mib) for rows, mib in answer["samples"]])


def show(speed: Speed, memories: Sequence[Flatness]) -> str:
    """Return the goals and the figures as Markdown."""
    goals = [
        Goal("`gateway embed` in process, share of the bare loop's throughput", ">=", _MIN_SHARE, "%", speed.share),
        *(
            Goal(
                f"memory over {memory.rows:,} rows, {memory.encoder} encoder: last quarter against the second",
                "<=",
                _MAX_GROWTH,
                "x",
                memory.growth,
            )
            for memory in memories
        ),
    ]
    rows = [
        ("bare loop", number(median(speed.bare)), f"{number(min(speed.bare))} to {number(max(speed.bare))}"),
        ("`gateway embed`", number(median(speed.job)), f"{number(min(speed.job))} to {number(max(speed.job))}"),
    ]
    flat = [
        (
            f"{memory.rows:,}",
            memory.encoder,
            number(memory.rows / memory.seconds),
            *(number(memory.median_mib(first, first + 0.25)) for first in (0, 0.25, 0.5, 0.75)),
            number(memory.peak_mib),
        )
        for memory in memories
    ]
    header = (
        "rows",
        "encoder",
        "rows/s",
        *(f"{part} quarter, MiB" for part in ("1st", "2nd", "3rd", "4th")),
        "peak, MiB",
    )
    return "\n\n".join(
        (
            describe_machine(),
            f"{MODEL}, sentences of 3 to 60 words, {speed.about}. From JSON lines into Parquet, with the manifest.",
            goals_table(goals),
            table(("", "texts/s", "range"), rows),
            table(header, flat),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--full", action="store_true", help="1,000,000 rows with a fake encoder, 100,000 with the real one"
    )
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="of the speed (%(default)s)")
    parser.add_argument("--texts", type=int, default=_TEXTS, help="per round (%(default)s)")
    parser.add_argument("--update", action="store_true", help="write the tables into docs/performance.md")
    parser.add_argument("--limit-s", type=int, default=_LIMIT_S, help="stop after so many seconds (%(default)s)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="which seconds to count")
    options = parser.parse_args()
    sizes = {"fake": 1_000_000, "real": 100_000} if options.full else {"fake": 300_000}
    with bounded(options.limit_s):
        speed = measure_speed(options.rounds, options.texts, options.clock)
        memories = [measure_memory(encoder, num_rows) for encoder, num_rows in sizes.items()]
    figures = {"job": speed.job, "bare": speed.bare, "memory": [memory.samples for memory in memories]}
    (RESULTS / f"embed-{time.strftime('%Y%m%d-%H%M%S')}.json").write_bytes(orjson.dumps(figures))
    markdown = show(speed, memories)
    print(markdown)
    if options.update:
        update_page("bench.embed", markdown)


if __name__ == "__main__":
    main()

"""The command line of a load test, on top of locust's own."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loadtest.plan import PROFILES, Loop, Plan, Target, make_plan, parse_targets
from loadtest.thresholds import Thresholds, make_thresholds
from loadtest.workloads import WORKLOADS

KNEE = "knee"


class Parser(Protocol):
    """What locust gives to add arguments to: an ``ArgumentParser`` that reads environment variables as well."""

    def add_argument(self, *names: str, **options: object) -> object: ...


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a run.

    Attributes:
        profile: a name of :data:`loadtest.plan.PROFILES`, or ``knee``.
        loop: ``closed``: a user sends when the last answer has come. ``open``: turns begin at random times, as many a
            second as asked for, whether or not those before have ended.
        peak: users, or turns a second; 0 for the profile's own. So for the times.
        fixed_texts: how many different texts there are; 0: each is new.
        is_golden: each answer is compared with the vector that its text had alone.
        api_key: sent as bearer token.
    """

    targets: list[Target]
    profile: str
    loop: Loop
    workload: str
    peak: int
    slot_s: float
    rounds: int
    thresholds: dict[str, Thresholds]
    seed: int
    texts: Path | None
    fixed_texts: int
    is_golden: bool
    encoding: str
    sends_task: bool
    api_key: str
    metrics_url: str
    out: Path

    @property
    def labels(self) -> list[str]:
        return [target.label for target in self.targets]

    def plan(self) -> Plan:
        """Return the schedule; of every profile but ``knee``."""
        profile = PROFILES[self.profile]
        return make_plan(self.targets, profile, peak=self.peak, slot_s=self.slot_s, rounds=self.rounds)


def add_arguments(parser: Parser) -> None:
    """Add the options of a load test."""
    add = parser.add_argument  # texts and numbers alone: the master sends them to its workers
    add("--models", default="", env_var="LOADTEST_MODELS", help="Models behind --host, comma-separated: A,B")
    add("--target", action="append", default=[], help="A model elsewhere: LABEL=URL#MODEL; may be repeated")
    add(
        "--load-profile",
        choices=[*PROFILES, KNEE],
        default="smoke",
        env_var="LOADTEST_PROFILE",
        help="Course of the load",
    )
    add("--workload", choices=list(WORKLOADS), default="mixed", help="Kind of requests that users send")
    add("--arrivals", choices=["closed", "open"], default="", help="Closed or open loop; knee is open, others closed")
    add(
        "--peak",
        type=int,
        default=0,
        help="Most users, or turns a second with --arrivals open; by default the profile's",
    )
    add("--slot-s", type=float, default=0.0, help="Seconds for which one target is loaded at a time")
    add("--rounds", type=int, default=0, help="How often each target is loaded: A B, B A, ...")
    add("--p95-ms", default="", help="Fail above this 95th percentile: 200, or A=200,B=300")
    add("--max-fail-ratio", default="", help="Fail above this share of failures; by default 0.01. As --p95-ms")
    add("--min-rps", default="", help="Fail below this many requests per second. As --p95-ms")
    add("--seed", type=int, default=1, help="Of the texts")
    add("--texts", default="", help="File with sentences, one a line, to make texts of")
    add("--fixed-texts", type=int, default=0, help="Send so many different texts again and again; 0: each text is new")
    add("--golden", action="store_true", help="Hold each answer against the vector of its text alone")
    add(
        "--encoding", choices=["base64", "float"], default="base64", help="Form of the vectors; OpenAI's client: base64"
    )
    add("--no-task", action="store_true", help="Send no task, for servers that refuse the field")
    add("--api-key", default="", env_var="LOADTEST_API_KEY", help="Sent as bearer token", include_in_web_ui=False)
    add("--metrics-url", default="", help="Prometheus metrics of the gateway; by default HOST/metrics")
    add("--out", default="build/loadtest", help="Folder for report.html, CSV and JSON")


def read_options(parsed: Namespace | None) -> Options:
    """Return the options of a run.

    Raises:
        ValueError: an option is wrong; the message names it and the valid values.
    """
    if parsed is None:
        raise ValueError("locust gave no options")
    host = (parsed.host or "").rstrip("/")
    targets = parse_targets(parsed.models, host, parsed.target)
    labels = [target.label for target in targets]
    if parsed.golden and not parsed.fixed_texts:
        raise ValueError("--golden needs --fixed-texts NUMBER: the texts whose vectors are asked for before")
    return Options(
        targets=targets,
        profile=parsed.load_profile,
        loop=parsed.arrivals or ("open" if parsed.load_profile == KNEE else "closed"),
        workload=parsed.workload,
        peak=parsed.peak,
        slot_s=parsed.slot_s,
        rounds=parsed.rounds,
        thresholds=make_thresholds(labels, parsed.p95_ms, parsed.max_fail_ratio, parsed.min_rps),
        seed=parsed.seed,
        texts=Path(parsed.texts) if parsed.texts else None,
        fixed_texts=parsed.fixed_texts,
        is_golden=parsed.golden,
        encoding=parsed.encoding,
        # A golden vector is that of a text without a task.
        sends_task=not (parsed.no_task or parsed.golden),
        api_key=parsed.api_key,
        metrics_url=parsed.metrics_url or (f"{host}/metrics" if host else ""),
        out=Path(parsed.out),
    )

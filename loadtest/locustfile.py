"""The file for ``locust -f loadtest/locustfile.py``: combines options, users, shape and report."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # locust adds this file's own folder alone

from locust import FastHttpUser, events
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from loadtest.answers import Checker
from loadtest.knee import Limits
from loadtest.options import KNEE, Options, add_arguments, read_options
from loadtest.probe import Probe, golden_vectors
from loadtest.recorder import Recorder
from loadtest.report import write_report
from loadtest.results import make_results, print_results
from loadtest.shapes import Course, KneeShape, PlannedShape
from loadtest.texts import Texts, read_sentences
from loadtest.users import Run, make_user_classes

log = logging.getLogger("loadtest")
logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for each look at the metrics

_KNEE_FIRST, _KNEE_STEP_S = 4, 12.0
_STOP_TIMEOUT_S = 60


class Placeholder(FastHttpUser):
    """Locust wants a class of users before it has read its options; each target's own takes its place then."""

    fixed_count = 1


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    add_arguments(parser)


@events.init.add_listener
def set_up(environment: Environment, **_unused: Any) -> None:
    """Put users and shape of this run in place, on the master, on each worker, or where both are one."""
    try:
        options = read_options(environment.parsed_options)
        sentences = read_sentences(options.texts)
    except (OSError, ValueError) as error:
        sys.exit(f"loadtest: {error}")
    runner = environment.runner
    place = runner.worker_index if isinstance(runner, WorkerRunner) else 0
    # The same texts for all processes if answers are compared with known vectors; otherwise new ones in each.
    seed = str(options.seed) if options.fixed_texts else f"{options.seed} {place}"
    texts = {label: Texts(sentences, seed, options.fixed_texts) for label in options.labels}
    run = Run(options, Recorder(), texts, {label: Checker() for label in options.labels})
    classes = make_user_classes(run)
    environment.user_classes[:] = list(classes.values())
    environment.stop_timeout = environment.stop_timeout or _STOP_TIMEOUT_S
    if options.is_golden and not isinstance(runner, MasterRunner):
        for target in options.targets:
            run.checkers[target.label].golden = golden_vectors(target, options, texts[target.label].fixed)
    if isinstance(runner, WorkerRunner):
        _send_to_master(run.recorder)
        return
    _lead(environment, run, classes)


def _send_to_master(recorder: Recorder) -> None:
    @events.report_to_master.add_listener
    def report(client_id: str, data: dict[str, Any]) -> None:
        data["loadtest"] = recorder.take()


def _lead(environment: Environment, run: Run, classes: dict[str, Any]) -> None:
    """Control the load, collect the results, and write the report."""
    course, probe = Course(), Probe(run.options)
    environment.shape_class = _shape(run, classes, course)

    @events.worker_report.add_listener
    def collect(client_id: str, data: dict[str, Any]) -> None:
        run.recorder.merge(data.get("loadtest", ()))

    @events.test_start.add_listener
    def start(**_unused: Any) -> None:
        probe.start()

    @events.quitting.add_listener
    def finish(environment: Environment, **_unused: Any) -> None:
        results = make_results(run.options, run.recorder, course, probe)
        print_results(results)
        print(f"\nreport: {write_report(results, run.options.out)}")
        environment.process_exit_code = 1 if results.problems else 0


def _shape(run: Run, classes: dict[str, Any], course: Course) -> PlannedShape | KneeShape:
    options: Options = run.options
    if options.profile != KNEE:
        return PlannedShape(options.plan(), classes, options.thresholds, run.recorder, course)
    limits = {
        label: Limits(p95_ms=known.p95_ms or Limits().p95_ms, fail_ratio=known.max_fail_ratio)
        for label, known in options.thresholds.items()
    }
    return KneeShape(
        options.targets,
        classes,
        limits,
        run.recorder,
        course,
        first=options.peak or _KNEE_FIRST,
        step_s=options.slot_s or _KNEE_STEP_S,
    )

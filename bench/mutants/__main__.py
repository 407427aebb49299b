"""Change modules in small ways, one at a time, and say which changes no test notices.

python -m bench.mutants --record                 # once: which test runs which lines (20 minutes)
python -m bench.mutants                          # a sample of each module of the core
python -m bench.mutants access/quotas --sample 0 # every change of one module
python -m bench.mutants --table --update         # write the known results into docs/testing.md

Results are kept: a run that was stopped continues where it stopped.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path

from bench.mutants.equivalents import FILE, read_equivalents
from bench.mutants.outcomes import Outcomes
from bench.mutants.own_tests import all_tests, own_tests
from bench.mutants.records import Records
from bench.mutants.report import print_result, table_of, write_page
from bench.mutants.running import preload, workspaces
from bench.mutants.scoring import CORE, Options, record, result_of, score
from bench.processes import RESULTS, ROOT


def main() -> int:
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes the copies and ends running tests
    project: Path = arguments.project.resolve()
    folder = RESULTS / "mutants" if project == ROOT else project / "results"
    modules = [_path_of(project, name) for name in arguments.modules or CORE]
    entries = read_equivalents(arguments.equivalent)
    options = Options(arguments.sample, arguments.seed, arguments.budget, is_own_only=arguments.own)
    if not arguments.table:
        with workspaces(arguments.jobs + 1, project) as (snapshot, *copies):
            # The checkout may change during the run. The run reads and tests the copy from the start.
            records = Records(snapshot.root, folder / "records")
            every = all_tests(snapshot.root)
            own = {file for module in modules for file in own_tests(snapshot.root, module)}
            preload(snapshot, sorted(own) if arguments.own and arguments.record is None else every)
            for copy in copies:
                copy.take_compiled(snapshot)
            if arguments.record is not None:
                record(
                    copies, records, [file for file in every if file.startswith(tuple(arguments.record) or "tests/")]
                )
            for module in modules if arguments.modules or arguments.record is None else ():
                outcomes = Outcomes(snapshot.root, folder, module)
                score(copies, records, snapshot.root, module, options, entries, outcomes)
                print_result(result_of(snapshot.root, module, options, entries, outcomes))
    results = [result_of(project, module, options, entries, Outcomes(project, folder, module)) for module in modules]
    if arguments.table:
        for result in results:
            print_result(result)
    print(f"\n{table_of(results)}")
    if arguments.update:
        write_page(results, _commit())
    return 1 if any(result.survivors for result in results) else 0


def _commit() -> str:
    """Return the commit that the checkout is at."""
    return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="for example access/quotas; default: the core")
    parser.add_argument("--sample", type=int, default=40, help="changes per module, 0 for all (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="which changes are in the sample (default 0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side (default 2)")
    parser.add_argument(
        "--budget", type=float, default=40.0, help="seconds of tests for a change, own and others each (default 40)"
    )
    parser.add_argument("--own", action="store_true", help="run only the module's own tests")
    parser.add_argument(
        "--record",
        nargs="*",
        metavar="TESTS",
        help="record what tests run that are new or changed: all, or some folders",
    )
    parser.add_argument("--table", action="store_true", help="run nothing; print the known results")
    parser.add_argument("--update", action="store_true", help="write the table into docs/testing.md")
    parser.add_argument("--project", type=Path, default=ROOT, help="root of a project (default: this one)")
    parser.add_argument("--equivalent", type=Path, default=FILE, help="changes that change no behavior")
    return parser


def _path_of(project: Path, name: str) -> str:
    """Return the path of a module: ``access/quotas`` is ``gateway/access/quotas.py``."""
    for path in (name, f"{name}.py", f"gateway/{name}", f"gateway/{name}.py"):
        if path.endswith(".py") and (project / path).is_file():
            return path
    raise SystemExit(f"{name}: there is no such module")


if __name__ == "__main__":
    sys.exit(main())

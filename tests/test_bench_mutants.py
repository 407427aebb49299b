"""The tool that checks whether tests would notice a changed line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from bench.mutants.equivalents import read_equivalents, reason_for, unmatched
from bench.mutants.operators import mutants_of
from bench.mutants.outcomes import Outcomes
from bench.mutants.own_tests import own_tests
from bench.mutants.plugin import IMPORT, Trace
from bench.mutants.records import Records
from bench.mutants.report import write_page
from bench.mutants.scoring import CORE, ModuleResult
from bench.mutants.usage import Limits, Usage
from bench.processes import ROOT


def changes(source: str) -> set[tuple[str, str]]:
    return {(mutant.operator, mutant.after) for mutant in mutants_of("m.py", source)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a = b < c", {("comparison", "a = (b <= c)"), ("comparison", "a = (b >= c)")}),
        ("a = b[1]", {("off by one", "a = b[2]")}),
        ("a = not b", {("not dropped", "a = b")}),
        ("a += b", {("statement dropped", "pass"), ("arithmetic", "a -= b")}),
        ("a = b and c", {("and/or", "a = (b or c)"), ("operand dropped", "a = c"), ("operand dropped", "a = b")}),
        ("f(a, b)", {("statement dropped", "pass"), ("arguments swapped", "f(b, a)")}),
        ("raise E", {("raise dropped", "pass")}),
        ("def f(): return a", {("return value dropped", "def f(): return None")}),
        (
            "if a: b()",
            {("condition", "if True: b()"), ("condition", "if False: b()"), ("statement dropped", "if a: pass")},
        ),
        ("a = 'key'", {("constant", "a = 'key~'")}),
        ("_MOST = 64", {("off by one", "_MOST = 64000")}),
        ("_MOST = 64 * 2**20", {("constant", "_MOST = (64 * 2 ** 20 * 1000)")}),
    ],
)
def test_a_mutant_is_one_small_change(source, expected):
    assert changes(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""A docstring."""',
        "a: Literal['x']",
        "def f(a: 'int') -> 'str': ...",
        "__all__ = ['a']",
        "log.info('started', port=1)",
        "a = 'prose, which has spaces'",
        "@route('/path', status=200)\ndef f(): ...",
    ],
)
def test_code_without_behavior_is_not_changed(source):
    assert changes(source) == set()


def test_the_mutants_of_the_gateway_are_python():
    """One in fifty is read; there are some 14,000."""
    mutants = [
        mutant
        for path in sorted(ROOT.glob("gateway/**/*.py"))
        for mutant in mutants_of(path.name, path.read_text(encoding="utf-8"))
    ]
    chosen = sorted(mutants, key=lambda mutant: mutant.order(0))[::50]

    assert len(chosen) > 100
    for mutant in chosen:
        compile(mutant.source, mutant.module, "exec")


def test_the_same_change_is_in_the_sample_wherever_its_line_is():
    [*mutants] = mutants_of("m.py", "a = b < c\nd = e + 1\n")
    [*moved] = mutants_of("m.py", "import x\n\na = b < c\nd = e + 1\n")

    assert [mutant.order(0) for mutant in mutants] == [mutant.order(0) for mutant in moved]
    assert mutants[0].order(0) != mutants[0].order(1)


def test_an_equivalent_change_is_known_by_its_text_and_an_old_entry_is_reported(tmp_path):
    path = tmp_path / "equivalent.toml"
    entry = '[[equivalent]]\nmodule = "m.py"\nbefore = "{}"\nafter = "{}"\nreason = "why"\n'
    path.write_text(entry.format("a = b < c", "a = (b <= c)") + entry.format("gone", "*"))
    entries = read_equivalents(path)
    mutants = mutants_of("m.py", "import x\na = b < c\n")

    assert [reason_for(mutant, entries) for mutant in mutants] == ["why", None]
    assert [stale.before for stale in unmatched(mutants, entries)] == ["gone"]


TOY = '''
def clamp(value, low, high):
    """Return a value between two others."""
    if value < low:
        return low
    return min(value, high)


def never_tested(a):
    return a + 1
'''
TOY_TESTS = """
import subprocess, sys
from gateway.toy import clamp

def test_low():
    assert clamp(1, 3, 5) == 3

def test_high_in_a_process_of_its_own():
    code = "from gateway.toy import clamp; assert clamp(9, 3, 5) == 5"
    subprocess.run([sys.executable, "-c", code], check=True)
"""


def test_a_record_is_good_where_lines_and_modules_have_moved(tmp_path):
    for name, text in {"gateway/toy.py": TOY, "tests/test_toy.py": TOY_TESTS}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    test = "tests/test_toy.py::test_low"
    traces = {IMPORT: Trace(lines={"gateway/toy.py": {2, 9}}), test: Trace(lines={"gateway/toy.py": {4, 5}})}
    Records(tmp_path, tmp_path / "records").save("tests/test_toy.py", traces)
    (tmp_path / "gateway/toy.py").unlink()
    (tmp_path / "gateway/math.py").write_text("import x\n" + TOY)

    records = Records(tmp_path, tmp_path / "records")
    tests = {
        mutant.before: [candidate.test for candidate in records.candidates(mutant, ["tests/test_toy.py"], 1)]
        for mutant in mutants_of("gateway/math.py", "import x\n" + TOY)
    }

    assert tests == {"if value < low:": [test], "return low": [test], "return min(value, high)": [], "return a + 1": []}


def test_a_record_is_good_for_both_parts_of_a_module_that_was_split(tmp_path):
    for name, text in {"gateway/toy.py": TOY, "tests/test_toy.py": TOY_TESTS}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    test = "tests/test_toy.py::test_low"
    Records(tmp_path, tmp_path / "records").save(
        "tests/test_toy.py",
        {IMPORT: Trace(lines={"gateway/toy.py": {2, 9}}), test: Trace(lines={"gateway/toy.py": {4, 5}})},
    )
    clamp, never_tested = TOY.split("\n\n\n")
    (tmp_path / "gateway/toy.py").write_text(never_tested)
    (tmp_path / "gateway/limits.py").write_text("import x\n" + clamp)

    records = Records(tmp_path, tmp_path / "records")
    [lowered] = [
        one
        for one in mutants_of("gateway/limits.py", "import x\n" + clamp)
        if one.after == "return None" and one.line == 6
    ]

    assert [candidate.test for candidate in records.candidates(lowered, ["tests/test_toy.py"], 1)] == [test]


def test_each_module_of_the_core_has_tests():
    modules = [f"gateway/{name}.py" for name in CORE]

    assert [module for module in modules if not (ROOT / module).is_file()] == []
    assert [module for module in modules if not own_tests(ROOT, module)] == []


def test_the_mutants_that_no_test_notices_are_printed(tmp_path):
    for name, text in {"gateway/__init__.py": "", "gateway/toy.py": TOY, "tests/test_toy.py": TOY_TESTS}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    equivalent = tmp_path / "equivalent.toml"
    equivalent.write_text(
        '[[equivalent]]\nmodule = "gateway/toy.py"\nbefore = "if value < low:"\n'
        'after = "if (value <= low):"\nreason = "the same value"\n'
    )

    command = ["bench.mutants", "toy", "--sample", "0", "--project", str(tmp_path), "--equivalent", str(equivalent)]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=240, check=False)

    assert done.returncode == 1, done.stderr
    survivors = {line.removeprefix("  + ") for line in done.stdout.splitlines() if line.startswith("  + ")}
    assert survivors == {"return (a - 1)", "return a + 2", "return None"}
    assert "| toy | 10 | 10 | 6 | 3 | 1 | 67 % |" in done.stdout
    assert (tmp_path / "gateway" / "toy.py").read_text() == TOY


def test_the_page_keeps_the_rows_of_modules_whose_results_are_elsewhere(tmp_path):
    page = tmp_path / "testing.md"
    page.write_text("before\n<!-- bench.mutants -->\n<!-- end of bench.mutants -->\nafter\n")
    union, compared, raised = (
        mutants_of("gateway/vectors.py", source)[0] for source in ("a: int = b | c", "a = b < c", "raise E")
    )

    def vectors(**parts) -> ModuleResult:
        return ModuleResult("gateway/vectors.py", 9, **parts)

    there = ModuleResult("gateway/service.py", 5, [(compared, "a test")], [(union, 3)], [(raised, "never reached")])
    write_page([vectors(survivors=[(compared, 0)]), there, ModuleResult("gateway/requests.py", 7)], "abc1234", page)

    write_page([vectors(killed=[(compared, "a test")]), ModuleResult("gateway/service.py", 5)], "def5678", page)

    text = page.read_text()
    assert "| vectors | 9 | 1 | 1 | 0 | 0 | 100 % | def5678 |" in text
    assert "| service | 5 | 3 | 1 | 1 | 1 | 50 % | abc1234 |" in text
    assert "| all | 14 | 4 | 2 | 1 | 1 | 67 % |  |" in text
    assert "| requests |" not in text
    assert [line for line in text.splitlines() if line.startswith("| `")] == [
        f"| `service` | `{union.before}` | `{union.after}` |".replace("b | c", "b \\| c"),
        f"| `service` | `{raised.before}` | `{raised.after}` | never reached |",
    ]
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")


def test_a_stopped_run_continues_and_a_changed_test_or_function_is_tried_again(tmp_path):
    for name, text in {"gateway/toy.py": TOY, "tests/test_toy.py": TOY_TESTS}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    low, high = "tests/test_toy.py::test_low", "tests/test_toy.py::test_high_in_a_process_of_its_own"

    def mutant(source: str = TOY, after: str = "return min(high, value)"):
        return next(one for one in mutants_of("gateway/toy.py", source) if one.after == after)

    def outcome(of):
        known = Outcomes(tmp_path, tmp_path / "kept", "gateway/toy.py").of(of)
        return None if known is None else (known.killed_by, sorted(known.tests))

    lower, removed = mutant(after="if (value <= low):"), mutant(after="return None")
    assert outcome(lower) is None
    kept = Outcomes(tmp_path, tmp_path / "kept", "gateway/toy.py")
    kept.save_passed(lower, [low])
    kept.save_passed(lower, [high])
    kept.save_killed(removed, low, [low, high])

    assert outcome(lower) == ("", [high, low])
    assert outcome(removed) == (low, [low])
    further_down = "import x\n" + TOY
    assert outcome(mutant(further_down, "if (value <= low):")) == ("", [high, low])
    assert outcome(mutant(TOY.replace("min(value", "max(value"), "if (value <= low):")) is None

    (tmp_path / "tests/test_toy.py").write_text(TOY_TESTS.replace("(1, 3, 5)", "(2, 3, 5)"))
    assert outcome(lower) == ("", [high])
    assert outcome(removed) is None


def test_a_test_that_is_new_in_a_file_is_recorded_without_the_others(tmp_path):
    for name, text in {"gateway/toy.py": TOY, "tests/test_toy.py": TOY_TESTS}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    low, new = "tests/test_toy.py::test_low", "tests/test_toy.py::test_new"
    traces = {IMPORT: Trace(), low: Trace(lines={"gateway/toy.py": {4, 5}})}
    Records(tmp_path, tmp_path / "records").save("tests/test_toy.py", traces)
    (tmp_path / "tests/test_toy.py").write_text(TOY_TESTS + "\ndef test_new():\n    assert clamp(4, 3, 5) == 4\n")

    records = Records(tmp_path, tmp_path / "records")
    assert not records.has("tests/test_toy.py")
    assert records.known("tests/test_toy.py") == {low}
    records.save("tests/test_toy.py", {IMPORT: Trace(), new: Trace(lines={"gateway/toy.py": {4, 6}})})

    assert records.has("tests/test_toy.py")
    assert records.known("tests/test_toy.py") == {low, new}
    [returned] = [one for one in mutants_of("gateway/toy.py", TOY) if one.after == "return None" and one.line == 6]
    assert [one.test for one in records.candidates(returned, ["tests/test_toy.py"], 1)] == [new]


WAITS = "import sys, threading; print('ready', flush=True); threading.Event().wait()"
WORKS = "print('ready', flush=True)\nwhile True: pass"
WORKS_IN_A_CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORKS!r}])"


@pytest.mark.parametrize(
    ("code", "limits", "reason"),
    [
        (WAITS, Limits(cpu_s=60, still_s=0.5, wall_s=60), "stood still"),
        (WORKS, Limits(cpu_s=0.3, still_s=30, wall_s=60), "processor time"),
        (WORKS_IN_A_CHILD, Limits(cpu_s=0.3, still_s=30, wall_s=60), "processor time"),
        (WAITS, Limits(cpu_s=60, still_s=60, wall_s=0.5), "ran for"),
    ],
)
def test_a_run_that_uses_too_much_is_stopped(code, limits, reason):
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            process.stdout.readline()
            usage = Usage(process.pid)
            while not (exceeded := usage.exceeded(limits)):
                time.sleep(0.02)
        finally:
            os.killpg(process.pid, signal.SIGKILL)

    assert reason in exceeded


COLLECTS = """
import sys
import time
from pathlib import Path
import psutil
from bench.mutants import collected
from bench.mutants.running import Workspace
from bench.mutants.usage import Limits

collected._LIMITS = Limits(cpu_s=200, still_s=float(sys.argv[2]), wall_s=200)
folder = Path(sys.argv[1])
waiting = collected.Collected(Workspace(folder / "copy", folder / "source"), ["tests/test_toy.py"])
print(waiting.is_usable)
if waiting.is_usable:
    child = collected.ChildOfCollected(waiting, folder / "none.py", ("", ""), [], collected._LIMITS)
    while psutil.pid_exists(child._pid):
        time.sleep(0.01)
    child.kill()  # it has just ended
waiting.close()
"""


@pytest.mark.parametrize(
    ("content", "still_s", "is_usable"),
    [("def test_toy(): pass\n", 200, True), ("import threading\n\nthreading.Event().wait()\n", 3, False)],
)
def test_a_collection_that_does_not_end_is_given_up(tmp_path, content, still_s, is_usable):
    (tmp_path / "source" / "tests").mkdir(parents=True)
    (tmp_path / "source" / "tests" / "test_toy.py").write_text(content)
    # A fork of this process would have its threads' locks without the threads.
    command = [sys.executable, "-c", COLLECTS, str(tmp_path), str(still_s)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=250, check=True, env=environment)
    assert ended.stdout.split() == [str(is_usable)]


def test_a_process_that_waits_for_a_core_does_not_stand_still(monkeypatch):
    """Each of its threads has run for a twentieth of the time, and has waited for a core the rest of it."""
    times = iter([(0.0, 0.0), (0.05, 0.95)])
    monkeypatch.setattr("bench.mutants.usage._thread_folders", lambda _pid: [ROOT])
    monkeypatch.setattr("bench.mutants.usage._times_of", lambda _thread: next(times))
    clock = iter([0.0, 1.0, 2.0])
    monkeypatch.setattr("bench.mutants.usage.time.monotonic", lambda: next(clock))
    usage = Usage(1)
    limits = Limits(cpu_s=60, still_s=60, wall_s=60)

    usage.exceeded(limits)
    before_s = usage.still_s
    usage.exceeded(limits)

    assert usage.still_s == before_s

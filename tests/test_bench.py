"""What of the benchmarks can be wrong without anybody noticing: the texts, the statistics, the counting."""

from __future__ import annotations

import asyncio
import math
import re
import runpy
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec

import orjson
import pytest

from bench.load import Group, Load, make_load
from bench.mutants.equivalents import read_equivalents, reason_for, unmatched
from bench.mutants.operators import mutants_of
from bench.mutants.plugin import IMPORT, Trace
from bench.mutants.records import Records, own_tests
from bench.mutants.scoring import CORE
from bench.processes import ROOT
from bench.report import Goal, goals_table, number, update_page
from bench.stats import median_ratio, percentile
from bench.texts import MAX_WORDS, MIN_WORDS, Sentences, docstring_sentences


def test_sentences_are_the_same_for_the_same_seed():
    assert Sentences(1).take(500) == Sentences(1).take(500)
    assert Sentences(1).take(500) != Sentences(2).take(500)


def test_no_sentence_comes_twice_even_when_the_docstrings_are_used_up():
    count = len(docstring_sentences()) + 5000

    sentences = Sentences(1).take(count)

    assert len(set(sentences)) == count


def test_sentences_have_3_to_60_words_and_mixed_lengths():
    lengths = [len(sentence.split()) for sentence in Sentences(1).take(len(docstring_sentences()) + 5000)]

    assert min(lengths) == MIN_WORDS
    assert 40 < max(lengths) <= MAX_WORDS
    assert len(set(lengths)) > 30


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([3, 1, 2], 0.5, 2), ([1, 2, 3, 4], 0.5, 2), (range(1, 101), 0.99, 99), ([7], 0.99, 7), ([1, 2], 0.0, 1)],
)
def test_percentile_is_the_nearest_rank(values, share, expected):
    assert percentile(values, share) == expected


def test_percentile_of_nothing_is_not_a_number():
    assert math.isnan(percentile([], 0.5))


def test_median_ratio_compares_neighbors_not_medians():
    # The second round ran on a machine half as fast: each neighbor saw the same.
    assert median_ratio([8, 4, 8], [2, 1, 2]) == 4
    assert median_ratio([8, 1, 9], [2, 1, 1]) == 4


def test_median_ratio_over_zero_is_infinite():
    assert median_ratio([5.0], [0.0]) == math.inf


@pytest.mark.parametrize(
    ("sense", "measured", "is_met"),
    [(">=", 4.0, True), (">=", 3.9, False), ("<=", 4.0, True), ("<=", 4.1, False), (">=", math.nan, False)],
)
def test_a_goal_is_met_or_not(sense, measured, is_met):
    assert Goal("speed", sense, 4, "x", measured).is_met is is_met


def test_a_goal_whose_run_had_errors_is_not_met():
    assert not Goal("speed", ">=", 4, "x", 5, is_sound=False).is_met


def test_the_table_of_goals_says_target_measured_and_met():
    table = goals_table([Goal("share", ">=", 0.85, "%", 0.9), Goal("ratio", "<=", 1.25, "x", 1.5, note="late")])

    assert "| share | >= 85.0 % | 90.0 % | yes |" in table
    assert "| ratio | <= 1.25x | 1.50x (late) | **no** |" in table


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234"), (12.34, "12.3"), (1.234, "1.23"), (math.nan, "n/a"), (math.inf, "∞")]
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_a_section_of_the_page_is_replaced_and_the_rest_is_kept(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold \\1\n<!-- end of a -->\nafter\n")

    update_page("a", "new \\1", page)

    assert page.read_text() == "before\n<!-- a -->\nnew \\1\n<!-- end of a -->\nafter\n"
    with pytest.raises(ValueError, match="0 sections"):
        update_page("b", "new", page)


# -------------------------------------------------------------------------------------------------------------- load


@asynccontextmanager
async def server_that_says(*answers: bytes, received: list[bytes]) -> AsyncIterator[int]:
    """Serve on the port that is yielded: each request gets the next answer, in two parts; after the last, hang up."""
    left = iter(answers)
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                received.append(await reader.readexactly(int(head.partition(b"content-length: ")[2])))
                if not (answer := next(left, b"")):
                    break
                for part in (answer[:30], answer[30:]):
                    writer.write(part)
                    await asyncio.sleep(0.01)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        ended.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        await ended.wait()


def http_answer(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


VECTORS = b'{"data":[{"embedding":[1.0]},{"embedding":[2.0]}],"usage":{"prompt_tokens":7,"total_tokens":7}}'


async def test_load_counts_texts_tokens_and_failures():
    received: list[bytes] = []
    answers = [http_answer(VECTORS), http_answer(b"{}", "503 Service Unavailable"), http_answer(VECTORS)]
    texts = [f"text {i}" for i in range(20)]

    async with server_that_says(*answers, received=received) as port:
        [sample] = await make_load(Load(port, "/v1/embeddings", "m", 0.5, [Group(1, 2, texts)]))

    assert (sample.num_texts, sample.num_tokens) == (4, 14)
    assert sample.failures == {"503": 1, "broken": 1}
    assert len(sample.latencies_ms) == 2
    assert min(sample.latencies_ms) >= 10
    assert [orjson.loads(body)["input"] for body in received] == [texts[i : i + 2] for i in range(0, 8, 2)]


async def test_load_counts_an_answer_whose_length_is_not_known_before_its_end():
    """The gateway sends large answers in chunks."""
    chunks = [VECTORS[:20], VECTORS[20:-3], VECTORS[-3:], b""]
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body

    async with server_that_says(answer, answer, received=[]) as port:
        [sample] = await make_load(Load(port, "/", "m", 0.5, [Group(1, 2, ["a", "b"] * 2)]))

    assert (sample.num_texts, sample.num_tokens, sample.failures) == (4, 14, {})


async def test_an_answer_with_too_few_vectors_is_a_failure():
    answer = http_answer(b'{"data":[{"embedding":[1.0]}]}')

    async with server_that_says(answer, received=[]) as port:
        [sample] = await make_load(Load(port, "/", "m", 0.1, [Group(1, 2, ["a", "b"])]))

    assert sample.num_texts == 0
    assert sample.failures == {"wrong answer": 1}


# ----------------------------------------------------------------------------------------------------------- mutants


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
def test_what_is_no_behavior_is_left_alone(source):
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
    assert "| toy | 10 | 6 | 3 | 1 | 67 % |" in done.stdout
    assert (tmp_path / "gateway" / "toy.py").read_text() == TOY


# ---------------------------------------------------------------------------------------------------------- commands


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_here(monkeypatch, module, *arguments):
    """Run a module as ``python -m`` does, in this process, which has torch and transformers imported."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    runpy.run_module(module, run_name="__main__")


@pytest.mark.parametrize("module", ["bench.compare", "bench.cpu", "bench.gpu"])
def test_help(module, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, module, "--help")

    assert ended.value.code == 0
    assert "--update" in capsys.readouterr().out


@pytest.mark.skipif(
    find_spec("gateway.engine.model.runtimes") is None,
    reason="gateway.engine.model.runtimes, which it measures, is not there",
)
@pytest.mark.slow
def test_the_gpu_benchmark_runs_with_tiny_models_on_a_cpu(monkeypatch, capsys):
    run_here(monkeypatch, "bench.gpu", "--device", "cpu", "--tiny")

    printed = capsys.readouterr().out
    cosines = [line.split(" | ")[-2] for line in printed.splitlines() if line.endswith("n/a |")]
    assert len(cosines) == 6
    assert set(cosines) == {"1.000000"}
    for goal in (
        "Jina v3, float32: one task, 64 tokens and more, share of the matmul rate | >= 70.0 %",
        "Jina v3, float32: five tasks mixed, 64 tokens and more, share of the matmul rate | >= 60.0 %",
        "BGE-M3, float32: 64 tokens and more, share of the matmul rate | >= 78.0 %",
        "BGE-M3, float32: one short text | <= 2.50 ms",
        "BGE-M3, float32: the same next to a busy thread | <= 2.00x",
        "BGE-M3, float32: 32 texts, against one | <= 3.00x",
        "BGE-M3, float32: sparse output, 64 tokens | <= 10.0 %",
    ):
        assert goal in printed
    assert "n/a" not in printed.partition("### Matrix")[0]  # every goal was measured
    assert re.search(r"^\| 4 \| \d+% \| \d+% \| \d+% \| 1\.000000 \|$", printed, re.MULTILINE), "no tasks"
    assert re.search(r"^\| multivector \| 64 \|", printed, re.MULTILINE)

"""What of the benchmarks can be wrong without anybody noticing: the texts, the statistics, the counting."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec

import orjson
import pytest

from bench.load import Group, Load, make_load
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


def test_median_ratio_compares_neighbours_not_medians():
    # The second round ran on a machine half as fast: each neighbour saw the same.
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


async def test_an_answer_with_too_few_vectors_is_a_failure():
    answer = http_answer(b'{"data":[{"embedding":[1.0]}]}')

    async with server_that_says(answer, received=[]) as port:
        [sample] = await make_load(Load(port, "/", "m", 0.1, [Group(1, 2, ["a", "b"])]))

    assert sample.num_texts == 0
    assert sample.failures == {"wrong answer": 1}


# ---------------------------------------------------------------------------------------------------------- commands


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["bench.compare", "bench.gpu"])
def test_help(module):
    assert "--update" in run(module, "--help")


@pytest.mark.skipif(
    find_spec("gateway.engine.runtimes") is None, reason="gateway.engine.runtimes, which it measures, is not there"
)
def test_the_gpu_benchmark_runs_with_tiny_models_on_a_cpu():
    printed = run("bench.gpu", "--device", "cpu", "--tiny")

    cosines = [line.split(" | ")[-2] for line in printed.splitlines() if line.endswith("n/a |")]
    assert len(cosines) == 6
    assert set(cosines) == {"1.000000"}
    assert "five tasks in a batch, share of merged weights" in printed

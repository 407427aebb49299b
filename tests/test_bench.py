"""The parts of the benchmarks whose errors would go unnoticed: the texts, the statistics, the counting."""

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
import pynvml
import pytest
import torch

from bench.gpu_card import describe_card, describe_state
from bench.load import Group, Load, make_load
from bench.priority import batches_later
from bench.report import Goal, goals_table, number, update_page
from bench.stats import median_ratio, percentile
from bench.texts import MAX_WORDS, MIN_WORDS, Sentences, docstring_sentences
from tests.nvml import GIB, FakeCard, FakeDriver, install, install_cuda


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


# ---------------------------------------------------------------------------------------------------------- commands


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def default_threads():
    """Restore torch's number of threads, which an engine sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run_here(monkeypatch, module, *arguments):
    """Run a module as ``python -m`` does, in this process, which has torch and transformers imported."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    runpy.run_module(module, run_name="__main__")


@pytest.mark.parametrize("module", ["bench.compare", "bench.cpu", "bench.gpu", "bench.gpu_counts", "bench.gpu_peers"])
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


@pytest.mark.slow
@pytest.mark.usefixtures("default_threads")
def test_the_engine_and_sentence_transformers_give_the_same_vectors_in_turns(monkeypatch, capsys):
    run_here(monkeypatch, "bench.gpu_peers", "--device", "cpu", "--tiny")

    printed = capsys.readouterr().out
    assert re.search(r"^\| 8 \| [\d,]+ \| [\d,]+ \| [\d,]+ \| [\d.]+ \| [\d.]+ \| 1\.000000 \|$", printed, re.MULTILINE)
    assert re.search(r"^\| mixed \|.*\| 1\.000000 \|$", printed, re.MULTILINE)
    assert "sparse output through the engine, 64 tokens | <= 10.0 %" in printed
    assert re.search(r"^\| multivector \| -?[\d.]+% \|$", printed, re.MULTILINE)


def test_the_cost_of_a_forward_on_a_card_is_counted_without_one(monkeypatch, capsys):
    run_here(monkeypatch, "bench.gpu_counts", "--tiny")

    printed = capsys.readouterr().out
    for goal in (
        "BGE-M3: launches with a graph | <= 150 | 3 (a graph of 19 kernels) | yes",
        "BGE-M3: launches without a graph | <= 150 | 19 | yes",
        "Jina v3, one task, merged weights: launches with a graph | <= 350 | 3 (a graph of 20 kernels",
        "Jina v3, one task, adapters: host time without a graph, of before | <= 0.33x",
    ):
        assert goal in printed
    for row in (
        r"\| BGE-M3 \| 41 \| 21 \| 19 \| [\d,]+ \| [\d,]+ \| 3 \|",
        r"\| Jina v3, several tasks in a row \| 118 \| 56 \| 47 \|",
    ):
        assert re.search(row, printed), row
    assert "n/a" not in printed


PART = FakeCard("NVIDIA H100 MIG 1g.10gb", (0, 0), 10 * GIB, 9 * GIB, "MIG-1")


@pytest.mark.parametrize(
    ("cards", "shown", "card", "state"),
    [
        (
            [FakeCard()],
            FakeCard(),
            "NVIDIA GeForce RTX 3090, 24 GiB, capability 8.6, .*driver 580.95.05, 350 W limit, up to 2100 MHz",
            "1695 MHz, 61 °C, 348 W, held down by: power limit",
        ),
        (
            [FakeCard("NVIDIA H100", (9, 0), slices=[PART])],
            FakeCard(PART.name, (9, 0), 10 * GIB, uuid="GPU-1"),
            "NVIDIA H100 MIG 1g.10gb, 10 GiB, capability 9.0, .*driver 580.95.05",
            r"n/a \(Not Supported\)",
        ),
    ],
    ids=["a card", "a slice"],
)
def test_a_card_is_described_as_far_as_its_driver_does(monkeypatch, cards, shown, card, state):
    install(monkeypatch, FakeDriver(cards))
    install_cuda(monkeypatch, [shown])
    device = torch.device("cuda:0")

    assert re.fullmatch(card, describe_card(device))
    assert re.fullmatch(state, describe_state(device))
    assert describe_card(torch.device("cpu")) == "cpu"
    assert describe_state(torch.device("cpu")) == "n/a"


def test_a_card_without_a_driver_s_library_is_described_by_torch(monkeypatch):
    install(monkeypatch, FakeDriver([], error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    install_cuda(monkeypatch, [FakeCard()])

    assert describe_card(torch.device("cuda")).startswith("NVIDIA GeForce RTX 3090, 24 GiB, capability 8.6")
    assert describe_state(torch.device("cuda")) == "n/a"


def test_the_delay_of_one_text_counts_in_batches_of_the_bulk_load() -> None:
    assert batches_later(60.0, 20.0, 80.0) == 0.5
    assert batches_later(60.0, 20.0, 0.0) == 0.0

"""The parts of the load test that do not depend on locust."""

from __future__ import annotations

import base64
import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.answers import Checker, WrongAnswer
from loadtest.histogram import bucket_of, percentile
from loadtest.knee import PRECISION, Limits, Search, judge
from loadtest.plan import PAUSE_S, PROFILES, make_plan, parse_targets
from loadtest.recorder import Recorder, Tally
from loadtest.texts import Texts, read_sentences
from loadtest.thresholds import Thresholds, broken, is_hopeless, make_thresholds
from loadtest.workloads import WORKLOADS

SENTENCES = tuple(
    f"sentence number {number} tells of some matter and then ends".replace(str(number), "x" * (number % 7 + 1))
    for number in range(50)
)


def tally(milliseconds: Sequence[float] = (), *, offered: int = 0, failures: dict[str, int] | None = None) -> Tally:
    counts = Counter(bucket_of(value) for value in milliseconds)
    return Tally(offered=offered or len(milliseconds), latencies=counts, failures=Counter(failures or {}))


# ---------------------------------------------------------------------------------------------------------- percentiles


@given(st.lists(st.floats(0.01, 1e6), min_size=1), st.sampled_from([0.5, 0.95, 0.99, 1.0]))
def test_percentiles_are_within_a_hundredth(values: list[float], share: float) -> None:
    exact = sorted(values)[max(1, math.ceil(share * len(values))) - 1]

    assert percentile(Counter(map(bucket_of, values)), share) == pytest.approx(exact, rel=0.0101)


def test_no_request_has_no_percentile() -> None:
    assert math.isnan(percentile(Counter(), 0.95))


# ----------------------------------------------------------------------------------------------------------------- plan


def test_targets_take_turns_in_turning_order() -> None:
    targets = parse_targets("a,b", "http://h:1")
    plan = make_plan(targets, PROFILES["steady"], slot_s=10, rounds=3)

    assert [slot.target.label for slot in plan.slots] == ["a", "b", "b", "a", "a", "b"]
    assert plan.level_at(5) == PROFILES["steady"].peak
    assert plan.level_at(10 + PAUSE_S / 2) == 0
    assert plan.seconds == 6 * 10 + 5 * PAUSE_S


def test_the_levels_of_a_spike() -> None:
    plan = make_plan(parse_targets("a", "http://h:1"), PROFILES["spike"], slot_s=100, rounds=1, peak=50)

    assert [plan.level_at(second) for second in (1, 39, 41, 59, 61)] == [5, 5, 50, 50, 5]


def test_targets_may_be_elsewhere() -> None:
    here, there = parse_targets("mini", "https://gpu:8000", ["infinity=http://h:7997/embeddings#big/model"])

    assert (here.label, here.url, here.path, here.model) == ("mini", "https://gpu:8000", "/v1/embeddings", "mini")
    assert (there.label, there.url, there.path, there.model) == (
        "infinity",
        "http://h:7997",
        "/embeddings",
        "big/model",
    )


@pytest.mark.parametrize(
    ("models", "host", "extra", "message"),
    [
        ("", "http://h", [], "name at least one model"),
        ("a", "", [], "a needs a server"),
        ("a,a", "http://h", [], "a distinct label"),
        ("", "", ["http://h#m"], "a target is LABEL=URL#MODEL"),
        ("", "", ["x=http://h"], "x needs a model"),
    ],
)
def test_wrong_targets_are_errors(models: str, host: str, extra: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_targets(models, host, extra)


# ------------------------------------------------------------------------------------------------------------- recorder


def test_workers_counts_add_up() -> None:
    master, workers = Recorder(), [Recorder(), Recorder()]
    for second, worker in enumerate(workers):
        for _ in range(10):
            worker.offer(100 + second, "a")
            worker.answer(100 + second, "a", milliseconds=5, texts=2, tokens=7, stages_ms={"queue": 1.0, "total": 4.0})
        worker.fail(101, "a", "503 model_not_ready")
        master.merge(orjson.loads(orjson.dumps(worker.take(), option=orjson.OPT_NON_STR_KEYS)))
        assert worker.take() == []

    found = master.between("a", 100, 102)
    assert (found.offered, found.answered, found.failed, found.texts, found.tokens) == (20, 20, 2, 40, 140)
    assert found.fail_ratio == pytest.approx(2 / 22)
    assert (found.stage_ms("queue"), found.stage_ms("inference")) == (1.0, 0.0)
    assert master.between("a", 100, 101).answered == 10
    assert master.between("a", 100.5, 102).answered == 10  # whole seconds alone
    assert master.between("b", 100, 102) == Tally()


# -------------------------------------------------------------------------------------------------------------- answers


def body(vectors: Sequence[Sequence[float]], *, is_base64: bool = False, order: Sequence[int] | None = None) -> bytes:
    rows = [np.asarray(vector, "<f4") for vector in vectors]
    data = [
        {"index": index, "embedding": base64.b64encode(row.tobytes()).decode() if is_base64 else row.tolist()}
        for index, row in zip(order or range(len(rows)), rows, strict=True)
    ]
    return orjson.dumps({"data": data, "usage": {"total_tokens": 9}})


@pytest.mark.parametrize("is_base64", [True, False])
def test_a_right_answer_passes(is_base64: bool) -> None:
    headers = {"x-gateway-space": "s@1", "server-timing": "tokenize;dur=1.5, queue;dur=0.20, total;dur=7"}

    answer = Checker().check(["a", "b"], body([[1, 2], [3, 4]], is_base64=is_base64), headers)

    assert answer.vectors.tolist() == [[1, 2], [3, 4]]
    assert answer.tokens == 9
    assert answer.stages_ms == {"tokenize": 1.5, "queue": 0.2, "total": 7.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "not an embeddings answer"),
        (b"<html>", "not an embeddings answer"),
        (body([[1, 2]]), "1 vectors for 2 texts"),
        (body([[1, 2], [3, 4]], order=[1, 0]), "in another order"),
        (body([[1, 2, 3], [1, 2, 3]]), "vectors of 3 numbers, not 2"),
        (body([[1, 2], [3, float("nan")]], is_base64=True), "not finite"),
        (body([[1, 2], [0, 0]]), "a vector of zeros"),
        (body([[1, 2], [3]], is_base64=True), "not an embeddings answer"),
    ],
)
def test_a_wrong_answer_is_an_error(content: bytes, message: str) -> None:
    with pytest.raises(WrongAnswer, match=message):
        Checker(width=2).check(["a", "b"], content, {})


def test_the_space_must_stay() -> None:
    checker = Checker()
    checker.check(["a"], body([[1, 2]]), {"x-gateway-space": "s@1"})

    with pytest.raises(WrongAnswer, match="space s@2, not s@1"):
        checker.check(["a"], body([[1, 2]]), {"x-gateway-space": "s@2"})
    with pytest.raises(WrongAnswer, match="space unnamed, not s@1"):
        checker.check(["a"], body([[1, 2]]), {})


def test_the_vector_of_another_text_is_wrong() -> None:
    golden = {"a": np.array([1, 0], "f4"), "b": np.array([0, 1], "f4")}
    checker = Checker(golden=golden)

    checker.check(["a", "b"], body([[2, 0.001], [0.001, 2]]), {})
    with pytest.raises(WrongAnswer, match=r"the vector of another text, or a broken one: cosine 0\.0000"):
        checker.check(["a", "b"], body([[0, 1], [1, 0]]), {})


# ---------------------------------------------------------------------------------------------------- texts, workloads


def test_texts_are_new_each_time_and_the_same_for_a_seed() -> None:
    first, again, other = (Texts(SENTENCES, seed) for seed in ("1", "1", "2"))
    made = [first.passage() for _ in range(500)]

    assert len(set(made)) == 500
    assert made == [again.passage() for _ in range(500)]
    assert made != [other.passage() for _ in range(500)]
    lengths = sorted(len(text.split()) for text in made)
    assert 45 < lengths[250] < 75
    assert lengths[-1] > 150


def test_fixed_texts_come_again() -> None:
    texts = Texts(SENTENCES, "1", fixed=12)

    assert len(set(texts.fixed)) == 12
    assert {texts.query() for _ in range(300)} == set(texts.fixed)


def test_a_file_of_too_few_sentences_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("one\n\ntwo\n")

    with pytest.raises(ValueError, match="needs 10 lines of text or more, got 2"):
        read_sentences(path)


@pytest.mark.parametrize("name", WORKLOADS)
def test_turns_are_requests_with_texts(name: str) -> None:
    texts, rng = Texts(SENTENCES, "1"), random.Random(1)
    asked = list(itertools.chain.from_iterable(WORKLOADS[name](texts, rng) for _ in range(60)))

    assert all(ask.texts and all(ask.texts) for ask in asked)
    sizes = {len(ask.texts) for ask in asked}
    assert sizes == {"search": {1}, "memory": {1}, "ingest": {32, 256}, "mixed": sizes & {1, 32, 256}}[name]


# ----------------------------------------------------------------------------------------------------- limits and knee


def test_limits_are_for_all_or_for_one() -> None:
    found = make_thresholds(["a", "b"], "a=200,b=300", "0.05", "")

    assert found == {"a": Thresholds(200, 0.05), "b": Thresholds(300, 0.05)}
    with pytest.raises(ValueError, match="--p95-ms: there is no target 'c', only a, b"):
        make_thresholds(["a", "b"], "c=1", "", "")
    with pytest.raises(ValueError, match="--min-rps: 'x' is not a number"):
        make_thresholds(["a", "b"], "", "", "x")


def test_broken_limits_are_reported() -> None:
    bad = tally([500] * 90, failures={"503 overloaded": 8, "no answer": 2})

    assert broken(tally([10] * 100), 10, Thresholds(100, 0.01, 5)) == []
    assert [problem.partition(";")[0] for problem in broken(bad, 10, Thresholds(100, 0.01, 50))] == [
        "10.00 % failed",
        "p95 was 497 ms",
        "9.0 requests/s",
    ]
    assert broken(Tally(), 10, Thresholds()) == ["no request came to an end"]


def test_a_run_is_hopeless_when_far_beyond_its_limits() -> None:
    assert not is_hopeless(tally([390] * 50), Thresholds(100))
    assert is_hopeless(tally([500] * 50), Thresholds(100))
    assert not is_hopeless(tally([500] * 50), Thresholds())
    assert is_hopeless(tally([1] * 10, failures={"x": 20}), Thresholds())
    assert not is_hopeless(tally([500] * 5), Thresholds(100))


@pytest.mark.parametrize("capacity", [1, 3, 17, 100, 999])
def test_the_knee_is_found_within_a_tenth(capacity: int) -> None:
    search = Search(4, Limits(p95_ms=100))
    for _ in range(60):
        if search.rate is None:
            break
        search.note(10, tally([50 if search.rate <= capacity else 500] * 100))

    assert search.rate is None
    assert search.sustained is not None
    assert search.sustained.rate <= capacity <= max(search.sustained.rate * PRECISION, search.sustained.rate + 1)


def test_where_nothing_is_sustained_the_search_ends() -> None:
    search = Search(4, Limits(p95_ms=100))
    while search.rate is not None:
        search.note(10, tally([500] * 10))

    assert search.sustained is None
    assert [step.rate for step in search.steps] == [4, 2, 1]


def test_requests_that_never_end_break_a_rate() -> None:
    assert judge(tally([10] * 90, offered=100), Limits()) == "90 of 100 requests came to an end"
    assert judge(tally([10] * 100), Limits()) == ""
    assert (
        judge(tally([10] * 90, failures={"429 overloaded": 10}), Limits())
        == "10.0 % failed, most of them by 429 overloaded"
    )
    assert judge(Tally(), Limits()) == "no answer"


def test_few_sentences_do_not_run_out_of_texts() -> None:
    """A run that is faster than expected asks for more texts than three words can make."""
    texts = Texts(("one two three",) * 10, "seed")

    made = [texts.query() for _ in range(2_000)]

    assert len(set(made)) == len(made)

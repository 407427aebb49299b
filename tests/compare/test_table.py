"""The tables show all results in terminals of any width, and no quality without judgments."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import pytest
from rich.console import Console

from gateway.compare.bottom_line import decide
from gateway.compare.page import render_page
from gateway.compare.results import PRIMARY_MEASURE, Advice, Comparison, Estimate, Ratio, Verdict
from gateway.compare.sentences import (
    TIMES,
    cost_sentence,
    fixed,
    interval,
    ratio_words,
    signed,
    significant,
    verdict_sentence,
)
from gateway.compare.statistics import Design, contrast, with_verdicts
from gateway.compare.table import print_comparison
from tests.compare.results_example import BGE, JINA, JINA_CUT, MINILM, Likeness, make_comparison


def printed(comparison: Comparison, width: int = 160) -> str:
    file = io.StringIO()
    print_comparison(comparison, Console(file=file, width=width))
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 160])
def test_every_figure_is_complete(width: int) -> None:
    comparison = make_comparison(JINA, BGE, JINA_CUT, MINILM)
    text = printed(comparison, width)
    for arm in comparison.arms:
        assert interval(arm.quality[PRIMARY_MEASURE]) in text
        for estimate in arm.quality.values():
            assert fixed(estimate.mean) in text
        assert arm.cost is not None
        assert significant(arm.cost.tokens_per_s) in text
        assert f"{arm.bytes_per_document:,}" in text
    for one in comparison.contrasts:
        if one.measure == PRIMARY_MEASURE:
            assert signed(one.difference.mean) in text
            assert f"{one.wins}/{one.ties}/{one.losses}" in text
    for agreement in comparison.agreements:
        assert fixed(agreement.rbo.mean) in text


def test_rows_are_arms_in_order() -> None:
    lines = printed(make_comparison()).splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("Quality"))
    assert [line.split()[0] for line in lines[start + 4 : start + 7]] == [
        "jina-embeddings-v3",
        "bge-m3",
        "jina-embeddings-v3@256",
    ]
    assert lines[start + 2].split() == [
        "arm", "nDCG@10", "95", "%", "interval", "R@10", "R@100", "RR@10", "Success@1", "Judged@10",
    ]  # fmt: skip


def test_says_the_verdict_in_a_sentence_and_the_notes() -> None:
    text = printed(make_comparison())
    assert "bge-m3 is better than jina-embeddings-v3: nDCG@10 +0.061" in text
    assert "These queries do not show whether jina-embeddings-v3@256 is better" in text
    assert "Note: 12 queries were left out" in text
    assert "difference, not a quality" not in text


@pytest.mark.parametrize(
    ("likenesses", "num_queries", "conclusion"),
    [
        ((JINA, BGE, MINILM), 200, "Switch to bge-m3: it is better than jina-embeddings-v3 on these queries."),
        ((JINA, MINILM), 200, "Stay with jina-embeddings-v3: all-minilm-l6-v2 is worse."),
        (
            (JINA, MINILM),
            8,
            "Too few queries: at least 50 are needed to decide whether to replace jina-embeddings-v3, not 8.",
        ),
    ],
)
def test_the_conclusion_is_on_the_terminal_and_on_the_page(
    likenesses: tuple[Likeness, ...], num_queries: int, conclusion: str
) -> None:
    comparison = make_comparison(*likenesses, num_queries=num_queries)

    assert conclusion in printed(comparison).splitlines()
    assert conclusion in render_page(comparison)


def test_without_judgments_there_is_no_conclusion() -> None:
    comparison = make_comparison(JINA, MINILM, has_judgments=False)

    assert comparison.bottom_line.advice == Advice.NO_JUDGMENTS
    assert "Stay with" not in render_page(comparison)


def test_without_judgments_the_table_reports_only_a_difference() -> None:
    text = printed(make_comparison(JINA, MINILM, has_judgments=False))
    assert "This is a difference, not a quality." in text
    assert "all-minilm-l6-v2 and jina-embeddings-v3 have" in text
    assert "overlap@10" in text
    for word in ("Quality:", "nDCG", "better than", "W/T/L"):
        assert word not in text


def test_cost_that_was_not_measured_has_no_column() -> None:
    text = printed(make_comparison(has_cost=False))
    assert "tokens/s" not in text
    assert "dimensions" in text
    comparison = make_comparison()
    partly = replace(comparison, arms=[replace(comparison.arms[0], cost=None), *comparison.arms[1:]])
    row = next(
        line for line in printed(partly).splitlines() if line.split()[:1] == ["jina-embeddings-v3"] and "1,024" in line
    )
    assert row.split()[1:5] == ["-"] * 4


def test_one_arm_is_compared_with_nothing() -> None:
    text = printed(make_comparison(JINA))
    assert "nDCG@10" in text
    assert "against" not in text
    assert "Agreement" not in text


def test_markup_in_names_is_printed() -> None:
    arm = replace(JINA, name="[bold]x[/bold]")
    text = printed(make_comparison(arm, replace(BGE, name="[/]")))
    assert "[bold]x[/bold]" in text
    assert "[/] is " in text


# ----------------------------------------------------------------------------------------------------- verdicts in words

DESIGN = Design(num_resamples=20_000)


def verdict_of(
    differences: Sequence[float], level: float = 0.5, margin: float = 0.01, num_arms: int = 1
) -> tuple[str, str]:
    """Return the sentence of a verdict on these differences, and the bottom line."""
    comparison = make_comparison(JINA, BGE, num_queries=2)
    before = {f"q{place}": level for place in range(len(differences))}
    after = {query: level + difference for query, difference in zip(before, differences, strict=True)}
    compared = contrast(BGE.name, JINA.name, PRIMARY_MEASURE, after, before, replace(DESIGN, num_arms=num_arms))
    found = with_verdicts([compared] * num_arms, margin)[:1]
    arms = [replace(arm, quality={PRIMARY_MEASURE: Estimate(level, None, None)}) for arm in comparison.arms]
    queries = [comparison.queries[0]] * len(differences)
    comparison = replace(comparison, arms=arms, contrasts=found, queries=queries, margin=margin)
    return verdict_sentence(comparison, found[0]), decide(arms, found, [], margin).text


@pytest.mark.parametrize(
    ("differences", "level", "sentence", "conclusion"),
    [
        (
            [0.0] * 80,
            1.0,
            "Every query is tied at 1.000: these queries are too easy to distinguish bge-m3 from jina-embeddings-v3: "
            "nDCG@10 0.000 (p = 1.000); 0 wins, 80 ties, 0 losses.",
            "These queries are too easy: jina-embeddings-v3 has nDCG@10 1.000. Use harder queries, or more.",
        ),
        (
            [0.0] * 80,
            0.5,
            "Every query is tied: they do not distinguish bge-m3 from jina-embeddings-v3:",
            "Too few queries differ to decide whether to replace jina-embeddings-v3: use more queries.",
        ),
        (
            [0.1, -0.05] + [0.0] * 48,
            0.5,
            "48 of 50 queries are tied: too few differ to distinguish bge-m3 from jina-embeddings-v3: nDCG@10 +0.001",
            "Too few queries differ",
        ),
        (
            [0.2],
            0.5,
            "1 query is too few to distinguish bge-m3 from jina-embeddings-v3: nDCG@10 +0.200 (p = 1.000);",
            "Too few",
        ),
        (
            [0.001, 0.002] * 200,
            0.5,
            "bge-m3 is as good as jina-embeddings-v3, within 0.01: nDCG@10 +0.002 (95 % interval",
            "Stay with jina-embeddings-v3: nothing is better by more than 0.01, or as good and cheaper.",
        ),
        (
            [0.11, -0.1] * 200,
            0.5,
            "bge-m3 is not worse than jina-embeddings-v3 by more than 0.01, and may be better: nDCG@10 +0.005",
            "Stay with jina-embeddings-v3: nothing is shown to be better; a difference of 0.016 would probably have been",
        ),
        (
            [0.3, -0.3] * 50,
            0.5,
            "show a difference of 0.088 in 80 % of comparisons; one of 0.02 needs about 1,800.",
            "Stay with jina-embeddings-v3: nothing is shown to be better; a difference of 0.088 would probably",
        ),
        (
            [0.04] * 30 + [0.0] * 30,
            0.5,
            "60 queries are too few to rule out rare, large differences: they may lack a total loss or gain that up to "
            "6.0 % of queries have.",
            "Stay with jina-embeddings-v3: nothing is shown to be better",
        ),
    ],
)  # fmt: skip
def test_verdicts_in_words(differences: list[float], level: float, sentence: str, conclusion: str) -> None:
    wording, bottom = verdict_of(differences, level)
    assert sentence in wording
    assert conclusion in bottom


def test_p_near_the_limit_comes_with_its_error() -> None:
    comparison = make_comparison(JINA, BGE)
    (found,) = (one for one in comparison.contrasts if one.measure == PRIMARY_MEASURE)
    near = replace(found, p=0.048, p_holm=0.048, p_error=0.0021)
    assert "p = 0.048 ± 0.002;" in verdict_sentence(comparison, near).replace(")", "")


def test_smaller_vectors_that_are_as_good_are_taken() -> None:
    comparison = make_comparison(JINA, JINA_CUT)
    found = [
        replace(one, verdict=Verdict.AS_GOOD) if one.measure == PRIMARY_MEASURE else one for one in comparison.contrasts
    ]
    line = decide(comparison.arms, found, comparison.cost_contrasts, 0.01)
    assert (line.advice, line.arm) == (Advice.SWITCH, JINA_CUT.name)
    assert line.text == (
        f"Switch to jina-embeddings-v3@256: it is as good as jina-embeddings-v3, within 0.01, with {TIMES} 0.25 the bytes "
        "per document."
    )


def test_of_two_better_arms_the_best_is_taken() -> None:
    comparison = make_comparison(MINILM, JINA, BGE)
    assert comparison.bottom_line.arm == BGE.name
    assert "So is jina-embeddings-v3; the difference between them was not tested." in comparison.bottom_line.text


def test_the_price_of_a_better_arm_is_reported() -> None:
    assert make_comparison(JINA, BGE).bottom_line.text == (
        "Switch to bge-m3: it is better than jina-embeddings-v3 on these queries."
    )
    assert make_comparison(MINILM, JINA).bottom_line.text.endswith(
        f" The price: {TIMES} 2.67 the bytes per document and {TIMES} 7.45 the time per query and {TIMES} 0.06 the "
        "throughput."
    )


def test_an_arm_that_is_as_good_but_slower_is_not_taken() -> None:
    comparison = make_comparison(BGE, JINA)
    found = [
        replace(one, verdict=Verdict.AS_GOOD) if one.measure == PRIMARY_MEASURE else one for one in comparison.contrasts
    ]
    slower = comparison.cost_contrasts
    assert decide(comparison.arms, found, slower, 0.01).advice == Advice.STAY
    ratio = slower[0].query_time
    assert ratio is not None
    faster = [replace(slower[0], query_time=replace(ratio, ratio=0.5), texts_per_s=None)]
    line = decide(comparison.arms, found, faster, 0.01)
    assert line.text.endswith(f"within 0.01, with {TIMES} 0.50 the time per query.")
    unclear = [replace(slower[0], query_time=replace(ratio, ratio=0.5, is_shown=False), texts_per_s=None)]
    assert decide(comparison.arms, found, unclear, 0.01).advice == Advice.STAY


# ---------------------------------------------------------------------------------------------------------- cost in words


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (Ratio(2.84, 2.61, 3.04, 50, is_shown=True), f"{TIMES} 2.8, 2.6 to 3.0"),
        (Ratio(0.5, 0.45, 0.56, 50, is_shown=True), f"{TIMES} 0.50, 0.45 to 0.56"),
        (Ratio(0.98, 0.943, 1.03, 50, is_shown=False), "about the same, within 7 %"),
        (Ratio(0.9, 0.7, 1.4, 50, is_shown=False), f"no difference found: {TIMES} 0.70 to 1.40"),
        (Ratio(3.0, None, None, 5, is_shown=False), "too few requests to compare"),
    ],
)
def test_ratios_in_words(ratio: Ratio, words: str) -> None:
    assert ratio_words(ratio) == words


def test_one_model_in_two_sizes_is_reported_as_measured_once() -> None:
    comparison = make_comparison(JINA, JINA_CUT)
    assert cost_sentence(comparison, comparison.arms[1]) == (
        "22.9 ms per query, 75.1 texts/s, the same model as jina-embeddings-v3, which was not measured twice, "
        f"1,024 bytes per document ({TIMES} 0.25)"
    )
    assert cost_sentence(comparison, comparison.arms[0]) == "23.1 ms per query, 74.6 texts/s, 4,096 bytes per document"

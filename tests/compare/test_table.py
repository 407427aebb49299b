"""The tables say what was found, whole in any terminal, and without judgments nothing of quality."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from gateway.compare.page import render_page
from gateway.compare.results import PRIMARY_MEASURE, Comparison
from gateway.compare.sentences import bottom_line, fixed, interval, signed, significant
from gateway.compare.table import print_comparison
from tests.compare.results_example import BGE, JINA, JINA_CUT, MINILM, Likeness, make_comparison


def printed(comparison: Comparison, width: int = 160) -> str:
    file = io.StringIO()
    print_comparison(comparison, Console(file=file, width=width))
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 160])
def test_every_figure_is_there_whole(width: int) -> None:
    comparison = make_comparison(JINA, BGE, JINA_CUT, MINILM)
    text = printed(comparison, width)
    for arm in comparison.arms:
        assert interval(arm.quality[PRIMARY_MEASURE]) in text
        for estimate in arm.quality.values():
            assert fixed(estimate.mean) in text
        assert arm.cost is not None
        assert significant(arm.cost.tokens_per_s) in text
        assert f"{arm.bytes_per_vector:,}" in text
    for contrast in comparison.contrasts:
        if contrast.measure == PRIMARY_MEASURE:
            assert signed(contrast.difference.mean) in text
            assert f"{contrast.wins}/{contrast.ties}/{contrast.losses}" in text
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
    assert "bge-m3 is better than jina-embeddings-v3: nDCG@10 +0.049" in text
    assert "These queries do not show whether jina-embeddings-v3@256 is better" in text
    assert "Note: 12 queries were left out" in text
    assert "difference, not a quality" not in text


@pytest.mark.parametrize(
    ("likenesses", "num_queries", "conclusion"),
    [
        ((JINA, BGE, MINILM), 200, "Better than jina-embeddings-v3 on these queries: bge-m3."),
        ((JINA, MINILM), 200, "Nothing here is shown to be better than jina-embeddings-v3: keep it."),
        ((JINA, MINILM), 8, "These queries are too few to decide whether to replace jina-embeddings-v3."),
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

    assert not bottom_line(comparison)
    assert "keep it" not in render_page(comparison)


def test_without_judgments_it_speaks_of_a_difference_alone() -> None:
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

"""A comparison as tables in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gateway.cli.console import say
from gateway.compare.results import MEASURES, PRIMARY_MEASURE, Arm, Comparison, Contrast
from gateway.compare.sentences import (
    agreement_sentence,
    cost_sentence,
    fixed,
    interval,
    milliseconds,
    p_value,
    percent,
    signed,
    signed_interval,
    significant,
    verdict_sentence,
)

_NOTHING = "-"
_NAMES = ("arm", "space")


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the data set, the tables, a sentence for each arm, and the notes."""
    dataset = comparison.dataset
    split = f", split {dataset.split}" if dataset.split else ""
    say(
        console,
        f"{dataset.folder}{split}: {dataset.num_documents:,} documents, {dataset.num_queries:,} queries, "
        f"{dataset.num_judgments:,} judgments",
    )
    if not comparison.has_judgments:
        say(
            console,
            "\nThere are no judgments: the figures show how the rankings differ, but not which are better. "
            "This is a difference, not a quality.",
        )
    for table in (_quality_table, _contrast_table, _cost_table, _agreement_table):
        made = table(comparison)
        if made.row_count:
            console.print()
            console.print(made)
    for sentence in _sentences(comparison):
        say(console, f"\n{sentence}")
    if comparison.has_judgments:
        say(console, f"\n{comparison.bottom_line.text}")
    for note in comparison.notes:
        say(console, f"\nNote: {note}")


def _quality_table(comparison: Comparison) -> Table:
    measured = comparison.baseline.quality
    others = [measure for measure in MEASURES if measure in measured and measure != PRIMARY_MEASURE]
    rows = []
    for arm in comparison.arms:
        if arm.quality:
            primary = arm.quality[PRIMARY_MEASURE]
            means = [fixed(arm.quality[name].mean) if name in arm.quality else _NOTHING for name in others]
            rows.append([arm.name, fixed(primary.mean), interval(primary), *means])
    return _table("Quality: mean over the queries", ["arm", PRIMARY_MEASURE, "95 % interval", *others], rows)


def _contrast_table(comparison: Comparison) -> Table:
    columns = ["arm", "difference", "95 % interval", "p (Holm)", "W/T/L", "verdict"]
    rows = [
        [
            contrast.arm,
            signed(contrast.difference.mean),
            signed_interval(contrast.difference),
            p_value(contrast.p_holm).removeprefix("= "),
            f"{contrast.wins}/{contrast.ties}/{contrast.losses}",
            contrast.verdict or _NOTHING,
        ]
        for contrast in _primary(comparison)
    ]
    return _table(
        f"{PRIMARY_MEASURE} against {comparison.baseline.name} (W/T/L: queries won, tied, lost)", columns, rows
    )


def _primary(comparison: Comparison) -> Sequence[Contrast]:
    return [contrast for contrast in comparison.contrasts if contrast.measure == PRIMARY_MEASURE]


def _cost_table(comparison: Comparison) -> Table:
    is_measured = any(arm.cost for arm in comparison.arms)
    measured = ["texts/s", "tokens/s", "p50\n(ms)", "p95\n(ms)"] if is_measured else []
    rows = [
        [
            arm.name,
            *(_measured(arm) if is_measured else ()),
            f"{arm.bytes_per_document:,}",
            f"{arm.dimensions:,}" if arm.dimensions else _NOTHING,
            arm.space,
        ]
        for arm in comparison.arms
    ]
    return _table("Cost", ["arm", *measured, "bytes per\ndocument", "dimensions", "space"], rows)


def _measured(arm: Arm) -> list[str]:
    if arm.cost is None:
        return [_NOTHING] * 4
    return [
        significant(arm.cost.texts_per_s),
        significant(arm.cost.tokens_per_s),
        milliseconds(arm.cost.p50_s),
        milliseconds(arm.cost.p95_s) if arm.cost.p95_s is not None else _NOTHING,
    ]


def _agreement_table(comparison: Comparison) -> Table:
    rows = [
        [agreement.arm, percent(agreement.overlap.mean), fixed(agreement.rbo.mean), percent(agreement.same_first.mean)]
        for agreement in comparison.agreements
    ]
    return _table(f"Agreement with {comparison.baseline.name}", ["arm", "overlap@10", "RBO", "same first"], rows)


def _sentences(comparison: Comparison) -> list[str]:
    """Return a sentence for each arm except the baseline: its verdict (its agreement without judgments) and its cost."""
    sentences = {result.arm: verdict_sentence(comparison, result) for result in _primary(comparison)}
    sentences = sentences or {result.arm: agreement_sentence(result) for result in comparison.agreements}
    return [
        f"{sentences[arm.name]} {arm.name}: {cost_sentence(comparison, arm)}."
        for arm in comparison.arms
        if arm.name in sentences
    ]


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(
        title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for column in columns:
        # In a narrow terminal, names wrap, but numbers do not.
        is_name = column in _NAMES
        justify: Literal["left", "right"] = "left" if is_name or column == "verdict" else "right"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=not is_name)
    for row in rows:
        table.add_row(*map(Text, row))  # plain text on any console
    return table

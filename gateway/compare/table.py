"""A comparison as tables in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gateway.compare.results import MEASURES, PRIMARY_MEASURE, Arm, Comparison, Contrast
from gateway.compare.wording import (
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


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print what was compared, the tables, a sentence for each arm, and the notes."""
    dataset = comparison.dataset
    split = f", split {dataset.split}" if dataset.split else ""
    _say(
        console,
        f"{dataset.folder}{split}: {dataset.num_documents:,} documents, {dataset.num_queries:,} queries, "
        f"{dataset.num_judgements:,} judgements",
    )
    if not comparison.has_judgements:
        _say(
            console,
            "\nThere are no judgements: how the rankings differ can be told, and not which are better. "
            "This is a difference, not a quality.",
        )
    tables = [
        _quality_table(comparison),
        _contrast_table(comparison),
        _cost_table(comparison),
        _agreement_table(comparison),
    ]
    for table in tables:
        if table.row_count:
            console.print()
            console.print(table)
    for sentence in _sentences(comparison):
        _say(console, f"\n{sentence}")
    for note in comparison.notes:
        _say(console, f"\nNote: {note}")


def _say(console: Console, text: str) -> None:
    # Names and notes are shown as they are: a bracket in them is no markup, and a number no reason for a colour.
    console.print(Text(text), highlight=False, soft_wrap=not console.is_terminal)


def _quality_table(comparison: Comparison) -> Table:
    others = [measure for measure in MEASURES if measure != PRIMARY_MEASURE]
    table = _table("Quality: mean over the queries", [PRIMARY_MEASURE, "95 % interval", *others])
    for arm in comparison.arms:
        if arm.quality:
            primary = arm.quality[PRIMARY_MEASURE]
            _row(table, arm.name, [fixed(primary.mean), interval(primary), *(_mean(arm, name) for name in others)])
    return table


def _mean(arm: Arm, measure: str) -> str:
    return fixed(arm.quality[measure].mean) if measure in arm.quality else _NOTHING


def _contrast_table(comparison: Comparison) -> Table:
    table = _table(
        f"{PRIMARY_MEASURE} against {comparison.baseline.name}",
        ["difference", "95 % interval", "p (Holm)", "wins/ties/losses", "verdict"],
    )
    for contrast in _primary(comparison):
        _row(
            table,
            contrast.arm,
            [
                signed(contrast.difference.mean),
                signed_interval(contrast.difference),
                p_value(contrast.p_holm).removeprefix("= "),
                f"{contrast.wins}/{contrast.ties}/{contrast.losses}",
                contrast.verdict or _NOTHING,
            ],
        )
    return table


def _primary(comparison: Comparison) -> Sequence[Contrast]:
    return [contrast for contrast in comparison.contrasts if contrast.measure == PRIMARY_MEASURE]


def _cost_table(comparison: Comparison) -> Table:
    table = _table("Cost", ["texts/s", "tokens/s", "p50 (ms)", "p95 (ms)", "bytes a vector", "dimensions", "space"])
    for arm in comparison.arms:
        cost = arm.cost
        measured = [_NOTHING] * 4
        if cost is not None:
            measured = [
                significant(cost.texts_per_s),
                significant(cost.tokens_per_s),
                milliseconds(cost.p50_s),
                milliseconds(cost.p95_s),
            ]
        _row(table, arm.name, [*measured, f"{arm.bytes_per_vector:,}", f"{arm.dimensions:,}", arm.space])
    return table


def _agreement_table(comparison: Comparison) -> Table:
    table = _table(f"Agreement with {comparison.baseline.name}", ["overlap@10", "RBO", "same first"])
    for agreement in comparison.agreements:
        means = [percent(agreement.overlap.mean), fixed(agreement.rbo.mean), percent(agreement.same_first.mean)]
        _row(table, agreement.arm, means)
    return table


def _sentences(comparison: Comparison) -> list[str]:
    """Return for each arm but the baseline what is known of it: its quality, or else its difference; and its cost."""
    said = {one.arm: verdict_sentence(comparison, one) for one in _primary(comparison)}
    said = said or {one.arm: agreement_sentence(one) for one in comparison.agreements}
    return [
        f"{said[arm.name]} {arm.name}: {cost_sentence(arm, comparison.baseline)}."
        for arm in comparison.arms
        if arm.name in said
    ]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("arm", overflow="fold")
    for column in columns:
        is_text = column in {"space", "verdict"}
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    return table


def _row(table: Table, name: str, cells: Sequence[str]) -> None:
    # A number is not to be broken over two lines.
    table.add_row(Text(name), *(Text(cell.replace(" ", "\N{NO-BREAK SPACE}")) for cell in cells))

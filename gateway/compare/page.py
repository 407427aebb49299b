"""The page of a comparison: one HTML file without external resources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gateway.compare.drawing import marks
from gateway.compare.judge.sentences import judge_sentences
from gateway.compare.judge.values import JudgeReport
from gateway.compare.page_table import table_groups
from gateway.compare.plots import make_plots
from gateway.compare.results import PRIMARY_MEASURE, Comparison, Hit, QueryResult
from gateway.compare.sentences import agreement_sentence, cost_sentence, fixed, signed, verdict_sentence

NUM_EXAMPLES = 24
"""The total number of queries on the page, which keeps it small."""

_LEAST_EXAMPLES, _MOST_EXAMPLES = 6, 20  # per arm: half of them losses, half of them gains

_TEXT_CHARS = 400  # the characters of a document or a query: enough to see the topic


@dataclass(frozen=True, slots=True)
class Line:
    """A document in one of two rankings, which are shown side by side.

    Attributes:
        anchor: the document's id in the page.
        other_rank: its rank in the other ranking; ``None`` if it is not there.
        other_anchor: its id in the other ranking.
        judgment: the judgment in words; empty without judgments.
    """

    rank: int
    hit: Hit
    anchor: str
    other_rank: int | None
    other_anchor: str
    judgment: str
    is_relevant: bool


@dataclass(frozen=True, slots=True)
class Example:
    """A query with the rankings of the baseline and of an arm.

    Attributes:
        change: the figure by which the query was chosen.
        values: the two underlying figures; may be empty.
    """

    query: QueryResult
    change: str
    values: str
    baseline: Sequence[Line]
    arm: Sequence[Line]


def render_page(comparison: Comparison, judged: JudgeReport | None = None) -> str:
    """Render the page, with its styles and drawings."""
    main, folded = table_groups(comparison)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(
        comparison=comparison,
        judged=judged,
        judge_sentences=judge_sentences(judged) if judged else [],
        primary=PRIMARY_MEASURE,
        marks=marks(comparison),
        verdicts=[contrast for contrast in comparison.contrasts if contrast.measure == PRIMARY_MEASURE],
        say_verdict=lambda contrast: verdict_sentence(comparison, contrast),
        say_agreement=agreement_sentence,
        advice=comparison.bottom_line.advice.replace(" ", "-"),
        conclusion=comparison.bottom_line.text if comparison.has_judgments else "",
        costs={arm.name: cost_sentence(comparison, arm) for arm in comparison.arms},
        table=main,
        folded=folded,
        plots=make_plots(comparison),
        examples={arm.name: list(_examples(comparison, arm.name, key)) for key, arm in enumerate(comparison.arms[1:])},
        clip=_clip,
        fixed=fixed,
    )
    # A text may hold half a surrogate pair, which cannot be encoded.
    return page.encode("utf-8", "replace").decode("utf-8")


def _clip(text: str) -> str:
    return text if len(text) <= _TEXT_CHARS else f"{text[: _TEXT_CHARS - 1].rstrip()}…"


def _examples(comparison: Comparison, name: str, key: int) -> Iterator[tuple[str, Sequence[Example]]]:
    """Yield example queries under headings: the largest losses of the arm, and the largest gains."""
    baseline = comparison.baseline.name
    number_shown = min(_MOST_EXAMPLES, max(_LEAST_EXAMPLES, NUM_EXAMPLES // (len(comparison.arms) - 1)))
    if not comparison.has_judgments:
        different = (query for query in comparison.queries if query.rbo[name] < 1)
        least_alike = sorted(different, key=lambda query: query.rbo[name])[:number_shown]
        yield (
            "Ranked least alike",
            [
                _example(query, baseline, name, f"{key}-{number}", f"RBO {fixed(query.rbo[name], 2)}", "")
                for number, query in enumerate(least_alike)
            ],
        )
        return

    def change(query: QueryResult) -> float:
        return query.quality[name][PRIMARY_MEASURE] - query.quality[baseline][PRIMARY_MEASURE]

    ordered = sorted(comparison.queries, key=change)
    losses = [query for query in ordered[: number_shown // 2] if change(query) < 0]
    gains = [query for query in reversed(ordered[-(number_shown // 2) :]) if change(query) > 0]
    for heading, queries in (("Largest losses", losses), ("Largest gains", gains)):
        yield (
            heading,
            [
                _example(
                    query,
                    baseline,
                    name,
                    f"{key}-{heading[8]}{number}",
                    signed(change(query)),
                    " → ".join(fixed(query.quality[arm_name][PRIMARY_MEASURE]) for arm_name in (baseline, name)),
                )
                for number, query in enumerate(queries)
            ],
        )


def _example(query: QueryResult, baseline: str, name: str, key: str, change: str, values: str) -> Example:
    before, after = query.rankings[baseline], query.rankings[name]
    return Example(
        query,
        change,
        values,
        baseline=_lines(before, after, f"b{key}", f"a{key}", has_judgments=bool(query.quality)),
        arm=_lines(after, before, f"a{key}", f"b{key}", has_judgments=bool(query.quality)),
    )


def _lines(hits: Sequence[Hit], others: Sequence[Hit], key: str, other_key: str, *, has_judgments: bool) -> list[Line]:
    ranks: Mapping[str, int] = {hit.document: rank for rank, hit in enumerate(others, start=1)}
    return [
        Line(
            rank=rank,
            hit=hit,
            anchor=f"{key}-{rank}",
            other_rank=ranks.get(hit.document),
            other_anchor=f"{other_key}-{ranks.get(hit.document)}",
            judgment=_judgment(hit.relevance) if has_judgments else "",
            is_relevant=(hit.relevance or 0) > 0,
        )
        for rank, hit in enumerate(hits, start=1)
    ]


def _judgment(relevance: int | None) -> str:
    if relevance is None:
        return "not judged"
    if relevance <= 0:
        return "not relevant"
    return "relevant" if relevance == 1 else f"relevant ({relevance})"

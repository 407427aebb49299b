"""The page of a comparison: one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from gateway.compare.drawing import Plot, marks
from gateway.compare.judge.sentences import judge_sentences
from gateway.compare.judge.values import JudgeReport
from gateway.compare.page_table import table_groups
from gateway.compare.plots import make_plots
from gateway.compare.results import PRIMARY_MEASURE, Comparison, Hit, QueryResult
from gateway.compare.sentences import agreement_sentence, cost_sentence, fixed, signed, verdict_sentence

NUM_EXAMPLES = 20
"""How many queries are shown per arm: half of them losses, half of them gains."""

_TEXT_CHARS = 400  # of a document or a query: enough to see the topic


@dataclass(frozen=True, slots=True)
class Line:
    """A document in one of two rankings that are shown side by side.

    Attributes:
        anchor: its id in the page.
        other_rank: its rank in the other ranking; ``None`` if that does not have it.
        other_anchor: its id in the other ranking.
        judgment: in words; empty without judgments.
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
        change: the figure that it was chosen by.
        values: the two figures behind that; may be empty.
    """

    query: QueryResult
    change: str
    values: str
    baseline: Sequence[Line]
    arm: Sequence[Line]


def render_page(comparison: Comparison, judged: JudgeReport | None = None) -> str:
    """Render the page, with styles, plots and the script that draws them."""
    plots = make_plots(comparison)
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
        conclusion=comparison.bottom_line.text if comparison.has_judgments else "",
        costs={arm.name: cost_sentence(comparison, arm) for arm in comparison.arms},
        table=list(table_groups(comparison)),
        plots=plots,
        examples={arm.name: list(_examples(comparison, arm.name, key)) for key, arm in enumerate(comparison.arms[1:])},
        clip=_clip,
        fixed=fixed,
        specs=_to_script(plots),
        plotly_js=get_plotlyjs().replace("</script", "<\\/script"),
    )
    # A text may hold half a surrogate pair, which cannot be encoded.
    return page.encode("utf-8", "replace").decode("utf-8")


def _to_script(plots: Sequence[Plot]) -> str:
    """Return the plots as JSON that cannot end the script element around it."""
    specs = {plot.id: plot.spec for plot in plots if plot.spec is not None}
    return json.dumps(specs, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _clip(text: str) -> str:
    return text if len(text) <= _TEXT_CHARS else f"{text[: _TEXT_CHARS - 1].rstrip()}…"


def _examples(comparison: Comparison, name: str, key: int) -> Iterator[tuple[str, Sequence[Example]]]:
    """Yield example queries under headings: the largest losses of the arm, and the largest gains."""
    baseline = comparison.baseline.name
    if not comparison.has_judgments:
        different = (query for query in comparison.queries if query.rbo[name] < 1)
        least_alike = sorted(different, key=lambda query: query.rbo[name])[:NUM_EXAMPLES]
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
    losses = [query for query in ordered[: NUM_EXAMPLES // 2] if change(query) < 0]
    gains = [query for query in reversed(ordered[-(NUM_EXAMPLES // 2) :]) if change(query) > 0]
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
                    " → ".join(fixed(query.quality[one][PRIMARY_MEASURE]) for one in (baseline, name)),
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

"""Files of a run: a page with plots, tables for a spreadsheet, everything as JSON."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from loadtest.histogram import percentile
from loadtest.plots import make_plots
from loadtest.recorder import STAGES
from loadtest.results import Result, Results, rows


def write_report(results: Results, folder: Path) -> Path:
    """Write ``report.html``, ``summary.csv``, ``timeline.csv`` and ``results.json``, and return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(
        folder / "summary.csv", [["", *(r.label for r in results.results)], *([n, *c] for n, c in rows(results))]
    )
    _write_csv(folder / "timeline.csv", list(_timeline(results)))
    (folder / "results.json").write_bytes(orjson.dumps(_as_json(results), option=orjson.OPT_INDENT_2))
    page = folder / "report.html"
    page.write_text(_render(results), encoding="utf-8")
    return page


def _write_csv(path: Path, table: list[list[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)


def _timeline(results: Results) -> Iterator[list[Any]]:
    yield [
        *("second", "target", "offered", "answered", "failed", "texts", "tokens", "p50_ms", "p95_ms", "p99_ms"),
        *(f"{stage}_ms" for stage in STAGES),
    ]
    for label, seconds in results.timeline.items():
        for second, tally in seconds.items():
            shares = [_figure(percentile(tally.latencies, share)) for share in (0.5, 0.95, 0.99)]
            stages = [_figure(tally.stage_ms(stage)) for stage in STAGES]
            counts = [tally.offered, tally.answered, tally.failed, tally.texts, tally.tokens]
            yield [second, label, *counts, *shares, *stages]


def _figure(value: float) -> float | None:
    return round(value, 2) if value == value else None  # noqa: PLR0124  NaN: no request was answered in that second


def _as_json(results: Results) -> dict[str, Any]:
    return {
        "facts": results.facts,
        "problems": results.problems,
        "targets": [_result_as_json(results, result) for result in results.results],
    }


def _result_as_json(results: Results, result: Result) -> dict[str, Any]:
    return {
        "label": result.label,
        "model": result.model,
        "seconds": round(result.seconds, 1),
        "answered": result.tally.answered,
        "failures": dict(result.tally.failures),
        "offered_rps": round(result.offered_rps, 2),
        "rps": round(result.rps, 2),
        "texts_per_s": round(result.texts_per_s, 1),
        "tokens_per_s": round(result.tokens_per_s, 1),
        **{f"p{round(100 * share)}_ms": _figure(result.p(share)) for share in (0.5, 0.95, 0.99)},
        "client_ms": round(result.client_ms, 2),
        "outside_ms": round(result.wire_ms, 2),
        "stages_ms": {stage: round(result.tally.stage_ms(stage), 2) for stage in STAGES},
        "ratios": {figure: results.ratio(result, figure) for figure in ("rps", "p95")},
        "sustainable_turns_per_s": result.knee.rate if result.knee else None,
        "steps": [{"rate": step.rate, "broken_by": step.broken_by} for step in result.steps],
    }


def _render(results: Results) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        results=results,
        rows=rows(results),
        plots=make_plots(results),
        percentile=percentile,
    )

"""Files of a run: a page with plots, tables for a spreadsheet, everything as JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from loadtest.histogram import percentile
from loadtest.recorder import STAGES, Tally
from loadtest.results import Result, Results, rows

# Okabe and Ito's colors, which color-blind people tell apart.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_STAGE_COLORS = {
    "tokenize": "#e69f00",
    "queue": "#d55e00",
    "inference": "#0072b2",
    "rest": "#009e73",
    "wire": "#8b949e",
}


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
    plots = {name: spec for name, spec in _plots(results).items() if spec["data"]}
    return environment.get_template("report.html.j2").render(
        results=results,
        rows=rows(results),
        plots={name: spec["title"] for name, spec in plots.items()},
        specs=json.dumps(plots, allow_nan=False).replace("<", "\\u003c"),
        plotly_js=get_plotlyjs().replace("</script", "<\\/script"),
        percentile=percentile,
    )


def _plots(results: Results) -> dict[str, dict[str, Any]]:
    start = min((second for seconds in results.timeline.values() for second in seconds), default=0)
    throughput, latency, failures = [], [], []
    for number, (label, seconds) in enumerate(results.timeline.items()):
        color, at = _COLORS[number % len(_COLORS)], [second - start for second in seconds]
        tallies = list(seconds.values())
        throughput.append(_line(f"{label}, answered", at, [tally.answered for tally in tallies], color))
        throughput.append(_line(f"{label}, offered", at, [tally.offered for tally in tallies], color, dash="dot"))
        for share, dash in ((0.5, "solid"), (0.95, "dash"), (0.99, "dot")):
            values = [_figure(percentile(tally.latencies, share)) for tally in tallies]
            latency.append(_line(f"{label}, p{round(100 * share)}", at, values, color, dash=dash))
        if any(tally.failed for tally in tallies):
            failures.append(_line(label, at, [tally.failed for tally in tallies], color))
    return {
        "throughput": {
            "title": "Requests per second",
            "data": throughput,
            "y": "requests/s",
            "log": False,
        },
        "latency": {"title": "Latency, from when a request was due", "data": latency, "y": "ms", "log": True},
        "stages": {
            "title": "Where the time goes, mean of a request",
            "data": _stages(results),
            "y": "ms",
            "log": False,
        },
        "queue": {
            "title": "Texts that wait in the gateway",
            "data": _queues(results, start),
            "y": "texts",
            "log": False,
        },
        "failures": {"title": "Failures a second", "data": failures, "y": "requests/s", "log": False},
    }


def _line(name: str, x: list[int], y: list[Any], color: str, dash: str = "solid") -> dict[str, Any]:
    line = {"color": color, "dash": dash, "width": 1.5}
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": line, "connectgaps": False}


def _stages(results: Results) -> list[dict[str, Any]]:
    timed = [result for result in results.results if result.tally.num_timed]
    return [
        {
            "type": "bar",
            "name": stage if stage != "wire" else "outside the server",
            "x": [result.label for result in timed],
            "y": [round(_parts(result)[stage], 3) for result in timed],
            "marker": {"color": color},
        }
        for stage, color in _STAGE_COLORS.items()
        if timed
    ]


def _parts(result: Result) -> Mapping[str, float]:
    """Return the parts of the mean latency, in milliseconds."""
    tally: Tally = result.tally
    known = {stage: tally.stage_ms(stage) for stage in ("tokenize", "queue", "inference")}
    rest = max(0.0, tally.stage_ms("total") - sum(known.values()))
    return {**known, "rest": rest, "wire": result.wire_ms}


def _queues(results: Results, start: int) -> list[dict[str, Any]]:
    models = sorted({model for _, model, _ in results.queues})
    return [
        _line(
            model,
            [round(time - start, 1) for time, of, _ in results.queues if of == model],  # type: ignore[misc]
            [texts for _, of, texts in results.queues if of == model],
            _COLORS[number % len(_COLORS)],
        )
        for number, model in enumerate(models)
    ]

"""Compare models on SciFact by judgments, by a judge, by a judge that people check, and by blind duels, side by side.

There is no chat model here: the judge is a server that knows SciFact's judgments, grades with noise, and has a taste for
documents that repeat the words of the query. "People" are the judgments themselves, and a voter of the duels prefers the
list with more relevant documents (``bench/voting.py``). So the
tables show the methods, and the effect of a known bias of the judge on a verdict, not the quality of a chat model.

::

    python -m bench.scifact_judge --data scifact --models models.yaml all-minilm-l6-v2 e5-small ...
    python -m bench.scifact_judge ... --update      also writes the tables into docs/ab.md
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from bench.processes import ROOT
from bench.report import note, table, update_page
from bench.scifact_duel import NUM_DUELS, first_row, hold, many_rows, many_table
from gateway.cli.main import app
from gateway.comparisons.runs import Runs

PAGE: Final = ROOT / "docs" / "ab.md"
SECTION: Final = "bench.scifact_judge"

_DATA = re.compile(r"<query (\w+)>\n(.*)\n</query \1>\n<document \1>\n(.*)\n</document \1>", re.DOTALL)
# Cumulative shares of the grades 0 to 3.
_RELEVANT, _IRRELEVANT = (0.0, 0.05, 0.2, 1.0), (0.75, 0.95, 1.0, 1.0)
_MUCH_REPEATED = 0.6


class Judge:
    """Grades by SciFact's judgments, with noise and a taste."""

    def __init__(self, data: Path) -> None:
        relevant = _judgments(data)
        queries, documents = _texts(data / "queries.jsonl"), _texts(data / "corpus.jsonl")
        self._relevant = {(queries[query], documents[document]) for query, document in relevant}

    def grade(self, query: str, document: str) -> int:
        """Return the grade of a document, always the same one."""
        chance = int(hashlib.sha256(f"{query}\n{document}".encode()).hexdigest()[:8], 16) / 2**32
        shares = _RELEVANT if (query, document) in self._relevant else _IRRELEVANT
        grade = next(grade for grade, share in enumerate(shares) if chance < share)
        words = {word for word in re.findall(r"\w+", query.lower()) if len(word) > 3}
        repeated = len(words & set(re.findall(r"\w+", document.lower()))) / max(1, len(words))
        return min(3, grade + (repeated >= _MUCH_REPEATED))


@contextlib.contextmanager
def serve(judge: Judge) -> Iterator[str]:
    """Serve a judge as an OpenAI-style chat endpoint on this machine; yield its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are sent one after the other

        def do_POST(self) -> None:
            messages = json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"]
            _code, query, document = _DATA.findall(messages[-1]["content"])[0]
            content = json.dumps({"reason": "", "grade": judge.grade(query, document)})
            body = json.dumps({"model": "stand-in", "choices": [{"message": {"content": content}}]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def run(options: argparse.Namespace, folder: Path, *more: str) -> Mapping[str, Any]:
    """Run ``gateway compare``, and return the files that it writes as JSON."""
    arguments = [
        *options.arms,
        "--data",
        str(options.data),
        "--no-cost",
        "--out",
        str(folder),
        "--cache",
        str(options.cache),
    ]
    arguments += ["--models", str(options.models)] if options.models else []
    arguments += ["--max-documents", str(options.max_documents)] if options.max_documents else []
    if status := app(["compare", *arguments, *more], standalone_mode=False):
        raise RuntimeError(f"gateway compare ended with status {status}")
    return {
        path.stem: json.loads(path.read_text())
        for path in (folder / "results.json", folder / "judge.json")
        if path.exists()
    }


def check_by_judgments(path: Path, data: Path) -> Path:
    """Fill in the file for people: 3 for a document that is judged relevant, and otherwise 0."""
    relevant = _judgments(data)
    with path.open(newline="") as file:
        rows = list(csv.reader(file, "excel-tab"))
    for row in rows[1:]:
        row[2] = "3" if (row[0], row[1]) in relevant else "0"
    filled = path.with_name("checked.tsv")
    with filled.open("w", newline="") as file:
        csv.writer(file, "excel-tab").writerows(rows)
    return filled


def measure(options: argparse.Namespace, folder: Path) -> str:
    """Compare in four ways, and return the verdicts in Markdown."""
    with serve(Judge(options.data)) as url:
        judge = ["--judge", url, "--judge-model", "stand-in", "--yes"]
        note("by judgments, and by a judge alone")
        first = run(options, folder / "first", *judge)
        note("by a judge that people check")
        check = check_by_judgments(folder / "first" / "judge_check.tsv", options.data)
        second = run(options, folder / "second", *judge, "--judge-check", str(check))
    judged = [one for one in first["results"]["contrasts"] if one["measure"] == "nDCG@10"]
    kappa, summary = second["judge"]["check"]["kappa"], first["results"]["dataset"]
    note(f"by {NUM_DUELS} blind duels of each arm")
    queries, relevant = list(Runs(folder).queries("first")), _judgments(options.data)
    rows, many = [], []
    for place, arm in enumerate(options.arms[1:]):
        by_judgments, alone = judged[place], first["judge"]["contrasts"][place]
        checked = second["judge"]["contrasts"][place]
        duels = [hold(queries, options.arms[0], arm, relevant, seed) for seed in range(NUM_DUELS)]
        many.append(many_rows(duels, by_judgments["difference"]["mean"]))
        rows += [
            (arm, "SciFact's judgments", _figures(by_judgments["difference"]), by_judgments["verdict"]),
            ("", "the judge alone", _figures(alone["judged"]), alone["verdict"]),
            ("", "people alone, 60 queries", _figures(checked["people"]), ""),
            ("", "the judge, corrected by people", _figures(checked["corrected"]), checked["verdict"]),
            first_row(duels[0]),
        ]
    return (
        f"Against {options.arms[0]}: {summary['num_queries']} queries, {summary['num_documents']:,} documents, "
        f"{first['judge']['num_pairs']:,} pairs graded; kappa of judge and people {kappa['mean']:.2f} "
        f"({kappa['low']:.2f} to {kappa['high']:.2f}).\n\n"
        + table(("arm", "by", "difference in nDCG@10, or votes for the arm (95 % interval)", "verdict"), rows)
        + f"\n\n{many_table(many)}"
    )


def _figures(figure: Mapping[str, float]) -> str:
    return f"{figure['mean']:+.3f} ({figure['low']:+.3f} to {figure['high']:+.3f})"


def _judgments(data: Path) -> set[tuple[str, str]]:
    lines = [line.split("\t") for line in (data / "qrels" / "test.tsv").read_text().splitlines()[1:]]
    return {(query, document) for query, document, score in lines if int(score) > 0}


def _texts(path: Path) -> dict[str, str]:
    entries = [json.loads(line) for line in path.read_text().splitlines() if line]
    return {entry["_id"]: f"{entry.get('title', '')} {entry['text']}".strip() for entry in entries}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", help="models, baseline first")
    parser.add_argument("--data", type=Path, required=True, help="SciFact in BEIR's layout")
    parser.add_argument("--models", type=Path, help="the file of models")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "scifact-cache", help="%(default)s")
    parser.add_argument("--max-documents", type=int, help="a sample of the documents")
    parser.add_argument("--update", action="store_true", help="write the tables into docs/ab.md")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        markdown = measure(options, Path(folder))
    print(markdown)
    if options.update:
        update_page(SECTION, markdown, PAGE)


if __name__ == "__main__":
    main()

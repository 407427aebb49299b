"""``gateway compare --judge``: the price first, consent, and the files and tables at the end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from gateway.cli.main import app
from gateway.compare.judge.command import Judging, make_judging
from gateway.compare.judge.judging import JudgeRequest
from gateway.compare.judge.price import Price, estimate_price
from gateway.comparisons.sheet import CHECK_FILE, Sheet
from gateway.errors import CompareError
from tests.compare.conftest import MakeModel, WriteData
from tests.compare.judge.conftest import StartJudge
from tests.compare.judge.stand_in import Reply, completion, graded, texts_of
from tests.compare.test_comparison import many_queries
from tests.compare.test_served import Serve, compare, serve  # noqa: F401  a fixture

PRICE = Price(4_000, 12, 2_911_000, 160_000, "judge.example.com")


@pytest.fixture
def url(serve: Serve, make_words_model: MakeModel) -> Iterator[str]:  # noqa: F811  the fixture
    """Serve two models that know nothing but words."""
    with serve(make_words_model("plain", width=32), make_words_model("cut", width=64, dimensions=(64, 4))) as address:
        yield address


def asking(max_tokens: int | None = None, *, is_agreed: bool = False) -> Judging:
    request = JudgeRequest("http://127.0.0.1:1", "m", None, Path("cache"), max_tokens=max_tokens)
    return Judging(request, is_agreed)


def test_the_price_and_where_the_texts_go() -> None:
    text = f"{PRICE} {PRICE.privacy}"
    assert text == (
        "The judge needs 4,000 requests (12 grades are known from an earlier run), with about 2.9 million tokens to read "
        "and 160,000 to write; a judge that thinks first writes more. Queries and documents are sent to judge.example.com."
    )
    here = estimate_price([("a query", "a document", 0)], 0, None)
    assert str(here).startswith("The judge needs 1 request, with about ")
    assert here.privacy == "Queries and documents stay on this machine."


@pytest.mark.parametrize(
    ("judging", "message"),
    [
        (asking(), "the judge has not been asked: agree to its price with --yes or --judge-budget TOKENS"),
        (asking(1_000_000), "--judge-budget is 1,000,000 tokens, and about 3,071,000 are needed"),
        (asking(1_000_000, is_agreed=True), "--judge-budget is 1,000,000 tokens"),
    ],
)
def test_without_consent_it_stops(judging: Judging, message: str) -> None:
    console = Console(file=open("/dev/null", "w"), width=200)  # noqa: SIM115, PTH123
    with console.file, pytest.raises(CompareError, match=re.escape(message)):
        judging.agree(PRICE, console)


@pytest.mark.parametrize("judging", [asking(is_agreed=True), asking(4_000_000)])
def test_with_consent_it_continues(judging: Judging, capsys: pytest.CaptureFixture[str]) -> None:
    judging.agree(PRICE, Console(width=400))
    assert "The judge needs 4,000 requests" in capsys.readouterr().out


@pytest.mark.parametrize(("typed", "goes_on"), [("y", True), ("n", False), ("", False)])
def test_on_a_terminal_it_asks(monkeypatch: pytest.MonkeyPatch, typed: str, goes_on: bool) -> None:
    console = Console(force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    monkeypatch.setattr(console, "input", lambda *_arguments, **_options: typed)
    with console.file:
        if goes_on:
            asking().agree(PRICE, console)
        else:
            with pytest.raises(CompareError, match="the judge has not been asked"):
                asking().agree(PRICE, console)


def test_mistakes_are_found_before_anything_is_embedded(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match="--judge nowhere: must be an address"):
        make_judging(JudgeRequest("nowhere", "m", None, tmp_path), is_agreed=True)
    with pytest.raises(CompareError, match="there is no such file"):
        make_judging(JudgeRequest("http://h", "m", None, tmp_path, tmp_path / "absent.tsv"), is_agreed=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--judge", "http://127.0.0.1:1"], "--judge and --judge-model belong together"),
        (["--judge-model", "m"], "--judge and --judge-model belong together"),
        (["--judge-check", "f.tsv"], "--judge-check needs --judge and --judge-model"),
        (["--judge", "127.0.0.1", "--judge-model", "m"], "--judge 127.0.0.1: must be an address"),
    ],
)
def test_options_that_need_each_other(tmp_path: Path, write_data: WriteData, options: list[str], message: str) -> None:
    result = compare(tmp_path, "a", "b", "--data", write_data(), "--url", "http://127.0.0.1:1", *options)
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_comparison_with_a_judge(
    url: str, write_data: WriteData, start_judge: StartJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    data = write_data(**{**many_queries(60), "judgments": None})

    def grade(query: str, document: str) -> int:
        return 3 if query.split(maxsplit=1)[0] == document.split(maxsplit=1)[0] else 0

    judge = start_judge(lambda body, _number: graded(grade(*texts_of(body))))
    arguments = ["cut", "cut@4", "--data", data, "--url", url, "--judge", judge.url, "--judge-model", "<b>stand-in"]

    refused = compare(tmp_path, *arguments, "--out", tmp_path / "first")
    assert refused.exit_code == 1
    assert "The judge needs " in refused.stderr
    assert "Queries and documents stay on this machine." in refused.stderr
    assert "the judge has not been asked" in refused.stderr
    assert (tmp_path / "first" / "report.html").exists()  # of the comparison without the judge
    assert judge.bodies == []

    out = tmp_path / "second"
    result = compare(tmp_path, *arguments, "--out", out, "--yes")

    assert result.exit_code == 0, result.stderr
    assert "The judge prefers cut to cut@4: nDCG@10 \N{MINUS SIGN}0." in result.stdout
    for name in ("judge.json", "judge_grades.tsv", "judge_check.tsv"):
        assert f"  {out / name}\n" in result.stdout
    assert set(judge.keys) == {"Bearer secret"}
    report = json.loads((out / "judge.json").read_text())
    assert report["contrasts"][0]["verdict"] == "baseline preferred by the judge"
    page = (out / "report.html").read_text()
    assert "The judge prefers cut to cut@4" in page
    assert "&lt;b&gt;stand-in" in page
    assert report["asked"]["prompt_sha256"] in page
    assert "secret" not in page + result.stdout + result.stderr + json.dumps(report)

    # People grade the file, and the verdict needs neither the gateway nor the judge.
    asked, path = len(judge.bodies), out / CHECK_FILE
    check = Sheet(path.read_bytes())
    for row in check.pairs.values():
        score = grade(row.query_text, row.document_text)
        check = Sheet(b"".join(check.with_score(row.query, row.document, score)))
    path.write_bytes(b"".join(check.with_score("", "", None)))
    checked = CliRunner().invoke(app, ["judge-check", str(out)])
    assert checked.exit_code == 0, checked.stderr
    assert "kappa 1.00 (95 % interval 1.00 to 1.00)" in checked.stdout
    assert f"Written:\n  {out / 'judge.json'}\n  {out / 'report.html'}\n" in checked.stdout
    whole_run = compare(tmp_path, *arguments, "--out", tmp_path / "third", "--judge-check", path)
    assert whole_run.exit_code == 0, whole_run.stderr
    assert len(judge.bodies) == asked
    contrasts = [json.loads((folder / "judge.json").read_text())["contrasts"] for folder in (out, tmp_path / "third")]
    assert contrasts[0] == contrasts[1]
    assert contrasts[0][0]["verdict"] == "worse"


def test_the_same_command_continues_after_a_refusal_or_a_kill(
    url: str, write_data: WriteData, start_judge: StartJudge, tmp_path: Path
) -> None:
    """SIGKILL while the judge is asked; the second run pays for no answer again, and completes the same folder."""
    data, out = write_data(**{**many_queries(20), "judgments": None}), tmp_path / "out"
    reached, has_been_killed = threading.Event(), threading.Event()

    def respond(_body: dict[str, Any], number: int) -> Reply:
        if number >= 30 and not has_been_killed.is_set():
            reached.set()
            has_been_killed.wait(60)
        return graded(number % 4)

    judge = start_judge(respond)
    arguments = ["cut", "cut@4", "--data", data, "--url", url, "--out", out]
    arguments += ["--judge", judge.url, "--judge-model", "m"]
    assert "the judge has not been asked" in compare(tmp_path, *arguments).stderr
    options = ["--cache", tmp_path / "cache", "--resamples", 200, "--no-cost", "--yes"]
    command = [sys.executable, "-m", "gateway", "compare", *map(str, [*arguments, *options])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert reached.wait(60)
    finally:
        process.kill()
        process.communicate()
    has_been_killed.set()
    assert not (out / "judge.json").exists()
    asked_before = len(judge.bodies)

    result = compare(tmp_path, *arguments, "--yes")

    assert result.exit_code == 0, result.stderr
    report = json.loads((out / "judge.json").read_text())
    assert 22 <= report["usage"]["num_cached"] <= 30
    # The judge may read the last requests of the killed process, one for each of its workers, after that process has gone.
    assert 0 <= len(judge.bodies) - asked_before - report["usage"]["num_calls"] <= 8
    assert '<section aria-labelledby="judge">' in (out / "report.html").read_text()
    again = compare(tmp_path, *arguments, "--yes")
    assert "holds the results of another comparison" in again.stderr


def test_a_folder_without_a_judge_is_reported_without_a_traceback(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["judge-check", str(tmp_path)])
    assert result.exit_code == 1
    assert "judge_check.tsv: there is no such file" in result.stderr


def test_a_terminal_without_an_input_does_not_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123

    def ended(*_arguments: object, **_options: object) -> str:
        raise EOFError

    monkeypatch.setattr(console, "input", ended)
    with console.file, pytest.raises(CompareError, match="the judge has not been asked"):
        asking().agree(PRICE, console)


def test_with_nothing_to_grade_the_comparison_is_kept(
    url: str, start_judge: StartJudge, write_data: WriteData, tmp_path: Path
) -> None:
    """The only document is the query itself, which is left out of its ranking."""
    judge = start_judge(lambda _body, _number: graded(1))
    data, out = write_data({"q": "y"}, {"q": "y"}, None), tmp_path / "out"
    options = ["--judge", judge.url, "--judge-model", "m", "--yes", "--out", out]
    result = compare(tmp_path, "plain", "cut", "--data", data, "--url", url, *options)
    assert result.exit_code == 1
    assert "the judge has nothing to grade: no arm finds a document" in result.stderr
    assert (out / "report.html").exists()
    assert judge.bodies == []


def test_a_check_of_pairs_that_the_judge_refused_is_reported(
    url: str, start_judge: StartJudge, write_data: WriteData, tmp_path: Path
) -> None:
    judge = start_judge(lambda _body, _number: completion(None, refusal="no"))
    data = write_data({"d": "x"}, {"q": "y"}, None)
    check = tmp_path / "check.tsv"
    check.write_text("query-id\tcorpus-id\tscore\tquery\tdocument\nq\td\t1\ty\tx\n")
    options = ["--judge", judge.url, "--judge-model", "m", "--yes", "--judge-check", check, "--out", tmp_path / "out"]
    result = compare(tmp_path, "plain", "cut", "--data", data, "--url", url, *options)
    assert result.exit_code == 1
    assert "the judge has no grade for any document that people checked" in result.stderr

"""A judge at the command line: its price, the user's consent, and the grading."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.prompt import Confirm

from gateway.cli.console import say
from gateway.compare.dataset import Dataset
from gateway.compare.judge.check import read_check
from gateway.compare.judge.endpoint import chat_url
from gateway.compare.judge.judging import Judged, JudgeRequest, judge
from gateway.compare.judge.outputs import write_judgments
from gateway.compare.judge.price import Price
from gateway.compare.judge.report import Subject
from gateway.compare.judge.sentences import print_report
from gateway.compare.progress import progress_on
from gateway.compare.results import Comparison
from gateway.compare.search import Ranking
from gateway.errors import CompareError


def make_judging(request: JudgeRequest, *, is_agreed: bool, asks_program: bool = False) -> Judging:
    """Return the judge of a request, checked before anything is embedded.

    Raises:
        CompareError: the address or the check file is wrong.
    """
    chat_url(request.url)
    if request.check is not None:
        read_check(request.check)
    return Judging(request, is_agreed, asks_program)


class Declined(CompareError):
    """A program was asked for its consent to the judge's price, and declined."""


@dataclass(frozen=True, slots=True)
class Judging:
    """A judge, and whether its price is agreed to in advance.

    Attributes:
        is_agreed: continue at any price, unless the request has a bound.
        asks_program: the progress is read by a program, which answers the question about the price on standard input.
    """

    request: JudgeRequest
    is_agreed: bool
    asks_program: bool = False

    def run(
        self, comparison: Comparison, dataset: Dataset, rankings: Mapping[str, Ranking], console: Console
    ) -> Judged:
        """Judge the arms of a comparison.

        Raises:
            CompareError: there is no consent to the price, or the judge does not answer.
        """
        subject = Subject(
            dataset=dataset,
            rankings=rankings,
            sources={arm.name: f"{arm.model} {arm.source}" for arm in comparison.arms},
            seed=comparison.seed,
        )
        with progress_on(console, is_json=self.asks_program) as reporter:
            return asyncio.run(judge(self.request, subject, lambda price: self.agree(price, console), reporter))

    def agree(self, price: Price, console: Console) -> None:
        """Print the price, and ask for consent unless it was given.

        Raises:
            CompareError: the price is beyond the budget, or there is no consent.
            Declined: a program does not agree.
        """
        say(console, f"\n{price} {price.privacy}")
        bound = self.request.max_tokens
        if bound is not None and price.num_tokens > bound:
            raise CompareError(f"--judge-budget is {bound:,} tokens, and about {price.num_tokens:,} are needed")
        if self.is_agreed or bound is not None:
            return
        if self.asks_program:
            console.out(json.dumps({"question": f"{price} {price.privacy}"}), highlight=False)
            if sys.stdin.readline().strip() != "yes":
                raise Declined("the judge has not been asked; the vectors are kept")
            return
        if not console.is_terminal:
            raise CompareError("the judge has not been asked: agree to its price with --yes or --judge-budget TOKENS")
        try:
            is_agreed = Confirm.ask("Continue?", console=console, default=False)
        except EOFError:  # a terminal to write to, and nothing to read from
            is_agreed = False
        if not is_agreed:
            raise CompareError("the judge has not been asked; the vectors are kept")


def show_judged(judged: Judged, dataset: Dataset, folder: Path, seed: int, console: Console) -> list[Path]:
    """Print the judge's report, and write its files; see :func:`gateway.compare.judge.outputs.write_judgments`."""
    print_report(judged.report, console)
    return write_judgments(judged, dataset, folder, seed)

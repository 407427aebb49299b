"""Judge the arms of a comparison: pool, estimate the price, grade, check by people, conclude."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from gateway.compare.judge.answers import READING
from gateway.compare.judge.check import complete_queries, read_check
from gateway.compare.judge.endpoint import chat_url, connect_judge, is_on_this_machine
from gateway.compare.judge.grading import Grader, Question
from gateway.compare.judge.pool import draw_repeated, make_pool
from gateway.compare.judge.price import Price, estimate_price
from gateway.compare.judge.prompt import ORDERS, prompt_hash
from gateway.compare.judge.report import Graded, Subject, describe, make_report
from gateway.compare.judge.store import GradeStore
from gateway.compare.judge.values import Grades, JudgeReport, Pair
from gateway.compare.progress import Reporter
from gateway.errors import CompareError


@dataclass(frozen=True, slots=True)
class JudgeRequest:
    """The judge of a comparison.

    Attributes:
        url: the URL of an API like OpenAI's.
        cache: folder with the grades of earlier runs.
        check: file with people's grades, if any.
        max_tokens: the maximum number of tokens to use; ``None`` for no bound.
    """

    url: str
    model: str
    api_key: str | None
    cache: Path
    check: Path | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """A report, and additional data for the files.

    Attributes:
        pool: the pairs, in random order.
        people: the grades of the check, including those of incomplete queries.
    """

    report: JudgeReport
    pool: Sequence[Pair]
    people: Grades


Consent = Callable[[Price], None]
"""A callback that receives the price before the first request, and raises ``CompareError`` without consent."""


async def judge(request: JudgeRequest, subject: Subject, consent: Consent, reporter: Reporter) -> Judged:
    """Have a judge grade the first documents of every arm, and compare the arms by its grades.

    Raises:
        CompareError: the address or the check is wrong, there is no consent, or the judge does not answer.
    """
    address = chat_url(request.url)
    pool = make_pool(subject.rankings, subject.seed)
    if not pool:
        raise CompareError("the judge has nothing to grade: no arm finds a document for any query")
    people: Grades = {}
    checked: Grades | None = None
    notes: list[str] = []
    if request.check is not None:  # before anything costs money: the file may belong to other data
        people = read_check(request.check)
        checked, notes = complete_queries(people, subject.dataset, pool, subject.seed, request.check)
    questions = [Question(pair) for pair in pool]
    again = [Question(pair, order) for pair in draw_repeated(pool, subject.seed) for order in range(1, len(ORDERS))]
    with ExitStack() as stack:
        stores = {order: stack.enter_context(_open_store(request, address, order)) for order in range(len(ORDERS))}
        async with connect_judge(request.url, request.model, request.api_key) as endpoint:
            grader = Grader(endpoint, subject.dataset, stores, request.max_tokens)
            missing = grader.missing((*questions, *again))
            num_known = sum(grader.known(question) is not None for question in (*questions, *again))
            if missing:
                texts = [(*grader.texts(question.pair), question.order) for question in missing]
                destination = None if is_on_this_machine(address) else address.host
                consent(estimate_price(texts, num_known, destination))
                await grader.ask(missing, reporter.step(f"judge {request.model}: pairs", len(missing)))
            asked = describe(address, endpoint, sorted(grader.known_models(questions)))
            report = make_report(subject, asked, Graded(grader, questions, again, num_known), checked)
    return Judged(replace(report, check_notes=notes), pool, people)


def _open_store(request: JudgeRequest, address: httpx.URL, order: int) -> GradeStore:
    identity = {
        "judge": str(address),
        "model": request.model,
        "prompt_sha256": prompt_hash(order),
        "examples": order,
        "reading": READING,
    }
    return GradeStore(request.cache, identity)

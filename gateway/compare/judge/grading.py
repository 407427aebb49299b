"""Grade pairs: read known grades, ask for the others, and store each answer at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gateway.compare.dataset import Dataset
from gateway.compare.judge.answers import Answer, Outcome
from gateway.compare.judge.endpoint import CUT_REMEDY, ChatEndpoint, NoDialect
from gateway.compare.judge.prompt import make_messages
from gateway.compare.judge.store import GradeStore, StoredGrade
from gateway.compare.judge.values import Pair
from gateway.compare.progress import Step
from gateway.errors import CompareError

_NUM_IN_FLIGHT = 8
# A filter may be the reason why a pair gets no grade. The shortest pairs come first, because they fit into any context.
_MAX_FIRST = 3
# Beyond this limit no verdict is possible, and further requests would cost money for nothing.
_MIN_UNJUDGED, _MAX_UNJUDGED_SHARE = 20, 0.1
# Estimates for an endpoint that does not count its tokens.
_CHARACTERS_PER_TOKEN, _ANSWER_TOKENS = 4, 40


@dataclass(frozen=True, slots=True)
class Question:
    """A pair to grade, and the order of the prompt's examples."""

    pair: Pair
    order: int = 0


@dataclass(slots=True)
class Tally:
    """The answers of this run.

    Attributes:
        num_calls: number of answered requests.
        unjudged: the reason for each query and document without a grade; only for the first order.
        models: the ids of the models that answered.
    """

    num_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unjudged: dict[tuple[str, str], Outcome] = field(default_factory=dict)
    models: set[str] = field(default_factory=set)


class Grader:
    """Asks one judge about the pairs of one data set.

    Args:
        stores: the stores by the order of the examples.
        max_tokens: stop after this many tokens; ``None`` for no bound.
    """

    def __init__(
        self, endpoint: ChatEndpoint, dataset: Dataset, stores: Mapping[int, GradeStore], max_tokens: int | None
    ) -> None:
        self._endpoint = endpoint
        self._dataset = dataset
        self._stores = stores
        self._max_tokens = max_tokens
        self.tally = Tally()

    def known(self, question: Question) -> int | None:
        """Return the grade of a pair, if it is known."""
        stored = self._stores[question.order].get(*self.texts(question.pair))
        return None if stored is None else stored.grade

    def texts(self, pair: Pair) -> tuple[str, str]:
        """Return the query and the document of a pair."""
        return self._dataset.queries[pair.query], self._dataset.documents[pair.document]

    def missing(self, questions: Iterable[Question]) -> list[Question]:
        """Return the questions to ask: those without a known grade, without duplicates of equal texts."""
        unknown = (question for question in questions if self.known(question) is None)
        return list({(self.texts(question.pair), question.order): question for question in unknown}.values())

    def unjudged(self, questions: Iterable[Question]) -> list[Outcome]:
        """Return the reason for each question without a grade."""
        texts = (self.texts(question.pair) for question in questions if self.known(question) is None)
        return [self.tally.unjudged.get(text, Outcome.UNREADABLE) for text in texts]

    async def ask(self, questions: Sequence[Question], step: Step) -> None:
        """Ask about pairs, several at a time.

        Raises:
            CompareError: the endpoint does not answer, leaves too many pairs ungraded, or the tokens are used up. All grades
                until then are kept.
        """
        if not questions:
            return
        first = sorted(questions, key=self._size)[:_MAX_FIRST]
        known = set(first)
        remaining = iter([*first, *(question for question in questions if question not in known)])
        await self._find_dialect(remaining, len(questions), step)

        async def work() -> None:
            for question in remaining:  # shared: each worker takes the next one
                self._take(question, await self._endpoint.ask(self._messages(question)), len(questions))
                step.advance(1)

        workers = [asyncio.create_task(work()) for _ in range(_NUM_IN_FLIGHT)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _find_dialect(self, remaining: Iterator[Question], num_questions: int, step: Step) -> None:
        """Ask about a short pair in each form that the endpoint may accept; about others if it rejects that one."""
        for number, question in enumerate(remaining, start=1):
            try:
                answer = await self._endpoint.find_dialect(self._messages(question))
            except NoDialect as error:
                self._take(question, error.spent, num_questions)
                if number == min(_MAX_FIRST, num_questions):
                    raise
            else:
                self._take(question, answer, num_questions)
                step.advance(1)
                return
            step.advance(1)

    def _size(self, question: Question) -> int:
        return sum(map(len, self.texts(question.pair)))

    def _messages(self, question: Question) -> Sequence[Mapping[str, str]]:
        return make_messages(*self.texts(question.pair), question.order)

    def _take(self, question: Question, answer: Answer, num_questions: int) -> None:
        """Count an answer, and keep its grade."""
        tally = self.tally
        tally.num_calls += 1
        tally.prompt_tokens += answer.prompt_tokens
        tally.completion_tokens += answer.completion_tokens
        if answer.grade is not None:
            self._stores[question.order].add(*self.texts(question.pair), StoredGrade(answer.grade, answer.model))
            tally.models |= {answer.model} - {""}
        elif question.order == 0:
            tally.unjudged[self.texts(question.pair)] = answer.outcome
            if len(tally.unjudged) > max(_MIN_UNJUDGED, _MAX_UNJUDGED_SHARE * num_questions):
                raise CompareError(_too_many(self._endpoint.name, tally))
        self._check_budget(question)

    def _check_budget(self, question: Question) -> None:
        if self._max_tokens is None:
            return
        tally = self.tally
        used = tally.prompt_tokens + tally.completion_tokens
        if not used:  # the endpoint does not count
            size = sum(len(message["content"]) for message in self._messages(question))
            used = tally.num_calls * (size // _CHARACTERS_PER_TOKEN + _ANSWER_TOKENS)
        if used > self._max_tokens:
            raise CompareError(
                f"--judge-budget {self._max_tokens}: {tally.num_calls:,} requests have used {used:,} tokens. Run again with "
                "a larger budget to continue: all grades are kept"
            )

    def known_models(self, questions: Iterable[Question]) -> set[str]:
        """Return the ids of the models that gave the known grades of questions."""
        stored = (self._stores[question.order].get(*self.texts(question.pair)) for question in questions)
        return {grade.model for grade in stored if grade is not None and grade.model}


def _too_many(name: str, tally: Tally) -> str:
    nums = Counter(tally.unjudged.values())
    reasons = f"{nums[Outcome.REFUSED]} refused, {nums[Outcome.CUT]} cut, {nums[Outcome.UNREADABLE]} unreadable"
    remedy = f". For answers that are cut at their limit of tokens: {CUT_REMEDY}" if nums[Outcome.CUT] else ""
    return (
        f"{name} gave no grade for {len(tally.unjudged)} of {tally.num_calls:,} pairs ({reasons}): no verdict is possible. "
        f"All grades are kept{remedy}"
    )

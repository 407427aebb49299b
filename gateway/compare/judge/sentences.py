"""The judge's verdicts as text for people."""

from __future__ import annotations

from rich.console import Console

from gateway.cli.console import say
from gateway.compare.judge.values import Figure, JudgeContrast, JudgeReport, JudgeVerdict, PeopleCheck
from gateway.compare.judge.verdicts import MAX_UNJUDGED_SHARE
from gateway.compare.results import PRIMARY_MEASURE
from gateway.compare.sentences import fixed, p_value, percent, signed
from gateway.compare.statistics import MIN_QUERIES, MIN_UNTIED
from gateway.comparisons.scale import MIN_KAPPA, NUM_CHECKED
from gateway.config.wording import count

_WITHOUT_CHECK = (
    "A judge may favor an arm, so this is not a verdict on quality. For a verdict, let people grade the "
    "documents of judge_check.tsv: in the console, or in a spreadsheet and then `gateway judge-check FOLDER`."
)
_TEMPLATES = {
    JudgeVerdict.BETTER: "{arm} is better than {baseline}: {measure} {both}. By the judge alone: {judged}.",
    JudgeVerdict.WORSE: "{arm} is worse than {baseline}: {measure} {both}. By the judge alone: {judged}.",
    JudgeVerdict.INCONCLUSIVE: (
        "This does not show whether {arm} is better or worse than {baseline}: {measure} {both}. "
        "By the judge alone: {judged}."
    ),
    JudgeVerdict.PREFERRED: "The judge prefers {arm} to {baseline}: {measure} {judged}.",
    JudgeVerdict.NOT_PREFERRED: "The judge prefers {baseline} to {arm}: {measure} {judged}.",
    JudgeVerdict.NO_PREFERENCE: "The judge shows no preference between {arm} and {baseline}: {measure} {judged}.",
    JudgeVerdict.TOO_FEW_QUERIES: (
        "{num_queries} queries are too few to distinguish {arm} from {baseline}; at least {min_queries} are needed: "
        "{measure} {judged} so far."
    ),
    JudgeVerdict.TOO_FEW_CHECKED: (
        "People checked too few queries to distinguish {arm} from {baseline}: {num_checked} whole ones, and {num_untied} of "
        "them differ; all {num_drawn} drawn queries, and {min_untied} that differ, are needed."
    ),
    JudgeVerdict.TOO_MANY_UNJUDGED: "No verdict on {arm}: {unjudged} of the pairs have no grade; the limit is {limit}.",
    JudgeVerdict.UNUSABLE: (
        "This judge cannot be used: its kappa may be as low as {kappa}, and at least {min_kappa} is needed. "
        "By people alone, {arm} against {baseline}: {measure} {people}."
    ),
}


# The most useful verdict first: the bottom line is that of the arm whose verdict comes first, and of the best such arm.
_BOTTOM_LINES = {
    JudgeVerdict.BETTER: "Switch to {arm}: by the judge, corrected by people, it is better than {baseline}.",
    JudgeVerdict.PREFERRED: "The judge prefers {arm} to {baseline}: let people check the judge before you switch.",
    JudgeVerdict.INCONCLUSIVE: "Stay with {baseline}: the judge and its check do not show that {arm} is better.",
    JudgeVerdict.NO_PREFERENCE: "Stay with {baseline}: the judge shows no preference between it and {arm}.",
    JudgeVerdict.TOO_FEW_CHECKED: "People checked too few queries to decide between {baseline} and {arm}.",
    JudgeVerdict.TOO_FEW_QUERIES: "Too few queries to decide between {baseline} and {arm}.",
    JudgeVerdict.TOO_MANY_UNJUDGED: "Too many results have no grade to decide between {baseline} and {arm}.",
    JudgeVerdict.UNUSABLE: "This judge cannot be used: it does not agree with the people who checked it.",
    JudgeVerdict.WORSE: "Stay with {baseline}: by the judge, corrected by people, {arm} is worse.",
    JudgeVerdict.NOT_PREFERRED: "Stay with {baseline}: the judge prefers it to {arm}.",
}


def judge_bottom_line(report: JudgeReport) -> str:
    """Return the recommendation that follows from the judge's verdicts."""
    if not report.contrasts:
        return "The judge gave no grade, so there is nothing to decide."
    order = list(_BOTTOM_LINES)
    first = min(report.contrasts, key=lambda one: (order.index(one.verdict), -(one.corrected or one.judged).mean))
    text = _BOTTOM_LINES[first.verdict].format(arm=first.arm, baseline=first.baseline)
    others = [one.arm for one in report.contrasts if one.verdict is JudgeVerdict.BETTER and one is not first]
    if others:
        text += f" So is {', '.join(others)}; the difference between them was not tested."
    return text


def judge_sentences(report: JudgeReport) -> list[str]:
    """Return the report in sentences: the judge, its check, a verdict for each arm, and the notes."""
    check = report.check
    return [
        *_introduction(report),
        *([_check_sentence(check)] if check else []),
        *(contrast_sentence(report, contrast) for contrast in report.contrasts),
        *([] if check else [_WITHOUT_CHECK]),
        *(f"Note: {note}" for note in (*report.check_notes, *report.notes)),
    ]


def print_report(report: JudgeReport, console: Console) -> None:
    """Print the report."""
    say(console, "\nBy the judge's grades", style="bold")
    for sentence in judge_sentences(report):
        say(console, f"\n{sentence}")


def _introduction(report: JudgeReport) -> list[str]:
    usage = report.usage
    tokens = usage.prompt_tokens + usage.completion_tokens
    spent = f"{count(usage.num_calls, 'request')}{f', {tokens:,} tokens' if tokens else ''}"
    num_graded = report.num_pairs - report.num_unjudged
    agreement = report.self_agreement
    repeats = f" It repeats {percent(agreement.share)} of its grades." if agreement else ""
    means = ", ".join(f"{arm} {fixed(level.mean)}" for arm, level in report.levels.items())
    return [
        f"{report.asked.model} graded {num_graded:,} of {report.num_pairs:,} pairs of a query and a document from 0 to 3 "
        f"({spent}; {usage.num_cached:,} grades known before).{repeats}",
        *([f"{PRIMARY_MEASURE} by its grades: {means}."] if means else []),
    ]


def _check_sentence(check: PeopleCheck) -> str:
    return (
        f"People checked {count(check.num_queries, 'query', 'queries')} with {count(check.num_pairs, 'document')}: kappa "
        f"{fixed(check.kappa.mean, 2)} (95 % interval {fixed(check.kappa.low, 2)} to {fixed(check.kappa.high, 2)})."
    )


def contrast_sentence(report: JudgeReport, one: JudgeContrast) -> str:
    """Return the verdict on an arm, with its figures."""
    judged, check = _figures(one.judged, one.judged_p), report.check
    return _TEMPLATES[one.verdict].format(
        arm=one.arm,
        baseline=one.baseline,
        measure=PRIMARY_MEASURE,
        judged=judged,
        both=f"{_figures(one.corrected, one.corrected_p)}, corrected by people" if one.corrected else judged,
        people=_figures(one.people) if one.people else "not known",
        num_queries=f"{report.num_queries:,}",
        num_checked=check.num_queries if check else 0,
        num_untied=one.num_untied,
        kappa=fixed(check.kappa.low, 2) if check else "",
        unjudged=f"{100 * report.unjudged_share:.1f} %",
        limit=percent(MAX_UNJUDGED_SHARE),
        min_queries=MIN_QUERIES,
        num_drawn=min(NUM_CHECKED, report.num_queries),
        min_untied=MIN_UNTIED,
        min_kappa=MIN_KAPPA,
    )


def _figures(difference: Figure, p: float | None = None) -> str:
    figures = f"{signed(difference.mean)} (95 % interval {signed(difference.low)} to {signed(difference.high)}"
    return f"{figures}, p {p_value(p)})" if p is not None else f"{figures})"

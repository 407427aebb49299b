"""Numbers and verdicts as text for people."""

from __future__ import annotations

import math

from gateway.compare.results import Agreement, Arm, Comparison, Contrast, Estimate, Ratio, Verdict
from gateway.compare.statistics import ALPHA, SMALL_DIFFERENCE, num_queries
from gateway.config.wording import count

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
EASY = 0.9
"""Above this mean quality of the baseline, the queries leave little room for improvement."""

_ABOUT_THE_SAME = 0.15


def fixed(value: float, digits: int = 3) -> str:
    """Return a number with this many digits after the point; a number that rounds to zero has no sign."""
    text = f"{value:,.{digits}f}"
    return text.replace("-", MINUS) if float(text.replace(",", "")) else text.removeprefix("-")


def signed(value: float, digits: int = 3) -> str:
    """Return a difference with its sign, unless it rounds to zero."""
    text = fixed(value, digits)
    return f"+{text}" if value > 0 and float(text.replace(",", "")) else text


def significant(value: float) -> str:
    """Return a measured quantity with about three digits: 1,180 or 74.6 or 3.10."""
    size = abs(value)
    return fixed(value, 0 if size >= 100 else 1 if size >= 10 else 2)


def interval(estimate: Estimate) -> str:
    """Return the bounds of an interval; empty without bounds."""
    return "" if estimate.low is None or estimate.high is None else f"{fixed(estimate.low)} to {fixed(estimate.high)}"


def signed_interval(estimate: Estimate) -> str:
    """Return the bounds of the interval of a difference; empty without bounds."""
    return "" if estimate.low is None or estimate.high is None else f"{signed(estimate.low)} to {signed(estimate.high)}"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def p_value(p: float) -> str:
    """Return p with its relation: ``= 0.020``."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def verdict_sentence(comparison: Comparison, contrast: Contrast) -> str:
    """Return the verdict on an arm against the baseline, with its figures."""
    arm, baseline = contrast.arm, contrast.baseline
    within = f"{comparison.margin:g}"
    match contrast.verdict:
        case Verdict.BETTER | Verdict.WORSE:
            sentence = f"{arm} is {contrast.verdict} than {baseline}"
        case Verdict.AS_GOOD:
            sentence = f"{arm} is as good as {baseline}, within {within}"
        case Verdict.NOT_WORSE:
            sentence = f"{arm} is not worse than {baseline} by more than {within}, and may be better"
        case Verdict.TOO_FEW_QUERIES:
            number = len(comparison.queries)
            queries = "query is" if number == 1 else "queries are"
            sentence = f"{number:,} {queries} too few to distinguish {arm} from {baseline}"
        case Verdict.TOO_FEW_DIFFER:
            return f"{_few_differ(comparison, contrast)} {_figures(comparison, contrast)}."
        case Verdict.NOT_JUDGED_ALIKE:
            return f"{_not_judged_alike(contrast)} {_wins(contrast)}."
        case _:
            sentence = f"These queries do not show whether {arm} is better or worse than {baseline}"
    text = f"{sentence}: {_figures(comparison, contrast)}."
    if contrast.verdict in {Verdict.INCONCLUSIVE, Verdict.NOT_WORSE}:
        text += f"{_beyond_interval(contrast)}{_unseen(contrast)}{_power(comparison, contrast)}"
    return text


def _figures(comparison: Comparison, contrast: Contrast) -> str:
    """Return the difference with interval, p and wins."""
    bounds = signed_interval(contrast.difference)
    parts = [f"95 % interval {bounds}"] if bounds else []
    parts.append(_p_holm(comparison, contrast))
    return f"{contrast.measure} {signed(contrast.difference.mean)} ({', '.join(parts)}); {_wins(contrast)}"


def _few_differ(comparison: Comparison, contrast: Contrast) -> str:
    names = f"{contrast.arm} from {contrast.baseline}"
    level = comparison.baseline.quality[contrast.measure].mean
    if not contrast.wins and not contrast.losses:
        each = f" at {fixed(level)}" if level in {0.0, 1.0} else ""
        why = (
            f"these queries are too easy to distinguish {names}"
            if level >= EASY
            else f"they do not distinguish {names}"
        )
        return f"Every query is tied{each}: {why}:"
    if contrast.num_independent < num_queries(contrast):
        differ = f"{contrast.num_untied:,} of {count(contrast.num_independent, 'group')} of queries differ"
    else:
        differ = f"{contrast.ties:,} of {len(comparison.queries):,} queries are tied"
    return f"{differ}: too few differ to distinguish {names}:"


def _not_judged_alike(contrast: Contrast) -> str:
    condensed = contrast.condensed or contrast.difference
    return (
        f"{contrast.arm} and {contrast.baseline} are not judged alike. If documents without judgment count as irrelevant, "
        f"{contrast.measure} differs by {signed(contrast.difference.mean)} ({signed_interval(contrast.difference)}); if "
        f"they are left out, by {signed(condensed.mean)} ({signed_interval(condensed)}). Judge the first ten of both."
    )


def _unseen(contrast: Contrast) -> str:
    """Return the reason why a difference that looks clear in these queries has no clearer verdict."""
    if contrast.unseen is None:
        return ""
    is_grouped = contrast.num_independent < num_queries(contrast)
    number = (
        count(contrast.num_independent, "group") if is_grouped else count(contrast.num_independent, "query", "queries")
    )
    return (
        f" {number} are too few to rule out rare, large differences: they may lack a total loss or gain that up to "
        f"{100 * contrast.unseen:.1f} % of queries have."
    )


def _power(comparison: Comparison, contrast: Contrast) -> str:
    """Return the detectable difference, and the number of queries that a small difference needs."""
    if contrast.detectable is None or contrast.queries_needed is None:
        return ""
    number = len(comparison.queries)
    sentence = (
        f" {number:,} queries like these show a difference of {fixed(contrast.detectable)} in 80 % of comparisons"
    )
    if contrast.queries_needed <= number:
        return f"{sentence}."
    small = max(SMALL_DIFFERENCE, comparison.margin)
    return f"{sentence}; one of {small:g} needs about {_rounded(contrast.queries_needed)}."


def _rounded(number: int) -> str:
    """Return a number with two significant digits."""
    return f"{float(f'{number:.2g}'):,.0f}"


def _beyond_interval(contrast: Contrast) -> str:
    """Return the reason why a difference is inconclusive although its interval excludes 0."""
    low, high = contrast.difference.low, contrast.difference.high
    if low is None or high is None or low <= 0 <= high:
        return ""
    return " The interval excludes 0, but p is not small enough to rely on that."


def _p_holm(comparison: Comparison, contrast: Contrast) -> str:
    is_corrected = len(comparison.arms) > 2
    # Near 0.05, other random draws may give the opposite result.
    error = contrast.p_error * contrast.p_holm / contrast.p
    shown = f" ± {fixed(error)}" if abs(contrast.p_holm - ALPHA) < 3 * error else ""
    return f"p {p_value(contrast.p_holm)}{shown}{' after Holm' if is_corrected else ''}"


def _wins(contrast: Contrast) -> str:
    return f"{count(contrast.wins, 'win')}, {count(contrast.ties, 'tie')}, {count(contrast.losses, 'loss', 'losses')}"


def agreement_sentence(agreement: Agreement) -> str:
    """Return the similarity of the rankings, without saying which is better."""
    return (
        f"{agreement.arm} and {agreement.baseline} have {percent(agreement.overlap.mean)} of their first ten documents "
        f"in common{_percent_interval(agreement.overlap)}, and the same first document for "
        f"{percent(agreement.same_first.mean)} of the queries; rank-biased overlap {fixed(agreement.rbo.mean)}"
        f"{_in_brackets(interval(agreement.rbo))}."
    )


def _percent_interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" (95 % interval {percent(estimate.low)} to {percent(estimate.high)})"


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def cost_sentence(comparison: Comparison, arm: Arm) -> str:
    """Return the cost of an arm, with its ratio to the baseline's cost if they differ."""
    baseline = comparison.baseline
    parts = []
    if arm.cost:
        found = next((one for one in comparison.cost_contrasts if one.arm == arm.name), None)
        times = [
            (f"{milliseconds(arm.cost.p50_s)} ms per query", found and found.query_time),
            (f"{significant(arm.cost.texts_per_s)} texts/s", found and found.texts_per_s),
        ]
        parts = [f"{what} ({ratio_words(ratio)})" if ratio else what for what, ratio in times]
        if found and found.is_same_model:
            parts.append(f"the same model as {baseline.name}, which was not measured twice")
    size = f"{arm.bytes_per_document:,} bytes per document"
    if arm.bytes_per_document != baseline.bytes_per_document:
        size += f" ({TIMES} {_two_digits(arm.bytes_per_document / baseline.bytes_per_document)})"
    elif arm is not baseline:
        size += " (equal)"
    return ", ".join([*parts, size])


def ratio_words(ratio: Ratio) -> str:
    """Return a ratio with its interval if it differs from 1, otherwise the possible difference."""
    if ratio.low is None or ratio.high is None:
        return "too few requests to compare"
    if ratio.is_shown:
        return f"{TIMES} {_two_digits(ratio.ratio)}, {_two_digits(ratio.low)} to {_two_digits(ratio.high)}"
    within = max(ratio.high - 1, 1 / ratio.low - 1)
    if within <= _ABOUT_THE_SAME:
        return f"about the same, within {math.ceil(100 * within)} %"
    return f"no difference found: {TIMES} {_two_digits(ratio.low)} to {_two_digits(ratio.high)}"


def _two_digits(ratio: float) -> str:
    return fixed(ratio, 0 if ratio >= 10 else 1 if ratio >= 2 else 2)


def milliseconds(seconds: float) -> str:
    return significant(1000 * seconds)

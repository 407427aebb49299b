"""Numbers and verdicts as text for people."""

from __future__ import annotations

from gateway.compare.results import PRIMARY_MEASURE, Agreement, Arm, Comparison, Contrast, Estimate, Verdict
from gateway.config.wording import count

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"


def fixed(value: float, digits: int = 3) -> str:
    """Return a number with this many digits after the point; one that rounds to zero has no sign."""
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
    return f"{fixed(estimate.low)} to {fixed(estimate.high)}"


def signed_interval(estimate: Estimate) -> str:
    return f"{signed(estimate.low)} to {signed(estimate.high)}"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def p_value(p: float) -> str:
    """Return p with its relation: ``= 0.020``."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def verdict_sentence(comparison: Comparison, contrast: Contrast) -> str:
    """Return the verdict on an arm against the baseline, with its figures."""
    arm, baseline, measure = contrast.arm, contrast.baseline, contrast.measure
    mean, bounds = signed(contrast.difference.mean), f"95 % interval {signed_interval(contrast.difference)}"
    tests = f"{_p_holm(comparison, contrast)}); {_wins(contrast)}."
    match contrast.verdict:
        case Verdict.BETTER | Verdict.WORSE:
            return f"{arm} is {contrast.verdict} than {baseline}: {measure} {mean} ({bounds}, {tests}"
        case Verdict.TOO_FEW_QUERIES:
            num_queries = len(comparison.queries)
            return (
                f"{num_queries:,} {'query is' if num_queries == 1 else 'queries are'} too few to tell {arm} from "
                f"{baseline}: {measure} {mean} so far ({bounds}, {tests}"
            )
        case _:
            return (
                f"These queries do not show whether {arm} is better or worse than {baseline}: the difference in "
                f"{measure} lies between {signed(contrast.difference.low)} and {signed(contrast.difference.high)} "
                f"(95 % interval; mean {mean}, {tests}{_beyond_interval(contrast)}"
            )


def bottom_line(comparison: Comparison) -> str:
    """Return the recommendation that follows from the judgments; empty without any."""
    verdicts = {one.arm: one.verdict for one in comparison.contrasts if one.measure == PRIMARY_MEASURE}
    if not verdicts:
        return ""
    baseline = comparison.baseline.name
    better = [arm for arm, verdict in verdicts.items() if verdict is Verdict.BETTER]
    if better:
        return f"Better than {baseline} on these queries: {', '.join(better)}."
    if Verdict.TOO_FEW_QUERIES in verdicts.values():
        return f"These queries are too few to decide whether to replace {baseline}."
    return f"Nothing here is shown to be better than {baseline}: keep it."


def _beyond_interval(contrast: Contrast) -> str:
    """Return why a difference whose interval excludes 0 is still inconclusive."""
    if contrast.difference.low <= 0 <= contrast.difference.high:
        return ""
    return " The interval excludes 0, but p is not small enough to rely on that."


def _p_holm(comparison: Comparison, contrast: Contrast) -> str:
    is_corrected = len(comparison.arms) > 2
    return f"p {p_value(contrast.p_holm)}{' after Holm' if is_corrected else ''}"


def _wins(contrast: Contrast) -> str:
    return f"{count(contrast.wins, 'win')}, {count(contrast.ties, 'tie')}, {count(contrast.losses, 'loss', 'losses')}"


def agreement_sentence(agreement: Agreement) -> str:
    """Return how alike the rankings are, without a judgment on which is better."""
    return (
        f"{agreement.arm} and {agreement.baseline} have {percent(agreement.overlap.mean)} of their first ten documents "
        f"in common (95 % interval {percent(agreement.overlap.low)} to {percent(agreement.overlap.high)}), and the "
        f"same first document for {percent(agreement.same_first.mean)} of the queries; "
        f"rank-biased overlap {fixed(agreement.rbo.mean)} ({interval(agreement.rbo)})."
    )


def cost_sentence(arm: Arm, baseline: Arm) -> str:
    """Return the cost of an arm, and its ratio to the baseline's."""
    parts = [_against(f"{arm.bytes_per_vector:,} bytes per vector", arm.bytes_per_vector, baseline.bytes_per_vector)]
    if arm.cost and baseline.cost:
        parts = [
            _against(f"{milliseconds(arm.cost.p50_s)} ms per query", arm.cost.p50_s, baseline.cost.p50_s),
            _against(f"{significant(arm.cost.texts_per_s)} texts/s", arm.cost.texts_per_s, baseline.cost.texts_per_s),
            *parts,
        ]
    return ", ".join(parts)


def _against(what: str, value: float, reference: float) -> str:
    if not reference or value == reference:
        return f"{what} (the same)" if value == reference else what
    ratio = value / reference
    return f"{what} ({TIMES} {fixed(ratio, 0 if ratio >= 10 else 1 if ratio >= 2 else 2)})"


def milliseconds(seconds: float) -> str:
    return significant(1000 * seconds)

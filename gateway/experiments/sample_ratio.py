"""The sample ratio check: whether an experiment's units are split as its weights say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.experiments.units import MAX_UNITS

# A p below this is not chance. Lower than the usual 0.05, since people look repeatedly;
# see Fabijan et al., "Diagnosing Sample Ratio Mismatch in Online Controlled Experiments", KDD 2019.
SRM_THRESHOLD = 0.001
# With fewer expected units the chi-square distribution does not describe the statistic (Cochran 1954).
_LEAST_EXPECTED = 5
_MISMATCH = "sample ratio mismatch ({}): units of an arm are being lost; do not trust a comparison of the arms"


@dataclass(frozen=True, slots=True)
class SampleRatio:
    """Whether the units are split as the weights say: a chi-square test of goodness of fit.

    Attributes:
        p: how often a correct split would be this far off; ``None`` with too few units to tell.
        mismatch: units of an arm are being lost; a comparison of the arms cannot be trusted.
    """

    chi2: float | None
    degrees: int
    p: float | None
    mismatch: bool
    verdict: str


def check_sample_ratio(units: Sequence[int], shares: Sequence[float]) -> SampleRatio:
    """Test counts of distinct units against the shares given by the weights.

    A single unit in an arm of weight 0 is a mismatch.
    """
    total = sum(units)
    if any(count and not share for count, share in zip(units, shares, strict=True)):
        return SampleRatio(None, 0, 0.0, mismatch=True, verdict=_MISMATCH.format("an arm of weight 0 has units"))
    observed = [count for count, share in zip(units, shares, strict=True) if share]
    expected = [total * share for share in shares if share]
    degrees = len(observed) - 1
    if degrees < 1:
        return SampleRatio(None, 0, None, mismatch=False, verdict="one arm has all the weight: nothing to test")
    if max(observed) >= MAX_UNITS:
        return SampleRatio(
            None, degrees, None, mismatch=False, verdict=f"units are counted up to {MAX_UNITS:,} per arm"
        )
    if min(expected) < _LEAST_EXPECTED:
        return SampleRatio(None, degrees, None, mismatch=False, verdict=f"too few units to tell: {total}")
    from scipy.stats import chisquare  # slow to import, and not needed to serve

    result = chisquare(observed, expected)
    p = float(result.pvalue)
    if p < SRM_THRESHOLD:
        return SampleRatio(float(result.statistic), degrees, p, mismatch=True, verdict=_MISMATCH.format(f"p = {p:.2g}"))
    return SampleRatio(float(result.statistic), degrees, p, mismatch=False, verdict=f"no mismatch found, p = {p:.2g}")

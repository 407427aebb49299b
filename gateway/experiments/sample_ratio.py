"""The sample ratio check: whether an experiment's units are split as its weights say, valid at any look."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# The probability that a correct split ever reaches an e-value of 100 is at most 1 % (Ville's inequality).
_MISMATCH_E = 100.0
# The strength of the prior around the weights, in units. Lindon & Malek use it; it finds losses of a few percent.
_PRIOR = 1_000.0
# With fewer expected units the chi-square distribution does not describe the statistic (Cochran 1954).
_LEAST_EXPECTED = 5
_LARGEST_LOG = 700.0  # its exponential is near the largest float


@dataclass(slots=True)
class RatioProcess:
    """The evidence against the weights, unit by unit: the e-process of a multinomial with a Dirichlet prior.

    From Lindon & Malek, "Anytime-valid inference for multinomial count data", NeurIPS 2022 (arXiv 2011.03567). If the
    split follows the weights, this is a martingale that starts at 1, so its maximum may be checked after each unit.
    """

    counts: dict[str, int] = field(default_factory=dict)
    total: int = 0
    log_e: float = 0.0
    largest_log_e: float = 0.0

    def add(self, arm: str, share: float) -> None:
        """Count a unit in an arm that should get ``share`` of the units; the share is above 0."""
        count = self.counts.get(arm, 0)
        # The predictive probability of this arm, divided by its share.
        self.log_e += math.log((_PRIOR * share + count) / ((_PRIOR + self.total) * share))
        self.largest_log_e = max(self.largest_log_e, self.log_e)
        self.counts[arm] = count + 1
        self.total += 1


def process_of(counts: Mapping[str, int], shares: Mapping[str, float], largest: float = 0.0) -> RatioProcess:
    """Return a process that continues from the counts of arms with a share, after it has reached ``largest``."""
    log_e = _log_e([ArmCount(arm, num, shares[arm]) for arm, num in counts.items()]) if counts else 0.0
    return RatioProcess(dict(counts), sum(counts.values()), log_e, max(log_e, largest))


def largest_log_e(is_in: Sequence[NDArray[np.bool_]], shares: NDArray[np.float64]) -> float:
    """Return the largest ``log_e`` of a :class:`RatioProcess` over all units, given the ``(n,)`` flags of each arm."""
    log_e = np.zeros(len(is_in[0]) if is_in else 0)
    before = np.arange(len(log_e))
    for units, share in zip(is_in, shares, strict=True):
        mine: NDArray[np.int64] = np.cumsum(units) - units
        log_e += units * np.log((_PRIOR * share + mine) / ((_PRIOR + before) * share))
    return max(0.0, float(np.cumsum(log_e).max(initial=0.0)))


def num_tests_of(generation: int) -> int:
    """Return by how many tests a generation's p must be multiplied, so that all generations together err as often as one.

    A ramp changes the weights many times, and each generation has its own process. The factor of the k-th is k * (k + 1),
    because the sum of 1 / (k * (k + 1)) is 1. The processes must not be multiplied with each other: the units come back in
    later generations, mostly into the same arms, so a chance imbalance would count again each time.

    Args:
        generation: the number of the generation in order of time, from 1.
    """
    return generation * (generation + 1)


@dataclass(frozen=True, slots=True)
class ArmCount:
    """The units or requests that arrived in one arm.

    Attributes:
        num: number of units, or of requests, in the arm.
        share: the share that the weight gives to the arm.
        server_errors: requests that failed through no fault of the client.
    """

    arm: str
    num: int
    share: float
    requests: int = 0
    server_errors: int = 0


@dataclass(frozen=True, slots=True)
class SampleRatio:
    """The test whether the split of the units matches the weights.

    Attributes:
        of: the counted things: units, or requests without a unit, which are split at random.
        p: the probability that a correct split would ever be this far off, at any number of looks and under any of the
            weights of the experiment; 1 at the beginning.
        mismatch: the arriving units do not match the weights, so no comparison of the arms can be trusted.
        arm: the arm that lacks most, in standard deviations; ``None`` where nothing can be tested.
        expected: the number of ``of`` that this arm should have.
        chi2: Pearson's statistic of the present counts, for reading; ``None`` with fewer than 5 expected in an arm.
        chi2_p: its p-value, which holds for a single look at a time fixed in advance.
    """

    of: Literal["units", "requests"]
    p: float | None
    mismatch: bool
    arm: str | None
    expected: float | None
    chi2: float | None
    degrees: int
    chi2_p: float | None
    verdict: str


def check_sample_ratio(
    counts: Sequence[ArmCount],
    largest_log_e: float | None = None,
    *,
    of: Literal["units", "requests"] = "units",
    num_tests: int = 1,
    note: str = "",
) -> SampleRatio:
    """Test counts against the shares given by the weights. A single unit in an arm of weight 0 is a mismatch.

    Args:
        largest_log_e: that of a :class:`RatioProcess`; ``None`` if only the present counts are known.
        num_tests: the number of these tests in an experiment; together they err as often as a single test.
        note: added to the verdict.
    """
    weighted = [count for count in counts if count.share]
    total = sum(count.num for count in weighted)
    if stray := next((count for count in counts if count.num and not count.share), None):
        verdict = (
            f"sample ratio mismatch: arm {stray.arm!r} has weight 0, and {stray.num:,} {of}; do not trust a comparison"
        )
        return SampleRatio(of, 0.0, True, stray.arm, 0.0, None, 0, None, verdict)
    if len(weighted) < 2:
        return SampleRatio(of, None, False, None, None, None, 0, None, "one arm has all the weight: nothing to test")
    if not total:
        return SampleRatio(of, None, False, None, None, None, len(weighted) - 1, None, f"no {of} yet")
    log_e = max(_log_e(weighted), largest_log_e or 0.0)
    p = min(1.0, num_tests * math.exp(-min(log_e, _LARGEST_LOG)))
    mismatch = p <= 1 / _MISMATCH_E
    fewest = min(weighted, key=lambda count: (count.num - total * count.share) / math.sqrt(total * count.share))
    expected = total * fewest.share
    chi2, chi2_p = _chi_square(weighted)
    if mismatch:
        verdict = f"sample ratio mismatch (p = {p:.2g} at any look): {_describe(fewest, expected, of)}"
    else:
        verdict = f"no mismatch found, p = {p:.2g} at any look"
    return SampleRatio(
        of,
        p,
        mismatch,
        fewest.arm,
        expected,
        chi2,
        len(weighted) - 1,
        chi2_p,
        f"{verdict}; {note}" if note else verdict,
    )


def _describe(fewest: ArmCount, expected: float, of: str) -> str:
    text = f"arm {fewest.arm!r} has {fewest.num:,} {of}, and {expected:,.0f} are expected"
    if fewest.server_errors:
        text += f"; {fewest.server_errors:,} of its {fewest.requests:,} requests failed"
    return f"{text}; something loses {of} of an arm: do not trust a comparison of the arms"


def _log_e(counts: Sequence[ArmCount]) -> float:
    """Return the logarithm of the e-value of the present counts: a :class:`RatioProcess` in closed form."""
    total = sum(count.num for count in counts)
    log_e = math.lgamma(_PRIOR) - math.lgamma(_PRIOR + total)
    for count in counts:
        weight = _PRIOR * count.share
        log_e += math.lgamma(weight + count.num) - math.lgamma(weight) - count.num * math.log(count.share)
    return log_e


def _chi_square(counts: Sequence[ArmCount]) -> tuple[float | None, float | None]:
    """Return Pearson's statistic and its p-value, if the counts are large enough."""
    total = sum(count.num for count in counts)
    if min(total * count.share for count in counts) < _LEAST_EXPECTED:
        return None, None
    chi2 = sum((count.num - total * count.share) ** 2 / (total * count.share) for count in counts)
    return chi2, _chi_square_tail(chi2, len(counts) - 1)


def _chi_square_tail(chi2: float, degrees: int) -> float:
    """Return the probability of a larger statistic, by the sum for whole degrees; importing scipy takes a second.

    See Abramowitz & Stegun, 26.4.4 and 26.4.5.
    """
    half = chi2 / 2
    if degrees % 2 == 0:
        return math.exp(-half) * sum(half**i / math.factorial(i) for i in range(degrees // 2))
    tail, term = math.erfc(math.sqrt(half)), math.sqrt(2 * chi2 / math.pi) * math.exp(-half)
    for i in range(1, (degrees - 1) // 2 + 1):
        tail += term
        term *= chi2 / (2 * i + 1)
    return tail

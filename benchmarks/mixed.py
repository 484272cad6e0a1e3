"""A mixed model: measurements in groups, the group as a random effect.

    y_ij = m + u_i + e_ij,    u_i ~ N(0, t^2),  e_ij ~ N(0, s^2)

by restricted maximum likelihood, whose profile over q = t^2 / s^2 is written out: with n_i measurements of mean y_i in
group i and weights w_i = n_i / (1 + n_i q), m is the weighted mean of the y_i, and with S the sum of squares within
groups s^2 = (S + sum w_i (y_i - m)^2) / (N - 1), and twice the log-likelihood is, up to a constant,

    -(N - 1) log s^2 - sum log(1 + n_i q) - log sum w_i.

The interval of m is that of Student's t with one degree of freedom fewer than there are groups.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.paired import STUDENT


@dataclass(frozen=True)
class Mixed:
    """The fit."""

    mean: float
    error: float
    """Standard error of the mean."""
    between: float
    """Variance of the groups."""
    within: float
    """Variance of measurements in a group."""
    groups: int

    @property
    def interval(self) -> tuple[float, float]:
        """95%, of the mean."""
        half = STUDENT[min(self.groups - 1, len(STUDENT)) - 1] * self.error
        return self.mean - half, self.mean + half


def mixed(groups: Mapping[str, Sequence[float]]) -> Mixed:
    """Fit at least two groups, one of them of two measurements or more."""
    counts = [len(one) for one in groups.values()]
    means = [statistics.fmean(one) for one in groups.values()]
    inside = sum((y - mean) ** 2 for one, mean in zip(groups.values(), means, strict=True) for y in one)
    total = sum(counts)

    def fit(q: float) -> tuple[float, Mixed]:
        weights = [n / (1 + n * q) for n in counts]
        mean = sum(w * y for w, y in zip(weights, means, strict=True)) / sum(weights)
        spread = inside + sum(w * (y - mean) ** 2 for w, y in zip(weights, means, strict=True))
        within = spread / (total - 1)
        twice = -(total - 1) * math.log(within) - sum(math.log(1 + n * q) for n in counts) - math.log(sum(weights))
        return twice, Mixed(mean, math.sqrt(within / sum(weights)), q * within, within, len(counts))

    low, high = -12.0, 12.0  # of log q, where the likelihood has one maximum
    for _ in range(200):
        third = (high - low) / 3
        if fit(math.exp(low + third))[0] < fit(math.exp(high - third))[0]:
            low += third
        else:
            high -= third
    return max(fit(math.exp(low)), fit(0.0), key=lambda one: one[0])[1]

"""What runs say: paired differences, corrected for how many are looked at, and put together over tasks.

Seeds are the samples: two contenders with the same seed have the same initial draw, the same order of data and the same
split, so that their difference is compared with 0 by Student's t. Intervals are two-sided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
_STEPS = 200
_TINY = 1e-300


@dataclass(frozen=True)
class Effect:
    """A mean difference and how sure it is."""

    mean: float
    half: float
    """Half the width of its interval; infinite for a single sample."""
    p: float
    """Two-sided, of the mean being 0; 1 for a single sample."""
    samples: int
    error: float
    """Standard error of the mean."""

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out 0."""
        return abs(self.mean) > self.half


def paired(differences: Sequence[float], confidence: float = CONFIDENCE) -> Effect:
    """The mean of paired differences with Student's t interval.

    Raises ValueError without any.
    """
    count = len(differences)
    if not count:
        raise ValueError("expected at least one difference")
    mean = math.fsum(differences) / count
    if count == 1:
        return Effect(mean, math.inf, 1.0, 1, math.inf)
    error = math.sqrt(math.fsum((one - mean) ** 2 for one in differences) / (count - 1) / count)
    half = t_quantile((1 + confidence) / 2, count - 1) * error
    if error == 0:
        return Effect(mean, half, 0.0 if mean else 1.0, count, error)
    return Effect(mean, half, 2 * (1 - t_cdf(abs(mean) / error, count - 1)), count, error)


def not_worse(differences: Sequence[float], margin: float) -> float:
    """One-sided p of the mean difference being -`margin` or less: small where a loss of that much can be ruled out."""
    effect = paired(differences)
    if effect.samples == 1:
        return 1.0
    if effect.error == 0:
        return 0.0 if effect.mean > -margin else 1.0
    return 1 - t_cdf((effect.mean + margin) / effect.error, effect.samples - 1)


def holm(values: Sequence[float]) -> list[float]:
    """P-values corrected for how many there are: Holm's step-down (1979). In the order given."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected = [1.0] * len(values)
    largest = 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[at]))
        corrected[at] = largest
    return corrected


def over_tasks(effects: Sequence[Effect], confidence: float = CONFIDENCE) -> Effect:
    """The mean effect over tasks that are a sample of all tasks: random effects.

    The variance between tasks is that of DerSimonian & Laird (1986), the interval that of Hartung & Knapp (2001), with
    Student's t on one degree less than there are tasks; its variance is not let below that of fixed effects. A single
    task gives its own effect.

    Raises ValueError without any.
    """
    if not effects:
        raise ValueError("expected at least one effect")
    if len(effects) == 1:
        return effects[0]
    samples = sum(one.samples for one in effects)
    if any(math.isinf(one.error) for one in effects):
        return Effect(math.fsum(one.mean for one in effects) / len(effects), math.inf, 1.0, samples, math.inf)
    floor = max(max(one.error for one in effects) * 1e-3, 1e-12)
    variances = [max(one.error, floor) ** 2 for one in effects]
    weights = [1 / one for one in variances]
    total = math.fsum(weights)
    fixed = math.fsum(w * one.mean for w, one in zip(weights, effects, strict=True)) / total
    spread = math.fsum(w * (one.mean - fixed) ** 2 for w, one in zip(weights, effects, strict=True))
    scale = total - math.fsum(w * w for w in weights) / total
    between = max(0.0, (spread - (len(effects) - 1)) / scale)
    weights = [1 / (one + between) for one in variances]
    total = math.fsum(weights)
    mean = math.fsum(w * one.mean for w, one in zip(weights, effects, strict=True)) / total
    left = math.fsum(w * (one.mean - mean) ** 2 for w, one in zip(weights, effects, strict=True))
    error = math.sqrt(max(1.0, left / (len(effects) - 1)) / total)
    freedom = len(effects) - 1
    half = t_quantile((1 + confidence) / 2, freedom) * error
    return Effect(mean, half, 2 * (1 - t_cdf(abs(mean) / error, freedom)), samples, error)


def t_cdf(t: float, freedom: float) -> float:
    """The distribution function of Student's t."""
    tail = _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t)) / 2
    return 1 - tail if t >= 0 else tail


def t_quantile(part: float, freedom: float) -> float:
    """The value below which a part of Student's t lies, by bisection."""
    low, high = -1.0, 1.0
    while t_cdf(low, freedom) > part:
        low *= 2
    while t_cdf(high, freedom) < part:
        high *= 2
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < part else (low, middle)
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (Abramowitz & Stegun 26.5.8)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction of the mirrored function converges faster
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    value, c, d = 1.0, 1.0, 0.0
    for step in range(_STEPS):  # Lentz's way to evaluate it from the front
        m = step // 2
        if step == 0:
            term = 1.0
        elif step % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / _away_from_zero(1 + term * d)
        c = _away_from_zero(1 + term / c)
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * (value - 1) / a


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


__all__ = ["CONFIDENCE", "Effect", "holm", "not_worse", "over_tasks", "paired", "t_cdf", "t_quantile"]

"""Which branch is better: a paired test on held-out samples, with what a network costs as a part of the objective.

A branch is compared with the control, a copy that was trained for as many steps without an edit. With losses l of both
on the same n samples, prices p and costs c,

    score = mean(l_branch - l_control) + sum over costs of p * ln(c_branch / c_control)

FLOPs have a price that is measured: what is spent on a step is not there for further ones. Let the control's loss fall
by s per unit of the logarithm of the training FLOPs of its lineage, of which C are spent and R are left. A branch that
costs r times as much per step can make R / r of the control's remaining progress, which is worth

    s * (ln(1 + R / C) - ln(1 + R / (r C)))

and a branch is accepted if its score lies below 0 by more than z standard errors of the mean difference; z is the
normal quantile of the confidence, by Bonferroni's correction for as many branches as compete. The error is that of the
samples alone: what another order of batches would have given is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

from espalier.errors import RunError
from espalier.evolve.job import unpacked


@dataclass(frozen=True)
class Verdict:
    """How a branch did against the control."""

    gain: float
    """By how much its mean held-out loss is lower."""
    error: float
    """Standard error of that."""
    price: float
    """What its larger cost counts as in loss; negative for a smaller one."""
    accepted: bool

    @property
    def score(self) -> float:
        """The lower the better; 0 for the control."""
        return self.price - self.gain


@dataclass(frozen=True)
class Progress:
    """How fast the control learns."""

    slope: float
    """By how much its loss falls per unit of ln(FLOPs spent on it); not below 0."""
    spent: float
    """On it."""
    left: float

    @classmethod
    def between(cls, earlier: tuple[float, float], later: tuple[float, float], left: float) -> Progress:
        """From two points on its way, each FLOPs and loss."""
        slope = (earlier[1] - later[1]) / math.log(later[0] / earlier[0])
        return cls(max(0.0, slope), later[0], max(0.0, left))

    def price(self, ratio: float) -> float:
        """Of steps that cost so many times as much, in loss."""
        return self.slope * (math.log1p(self.left / self.spent) - math.log1p(self.left / (ratio * self.spent)))


@dataclass(frozen=True)
class Objective:
    """What is to be made small: the held-out loss, and costs at a price."""

    parameters: float = 0.0
    """The rise of the loss at which a network of e times fewer parameters is as good."""
    compute: float = 1.0
    """What the measured price of FLOPs is multiplied by; 0 where they cost nothing."""
    confidence: float = 0.95
    """One-sided, of each decision."""

    def __post_init__(self) -> None:
        if not (0.5 <= self.confidence < 1 and all(math.isfinite(one) for one in (self.parameters, self.compute))):
            raise RunError(f"expected a confidence from 0.5 to 1 and prices that are numbers, found {self!r}.")

    def verdict(
        self, branch: Mapping[str, object], control: Mapping[str, object], competing: int, progress: Progress
    ) -> Verdict:
        """Of one of so many branches, by the results of the jobs."""
        difference = _losses(branch) - _losses(control)
        gain, error = -float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))
        price = self.parameters * _log_ratio(branch, control, "parameters")
        price += self.compute * progress.price(math.exp(_log_ratio(branch, control, "flops")))
        z = NormalDist().inv_cdf(1 - (1 - self.confidence) / max(1, competing))
        return Verdict(gain, error, price, price - gain < -z * error)


def front(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Numbers of the points than which no other is as good in all and better in one coordinate; lower is better."""
    return [
        number
        for number, one in enumerate(points)
        if not any(all(b <= a for a, b in zip(one, other, strict=True)) and other != one for other in points)
    ]


def _losses(result: Mapping[str, object]) -> Tensor:
    return unpacked(str(result["losses"]))


def _log_ratio(branch: Mapping[str, object], control: Mapping[str, object], what: str) -> float:
    return math.log(float(str(branch[what])) / float(str(control[what])))


__all__ = ["Objective", "Progress", "Verdict", "front"]

"""Which branch is better: a paired test on held-out samples, with what a network costs as a part of the objective.

A branch is compared with the control, a copy that was trained without an edit for as many FLOPs, or steps. With losses
l of both on the same n samples, prices p and costs c,

    score = mean(l_branch - l_control) + sum over costs of p * ln(c_branch / c_control)

and a branch is accepted if its score lies below 0 by more than z standard errors of the mean difference; z is the
normal quantile of the confidence, by Bonferroni's correction for as many branches as compete. The error is that of the
samples alone: what another order of batches would have given is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
class Objective:
    """What is to be made small: the held-out loss, and costs at a price."""

    parameters: float = 0.0
    """The rise of the loss at which a network of e times fewer parameters is as good."""
    flops: float = 0.0
    """Likewise, for FLOPs of the forward pass."""
    latency: float = 0.0
    """Likewise, for what the problem's workbench measures (`Workbench.latency`)."""
    confidence: float = 0.95
    """One-sided, of each decision."""

    def __post_init__(self) -> None:
        prices = (self.parameters, self.flops, self.latency)
        if not (0.5 <= self.confidence < 1 and all(map(math.isfinite, prices))):
            raise RunError(f"expected a confidence from 0.5 to 1 and prices that are numbers, found {self!r}.")

    def verdict(self, branch: Mapping[str, object], control: Mapping[str, object], competing: int) -> Verdict:
        """Of one of so many branches, by the results of the jobs.

        Raises:
            RunError: latency has a price, and the problem measures none.
        """
        difference = _losses(branch) - _losses(control)
        gain, error = -float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))
        price = self.parameters * _log_ratio(branch, control, "parameters")
        price += self.flops * _log_ratio(branch, control, "flops")
        if self.latency:
            price += self.latency * _log_ratio(branch, control, "latency")
        z = NormalDist().inv_cdf(1 - (1 - self.confidence) / max(1, competing))
        return Verdict(gain, error, price, price - gain < -z * error)


def _losses(result: Mapping[str, object]) -> Tensor:
    return unpacked(str(result["losses"]))


def _log_ratio(branch: Mapping[str, object], control: Mapping[str, object], what: str) -> float:
    values = [float(str(one.get(what, "nan"))) for one in (branch, control)]
    if not all(one > 0 and math.isfinite(one) for one in values):
        raise RunError(
            f"expected the {what} of a branch and of its control, which has a price, as two numbers above 0, found "
            f"{values}: give the problem's workbench a function that measures it"
        )
    return math.log(values[0] / values[1])


__all__ = ["Objective", "Verdict"]

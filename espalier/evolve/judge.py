"""Which branch is better: a paired test on held-out samples, with what a network costs as a part of the objective.

A branch is compared with the control, a copy that was trained without an edit for as many steps. With losses l of both
on the same n samples, prices p and costs c,

    score = mean(l_branch - l_control) + training + sum over costs of p * ln(c_branch / c_control)

where ``training`` is what the steps are worth that a larger network leaves undone (`espalier.evolve.horizon`). A branch
is accepted if its score lies below 0, and below -z standard errors of the mean difference without what training costs
it more, which is an estimate of what is to come whose error nobody knows; one that is smaller, if both hold but for a
margin. z is the normal quantile of the confidence, by Bonferroni's correction for as many branches as compete. The
error is that of the samples alone: what another order of batches would have given is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

from espalier.errors import RunError
from espalier.evolve.job import unpacked

_HOPELESS = 0.25
"""Part of the control's loss. At first, new units are mostly noise to what reads them."""


@dataclass(frozen=True)
class Verdict:
    """How a branch did against the control."""

    gain: float
    """By how much its mean held-out loss is lower."""
    error: float
    """Standard error of that."""
    price: float
    """What its larger cost counts as in loss, that of training it on included; negative for a smaller one."""
    accepted: bool
    hopeless: bool
    """Whether its loss is higher by so much that it need not be trained on."""

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
    margin: float = 0.01
    """The rise of the loss at which a network that is smaller, in neither way larger, is still as good."""
    latency: float = 0.0
    """Likewise, for what the problem's workbench measures (`Workbench.latency`)."""
    confidence: float = 0.95
    """One-sided, of each decision."""

    def __post_init__(self) -> None:
        prices = (self.parameters, self.flops, self.latency, self.margin)
        if not (0.5 <= self.confidence < 1 and all(map(math.isfinite, prices)) and self.margin >= 0):
            raise RunError(
                f"expected a confidence from 0.5 to 1, prices that are numbers and a margin from 0 on, found {self!r}."
            )

    def verdict(
        self, branch: Mapping[str, object], control: Mapping[str, object], competing: int, training: float
    ) -> Verdict:
        """Of one of so many branches, by the results of the jobs, and what its training costs more, in loss.

        Raises:
            RunError: latency has a price, and the problem measures none.
        """
        difference = _losses(branch) - _losses(control)
        gain, error = -float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))
        ratios = [_log_ratio(branch, control, what) for what in ("parameters", "flops")]
        costs = self.parameters * ratios[0] + self.flops * ratios[1]
        if self.latency:
            costs += self.latency * _log_ratio(branch, control, "latency")
        margin = self.margin if max(ratios) <= 0 > min(ratios) else 0.0
        z = NormalDist().inv_cdf(1 - (1 - self.confidence) / max(1, competing))
        accepted = gain + margin - costs - min(0.0, training) > max(z * error, training)
        hopeless = not accepted and -gain > _HOPELESS * abs(float(_losses(control).mean()))
        return Verdict(gain, error, costs + training, accepted, hopeless)


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

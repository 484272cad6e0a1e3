"""Gate functions: how likely a unit is there, as a function of its logit, and how sharply under the parameter k.

A gate is a Bernoulli variable with probability g(phi; k). In the paper g is odd around 1/2, g(-phi) + g(phi) = 1, so
that gates rest at 1/2 for k = 0; here that is not needed. Estimators (`espalier.parts.gates.estimators`) give the
gradient by the logit of the probability; by the chain rule

    d logit(g) / d phi = c = g' / (g (1 - g))

turns it into that by phi. The general-g equation of Li & Ji (2020, Neural Plasticity Networks, arXiv:1908.08118,
equation 9) leaves c out, which is right for the sigmoid up to the factor k only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from espalier.errors import MethodError


class GateFunction(Protocol):
    """Probabilities of gates by their logits."""

    def probability(self, logits: Tensor, k: float, /) -> Tensor:
        """g(phi; k), of the shape of the logits, from 0 to 1; differentiable by them where it is not flat."""

    def chain(self, logits: Tensor, k: float, /) -> Tensor:
        """c = g' / (g (1 - g)), 0 where g is flat; of the shape of the logits."""

    def logit(self, probability: float, k: float, /) -> float:
        """The phi at which g is that probability. Raises MethodError where there is none."""


@dataclass(frozen=True)
class Sigmoid:
    """g = sigmoid(k phi + logit(rest)), so that c = k."""

    rest: float = 0.5
    """The probability for k = 0: 1 - rest is the rate of dropout there. 1/2 is the paper's. Gates below it are shut
    once k is large."""

    def __post_init__(self) -> None:
        if not 0 < self.rest < 1:
            raise MethodError(f"rest: expected a probability between 0 and 1, found {self.rest!r}.")

    def probability(self, logits: Tensor, k: float, /) -> Tensor:
        return torch.sigmoid(k * logits + _logit(self.rest))

    def chain(self, logits: Tensor, k: float, /) -> Tensor:
        return torch.full_like(logits, k)

    def logit(self, probability: float, k: float, /) -> float:
        _check(probability, k)
        return (_logit(probability) - _logit(self.rest)) / k


@dataclass(frozen=True)
class HardSigmoid:
    """g = min(1, max(0, k phi / 7 + 1/2)), so that c = (k / 7) / (g (1 - g)) inside and 0 in the tails.

    In the tails gates are decided: their samples never differ, and their logits rest.
    """

    def probability(self, logits: Tensor, k: float, /) -> Tensor:
        return (k / 7 * logits + 0.5).clamp(0, 1)

    def chain(self, logits: Tensor, k: float, /) -> Tensor:
        g = self.probability(logits, k)
        inside = (g > 0) & (g < 1)
        return torch.where(inside, k / 7 / torch.where(inside, g * (1 - g), 1.0), 0.0)

    def logit(self, probability: float, k: float, /) -> float:
        _check(probability, k)
        return (probability - 0.5) * 7 / k


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _check(probability: float, k: float) -> None:
    if not (0 < probability < 1 and k > 0):
        raise MethodError(
            f"expected a probability between 0 and 1 and k above 0, found {probability!r} and k={k!r}: at k=0 all "
            "gates are equally likely, whatever their logits."
        )


__all__ = ["GateFunction", "HardSigmoid", "Sigmoid"]

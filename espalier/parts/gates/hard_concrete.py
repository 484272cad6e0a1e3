"""Hard-concrete gates: numbers from 0 to 1, both included, through which gradients pass (L0 regularisation).

With u uniform on (0, 1) and the logit log alpha,

    s = sigmoid((log u - log(1 - u) + log alpha) / beta),    z = min(1, max(0, s (zeta - gamma) + gamma))

is 0 with a probability above 0, since gamma < 0 < 1 < zeta stretch the interval, and differentiable elsewhere, so that
logits learn from one evaluation of the loss. What is penalised is

    P(z > 0) = sigmoid(log alpha - beta log(-gamma / zeta)),

and the network is judged at min(1, max(0, sigmoid(log alpha) (zeta - gamma) + gamma)): equations 10 to 13 of Louizos,
Welling & Kingma (2018, Learning sparse neural networks through L0 regularization, arXiv:1712.01312).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.parts.gates.kinds import Drawn, Evaluation
from espalier.parts.gates.stages import DECIDED


@dataclass(frozen=True)
class HardConcrete:
    """Stretched and rectified binary concrete gates.

    k has no other meaning for them than that from `DECIDED` on, before and after the search, gates are what they are
    judged as, and rest.
    """

    beta: float = 2 / 3
    """The temperature; the smaller, the more gates are 0 or 1."""
    gamma: float = -0.1
    zeta: float = 1.1
    """The ends of the stretched interval."""

    def __post_init__(self) -> None:
        if not (0 < self.beta < math.inf and -math.inf < self.gamma < 0 and 1 < self.zeta < math.inf):
            raise MethodError(
                f"expected beta above 0, gamma below 0 and zeta above 1, found {self.beta!r}, {self.gamma!r} and "
                f"{self.zeta!r}."
            )

    @property
    def lasting(self) -> bool:
        return True

    def probability(self, logits: Tensor, k: float, /) -> Tensor:
        """P(z > 0); of decided gates 1 for what is judged as more than 0, without a slope."""
        if k >= DECIDED:
            return (self.judged(logits, k) > 0).to(logits) + 0 * logits
        return torch.sigmoid(logits - self._shift)

    def judged(self, logits: Tensor, k: float, /) -> Tensor:
        return self._stretched(torch.sigmoid(logits))

    def logit(self, probability: float, k: float, /) -> float:
        if not 0 < probability < 1:
            raise MethodError(f"expected a probability between 0 and 1, found {probability!r}.")
        return math.log(probability / (1 - probability)) + self._shift

    def sample(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """z for u, differentiable by the logits."""
        noise = torch.log(uniforms) - torch.log1p(-uniforms)
        return self._stretched(torch.sigmoid((noise + logits) / self.beta))

    def loss(
        self, logits: Mapping[str, Tensor], k: float, evaluation: Evaluation, generator: torch.Generator, /
    ) -> Drawn:
        if k >= DECIDED:
            return Drawn(evaluation({key: self.judged(one, k) for key, one in logits.items()}))
        leaves = {key: one.detach().clone().requires_grad_() for key, one in logits.items()}
        tiny = torch.finfo(torch.float64).tiny
        u = {
            key: torch.rand(one.shape, dtype=one.dtype, generator=generator).clamp_min(tiny)
            for key, one in leaves.items()
        }
        loss = evaluation({key: self.sample(one, u[key]) for key, one in leaves.items()})
        return Drawn(loss, leaves=leaves)

    @property
    def _shift(self) -> float:
        return self.beta * math.log(-self.gamma / self.zeta)

    def _stretched(self, s: Tensor) -> Tensor:
        return (s * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)


__all__ = ["HardConcrete"]

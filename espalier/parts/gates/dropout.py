"""Dropout as gates: of one fixed probability, which nothing trains (Srivastava et al. 2014, JMLR 15)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.parts.gates.kinds import Drawn, Evaluation
from espalier.parts.gates.stages import DECIDED


@dataclass(frozen=True)
class Dropout:
    """Gates that are shut with a fixed probability, and whose logits rest.

    What they leave of a unit is u < 1 - rate, drawn once per step for the whole batch. It is evaluated once: these
    gates have no twins. From k = `DECIDED` on, before and after the search, they are what they are judged as.
    """

    rate: float = 0.5
    """Probability of being shut, from 0, which is plain training to the bit, to below 1."""
    inverted: bool = True
    """Whether open gates are 1 / (1 - rate) in training, and 1 when the network is judged; or 1 in training, and
    1 - rate when it is judged, as in the original."""

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise MethodError(f"rate: expected a probability from 0 to below 1, found {self.rate!r}.")

    @property
    def lasting(self) -> bool:
        return False

    def probability(self, logits: Tensor, k: float, /) -> Tensor:
        return torch.full_like(logits, 1 - self.rate) + 0 * logits

    def judged(self, logits: Tensor, k: float, /) -> Tensor:
        return torch.full_like(logits, 1.0 if self.inverted else 1 - self.rate)

    def logit(self, probability: float, k: float, /) -> float:
        return 0.0

    def loss(
        self, logits: Mapping[str, Tensor], k: float, evaluation: Evaluation, generator: torch.Generator, /
    ) -> Drawn:
        if k >= DECIDED:
            return Drawn(evaluation({key: self.judged(one, k) for key, one in logits.items()}))
        value = 1 / (1 - self.rate) if self.inverted else 1.0
        gates = {
            key: (torch.rand(one.shape, dtype=one.dtype, generator=generator) < 1 - self.rate) * value
            for key, one in logits.items()
        }
        return Drawn(evaluation(gates))


__all__ = ["Dropout"]

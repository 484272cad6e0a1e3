"""Group decay: weights that gates multiply are kept small, by how likely these are open.

    1/2 * strength * sum over weights of (probability that all gates of the weight are open) * weight^2

is 1/2 strength E |z w|^2 for independent gates of 0 and 1. It is the group regulariser of Li & Ji (2020,
arXiv:1908.08118) and of Louizos, Welling & Kingma (2018, arXiv:1712.01312), over what the gates here multiply: the
weights that read a unit. What no gate multiplies is left to the weight decay of the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.parts.units.penalty import check_strength


@dataclass(frozen=True)
class GroupDecay:
    """A decay by the probability of gates."""

    strength: float
    """That of a weight whose gates are open, as the weight decay of an optimizer that adds it to the gradient."""
    learnt: bool = False
    """Whether logits learn from it, as in L0-ARM; else probabilities are taken as they are, as in NPN."""

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def __call__(self, tensors: Mapping[str, Tensor], chances: Mapping[str, Tensor]) -> Tensor:
        """A scalar, differentiable by both.

        Args:
            tensors: what gates multiply, by name.
            chances: name -> what is the probability of each of its weights, broadcasting to its shape.
        """
        parts = [(chances[name] * one.square()).sum().double().cpu() for name, one in tensors.items()]
        return 0.5 * self.strength * torch.stack(parts).sum()


__all__ = ["GroupDecay"]

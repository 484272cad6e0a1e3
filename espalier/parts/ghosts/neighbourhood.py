"""Firefly neighbourhoods: halves of units and small new units, optimised together and valued one by one.

Wu et al. 2020, Firefly neural architecture descent (arXiv:2102.08574): the network takes a step within a small
neighbourhood of functions that are wider than it,

    w sigma(theta x)  ->  w/2 sigma((theta + eps u) x) + w/2 sigma((theta - eps u) x)    a split
    0                 ->  eps o sigma(a x)                                               a new unit

with |u|, |a|, |o| <= 1, and keeps the parts that matter most. Norms are relative: 1 is the mean norm of the weights on
that side of the old units of the axis, since the absolute ones of the paper suit one scale of weights only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from espalier.parts.ghosts.ghosts import Ghosts
from espalier.parts.ghosts.halves import Copies, later


@dataclass(frozen=True)
class Candidates:
    """The candidates of one axis: splits of its old units, then new units."""

    apart: Tensor
    """(splits, weights that make a unit): what one half has more and the other less."""
    incoming: Tensor
    """(new units, weights that make a unit)."""
    outgoing: Tensor
    """(new units, weights that read a unit)."""

    @property
    def sides(self) -> tuple[Tensor, Tensor, Tensor]:
        """All three."""
        return self.apart, self.incoming, self.outgoing

    def times(self, apart: float, incoming: float, outgoing: float) -> Candidates:
        """The same with other lengths."""
        return Candidates(self.apart * apart, self.incoming * incoming, self.outgoing * outgoing)

    def of(self, units: Sequence[int]) -> Candidates:
        """Some of them, in ascending order."""
        splits = [unit for unit in units if unit < len(self.apart)]
        new = [unit - len(self.apart) for unit in units if unit >= len(self.apart)]
        return Candidates(self.apart[splits], self.incoming[new], self.outgoing[new])


def network(
    ghosts: Ghosts, candidates: Mapping[str, Candidates], origins: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Tensor]:
    """The tensors of the network with these candidates; differentiable. `origins`: the units to split; all if None."""
    tensors = dict(ghosts.tensors)
    for axis, one in candidates.items():
        if len(one.incoming):
            sides, splits = ghosts.sides[axis], len(one.apart)
            tensors = later(sides.incoming, splits).write(tensors, one.incoming)
            tensors = later(sides.outgoing, splits).write(tensors, one.outgoing)
    split = {axis: one.apart for axis, one in candidates.items() if len(one.apart)}
    units = {axis: range(len(apart)) if origins is None else origins[axis] for axis, apart in split.items()}
    return Copies(ghosts, units).made(tensors, split)


def falls(
    ghosts: Ghosts, candidates: Mapping[str, Candidates], batches: Sequence[Any], points: int
) -> dict[str, Tensor]:
    """Axis -> for every candidate what the mean loss falls by along its part of the straight path to all of them."""
    total = {axis: torch.zeros(len(one.apart) + len(one.incoming)) for axis, one in candidates.items()}
    for batch in batches:
        for point in range(points):
            way = (point + 0.5) / points
            at = {axis: one.times(way, 1.0, way) for axis, one in candidates.items()}
            leaves = [side.requires_grad_() for one in at.values() for side in (one.apart, one.outgoing)]
            with torch.enable_grad():
                loss = ghosts.loss(network(ghosts, at), batch)
                gradients = iter(torch.autograd.grad(loss, leaves, allow_unused=True))
            for axis, one in candidates.items():
                slopes = [
                    torch.zeros(len(side)) if grad is None else (grad * side).sum(1).cpu()
                    for side, grad in ((side, next(gradients)) for side in (one.apart, one.outgoing))
                ]
                total[axis] = total[axis] - torch.cat(slopes).double() / (points * len(batches))
    return total


__all__ = ["Candidates", "falls", "network"]

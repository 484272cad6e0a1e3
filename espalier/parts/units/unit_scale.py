"""The score of methods that regularise scales: how large the scale of every unit is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.graph.named_tensors import tensor_table
from espalier.parts.goal import Goal, Scores
from espalier.parts.score import Context
from espalier.parts.units.folded import FoldedScales
from espalier.parts.units.scales import holders


@dataclass(frozen=True)
class UnitScale:
    """The mean of |scale| over all norms along or across the axis: a unit of a residual stream has one in each.

    Where no norm has one, it is the folded scale s_j times |V_j| / mean |V|, the norm of the weights without it: a
    network may make a scale small and the weights that it multiplies large, and what they come to is what counts. So
    all scores are in the unit of a scale. Needs the memory `Folded`.
    """

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        memory = context.memory
        if not isinstance(memory, FoldedScales):
            raise MethodError(f"scores by scales need the memory Folded(...), found {memory!r}.")
        scales = memory.scales(context)
        tensors = tensor_table(context.structure.model).tensors
        found = {}
        for axis in goal.sizes:
            if axis in scales.bare:
                found[axis] = _folded(context, axis, memory.scale(axis).double().cpu())
            else:
                found[axis] = scales.of_units(axis, tensors)
        return Scores(found)


def _folded(context: Context, axis: str, scale: Tensor) -> Tensor:
    tensors = tensor_table(context.structure.model).tensors
    places = holders(context.structure.topology, axis)
    total = torch.zeros_like(scale)
    for place in places:
        squares = place.sums(tensors[place.tensor].detach().float().square(), len(scale))
        weights = squares.double().cpu().sqrt() / scale
        total += weights / weights.mean() if bool(weights.any()) else 1.0
    return scale * total / len(places)


__all__ = ["UnitScale"]

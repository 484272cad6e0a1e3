"""Wider axes and new layers in one choice, by what both are predicted to gain at what they cost.

Either begins as nothing, with weights B of zero, so that the loss has a first-order term in B alone, <G, B> with the
gradient G = dL/dB at B = 0. One step of gradient descent at the rate r makes it fall by r |G|^2 + O(r^2), whatever the
weights belong to: |G|^2 is the currency. For k units of an axis it is the largest that k directions get, GradMax's
gain; for a layer the squared norm of the gradient by all of its parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from espalier.edit.plan import Resize
from espalier.errors import MethodError
from espalier.parts.budget import FLOPs, Parameters, Polynomial
from espalier.parts.candidate import Candidate, Catalogue
from espalier.parts.depth.places import NewLayers, Places
from espalier.parts.depth.trial import gains
from espalier.parts.ghosts.steepest import Steepest
from espalier.parts.goal import UNBOUNDED, Cap, Goal, Scores
from espalier.parts.score import Context
from espalier.parts.units.where import choose_axes
from espalier.structure import Structure


@dataclass(frozen=True)
class WiderOrDeeper:
    """New layers, and for each axis that can grow without a change of the outputs some more units."""

    layers: Places = field(default_factory=NewLayers)
    fraction: float = 0.25
    """How many units, as a fraction of the axis; at least one."""
    widths: Sequence[str] | None = None
    """Names or patterns of axes; None for all."""

    def __post_init__(self) -> None:
        if isinstance(self.fraction, bool) or not isinstance(self.fraction, (int, float)) or not self.fraction > 0:
            raise MethodError(f"fraction: expected a number above 0, found {self.fraction!r}.")

    def __call__(self, structure: Structure, asked: Sequence[str] | None, /) -> Catalogue:
        found = self.layers(structure, asked)
        return Catalogue({**found.candidates, **self._widths(structure)}, found.stages)

    def _widths(self, structure: Structure) -> dict[str, Candidate]:
        topology = structure.topology
        sizes = {record.name: topology.sizes[record.number] for record in topology.axes.values()}
        parameters, flops = (kind(1).cost(topology, ()) for kind in (Parameters, FLOPs))
        wider = {}
        for axis, why in choose_axes(structure, "grow", self.widths).items():
            by = max(1, round(self.fraction * sizes[axis]))
            limit = structure.limits[axis].at_most if axis in structure.limits else None
            if why is None and (limit is None or sizes[axis] + by <= limit):
                cost = parameters.step(axis, sizes, by), flops.step(axis, sizes, by)
                wider[f"{axis} + {by} units"] = Candidate((), *cost, "widths", resizes=(Resize(axis, add=by),))
        return wider


@dataclass(frozen=True)
class PredictedGain:
    """|G|^2 of every candidate; units of axes by `Steepest`, which also says what they begin as."""

    steepest: Steepest = field(default_factory=Steepest)

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        layers = {name: one for name, one in goal.layers.items() if not one.resizes}
        values = gains(context, layers)
        wider = {name: one.resizes[0] for name, one in goal.layers.items() if one.resizes}
        found = self.steepest(context, _widening(context, list(wider.values()))) if wider else Scores({})
        for name, one in wider.items():
            best = found.values[one.axis][: one.add]
            values[name] = float(best.double().sum()) if len(best) == one.add else -math.inf
        return Scores({name: torch.tensor([values[name]], dtype=torch.float64) for name in goal.layers}, found.found)


def _widening(context: Context, resizes: Sequence[Resize]) -> Goal:
    """The goal in which every one of these axes grows by as many units."""
    topology = context.structure.topology
    sizes = {one.axis: topology.sizes[topology.by_name[one.axis].number] for one in resizes}
    most = {one.axis: sizes[one.axis] + one.add for one in resizes}
    units = Polynomial({(axis,): 1 for axis in sizes})
    reference = {axis: float(one) for axis, one in most.items()}
    return Goal("grow", sizes, sizes, most, reference, Cap(units, min(sum(most.values()), UNBOUNDED)))


__all__ = ["PredictedGain", "WiderOrDeeper"]

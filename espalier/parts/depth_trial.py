"""Layers that are not there, asked by putting them in for a moment: what gradient would their parameters get?

New layers that begin as nothing do not see each other, so that one pass forward and backward answers for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import nn

from espalier.edit.depth_edits import DepthEdit, Insert
from espalier.edit.plan import Plan
from espalier.edit.promise import Promise
from espalier.edit.recipes.base import Lookup, Recipe
from espalier.errors import MethodError, PlanError, SurgeryError
from espalier.graph.topology import Topology
from espalier.measure.stats import without_a_trace
from espalier.parts.depth_candidate import Candidate, seeded
from espalier.parts.goal import Goal, Scores
from espalier.parts.score import Context, derived_seed


@dataclass(frozen=True)
class Sensitivity:
    """|dL/d(parameters of a new layer)|^2: what the loss falls by, to the first order, per unit of learning rate.

    SensLI (Kreis et al. 2023) inserts the layer whose virtual parameters have the largest gradient. On the last
    training batch, or else the first held-out one, in the mode in which the network trains. What surgery refuses has a
    score of minus infinity.
    """

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        found = gains(context, goal.layers)
        return Scores({name: torch.tensor([found[name]], dtype=torch.float64) for name in goal.layers})


def gains(context: Context, layers: Mapping[str, Candidate]) -> dict[str, float]:
    """The squared norm of the gradient by all parameters of each new layer; -inf for one that surgery refuses."""
    if not layers:
        return {}
    try:
        return _together(context, layers)
    except (PlanError, SurgeryError):
        found = dict.fromkeys(layers, -math.inf)
        able = {name: one for name, one in layers.items() if len(layers) > 1 and _fits(context, one)}
        if able:
            found |= _together(context, able)
        return found


def _together(context: Context, layers: Mapping[str, Candidate]) -> dict[str, float]:
    batch = context.batch if context.batch is not None else next(iter(context.probe), None)
    if batch is None:
        raise MethodError("there is no batch to take gradients of; call session.loss(batch), or give a probe.")
    noted: dict[str, list[nn.Module]] = {name: [] for name in layers}
    edits: list[DepthEdit] = []
    for name, one in layers.items():
        for edit in seeded(one, derived_seed(context.seed, name)):
            assert isinstance(edit, Insert)
            edits.append(replace(edit, layer=_Noted(edit.layer, noted[name])))
    with context.structure.tried(Plan((), depth=tuple(edits))), without_a_trace(context.structure.model):
        new = {name: [p for module in built for p in module.parameters()] for name, built in noted.items()}
        asked = [parameter for one in new.values() for parameter in one if parameter.requires_grad]
        with torch.enable_grad():
            gradients = torch.autograd.grad(context.loss(batch), asked, allow_unused=True)
    squares = {
        id(parameter): 0.0 if one is None else float(one.double().square().sum())
        for parameter, one in zip(asked, gradients, strict=True)
    }
    return {name: sum(squares.get(id(parameter), 0.0) for parameter in one) for name, one in new.items()}


def _fits(context: Context, candidate: Candidate) -> bool:
    try:
        context.structure.check(Plan((), depth=candidate.edits))
    except (PlanError, SurgeryError):
        return False
    return True


@dataclass(frozen=True)
class _Noted(Recipe):
    """Another recipe, which lays by what it builds: for a plan that is only tried out, and never written down."""

    kind: ClassVar[str] = "noted"
    recipe: Recipe
    built: list[nn.Module] = field(compare=False)

    def build(self, module: Lookup, at: str) -> nn.Module:
        """What the other one builds."""
        self.built.append(self.recipe.build(module, at))
        return self.built[-1]

    def promise(self, topology: Topology, module: Lookup, at: str, *, before: bool) -> Promise:
        """As the other one."""
        return self.recipe.promise(topology, module, at, before=before)

    def silent(self) -> tuple[str, ...] | None:
        """As the other one."""
        return self.recipe.silent()

    def origins(self) -> Mapping[str, str]:
        """As the other one."""
        return self.recipe.origins()


__all__ = ["Sensitivity", "gains"]

"""Layers that are not there, asked by putting them in for a moment: what gradient would their parameters get?

New layers that begin as nothing do not see each other, so that one pass forward and backward answers for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import ClassVar, TypeVar

import torch
from torch import nn

from espalier.edit.depth_edits import DepthEdit, Insert
from espalier.edit.plan import Plan
from espalier.edit.promise import Promise
from espalier.edit.recipes.base import Lookup, Recipe
from espalier.errors import MethodError, PlanError, SurgeryError
from espalier.graph.topology import Topology
from espalier.measure.stats import without_a_trace
from espalier.parts.candidate import Candidate, seeded
from espalier.parts.goal import Goal, Scores
from espalier.parts.score import Context, derived_seed

T = TypeVar("T")


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
    batch = context.batch if context.batch is not None else next(iter(context.probe), None)
    if batch is None and layers:
        raise MethodError("there is no batch to take gradients of; call session.loss(batch), or give a probe.")

    def squares(new: Mapping[str, nn.Module]) -> dict[str, float]:
        asked = {name: [one for one in module.parameters() if one.requires_grad] for name, module in new.items()}
        flat = [one for parameters in asked.values() for one in parameters]
        if not flat:  # copies of blocks that do not train
            return dict.fromkeys(asked, 0.0)
        with torch.enable_grad():
            gradients = iter(torch.autograd.grad(context.loss(batch), flat, allow_unused=True))
        return {
            name: sum(0.0 if one is None else float(one.double().square().sum()) for one in islice(gradients, len(few)))
            for name, few in asked.items()
        }

    return dict.fromkeys(layers, -math.inf) | together(context, layers, squares)


def together(
    context: Context, layers: Mapping[str, Candidate], ask: Callable[[Mapping[str, nn.Module]], Mapping[str, T]]
) -> dict[str, T]:
    """What is to be said of new layers by name, by someone who finds all of them in place, and nothing left out.

    Of layers that surgery refuses nothing is said. Whoever asks may train the new modules; what happens to anything
    else leaves no trace.
    """
    if not layers:
        return {}
    try:
        return dict(_asked(context, layers, ask))
    except (PlanError, SurgeryError):
        able = {name: one for name, one in layers.items() if len(layers) > 1 and _fits(context, one)}
        return dict(_asked(context, able, ask)) if able else {}


def _asked(
    context: Context, layers: Mapping[str, Candidate], ask: Callable[[Mapping[str, nn.Module]], Mapping[str, T]]
) -> Mapping[str, T]:
    noted: dict[str, list[nn.Module]] = {name: [] for name in layers}
    edits: list[DepthEdit] = []
    for name, one in layers.items():
        for edit in seeded(one, derived_seed(context.seed, name)):
            assert isinstance(edit, Insert)
            edits.append(replace(edit, layer=_Noted(edit.layer, noted[name])))
    model = context.structure.model
    with context.structure.tried(Plan((), depth=tuple(edits))), without_a_trace(model):
        live = set(map(id, model.modules()))  # copies that follow the model have built modules of their own
        return ask({name: next(one for one in built if id(one) in live) for name, built in noted.items()})


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


__all__ = ["Sensitivity", "gains", "together"]

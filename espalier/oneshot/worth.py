"""What units are worth without labels: how much the outputs would change without them, on inputs that were seen.

With e drawn from N(0, 1) for every output, the gradient of <f(x), e> by the weights w that read a unit is J^T e, so
that E <J^T e, w>^2 = |J w|^2: the squared change of the outputs if the unit goes, to the first order. It is Taylor
pruning (Molchanov et al. 2019) with the metric of the outputs in place of the gradient of a loss, which vanishes in a
trained network and of which only the user's `train` knows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from espalier.parts.budget import FLOPs
from espalier.parts.goal import Cap, Goal, Scores
from espalier.parts.score import Context, GroupNorm, derived_seed
from espalier.parts.units.taylor import Taylor
from espalier.structure import Structure

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_KEPT, DRAWS = 4, 4
"""Calls that are looked at; and directions that the outputs of each are looked at in."""


@contextmanager
def watched(model: nn.Module, seed: int) -> Iterator[list[Inputs]]:
    """While the body runs, keep what the model is called with: copies of some of the calls, drawn at random."""
    kept: list[Inputs] = []
    draw, calls = random.Random(seed), 0

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        place = len(kept) if len(kept) < _KEPT else draw.randrange(calls)
        if place < _KEPT:
            copied = tree_map(lambda one: one.detach().clone() if isinstance(one, Tensor) else one, (args, kwargs))
            kept[place : place + 1] = [copied]

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield kept
    finally:
        handle.remove()


@dataclass(frozen=True)
class Draw:
    """Inputs, and the seed of the direction that their outputs are looked at in."""

    inputs: Inputs
    seed: int


def context_of(structure: Structure, axes: Sequence[str], inputs: Sequence[Inputs], seed: int) -> Context:
    """What scores and refitting look at."""
    draws = [Draw(one, derived_seed(seed, number)) for number in range(DRAWS) for one in inputs]

    def projected(draw: Draw) -> Tensor:
        args, kwargs = draw.inputs
        generator = torch.Generator().manual_seed(draw.seed)
        total = torch.zeros(())
        for one in tree_leaves(structure.model(*args, **kwargs)):
            if isinstance(one, Tensor) and torch.is_floating_point(one):
                direction = torch.randn(one.shape, generator=generator).to(one.device)
                total = total.to(one.device) + (one.float() * direction).sum()
        return total

    return Context(structure, tuple(axes), 0, 0, 0.0, seed, projected, None, draws)


def worth_of(context: Context) -> Scores:
    """The value of every unit of the axes of a context; by the norms of weights where no inputs were seen."""
    topology = context.structure.topology
    sizes = {name: topology.sizes[topology.by_name[name].number] for name in context.axes}
    goal = Goal("prune", sizes, sizes, sizes, {}, Cap(FLOPs(1).cost(topology, context.axes), 1))
    if not context.probe:
        return GroupNorm()(context, goal)
    return Taylor("squared", True, len(context.probe))(context, goal)


@dataclass(frozen=True)
class Known:
    """Scores that were computed before, for as long as the sizes are those of then."""

    values: Mapping[str, Tensor]

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        return Scores({name: self.values[name] for name in goal.sizes})


__all__ = ["DRAWS", "Draw", "Inputs", "Known", "context_of", "watched", "worth_of"]

"""What layers and cells that there are are worth: how much they change what passes through them, or the loss."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.edit.depth_edits import Remove
from espalier.errors import MethodError
from espalier.measure.stats import without_a_trace
from espalier.parts.checks import check_count
from espalier.parts.depth.ends import features, watched
from espalier.parts.goal import Goal, Scores
from espalier.parts.score import Context
from espalier.parts.units.taylor import batches_of


@dataclass(frozen=True)
class Influence:
    """Block influence: 1 - cos(x, y), averaged over samples and positions, of what goes into a layer and comes out.

    The angle is between the features of one position (Men et al. 2024, ShortGPT, arXiv:2403.03853), in eval mode. It
    says nothing of a branch that leaves zero, whose input is not what its result is added to.
    """

    batches: int = 4
    """Batches to look at, at most: held-out ones, or the last training batch where there are none."""

    def __post_init__(self) -> None:
        check_count("batches", self.batches)

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        for name, one in goal.layers.items():
            if any(isinstance(edit, Remove) and edit.leaves == "zero" for edit in one.edits):
                raise MethodError(f"{name} is a branch, which block influence does not judge; take another score.")
        model, wide = context.structure.model, features(context.structure, goal.layers)
        found: dict[str, list[Tensor]] = {name: [] for name in goal.layers}

        def seen(name: str, entry: Tensor, exit: Tensor) -> None:
            found[name].append(1 - cosines(entry, exit, wide[name]).mean().cpu())

        with watched(context.structure, goal.layers, seen), without_a_trace(model):
            for module in model.modules():
                module.training = False
            for batch in batches_of(context, self.batches):
                context.loss(batch)
        _check_ran(goal.layers, {name for name, values in found.items() if values})
        return Scores({name: torch.stack(values).mean(0, keepdim=True) for name, values in found.items()})


@dataclass(frozen=True)
class GateTaylor:
    """|dL/dz| of a gate z = 1 on what a layer adds to what takes its place: |sum of g (y - x)|, or |sum of g y|.

    x is what goes in, y what comes out, g the gradient of the loss by y. To the first order it is what the loss changes
    by without the layer: Taylor's criterion (Molchanov et al. 2017, arXiv:1611.06440) for a unit that is a whole layer.
    The absolute value is taken for every batch, and then averaged. In eval mode.
    """

    batches: int = 4

    def __post_init__(self) -> None:
        check_count("batches", self.batches)

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        model, batches = context.structure.model, batches_of(context, self.batches)
        zero = {
            name
            for name, one in goal.layers.items()
            if any(isinstance(edit, Remove) and edit.leaves == "zero" for edit in one.edits)
        }
        total = {name: torch.zeros(1, dtype=torch.float64) for name in goal.layers}
        for batch in batches:
            gates: dict[str, Tensor] = {}

            def seen(name: str, entry: Tensor, exit: Tensor, gates: dict[str, Tensor] = gates) -> Tensor:
                gates[name] = torch.zeros((), dtype=exit.dtype, device=exit.device, requires_grad=True)
                return exit + gates[name] * (exit if name in zero else exit - entry)

            with watched(context.structure, goal.layers, seen), without_a_trace(model):
                for module in model.modules():
                    module.training = False
                with torch.enable_grad():
                    loss = context.loss(batch)
                    _check_ran(goal.layers, gates)
                    found = torch.autograd.grad(loss, [gates[name] for name in total], allow_unused=True)
            for name, one in zip(total, found, strict=True):
                total[name] += 0 if one is None else one.double().abs().cpu()
        return Scores({name: one / len(batches) for name, one in total.items()})


def cosines(entry: Tensor, exit: Tensor, wide: tuple[int, ...]) -> Tensor:
    """The cosine at each sample and position; 1 where both are zero."""
    last = [*range(-len(wide), 0)]
    one, other = (tensor.double().movedim(wide, last).flatten(-len(wide)) for tensor in (entry, exit))
    norms = one.norm(dim=-1) * other.norm(dim=-1)
    products = (one * other).sum(-1)
    return torch.where(norms > 0, products / norms, (one == other).all(-1).to(products))


def _check_ran(names: Iterable[str], seen: Collection[str]) -> None:
    for name in names:
        if name not in seen:
            raise MethodError(f"{name} did not run on these batches; leave it out with axes=[...].")


__all__ = ["GateTaylor", "Influence", "cosines"]

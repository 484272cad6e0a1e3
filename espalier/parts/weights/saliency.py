"""Scores of single weights: one number per entry of each parameter, higher = keep it, or let it live first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.graph.named_tensors import tensor_table
from espalier.parts.checks import check_count
from espalier.parts.goal import Goal, Scores
from espalier.parts.score import Context, shares
from espalier.parts.units.taylor import batches_of, gradients_of

By = Literal["gradient", "gradient_times_weight"]


@dataclass(frozen=True)
class Size:
    """|w|; with `share`, w^2 / sum of v^2 over the weights v of the parameter that are as large or larger.

    The share makes parameters comparable (Lee et al. 2021, LAMP, arXiv:2010.07931): cutting all weights below one
    share changes the product of layers least in the worst case.
    """

    share: bool = False

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        sizes = {name: tensor.detach().abs() for name, tensor in live_tensors(context, goal).items()}
        if self.share:
            sizes = {name: shares(one.flatten().cpu()).view(one.shape) for name, one in sizes.items()}
        return Scores(sizes)


@dataclass(frozen=True)
class Slope:
    """|g|, or |g w|, with g the gradient of the mean loss over some batches, in eval mode.

    Gradients are dense: those of weights that masks hold at zero are among them, since masks are no part of the
    forward. They cost a training step per batch, only when an event asks.
    """

    by: By = "gradient"
    batches: int = 1
    """Batches to look at, at most: held-out ones, or the last training batch where there are none."""

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise MethodError(f"by: expected one of {', '.join(get_args(By))}, found {self.by!r}.")
        check_count("batches", self.batches)

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        tensors = live_tensors(context, goal)
        total = {name: torch.zeros_like(one, requires_grad=False) for name, one in tensors.items()}
        for batch in batches_of(context, self.batches):
            found = gradients_of(context, list(tensors.values()), batch)
            for name, gradient in zip(tensors, found, strict=True):
                total[name] += gradient
        if self.by == "gradient_times_weight":
            total = {name: one * tensors[name].detach() for name, one in total.items()}
        return Scores({name: one.abs() for name, one in total.items()})


@dataclass(frozen=True)
class AnyWeight:
    """Uniform random numbers."""

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        return Scores(
            {name: torch.rand(one.live.shape, generator=context.generator(name)) for name, one in goal.weights.items()}
        )


def live_tensors(context: Context, goal: Goal) -> dict[str, Tensor]:
    """The parameters of a goal at the level of weights."""
    table = tensor_table(context.structure.model).tensors
    return {name: table[name] for name in goal.weights}


__all__ = ["AnyWeight", "By", "Size", "Slope", "live_tensors"]

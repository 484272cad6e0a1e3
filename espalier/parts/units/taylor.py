"""What the loss would change by without a unit, to the first order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.graph.named_tensors import tensor_table
from espalier.measure.stats import without_a_trace
from espalier.parts.goal import Goal, Scores
from espalier.parts.score import Context
from espalier.parts.units.scales import Place, holders

Order = Literal["absolute", "squared"]


@dataclass(frozen=True)
class Taylor:
    """|<g, w>| or <g, w>^2 over the weights w that read a unit and the gradient g of the loss by them.

    Without its readers a unit is gone, so <g, w> is what the loss falls by, to the first order, if the unit goes:
    whatever lies before the readers, and without counting twice what the unit is made by. It is the sum over positions
    and samples of the unit's activation times its gradient (Molchanov et al. 2017); squared it is what Molchanov et al.
    2019 use. Where no weights read the axis, w are those that it is made by.

    The absolute value or the square is taken for every batch and then averaged, so that batches do not cancel. The
    loss is that of the network in eval mode, in which a batch norm is a fixed map.
    """

    order: Order = "squared"
    group: bool = True
    """Sum over the weights of a unit before the absolute value or the square; False: after it."""
    batches: int = 4
    """Batches to look at, at most: held-out ones, or the last training batch where there are none."""

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise MethodError(f"order: expected 'absolute' or 'squared', found {self.order!r}.")
        if isinstance(self.batches, bool) or not isinstance(self.batches, int) or self.batches < 1:
            raise MethodError(f"batches: expected a whole number of at least 1, found {self.batches!r}.")

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        places = {axis: holders(context.structure.topology, axis) for axis in goal.sizes}
        table = tensor_table(context.structure.model).tensors
        names = list(dict.fromkeys(place.tensor for found in places.values() for place in found))
        batches = batches_of(context, self.batches)
        total = {axis: torch.zeros(size, dtype=torch.float64) for axis, size in goal.sizes.items()}
        for batch in batches:
            gradients = gradients_of(context, [table[name] for name in names], batch)
            with torch.no_grad():
                products = {name: table[name] * one for name, one in zip(names, gradients, strict=True)}
            for axis, found in places.items():
                total[axis] += self._unit_values(found, products, len(total[axis]))
        return Scores({axis: one / len(batches) for axis, one in total.items()})

    def _unit_values(self, places: Sequence[Place], products: dict[str, Tensor], count: int) -> Tensor:
        def raised(values: Tensor) -> Tensor:
            return values.abs() if self.order == "absolute" else values.square()

        sums = [
            place.sums(products[place.tensor] if self.group else raised(products[place.tensor]), count)
            for place in places
        ]
        total = torch.stack([one.double().cpu() for one in sums]).sum(0)
        return raised(total) if self.group else total


def batches_of(context: Context, most: int) -> Sequence[Any]:
    """The held-out batches, at most so many, or the last training batch. Raises MethodError where there are none."""
    if context.probe:
        return context.probe[:most]
    if context.batch is None:
        raise MethodError(
            "there is no batch to judge units by: give the session probe=[...], or let session.loss(batch) be the loss."
        )
    return (context.batch,)


def gradients_of(context: Context, tensors: Sequence[Tensor], batch: Any) -> list[Tensor]:
    """Gradients of the loss in eval mode; zero where it does not depend on a tensor. No `.grad` is touched."""
    model = context.structure.model
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    with without_a_trace(model):
        for module in model.modules():
            module.training = False
        try:
            for tensor in frozen:
                tensor.requires_grad_(True)
            with torch.enable_grad():
                found = torch.autograd.grad(context.loss(batch), tensors, allow_unused=True)
        finally:
            for tensor in frozen:
                tensor.requires_grad_(False)
    return [torch.zeros_like(one) if grad is None else grad for one, grad in zip(tensors, found, strict=True)]


__all__ = ["Order", "Taylor", "batches_of", "gradients_of"]

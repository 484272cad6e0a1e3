"""Weights times what they read: the size of what each weight contributes, over some batches.

    |w_ij| * ||x_j||,    x_j all activations that input j of the layer had

needs no gradients, only activations, which hooks on linear and convolutional modules see; they are gone afterwards. For
a convolution x_j is input channel j at all positions. By single weights it is Wanda (Sun et al. 2023,
arXiv:2306.11695); summed over all weights that read a unit it is Wanda-sp (An et al. 2024, arXiv:2312.11983).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from espalier.errors import MethodError
from espalier.graph.dims import labels
from espalier.graph.named_tensors import tensor_table
from espalier.measure.stats import without_a_trace
from espalier.parts.checks import check_count
from espalier.parts.goal import Goal, Scores
from espalier.parts.score import Context
from espalier.parts.units.scales import Place
from espalier.parts.units.taylor import batches_of


@dataclass(frozen=True)
class ReadInput:
    """The sum of |w| ||x|| over all weights that read a unit, per weight; eval mode."""

    batches: int = 4
    """Batches to look at, at most: held-out ones, or the last training batch where there are none."""

    def __post_init__(self) -> None:
        check_count("batches", self.batches)

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        topology = context.structure.topology
        table = tensor_table(context.structure.model).tensors
        places: dict[str, list[Place]] = {}
        for axis in goal.sizes:
            record = topology.by_name[axis]
            found = [slot for slot in record.slots if slot[2] == "contract" and slot[0] in topology.parameters]
            if not found:
                raise MethodError(f"{axis}: no weights read its units; leave it out with axes=[...].")
            places[axis] = [
                Place(name, dim, torch.from_numpy(labels(topology.tensors[name][dim], topology.sizes, record.number)))
                for name, dim, _ in found
            ]
        tensors = {one.tensor: table[one.tensor] for found_ in places.values() for one in found_}
        products = times_inputs(context, tensors, self.batches)
        return Scores(
            {
                axis: torch.stack(
                    [
                        one.sums(products[one.tensor], goal.sizes[axis]).cpu() / products[one.tensor].numel()
                        for one in ones
                    ]
                ).sum(0)
                for axis, ones in places.items()
            }
        )


def times_inputs(context: Context, tensors: Mapping[str, Tensor], batches: int) -> dict[str, Tensor]:
    """|w| times the norm of what it reads, for parameters by name, over at most so many batches in eval mode.

    Raises MethodError for a parameter that is the weight of no linear or convolutional module that runs.
    """
    readers = {name: _readers(context.structure.model, name, tensor) for name, tensor in tensors.items()}
    squares: dict[nn.Module, Tensor] = {}

    def seen(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        found = _input_squares(module, inputs[0])
        squares[module] = squares[module] + found if module in squares else found

    modules = dict.fromkeys(module for found in readers.values() for module in found)
    hooks = [module.register_forward_pre_hook(seen) for module in modules]
    try:
        with without_a_trace(context.structure.model):
            for module in context.structure.model.modules():
                module.training = False
            for batch in batches_of(context, batches):
                context.loss(batch)
    finally:
        for hook in hooks:
            hook.remove()
    products = {}
    for name, tensor in tensors.items():
        found = [_factors(module, squares[module].sqrt()) for module in readers[name] if module in squares]
        if not found:
            raise MethodError(f"{name}: its module did not run on these batches; leave it out with axes=[...].")
        products[name] = tensor.detach().abs().double() * torch.stack(found).sum(0)
    return products


def _readers(model: nn.Module, name: str, tensor: Tensor) -> list[nn.Module]:
    """The modules that multiply activations with a parameter."""
    found: list[nn.Module] = [
        module
        for module in model.modules()
        if isinstance(module, (nn.Linear, _ConvNd))
        and not isinstance(module, _ConvTransposeNd)
        and module.weight is tensor
    ]
    if not found:
        raise MethodError(
            f"{name}: only what linear and convolutional modules read is known, and this is the weight of "
            "none; leave it out with axes=[...]."
        )
    return found


def _input_squares(module: nn.Module, inputs: Tensor) -> Tensor:
    """Sum of squares of every input unit."""
    dim = inputs.dim() - 1
    if isinstance(module, _ConvNd):
        dim -= len(module.kernel_size)
    others = [other for other in range(inputs.dim()) if other != dim]
    squares = inputs.detach().double().square()
    return squares.sum(others) if others else squares


def _factors(module: nn.Module, norms: Tensor) -> Tensor:
    """The norms in a form that broadcasts to the weight: (outputs, inputs per group, 1...)."""
    if not isinstance(module, _ConvNd):
        return norms[None, :]
    per_group = norms.view(module.groups, -1).repeat_interleave(module.out_channels // module.groups, 0)
    return per_group.view(*per_group.shape, *(1 for _ in module.kernel_size))


__all__ = ["ReadInput", "times_inputs"]

"""Regularisers: what methods add to the training loss so that units part into those worth keeping and others.

Their gradients are known, so nothing of them is recorded by autograd: a penalty costs one pass over its tensors where
the loss is made and one where it is differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.graph.dims import IntArray
from espalier.graph.topology import Topology
from espalier.parts.names import Names
from espalier.parts.score import Context
from espalier.parts.units.folded import FoldedScales
from espalier.parts.units.polarization import polarization, polarization_gradient
from espalier.parts.units.scales import LiveTensor, place_of

On = Literal["weights", "scales", "both"]
_ROLES: Mapping[str, frozenset[str]] = {
    "weights": frozenset({"produce", "filter", "group", "contract"}),
    "scales": frozenset({"scale"}),
    "both": frozenset({"produce", "filter", "group", "contract", "scale"}),
}


class _Known(torch.autograd.Function):
    """A number whose gradients by some tensors are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Callable[[], Sequence[Tensor]], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch._foreach_mul(list(ctx.gradients()), upstream)


class _SumOfAbsolutes(torch.autograd.Function):
    """The sum of |w| over some tensors, within masks where there are any."""

    @staticmethod
    def forward(ctx: Any, masks: Sequence[Tensor | None], *tensors: Tensor) -> Tensor:
        ctx.masks = masks
        ctx.save_for_backward(*tensors)
        inside = [one if mask is None else one * mask for one, mask in zip(tensors, masks, strict=True)]
        return torch.stack(torch._foreach_norm(inside, 1)).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        signs = torch._foreach_sign(ctx.saved_tensors)
        torch._foreach_mul_(signs, upstream)
        return None, *(one if mask is None else one.mul_(mask) for one, mask in zip(signs, ctx.masks, strict=True))


class WeightsOfUnits:
    """The memory of `L1`: where the weights are, looked up again after every edit. Nothing has to be saved."""

    def __init__(self) -> None:
        self._topology: Topology | None = None
        self._tensors: list[LiveTensor] = []
        self._masks: list[Tensor | None] = []

    def follow(self, units: Mapping[str, IntArray], /) -> None:
        """What is where is looked up again."""
        self._topology = None

    def rename(self, names: Names, /) -> None:
        """Likewise."""
        self._topology = None

    def after_step(self, context: Context, /) -> None:
        """Nothing to do."""

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Any], /) -> None:
        """Nothing. Raises ValueError for a state that is not empty."""
        if state:
            raise ValueError(f"expected an empty state, found {sorted(state)}")

    def live(self, context: Context, roles: frozenset[str]) -> tuple[list[Tensor], list[Tensor | None]]:
        """The trainable tensors that hold weights of the units of the axes, and masks of those; None for all."""
        if self._topology is not context.structure.topology:
            self._look_up(context, roles)
        found = [(live(), mask) for live, mask in zip(self._tensors, self._masks, strict=True)]
        found = [(tensor, mask) for tensor, mask in found if tensor.requires_grad]
        return [tensor for tensor, _ in found], [mask for _, mask in found]

    def _look_up(self, context: Context, roles: frozenset[str]) -> None:
        topology = self._topology = context.structure.topology
        masks: dict[str, Tensor] = {}
        for axis in context.axes:
            for tensor, dim, role in topology.by_name[axis].slots:
                if role in roles and tensor in topology.parameters:
                    shape = topology.shape(tensor)
                    units = place_of(topology, axis, tensor, dim).units
                    inside = (units >= 0).view([-1 if other == dim else 1 for other in range(len(shape))])
                    masks[tensor] = masks.get(tensor, torch.zeros(shape, dtype=torch.bool)) | inside
        self._tensors = [LiveTensor(context.structure.model, name) for name in masks]
        self._masks = [
            None if bool(mask.all()) else mask.to(live().device)
            for live, mask in zip(self._tensors, masks.values(), strict=True)
        ]


@dataclass(frozen=True)
class RememberWeights:
    """Makes the memory of a method with the penalty `L1`."""

    def __call__(self) -> WeightsOfUnits:
        return WeightsOfUnits()


@dataclass(frozen=True)
class L1:
    """strength * the sum of |w| over all weights that make or read a unit of the method's axes, each of them once.

    With `on` it is the sum over scales instead (of norms, layer scales), or over both. With the memory
    `RememberWeights` it looks for them after edits only, without at every call.
    """

    strength: float
    on: On = "weights"

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.on not in get_args(On):
            raise MethodError(f"on: expected one of {', '.join(get_args(On))}, found {self.on!r}.")

    def __call__(self, context: Context, /) -> Tensor | None:
        places = context.memory if isinstance(context.memory, WeightsOfUnits) else WeightsOfUnits()
        tensors, masks = places.live(context, _ROLES[self.on])
        if not tensors or self.strength == 0:
            return None
        total: Tensor = _SumOfAbsolutes.apply(masks, *tensors)  # type: ignore[no-untyped-call]
        return self.strength * total


@dataclass(frozen=True)
class ScalesL1:
    """strength * the sum of |scale| over all units of the method's axes (Liu et al. 2017, network slimming).

    Scales are those of norms; an axis without any gets the folded ones of `FoldedScales`, the memory that this needs.
    """

    strength: float

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def __call__(self, context: Context, /) -> Tensor | None:
        def value_and_gradient(scales: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
            return scales.abs().sum(), scales.sign()

        return _of_scales(context, self.strength, None, value_and_gradient)


@dataclass(frozen=True)
class Polarization:
    """strength * the polarization of all scales of the method's axes together (`espalier.parts.units.polarization`).

    Scales are those of norms; an axis without any gets the folded ones of `FoldedScales`, the memory that this needs,
    which also keeps all of them in [0, a].
    """

    strength: float
    t: float
    by_flops: tuple[float, float] | None = None
    """Smallest and largest weight of an axis, by the FLOPs of one of its units; None for 1 everywhere."""

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if not (math.isfinite(self.t) and self.t >= 0):
            raise MethodError(f"t: expected a number of at least 0, found {self.t!r}.")
        if self.by_flops is not None:
            object.__setattr__(self, "by_flops", tuple(self.by_flops))
            if len(self.by_flops) != 2 or not 0 < self.by_flops[0] <= self.by_flops[1] < math.inf:
                raise MethodError(
                    f"by_flops: expected (smallest, largest) weight, both above 0, found {self.by_flops!r}."
                )

    def __call__(self, context: Context, /) -> Tensor | None:
        def value_and_gradient(scales: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
            return polarization(scales, self.t, weights), polarization_gradient(scales, self.t, weights)

        return _of_scales(context, self.strength, self.by_flops, value_and_gradient)


def check_strength(strength: float) -> None:
    """Raise MethodError if that is no factor for a penalty."""
    if not (math.isfinite(strength) and strength >= 0):
        raise MethodError(f"strength: expected a number of at least 0, found {strength!r}.")


def _of_scales(
    context: Context,
    strength: float,
    by_flops: tuple[float, float] | None,
    value_and_gradient: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
) -> Tensor | None:
    """A penalty on all scales in a row: on those of norms through autograd, on folded ones through their memory."""
    memory = context.memory
    if not isinstance(memory, FoldedScales):
        raise MethodError(
            f"a penalty on scales needs its memory, found {memory!r}: give the method memory=Folded(...), and use it "
            "in a Session, which keeps it."
        )
    scales = memory.scales(context)
    flat = scales.values() + memory.values()
    if not flat or strength == 0:
        return None
    with torch.no_grad():
        row = torch.cat(flat)
        value, gradient = value_and_gradient(row, None if by_flops is None else scales.weights(by_flops, row))
        gradient *= strength
    own, folded = torch.split(gradient, [len(gradient) - memory.count, memory.count])
    memory.expect(folded)
    parameters = scales.parameters()
    if not parameters:
        return None
    total: Tensor = _Known.apply(strength * value, lambda: scales.gradients(own), *parameters)  # type: ignore[no-untyped-call]
    return total


__all__ = ["L1", "On", "Polarization", "RememberWeights", "ScalesL1", "WeightsOfUnits", "check_strength"]

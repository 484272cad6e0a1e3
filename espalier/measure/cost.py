"""Parameters and floating-point operations as polynomials in the sizes of the axes.

One multiply-add counts as two operations. Matrix products, convolutions and attention are counted, as
`torch.utils.flop_counter` counts them; elementwise operators, norms and pooling are not. The costs of a network at any
other sizes follow without running it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from espalier.graph.dims import Dim, Sizes, axes_of, size_of
from espalier.graph.topology import Topology


@dataclass(frozen=True, slots=True)
class Cost:
    """What a network, or one unit of it, costs."""

    parameters: int
    """Number of trainable and frozen parameters; tied ones once, buffers not at all."""
    flops: int
    """Floating-point operations of one eval-mode forward pass on the example inputs."""

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.parameters - other.parameters, self.flops - other.flops)

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters, {self.flops:,} FLOPs"


def cost_of(topology: Topology, sizes: Mapping[int, int] | None = None) -> Cost:
    """The cost of the whole network, at its present or at other axis sizes."""
    at = topology.sizes if sizes is None else {**topology.sizes, **sizes}
    parameters = sum(_volume(topology.tensors[name], at) for name in topology.parameters)
    flops = sum(factor * _volume(dims, at) for _, factor, dims in topology.predictions[0].costs)
    return Cost(parameters, flops)


def axis_cost(topology: Topology, number: int) -> Cost:
    """What one more unit of an axis costs at the present sizes, everything coupled to it included."""
    at = dict(topology.sizes)
    more = {**at, number: at[number] + 1}
    parameters = flops = 0
    for name in topology.parameters:
        dims = topology.tensors[name]
        if _contains(dims, number):
            parameters += _volume(dims, more) - _volume(dims, at)
    for _, factor, dims in topology.predictions[0].costs:
        if _contains(dims, number):
            flops += factor * (_volume(dims, more) - _volume(dims, at))
    return Cost(parameters, flops)


def _volume(dims: tuple[Dim, ...], sizes: Sizes) -> int:
    return prod(size_of(dim, sizes) for dim in dims)


def _contains(dims: tuple[Dim, ...], number: int) -> bool:
    return any(number in axes_of(dim) for dim in dims)

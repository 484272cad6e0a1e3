"""Gates on the single weights of a parameter. Where one is shut the weight is masked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.edit.tensors import gather
from espalier.graph.dims import IntArray, axes_of, source
from espalier.graph.topology import Topology
from espalier.parts.gates.trail import Units


@dataclass(frozen=True)
class Weights:
    """All weights of a parameter, in row-major order; their own spread."""

    tensor: str

    @property
    def key(self) -> str:
        """The name of their gates: that of the parameter."""
        return self.tensor

    def spread(self, values: Tensor, shape: Sequence[int], /) -> Tensor:
        """Every value at its weight."""
        return values.view(tuple(shape))

    def count(self, shape: Sequence[int], /) -> int:
        """One for every weight."""
        return math.prod(shape)

    def shut(self, shape: Sequence[int], gone: Iterable[int]) -> Tensor:
        """Of booleans, of the tensor's shape: what these gates, shut, hold at zero."""
        flat = torch.zeros(math.prod(shape), dtype=torch.bool)
        flat[list(gone)] = True
        return flat.view(tuple(shape))

    def followed(self, topology: Topology, units: Units) -> IntArray | None:
        """As `espalier.parts.gates.columns.Columns.followed`, for weights."""
        name = topology.aliases.get(self.tensor, self.tensor)
        changes = {topology.by_name[axis].number: one for axis, one in units.items()}
        dims = topology.tensors[name]
        sources = [
            None if changes.keys().isdisjoint(axes_of(dim)) else source(dim, topology.sizes, changes) for dim in dims
        ]
        if all(one is None for one in sources):
            return None
        shape = topology.shape(name)
        return gather(torch.arange(math.prod(shape)).view(shape), sources, -1).flatten().numpy()


__all__ = ["Weights"]

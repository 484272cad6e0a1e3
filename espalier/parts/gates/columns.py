"""Gates on single positions along one dimension of one parameter, whatever else is coupled to them.

The paper gates the 800 flattened inputs of LeNet5's first dense layer one by one, though 16 of them come from one
channel. Such gates have the name of the parameter and the number of the dimension, ``fc1.weight[1]``: its columns.
Where one is shut nothing leaves the network, but the column is masked (`espalier.parts.gates.masking`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from espalier.errors import PlanError
from espalier.graph.dims import IntArray, axes_of, source
from espalier.graph.named_tensors import tensor_table
from espalier.graph.topology import Topology
from espalier.parts.gates.places import GatePlace
from espalier.structure import Structure

_KEY = re.compile(r"(?P<tensor>.+)\[(?P<dim>\d+)\]")


@dataclass(frozen=True)
class Columns:
    """The positions along one dimension of a parameter; its own spread."""

    tensor: str
    dim: int

    @property
    def key(self) -> str:
        """The name of its gates."""
        return f"{self.tensor}[{self.dim}]"

    @classmethod
    def named(cls, key: str) -> Columns | None:
        """From `key`; None for a name of another kind."""
        found = _KEY.fullmatch(key)
        return None if found is None else cls(found["tensor"], int(found["dim"]))

    def spread(self, values: Tensor, shape: Sequence[int], /) -> Tensor:
        """One value for every position along the dimension; broadcasts to the shape."""
        return values.view(-1, *[1] * (len(shape) - self.dim - 1))

    def count(self, shape: Sequence[int], /) -> int:
        """One for every position along the dimension."""
        return shape[self.dim]

    def shut(self, shape: Sequence[int], gone: Iterable[int]) -> Tensor:
        """Of booleans, of the tensor's shape: what these gates, shut, hold at zero."""
        along = torch.zeros(shape[self.dim], dtype=torch.bool)
        along[list(gone)] = True
        return self.spread(along, shape).expand(tuple(shape))

    def followed(self, topology: Topology, units: Mapping[str, IntArray]) -> IntArray | None:
        """The old position that each one along the dimension comes from after an edit, -1 for a new one.

        Args:
            topology: before the edit.
            units: axis -> the old unit that each of its units comes from, -1 for a new one.

        None if the edit does not change the dimension.
        """
        expression = topology.tensors[topology.aliases.get(self.tensor, self.tensor)][self.dim]
        changes = {topology.by_name[axis].number: one for axis, one in units.items()}
        if changes.keys().isdisjoint(axes_of(expression)):
            return None
        return source(expression, topology.sizes, changes)


def column_place(structure: Structure, columns: Columns) -> GatePlace:
    """One gate for every position along a dimension of a parameter.

    Raises:
        PlanError: there is no such parameter or dimension, or it holds no floating-point numbers.
    """
    table, topology = tensor_table(structure.model), structure.topology
    first = topology.aliases.get(columns.tensor, columns.tensor)
    tensor = table.tensors.get(first)
    if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
        raise PlanError(f"{columns.tensor}: expected a parameter of floating-point numbers to gate, found none.")
    if columns.dim >= tensor.dim():
        raise PlanError(
            f"{columns.key}: expected a dimension of {columns.tensor} from 0 to {tensor.dim() - 1}, which has shape "
            f"{tuple(tensor.shape)}; found {columns.dim}."
        )
    return GatePlace(columns.key, tensor.shape[columns.dim], (Columns(first, columns.dim),))


__all__ = ["Columns", "column_place"]

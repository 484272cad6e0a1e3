"""Units that sleep: out of the live tensors, kept aside on the CPU, and put back as they were.

Every unit of every axis has a number of its own, which it keeps however its place changes. What is kept of a unit that
goes to sleep are its entries of every tensor, with the numbers of the units that each entry belongs to along all other
dimensions. When it wakes, they go back to where these units are by then; entries that belong to units which came
meanwhile start as surgery starts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espalier.graph.capture import tensor_table
from espalier.graph.dims import axes_of, labels
from espalier.graph.topology import Topology
from espalier.structure import Structure

Ids = Mapping[str, Sequence[int]]
"""Axis -> the numbers of its units, in order."""
Key = tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """What a tensor and the optimizer's state of it held for a unit."""

    tensor: str
    keys: tuple[tuple[Key, ...], ...]
    """For every dimension the units that its positions belong to."""
    values: Tensor
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def put(self, into: Tensor, values: Tensor, places: Sequence[Mapping[Key, int]]) -> Tensor:
        """A copy of a tensor with these entries in their places, as far as they have one."""
        kept, found = [], []
        for keys, at in zip(self.keys, places, strict=True):
            here = [index for index, key in enumerate(keys) if key in at]
            kept.append(torch.tensor(here, dtype=torch.int64))
            found.append(torch.tensor([at[keys[index]] for index in here], dtype=torch.int64))
        result = into.detach().clone()
        result[torch.meshgrid(*found, indexing="ij")] = values[torch.meshgrid(*kept, indexing="ij")].to(result)
        return result

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "tensor": self.tensor,
            "keys": [[list(key) for key in keys] for keys in self.keys],
            "values": _packed(self.values),
            "state": {name: _packed(one) for name, one in self.state.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Slice:
        """What `to_json` gave."""
        keys = tuple(tuple(tuple(map(int, key)) for key in one) for one in data["keys"])
        state = {str(name): _unpacked(one) for name, one in dict(data["state"]).items()}
        return cls(str(data["tensor"]), keys, _unpacked(data["values"]), state)


@dataclass(frozen=True)
class Sleeper:
    """A unit that sleeps."""

    number: int
    slices: tuple[Slice, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {"number": self.number, "slices": [one.to_json() for one in self.slices]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sleeper:
        """What `to_json` gave."""
        return cls(int(data["number"]), tuple(map(Slice.from_json, data["slices"])))


def kept(structure: Structure, axis: str, unit: int, ids: Ids) -> Sleeper:
    """What has to be kept of a unit that goes to sleep."""
    topology, tensors = structure.topology, tensor_table(structure.model).tensors
    state = {} if structure.optimizer is None else structure.optimizer.state
    record, found = topology.by_name[axis], []
    for name, dim in dict.fromkeys(slot[:2] for slot in record.slots):
        tensor = tensors[name].detach()
        if not tensor.is_floating_point():
            continue
        units = labels(topology.tensors[name][dim], topology.sizes, record.number)
        at = torch.from_numpy(np.flatnonzero(units == unit))
        keys = [_keys(topology, name, other, ids) for other in range(tensor.dim())]
        keys[dim] = [keys[dim][index] for index in at.tolist()]
        own = {
            key: one.index_select(dim, at.to(one.device)).cpu().clone()
            for key, one in state.get(tensors[name], {}).items()
            if isinstance(one, Tensor) and one.shape == tensor.shape
        }
        values = tensor.index_select(dim, at.to(tensor.device)).cpu().clone()
        found.append(Slice(name, tuple(map(tuple, keys)), values, own))
    return Sleeper(ids[axis][unit], tuple(found))


def values_of(
    sleepers: Sequence[Sleeper], topology: Topology, ids: Ids, made: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a network in which units wake, with all that was kept of them in its place.

    Args:
        sleepers: the units.
        topology: the network with them.
        ids: the numbers of its units.
        made: the tensors as surgery makes them.
    """
    found: dict[str, Tensor] = {}
    for sleeper in sleepers:
        for one in sleeper.slices:
            if one.tensor in made:
                places = _places(topology, one.tensor, ids)
                found[one.tensor] = one.put(found.get(one.tensor, made[one.tensor]), one.values, places)
    return found


def give_state_back(structure: Structure, sleepers: Sequence[Sleeper], ids: Ids) -> None:
    """Put the optimizer's state of units that woke where they are now."""
    topology, tensors = structure.topology, tensor_table(structure.model).tensors
    assert structure.optimizer is not None
    for sleeper in sleepers:
        for one in sleeper.slices:
            tensor = tensors.get(one.tensor)
            state = structure.optimizer.state.get(tensor, {}) if tensor is not None else {}
            for name, values in one.state.items():
                present = state.get(name)
                if isinstance(present, Tensor) and tensor is not None and present.shape == tensor.shape:
                    present.copy_(one.put(present, values, _places(topology, one.tensor, ids)))


def _places(topology: Topology, name: str, ids: Ids) -> list[dict[Key, int]]:
    rank = len(topology.tensors[name])
    return [{key: at for at, key in enumerate(_keys(topology, name, dim, ids))} for dim in range(rank)]


def _keys(topology: Topology, name: str, dim: int, ids: Ids) -> list[Key]:
    """For every position the numbers of the units that it belongs to, and which position of these it is."""
    expression = topology.tensors[name][dim]
    columns = []
    for number in sorted(axes_of(expression), key=lambda one: topology.axes[one].name):
        units = labels(expression, topology.sizes, number)
        numbers = np.array([*ids[topology.axes[number].name], -1])
        columns.append(numbers[units])
    seen: dict[Key, int] = {}
    found = []
    for position in range(topology.shape(name)[dim]):
        key = tuple(int(column[position]) for column in columns)
        seen[key] = seen.get(key, -1) + 1
        found.append((*key, seen[key]))
    return found


def _packed(tensor: Tensor) -> dict[str, Any]:
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "data": tensor.flatten().tolist(),
    }


def _unpacked(data: Mapping[str, Any]) -> Tensor:
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
    return torch.tensor(data["data"], dtype=dtype[data["dtype"]]).view(data["shape"])


__all__ = ["Ids", "Key", "Sleeper", "Slice", "give_state_back", "kept", "values_of"]

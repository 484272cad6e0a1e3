"""Units that sleep: out of the live tensors, kept aside on the CPU, and put back as they were.

Every unit of every axis has a number of its own, which it keeps however its place changes. What is kept of a unit that
goes to sleep are its entries of every tensor, with the numbers of the units that each entry belongs to along all other
dimensions. When it wakes, they go back to where these units are by then; entries that belong to units which came
meanwhile start as surgery starts them.

Values are those of the time at which a unit fell asleep: where others were scaled meanwhile, as queries are whose
head_dim changes (the softmax scale is held), it wakes as large as it was.

Positions are known by keys: along a dimension, one row of whole numbers per position, which are the numbers of the
units that it belongs to, and which of the positions of these units it is. Units that go to sleep together share the
keys of all other dimensions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espalier.edit.optimizer import dims_of_state
from espalier.edit.young import AGE, YOUTH, forget_if_grown_up
from espalier.graph.dims import IntArray, axes_of, labels
from espalier.graph.named_tensors import tensor_table
from espalier.graph.topology import Topology
from espalier.structure import Structure

Ids = Mapping[str, Sequence[int]]
"""Axis -> the numbers of its units, in order."""


@dataclass(frozen=True, eq=False)
class Entries:
    """Entries of a tensor, or of a state that an optimizer has of one."""

    dims: tuple[int | None, ...]
    """The dimensions of the tensor that these entries have, in order; None for one that was reduced to size 1."""
    values: Tensor

    def at(self, dim: int, rows: Tensor) -> Entries:
        """Some positions along a dimension of the tensor, which these entries have."""
        return Entries(self.dims, self.values.index_select(self.dims.index(dim), rows))

    def all_at(self, number: float) -> Entries:
        """As many entries, all of them that number."""
        return Entries(self.dims, torch.full_like(self.values, number))

    def to_state(self) -> list[Any]:
        """As what the state of a memory can hold."""
        return [list(self.dims), self.values]

    @classmethod
    def from_state(cls, data: Sequence[Any]) -> Entries:
        """What `to_state` gave. Raises TypeError or ValueError for anything else."""
        dims, values = data
        return cls(tuple(None if dim is None else int(dim) for dim in dims), _tensor(values))


@dataclass(frozen=True, eq=False)
class Slice:
    """What a tensor and the optimizer's state of it held for a unit; nobody changes the tensors of it."""

    tensor: str
    dim: int
    """The dimension along which it holds nothing but this unit."""
    keys: tuple[Tensor, ...]
    """For every dimension the keys of its positions, int32, shape (positions, numbers)."""
    values: Entries
    state: Mapping[str, Entries] = field(default_factory=dict)

    def at(self, dim: int, rows: Tensor) -> Slice:
        """Some positions along a dimension of the tensor; without state that does not have it."""
        keys = (*self.keys[:dim], self.keys[dim][rows], *self.keys[dim + 1 :])
        state = {key: one.at(dim, rows) for key, one in self.state.items() if dim in one.dims}
        return Slice(self.tensor, dim, keys, self.values.at(dim, rows), state)

    def to_state(self) -> dict[str, Any]:
        """As what the state of a memory can hold."""
        return {
            "tensor": self.tensor,
            "dim": self.dim,
            "keys": list(self.keys),
            "values": self.values.to_state(),
            "state": {key: one.to_state() for key, one in self.state.items()},
        }

    @classmethod
    def from_state(cls, data: Mapping[str, Any]) -> Slice:
        """What `to_state` gave. Raises KeyError, TypeError or ValueError for anything else."""
        keys = tuple(map(_tensor, data["keys"]))
        values = Entries.from_state(data["values"])
        state = {str(key): Entries.from_state(one) for key, one in dict(data["state"]).items()}
        for one in (values, *state.values()):
            expected = tuple(1 if dim is None else len(keys[dim]) for dim in one.dims)
            if tuple(one.values.shape) != expected:
                raise ValueError(f"{data['tensor']}: expected shape {expected}, found {tuple(one.values.shape)}")
        return cls(str(data["tensor"]), int(data["dim"]), keys, values, state)


@dataclass(frozen=True, eq=False)
class Sleeper:
    """A unit that sleeps."""

    number: int
    slices: tuple[Slice, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept of it but keys, which others share."""
        return sum(one.values.nbytes for each in self.slices for one in (each.values, *each.state.values()))

    def to_state(self) -> dict[str, Any]:
        """As what the state of a memory can hold."""
        return {"number": self.number, "slices": [one.to_state() for one in self.slices]}

    def without(self, places: Collection[tuple[str, int]]) -> Sleeper:
        """Without what these dimensions of tensors hold of it: there it begins as surgery lets it begin."""
        return replace(self, slices=tuple(one for one in self.slices if (one.tensor, one.dim) not in places))

    @classmethod
    def from_state(cls, data: Mapping[str, Any]) -> Sleeper:
        """What `to_state` gave. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(int(data["number"]), tuple(map(Slice.from_state, data["slices"])))


def kept(structure: Structure, axis: str, units: Iterable[int], ids: Ids) -> dict[int, Sleeper]:
    """What has to be kept of units of an axis that go to sleep: unit -> all of it."""
    topology, tensors = structure.topology, tensor_table(structure.model).tensors
    record, chosen = topology.by_name[axis], list(units)
    found: dict[int, list[Slice]] = {unit: [] for unit in chosen}
    for name, dim in dict.fromkeys(slot[:2] for slot in record.slots):
        tensor = tensors[name].detach()
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        at = labels(topology.tensors[name][dim], topology.sizes, record.number)
        rows = torch.from_numpy(np.flatnonzero(np.isin(at, chosen)))
        keys = [_keys(topology, name, other, ids) for other in range(tensor.dim())]
        keys[dim] = keys[dim][rows]
        values = Entries(tuple(range(tensor.dim())), tensor.index_select(dim, rows.to(tensor.device)).cpu())
        together = Slice(name, dim, tuple(keys), values, _state_at(structure, tensors[name], dim, rows))
        owners = torch.from_numpy(at)[rows]
        for unit, slices in found.items():
            slices.append(together.at(dim, (owners == unit).nonzero().flatten()))
    return {unit: Sleeper(ids[axis][unit], tuple(slices)) for unit, slices in found.items()}


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
    places = _Places(topology, ids)
    found: dict[str, Tensor] = {}
    for one in (one for sleeper in sleepers for one in sleeper.slices if one.tensor in made):
        if one.tensor not in found:
            found[one.tensor] = made[one.tensor].detach().clone()
        _put(found[one.tensor], one.values, places.of(one))
    return found


def give_state_back(structure: Structure, sleepers: Sequence[Sleeper], ids: Ids) -> None:
    """Put the optimizer's state of units that woke where they are now."""
    tensors, places = tensor_table(structure.model).tensors, _Places(structure.topology, ids)
    assert structure.optimizer is not None
    for one in (one for sleeper in sleepers for one in sleeper.slices if one.tensor in tensors):
        tensor = tensors[one.tensor]
        present = structure.optimizer.state.get(tensor, {}) if one.state else {}
        for key, entries in one.state.items():
            if isinstance(present.get(key), Tensor) and dims_of_state(key, present[key], tensor) == entries.dims:
                _put(present[key], entries, places.of(one))
        if AGE in present and AGE not in one.state:
            _put(present[AGE], one.values.all_at(YOUTH), places.of(one))
            forget_if_grown_up(present)
    structure.surgery.youth.look()


def handed_over(woken: Sequence[Sleeper], asleep: Sequence[Sleeper]) -> list[Sleeper]:
    """Units that go on sleeping, each with what those that woke kept of entries that belong to both.

    An entry of two units is kept by the one that fell asleep first. If that one wakes first it has no place yet, and
    waits with the other.
    """
    numbers = torch.tensor([one.number for one in asleep], dtype=torch.int32)
    more: dict[int, list[Slice]] = {}
    for one in (one for sleeper in woken for one in sleeper.slices):
        for dim, keys in enumerate(one.keys):
            for number in np.intersect1d(keys[:, :-1].numpy(), numbers.numpy()).tolist():
                rows = (keys[:, :-1] == number).any(1).nonzero().flatten()
                more.setdefault(number, []).append(one.at(dim, rows))
    return [replace(one, slices=(*one.slices, *more.get(one.number, ()))) for one in asleep]


class _Places:
    """Where entries that were kept belong in a network."""

    def __init__(self, topology: Topology, ids: Ids) -> None:
        self._topology, self._ids = topology, ids
        self._keys: dict[tuple[str, int], Tensor] = {}

    def of(self, one: Slice) -> list[tuple[Tensor, Tensor]]:
        """For every dimension the positions in the slice that have a place, and their places."""
        return [_matched(keys, self._now(one.tensor, dim)) for dim, keys in enumerate(one.keys)]

    def _now(self, name: str, dim: int) -> Tensor:
        if (name, dim) not in self._keys:
            self._keys[name, dim] = _keys(self._topology, name, dim, self._ids)
        return self._keys[name, dim]


def _state_at(structure: Structure, parameter: Tensor, dim: int, rows: Tensor) -> dict[str, Entries]:
    """Some positions along a dimension of every state of a parameter that has it."""
    state = {} if structure.optimizer is None else structure.optimizer.state.get(parameter, {})
    found = {}
    for key, one in state.items():
        dims = dims_of_state(key, one, parameter) if isinstance(one, Tensor) else None
        if dims is not None and dim in dims:
            found[key] = Entries(dims, one.detach().index_select(dims.index(dim), rows.to(one.device)).cpu())
    return found


def _put(into: Tensor, entries: Entries, places: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write entries to their places, given for every dimension of the tensor."""
    values, rank, at = entries.values, len(entries.dims), []
    for own, dim in enumerate(entries.dims):
        here, there = (torch.zeros(1, dtype=torch.int64),) * 2 if dim is None else places[dim]
        values = values.index_select(own, here)
        at.append(there.view(*(-1 if one == own else 1 for one in range(rank))))
    into[tuple(at)] = values.to(into)


def _keys(topology: Topology, name: str, dim: int, ids: Ids) -> Tensor:
    """The keys of all positions along a dimension, int32, shape (positions, numbers)."""
    expression = topology.tensors[name][dim]
    columns: list[IntArray] = []
    for number in sorted(axes_of(expression), key=lambda one: topology.axes[one].name):
        numbers = np.array([*ids[topology.axes[number].name], -1], np.int64)
        columns.append(numbers[labels(expression, topology.sizes, number)])
    codes = np.zeros(topology.shape(name)[dim], np.int64)
    for column in columns:
        codes = _coded(codes, column)
    return torch.from_numpy(np.stack([*columns, _turns(codes)], axis=1).astype(np.int32))


def _turns(codes: IntArray) -> IntArray:
    """For every position how many before it have the same code."""
    order = np.argsort(codes, kind="stable")
    first = np.searchsorted(codes[order], codes[order], side="left")
    turns = np.empty_like(codes)
    turns[order] = np.arange(len(codes)) - first
    return turns


def _coded(codes: IntArray, column: IntArray) -> IntArray:
    """Numbers from 0 that are the same for positions that agree in both."""
    _, own = np.unique(column, return_inverse=True)
    return np.asarray(np.unique(codes * (len(codes) + 1) + own, return_inverse=True)[1], np.int64)


def _matched(then: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """The positions whose keys are among those of now, and where."""
    if torch.equal(then, now):
        every = torch.arange(len(then))
        return every, every
    if then.shape[1] != now.shape[1]:  # of a dimension that is made of other axes by now
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    codes = np.zeros(len(then) + len(now), np.int64)
    for column in np.concatenate([then.numpy(), now.numpy()]).T:
        codes = _coded(codes, column)
    before, after = codes[: len(then)], codes[len(then) :]
    order = np.argsort(after, kind="stable")
    at = np.searchsorted(after[order], before).clip(max=max(0, len(after) - 1))
    has = after[order][at] == before if len(after) else np.zeros(len(before), bool)
    return torch.from_numpy(np.flatnonzero(has)), torch.from_numpy(order[at[has]])


def _tensor(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"expected a tensor, found {type(value).__name__}")
    return value


__all__ = ["Entries", "Ids", "Sleeper", "Slice", "give_state_back", "handed_over", "kept", "values_of"]

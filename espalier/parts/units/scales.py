"""The scales of a live network's units: those of its norms, and for axes without any which weights could hold one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from espalier.edit.norms import NoCompensationError, norm_sites
from espalier.graph.dims import labels
from espalier.graph.flow import operator_name
from espalier.graph.topology import Topology, TracePrediction
from espalier.graph.trace import Ref
from espalier.structure import Structure

_NORMS = frozenset(
    "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit _batch_norm_with_update "
    "_native_batch_norm_legit_no_training _batch_norm_no_update native_layer_norm native_group_norm _fused_rms_norm "
    "rms_norm".split()
)
_READ = frozenset({"contract"})
_MADE = frozenset({"produce", "filter", "group", "shift"})


@dataclass(frozen=True, eq=False)
class Place:
    """Where an axis appears in a parameter."""

    tensor: str
    dim: int
    units: Tensor
    """For every position along `dim` the unit there; -1 for none."""
    offset: float = 0.0
    """What the forward adds to the parameter: 1.0 for a norm that scales by ``1 + weight``."""

    @cached_property
    def _in_order(self) -> bool:
        """Whether the positions are the units, one by one."""
        return bool((self.units == torch.arange(len(self.units))).all())

    def sums(self, values: Tensor, count: int) -> Tensor:
        """A tensor of the parameter's shape summed over all that belongs to each of `count` units: shape (count,)."""
        along = values.sum(list(range(self.dim))) if self.dim else values
        along = along.flatten(1).sum(1) if along.dim() > 1 else along
        if self._in_order:
            return along
        units = self.units.to(along.device)
        return along.new_zeros(count + 1).index_add_(0, units % (count + 1), along)[:count]  # -1 is the last one

    def spread(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """One value per unit at all positions of it, 1 elsewhere; broadcasts to the parameter's shape.

        Whole behind the dimension, so that what it is multiplied with is read in rows that are long.
        """
        along = values if self._in_order else torch.cat([values, values.new_ones(1)])[self.units.to(values.device)]
        behind = shape[self.dim + 1 :]
        return along.view(-1, *[1] * len(behind)).expand(-1, *behind).contiguous()


def norm_scales(topology: Topology, axes: Iterable[str]) -> dict[str, tuple[Place, ...]]:
    """Axis -> the scales of all norms along or across it: BatchNorm, GroupNorm, LayerNorm, RMSNorm, also by hand."""
    of_operators = {name for prediction in topology.predictions for name in _scales_of_operators(prediction)}
    found = {}
    for axis in axes:
        record = topology.by_name[axis]
        offsets = dict.fromkeys(of_operators, 0.0)
        for prediction in topology.predictions:
            try:
                offsets |= {site.weight: site.offset for site in norm_sites(prediction, record.number)}
            except NoCompensationError:
                continue  # a mean of another kind; norms that are operators are known without
        places = {
            (tensor, dim): place_of(topology, axis, tensor, dim, offsets[tensor])
            for tensor, dim, _ in record.slots
            if tensor in offsets and tensor in topology.parameters
        }
        found[axis] = tuple(places.values())
    return found


def holders(topology: Topology, axis: str) -> tuple[Place, ...]:
    """The parameters that hold a factor of every unit, so that zero there removes it.

    Those that read the axis; where none do (queries and keys meet each other), those that it is made by.
    """
    slots = [slot for slot in topology.by_name[axis].slots if slot[0] in topology.parameters]
    for roles in (_READ, _MADE):
        places = {slot[:2]: place_of(topology, axis, *slot[:2]) for slot in slots if slot[2] in roles}
        if places:
            return tuple(places.values())
    return tuple({slot[:2]: place_of(topology, axis, *slot[:2]) for slot in slots}.values())


def place_of(topology: Topology, axis: str, tensor: str, dim: int, offset: float = 0.0) -> Place:
    """Where the units of an axis are along a dimension of a parameter."""
    units = labels(topology.tensors[tensor][dim], topology.sizes, topology.by_name[axis].number)
    return Place(tensor, dim, torch.from_numpy(units), offset)


def _scales_of_operators(prediction: TracePrediction) -> set[str]:
    names = set()
    for call in prediction.calls:
        weight = call.arguments().get("weight") if operator_name(call) in _NORMS else None
        if isinstance(weight, Ref):
            index: int | None = weight.index
            while index is not None and index not in prediction.flow.names:
                index = _before_cast(prediction, index, call.index)
            if index is not None:
                names.add(prediction.flow.names[index])
    return names


def _before_cast(prediction: TracePrediction, index: int, at: int) -> int | None:
    maker = prediction.flow.maker(index, at)
    if maker is None or operator_name(maker) not in ("_to_copy", "clone"):
        return None
    source = maker.args[0]
    return source.index if isinstance(source, Ref) else None


class LiveTensor:
    """A parameter of a module, looked up anew whenever it is asked for."""

    def __init__(self, model: nn.Module, name: str) -> None:
        path, _, self._name = name.rpartition(".")
        self._owner = model.get_submodule(path)

    def __call__(self) -> nn.Parameter:
        found = self._owner._parameters[self._name]
        assert found is not None
        return found


@dataclass(frozen=True)
class _Part:
    """What one norm's scale contributes to the scales of a network."""

    name: str
    tensor: LiveTensor
    index: Tensor | None
    """Positions in the flattened parameter; None for all of it."""
    offset: float
    owners: Tensor
    """For each of them the number of its axis; the last one where it belongs to several."""

    def values(self) -> Tensor:
        flat = self.tensor().detach().flatten()
        flat = flat if self.index is None else flat[self.index]
        return flat + self.offset if self.offset else flat

    def gradient(self, gradient: Tensor) -> Tensor:
        """The gradient of the parameter from that of its scales."""
        parameter = self.tensor()
        if self.index is None:
            return gradient.view_as(parameter)
        return torch.zeros_like(parameter).flatten().index_copy_(0, self.index, gradient).view_as(parameter)


class Scales:
    """The scales of all norms along some axes, each of them once and in a fixed order, and the axes that have none.

    Valid for one topology; the parameters are looked up when values are asked for.
    """

    def __init__(self, structure: Structure, axes: Sequence[str]) -> None:
        topology = self.topology = structure.topology
        self.axes = tuple(axes)
        self.norms = norm_scales(topology, axes)
        self.bare = tuple(axis for axis in axes if not self.norms[axis])
        """The axes without the scale of a norm."""
        self.sizes = {axis: topology.sizes[topology.by_name[axis].number] for axis in axes}
        self._structure = structure
        self._weights: dict[tuple[float, float], Tensor] = {}
        self._parts: list[_Part] = []
        by_tensor: dict[str, list[tuple[int, Place]]] = {}
        for number, axis in enumerate(axes):
            for place in self.norms[axis]:
                by_tensor.setdefault(place.tensor, []).append((number, place))
        for name, found in by_tensor.items():
            live = LiveTensor(structure.model, name)
            owner = torch.full(topology.shape(name), -1)
            for number, place in found:
                shape = [-1 if dim == place.dim else 1 for dim in range(owner.dim())]
                owner = torch.where((place.units >= 0).view(shape), number, owner)
            flat = owner.flatten()
            index = None if bool((flat >= 0).all()) else (flat >= 0).nonzero().flatten().to(live().device)
            self._parts.append(_Part(name, live, index, found[0][1].offset, flat[flat >= 0]))

    def weights(self, bounds: tuple[float, float], row: Tensor) -> Tensor:
        """A weight within bounds for every scale, of norms and then of the units of `bare`, where and of what `row` is.

        It is linear in the FLOPs that a unit of the scale's axis costs, all that is coupled to it included.
        """
        if bounds not in self._weights:
            low, high = bounds
            flops = torch.tensor([float(self._structure.axes[axis].unit_cost.flops) for axis in self.axes])
            relative = (flops - flops.min()) / (flops.max() - flops.min()).clamp_min(1)
            bare = [torch.full((self.sizes[axis],), self.axes.index(axis)) for axis in self.bare]
            owners = torch.cat([*(part.owners for part in self._parts), *bare])
            self._weights[bounds] = (low + (high - low) * relative)[owners].to(row)
        return self._weights[bounds]

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that hold scales of norms, in order."""
        return [part.tensor() for part in self._parts]

    def values(self) -> list[Tensor]:
        """The scales of every such parameter that are along the axes, flat and without gradient."""
        return [part.values() for part in self._parts]

    def gradients(self, flat: Tensor) -> list[Tensor]:
        """The gradients of `parameters()` from that of all `values()` in a row."""
        pieces = torch.split(flat, [len(part.owners) for part in self._parts])
        return [part.gradient(piece) for part, piece in zip(self._parts, pieces, strict=True)]

    def outside(self, most: float) -> str | None:
        """The first parameter with scales outside of [0, most], and their range; None if there is none."""
        for part in self._parts:
            values = part.values()
            least, largest = float(values.min()), float(values.max())
            if least < 0 or largest > most:
                return f"{part.name} has scales from {least:.3g} to {largest:.3g}"
        return None

    def clamp_(self, most: float) -> None:
        """Bring every trainable scale along the axes into [0, most], in place."""
        whole = []
        for part in self._parts:
            parameter = part.tensor().detach()
            if not part.tensor().requires_grad:
                continue
            if part.index is None and not part.offset:
                whole.append(parameter)
                continue
            clamped = part.values().clamp_(0, most) - part.offset
            index = slice(None) if part.index is None else part.index
            parameter.view(-1)[index] = clamped
        if whole:
            torch._foreach_clamp_min_(whole, 0.0)
            torch._foreach_clamp_max_(whole, most)

    def of_units(self, axis: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The mean of |scale| over all scales of every unit of an axis: shape (units,)."""
        total = torch.zeros(self.sizes[axis], dtype=torch.float64)
        count = torch.zeros_like(total)
        for place in self.norms[axis]:
            tensor = tensors[place.tensor].detach()
            total += place.sums((tensor.float() + place.offset).abs(), len(total)).double().cpu()
            count += place.sums(torch.ones(tensor.shape), len(count)).double()
        return total / count.clamp_min(1)


__all__ = ["LiveTensor", "Place", "Scales", "holders", "norm_scales", "place_of"]

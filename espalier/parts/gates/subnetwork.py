"""The loss in the sub-network that gates leave: units whose gate is 0 are left out while it is evaluated.

`Gates.applied` multiplies by zeros, which costs as much as the whole network. A gate of 0 that a batch shares is a unit
that is not there: so every parameter and buffer is replaced by its entries of the other units, and the same forward
runs in fewer dimensions. Losses and all gradients are those of multiplying, in exact arithmetic; what leads to units
that are left out gets a gradient of zero either way. Running statistics of batch norms are one thing that differs:
those of a unit that is left out stay as they are, where multiplying would go on to update them with what nobody reads.

Sizes are rounded up to a few per axis (`Worth.rounded`), and filled with units whose gate is 0, which are multiplied as
before: kernels are fast at even sizes, and slow whenever they meet sizes for the first time.

Whether leaving units out pays is decided by counting (`Worth`), never by the clock, so that a run repeats to the same
bits. Before it is done for the first time after an edit, it is tried out: on fake tensors, where every operator has to
be as predicted, and on the batch at hand, where the loss has to be that of multiplying. Whatever fails there
(`SubNetwork.problem`) is multiplied as ever. So is a network that draws random numbers for units (dropout): it would
draw others, and both samples of an estimator are to see the same. A loss that is compiled as a whole cannot be seen
from here; give it `Worth(per_tensor=math.inf)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.edit.attributes import AttributeChange, known_changes
from espalier.edit.verify import attributes_set, verify
from espalier.errors import EspalierError
from espalier.graph.dims import Dim, IntArray, axes_of, labels
from espalier.graph.named_tensors import tensor_table
from espalier.graph.topology import Topology, TracePrediction
from espalier.graph.trees import flatten_tensors
from espalier.measure.stats import without_a_trace
from espalier.parts.budget import FLOPs
from espalier.parts.gates.places import Gates
from espalier.structure import Structure

Forward = Callable[[], Tensor]
_Mask = np.ndarray[Any, np.dtype[np.bool_]]
_NOTHING: Mapping[str, _Mask] = {}


@dataclass(frozen=True)
class Worth:
    """When leaving units out pays: if the operations that it saves are more than what picking tensors costs.

    The numbers are in operations of the forward, as measured by `benchmarks/npn_speed.py`.
    """

    multiple: int = 8
    """Sizes are multiples of it, or whole. At most four sizes of an axis differ."""
    per_tensor: float = 1e6
    """For a tensor that is picked from, forward and backward."""
    per_entry: float = 30.0
    """For an entry of it."""
    per_tensor_elsewhere: float = 1e9
    """In place of `per_tensor` on devices other than the CPU, where a kernel takes long to begin and little to run."""

    def rounded(self, count: int, size: int) -> int:
        """How many units of an axis are kept if so many of its gates are open."""
        step = math.ceil(size / 4 / self.multiple) * self.multiple if self.multiple > 1 else 1
        return min(size, math.ceil(max(count, 2) / step) * step)

    def pays(self, saved: float, tensors: int, entries: int, device: str) -> bool:
        """Whether so many operations that are saved are worth picking from so many tensors with so many entries."""
        each = self.per_tensor if device == "cpu" else self.per_tensor_elsewhere
        return saved > each * tensors + self.per_entry * entries


@dataclass(frozen=True)
class _Picked:
    """A tensor that has units which can be left out."""

    name: str
    places: tuple[tuple[nn.Module, str, bool], ...]
    dims: tuple[tuple[int, int], ...]
    """(dimension, number of its expression)."""
    axes: frozenset[str]
    entries: int


class SubNetwork:
    """Evaluates the loss of a network under gates, in a smaller one where that pays; to be made anew after every edit.

    Args:
        structure: of the live network.
        gates: where its gates act.
        worth: when it pays.
    """

    def __init__(self, structure: Structure, gates: Gates, worth: Worth | None = None) -> None:
        self.topology: Topology = structure.topology
        compiled = any(module._compiled_call_impl is not None for module in structure.model.modules())
        self.problem: str | None = "it is compiled, which sizes that change would undo" if compiled else None
        """Why no unit is ever left out; None if nothing was found yet."""
        self._structure, self._gates, self._worth = structure, gates, worth or Worth()
        self._trusted = False
        self._with_attributes = False
        self._example = _largest(structure.example)
        table, topology = tensor_table(structure.model), self.topology
        recurrent = {
            name for name, places in table.places.items() if any(isinstance(one[0], nn.RNNBase) for one in places)
        }
        self._axes = {
            axis: topology.by_name[axis].number
            for axis in gates.sizes
            if axis in topology.by_name
            and axis in gates.plain
            and recurrent.isdisjoint(slot[0] for slot in topology.by_name[axis].slots)
        }
        self._expressions: list[tuple[tuple[str, IntArray], ...]] = []
        self._picked = self._find(table.tensors, table.places)
        self._device = next((table.tensors[one.name].device.type for one in self._picked), "cpu")
        names = set(topology.by_name) - set(self._axes)
        rest = {name: topology.sizes[topology.by_name[name].number] for name in names}
        self._flops = FLOPs(1).cost(topology, ()).fixed(rest)
        self._whole = self._flops.at({axis: topology.sizes[number] for axis, number in self._axes.items()})
        self._drawing = {one.training for one in topology.predictions if self._draws(one)}

    def applied(self, gates: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Run the body with the whole network multiplied by these numbers: `Gates.applied`."""
        return self._gates.applied(gates)

    def factors(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What tensors are multiplied by: `Gates.factors`."""
        return self._gates.factors(gates)

    def counting(self, key: str) -> bool:
        """Whether the statistics of a norm or a mean leave out what the gates of this key shut."""
        return self._gates.counting(key)

    def loss(self, forward: Forward, gates: Mapping[str, Tensor], batch: Any) -> Tensor:
        """What `forward` gives with units multiplied by these numbers, as under `Gates.applied`.

        Gradients reach weights and gates, those of gates that are 0 excepted if their unit is left out.

        Args:
            forward: evaluates the loss of the batch.
            gates: key -> one number for each gate.
            batch: whose tensors tell how much there is to compute; of any kind.
        """
        kept = self._kept(gates)
        if kept and self._usable() and self._pays(kept, batch) and self._tried_out(forward, gates, kept):
            with self._applied(gates, kept):
                return forward()
        with self._gates.applied(gates):
            return forward()

    # --- whether

    def _kept(self, gates: Mapping[str, Tensor]) -> Mapping[str, _Mask]:
        """Axis -> which of its units are kept, for the axes that lose any."""
        if self.problem is not None:
            return _NOTHING
        found: dict[str, _Mask] = {}
        for axis in self._axes:
            if axis not in gates:
                continue
            kept: _Mask = gates[axis].detach().cpu().numpy() != 0
            wanted = self._worth.rounded(int(kept.sum()), len(kept))
            if wanted < len(kept):
                kept[np.flatnonzero(~kept)[: wanted - int(kept.sum())]] = True
                found[axis] = kept
        return found

    def _usable(self) -> bool:
        """Whether the same random numbers are drawn without units."""
        return not self._drawing or (
            False not in self._drawing and not any(one.training for one in self._structure.model.modules())
        )

    def _pays(self, kept: Mapping[str, _Mask], batch: Any) -> bool:
        touched = [one for one in self._picked if not one.axes.isdisjoint(kept)]
        passes = 3 if torch.is_grad_enabled() else 1  # backward takes two
        often = _largest(batch) / self._example if self._example and _largest(batch) else 1.0
        saved = (self._whole - self._flops.at(self._sizes(kept))) * passes * often
        return self._worth.pays(saved, len(touched), sum(one.entries for one in touched), self._device)

    def _sizes(self, kept: Mapping[str, _Mask]) -> dict[str, int]:
        whole = {axis: self.topology.sizes[number] for axis, number in self._axes.items()}
        return whole | {axis: int(one.sum()) for axis, one in kept.items()}

    def _draws(self, prediction: TracePrediction) -> bool:
        """Whether a pass draws random numbers for units."""
        numbers = set(self._axes.values())
        for call in prediction.calls:
            if torch.Tag.nondeterministic_seeded in call.op.tags and call.arguments().get("dropout_p", 1.0) != 0.0:
                dims = (dim for ref in call.outputs if ref is not None for dim in prediction.dims.get(ref.index, ()))
                if any(axis in numbers for dim in dims for axis in axes_of(dim)):
                    return True
        return False

    # --- trying it out

    def _tried_out(self, forward: Forward, gates: Mapping[str, Tensor], kept: Mapping[str, _Mask]) -> bool:
        """Whether the network gives the same loss without units; it is tried once."""
        if self._trusted or self.problem is not None:
            return self._trusted
        self.problem = self._mismatch(kept)
        if self.problem is not None:
            return False
        with without_a_trace(self._structure.model), self._gates.applied(gates):
            multiplied = forward()
        try:
            with without_a_trace(self._structure.model), self._applied(gates, kept):
                value = forward()
        except Exception as problem:  # whatever the user's code raises at sizes that it does not expect
            self.problem = f"the forward failed without the units: {type(problem).__name__}: {problem}"
            return False
        near = torch.finfo(value.dtype).eps ** 0.5
        self._trusted = value.shape == multiplied.shape and torch.allclose(value, multiplied, near, near, True)
        if not self._trusted:
            self.problem = f"the loss is {value.tolist()} without the units and {multiplied.tolist()} with zeros"
        return self._trusted

    def _mismatch(self, kept: Mapping[str, _Mask]) -> str | None:
        """Why the network would not run without units; None if it would. Notices whether attributes have to follow."""
        after = self._after(kept)
        try:
            subject = self._structure.surgery.subject()
            found = verify(subject, after, ())
            if found.mismatch is not None:
                self._with_attributes = True
                found = verify(subject, after, self._changes(kept))
        except EspalierError as error:
            return str(error)
        if found.mismatch is not None:
            return f"{found.mismatch.where}: {found.mismatch.text}"
        return "a constant of the forward follows a size" if found.scalars else None

    # --- how

    def _find(
        self, tensors: Mapping[str, Tensor], places: Mapping[str, tuple[tuple[nn.Module, str, bool], ...]]
    ) -> tuple[_Picked, ...]:
        numbers: dict[Dim, int] = {}
        of = {number: axis for axis, number in self._axes.items()}
        found = []
        for name, dims in self.topology.tensors.items():
            here: list[tuple[int, int]] = []
            inside: set[str] = set()
            for dim, expression in enumerate(dims):
                axes = [of[number] for number in dict.fromkeys(axes_of(expression)) if number in of]
                if not axes:
                    continue
                if expression not in numbers:
                    numbers[expression] = len(self._expressions)
                    sizes = self.topology.sizes
                    units = [(axis, labels(expression, sizes, self._axes[axis])) for axis in axes]
                    self._expressions.append(tuple(units))
                here.append((dim, numbers[expression]))
                inside.update(axes)
            if here:
                found.append(_Picked(name, tuple(places[name]), tuple(here), frozenset(inside), tensors[name].numel()))
        return tuple(found)

    def _after(self, kept: Mapping[str, _Mask]) -> Topology:
        return self.topology.resized({self._axes[axis]: int(one.sum()) for axis, one in kept.items()})

    def _changes(self, kept: Mapping[str, _Mask]) -> Sequence[AttributeChange]:
        """The attributes of modules that have to follow."""
        if not self._with_attributes:
            return ()
        return known_changes(self._structure.model, self.topology, self._after(kept))

    @contextmanager
    def _applied(self, gates: Mapping[str, Tensor], kept: Mapping[str, _Mask]) -> Iterator[None]:
        """Run the body without the units that are not kept, the others multiplied."""
        positions = self._positions(kept)
        held: list[tuple[dict[str, Any], str, Any]] = []
        buffers: list[tuple[Tensor, dict[str, Any], str, dict[int, Tensor]]] = []
        with self._gates.applied(gates), attributes_set(self._structure.model, self._changes(kept)):
            try:
                for one in self._picked:
                    if one.axes.isdisjoint(kept):
                        continue
                    at = {dim: positions[number] for dim, number in one.dims if number in positions}
                    whole = picked = _stored(*one.places[0])
                    for dim, index in at.items():
                        picked = picked.index_select(dim, index)
                    for place in one.places:
                        store = _store(place)
                        held.append((store, place[1], store[place[1]]))
                        store[place[1]] = picked
                    if not one.places[0][2]:
                        buffers.append((whole, _store(one.places[0]), one.places[0][1], at))
                yield
                for whole, store, key, at in buffers:
                    _put_back(whole, store[key], at)
            finally:
                for store, key, before in held:
                    store[key] = before

    def _positions(self, kept: Mapping[str, _Mask]) -> dict[int, Tensor]:
        """Number of an expression -> the positions along it that stay; those that all stay left out."""
        found: dict[int, Tensor] = {}
        inside = {axis: np.append(one, True) for axis, one in kept.items()}  # what belongs to no unit stays: -1
        for number, units in enumerate(self._expressions):
            masks = [inside[axis][of] for axis, of in units if axis in inside]
            if masks:
                found[number] = torch.from_numpy(np.flatnonzero(np.logical_and.reduce(masks))).to(self._device)
        return found


def _largest(tree: Any) -> int:
    """The number of entries of the largest tensor in a batch or example; 0 without any."""
    return max((one.numel() for _, one in flatten_tensors(tree, "")), default=0)


def _store(place: tuple[nn.Module, str, bool]) -> dict[str, Any]:
    module, _, is_parameter = place
    return module._parameters if is_parameter else module._buffers


def _stored(module: nn.Module, key: str, is_parameter: bool) -> Tensor:
    found: Tensor = _store((module, key, is_parameter))[key]
    return found


@torch.no_grad()
def _put_back(whole: Tensor, picked: Tensor, at: Mapping[int, Tensor]) -> None:
    """What a forward left in some entries of a buffer, into that buffer."""
    if whole.dim() == 1:
        whole.index_copy_(0, at[0], picked.to(whole.dtype))
        return
    every = [at.get(dim, torch.arange(size, device=whole.device)) for dim, size in enumerate(whole.shape)]
    whole[torch.meshgrid(*every, indexing="ij")] = picked.to(whole.dtype)


__all__ = ["SubNetwork", "Worth"]

"""Gates on the units of a live network: every unit is multiplied by a number of its own, most often 0 or 1.

A gate multiplies its unit where that is read: every weight that sums over the axis is multiplied by z along it, while
the loss is evaluated, and is itself again afterwards. This is the same as multiplying the activation in front of each
reader, and exact whatever made the unit: a bias, the shift of a norm, an activation that is not zero at zero. It costs
a product per weight, not per activation, and needs to know no module. Gradients reach weights and gates through it.

Which axes may have gates follows from the contract of removing units: an axis may if a network whose readers hold zero
for a unit is the network without it, whatever the other weights are. Where an operator normalises over the axis, sums
over it in a product of two activations, or takes a constant from its size, that is not so, and the axis is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from espalier.edit.changes import changes_of, find_axis
from espalier.edit.contract import contract_of
from espalier.edit.plan import prune_plan
from espalier.errors import EspalierError
from espalier.graph.capture import TensorTable, tensor_table
from espalier.graph.topology import Topology
from espalier.parts.scales import Place, place_of
from espalier.structure import Structure


class Gates:
    """Where the gates of some axes act in a network as it is; to be made anew after every edit.

    Args:
        structure: of the live network.
        axes: those that have gates, of which `gate_problem` knows nothing bad.
    """

    def __init__(self, structure: Structure, axes: Iterable[str]) -> None:
        self.topology: Topology = structure.topology
        self.sizes: dict[str, int] = {}
        """Axis -> number of its units."""
        self._table = tensor_table(structure.model)
        self._readers: dict[str, list[tuple[str, Place]]] = {}
        for axis in axes:
            self.sizes[axis] = self.topology.sizes[find_axis(self.topology, axis).number]
            for tensor, dim in _readers(self.topology, axis):
                self._readers.setdefault(tensor, []).append((axis, place_of(self.topology, axis, tensor, dim)))

    @contextmanager
    def applied(self, gates: Mapping[str, Tensor]) -> Iterator[None]:
        """Run the body with the units of the named axes multiplied by these numbers, one per unit; others by 1.

        Gates of 1 everywhere, or of no axis, leave the network as it is, to the last bit.
        """
        held: list[tuple[dict[str, Any], str, Tensor]] = []
        try:
            for name, tensor in self._gated(gates).items():
                for module, key, is_parameter in self._table.places[name]:
                    store: dict[str, Any] = module._parameters if is_parameter else module._buffers
                    held.append((store, key, store[key]))
                    store[key] = tensor
            yield
        finally:
            for store, key, before in held:
                store[key] = before

    def _gated(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The readers that gates change, multiplied by them."""
        found: dict[str, Tensor] = {}
        for name, places in self._readers.items():
            tensor = before = self._table.tensors[name]
            for axis, place in places:
                z = gates.get(axis)
                if z is not None and (z.requires_grad or not bool((z == 1).all())):
                    tensor = tensor * place.spread(z.to(tensor), tensor.shape)
            if tensor is not before:
                found[name] = tensor
        return found


def gate_problem(structure: Structure, axis: str) -> str | None:
    """Why an axis cannot have gates; None if it can. Tries its removal out, which costs a pass on fake tensors.

    Raises:
        PlanError: there is no such axis.
    """
    topology, table = structure.topology, tensor_table(structure.model)
    record, plan = find_axis(topology, axis), prune_plan({axis: [0]})
    if record.reasons:
        return "; ".join(one.text for one in record.reasons[:2])
    readers = _readers(topology, axis)
    if not readers:
        return "no weights read it"
    cached = next((name for name, _ in readers if _in_recurrent_layer(table, name)), None)
    if cached is not None:
        return f"{cached} reads it, which a recurrent layer keeps in a second place"
    if topology.sizes[record.number] == 1:
        return "it has one unit, whose removal cannot be tried out"
    contract = contract_of(changes_of(plan, topology, {}), _silenced(topology, axis, readers))
    if contract.kind != "exact":
        return contract.why
    if contract.norms:
        return "a norm runs over it, whose statistics gates would have to change"
    try:
        preview = structure.preview(plan, within_limits=False)
    except EspalierError as error:
        return str(error).rstrip(".")
    if preview.contract.scaled:
        return "a constant of the forward follows its size"
    return None


def _in_recurrent_layer(table: TensorTable, name: str) -> bool:
    return any(isinstance(module, nn.RNNBase) for module, _, _ in table.places[name])


def _readers(topology: Topology, axis: str) -> list[tuple[str, int]]:
    """The tensors, and the dimensions of them, along which something sums over the axis."""
    return list(dict.fromkeys(slot[:2] for slot in topology.by_name[axis].slots if slot[2] == "contract"))


def _silenced(topology: Topology, axis: str, readers: Iterable[tuple[str, int]]) -> dict[str, Tensor]:
    """Tensors of the network's shapes in which nothing is zero but what reads unit 0."""
    made = {}
    for name in topology.tensors:
        shape = topology.shape(name)
        count = math.prod(shape)
        made[name] = torch.linspace(0.5, 1.5, count + 1, dtype=torch.float64)[:count].view(shape)
    for name, dim in readers:
        units = place_of(topology, axis, name, dim).units
        made[name].index_fill_(dim, (units == 0).nonzero().flatten(), 0.0)
    return made


__all__ = ["Gates", "gate_problem"]

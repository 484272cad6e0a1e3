"""Gates on the units of an axis.

A gate multiplies its unit where that is read: every weight that sums over the axis is multiplied by z along it. This is
the same as multiplying the activation in front of each reader, and exact whatever made the unit: a bias, the shift of a
norm, an activation that is not zero at zero. It costs a product per weight, not per activation, and needs to know no
module.

Which axes may have gates follows from the contract of removing units: an axis may if a network whose readers hold zero
for a unit is the network without it, whatever the other weights are. Where an operator normalises over the axis, sums
over it in a product of two activations, or takes a constant from its size, that is not so, and the axis is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from espalier.edit.changes import changes_of, find_axis
from espalier.edit.contract import contract_of
from espalier.edit.plan import prune_plan
from espalier.errors import EspalierError
from espalier.graph.topology import Topology
from espalier.parts.gates.places import GatePlace
from espalier.parts.scales import place_of
from espalier.structure import Structure


def unit_place(structure: Structure, axis: str) -> GatePlace:
    """One gate for every unit of an axis, of which `gate_problem` knows nothing bad. Raises PlanError: no such axis."""
    topology = structure.topology
    size = topology.sizes[find_axis(topology, axis).number]
    return GatePlace(axis, size, tuple(place_of(topology, axis, *one) for one in _readers(topology, axis)))


def gate_problem(structure: Structure, axis: str) -> str | None:
    """Why an axis cannot have gates; None if it can. Tries its removal out, which costs a pass on fake tensors.

    Raises:
        PlanError: there is no such axis.
    """
    topology = structure.topology
    record, plan = find_axis(topology, axis), prune_plan({axis: [0]})
    if record.reasons:
        return "; ".join(one.text for one in record.reasons[:2])
    readers = _readers(topology, axis)
    if not readers:
        return "no weights read it"
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


__all__ = ["gate_problem", "unit_place"]

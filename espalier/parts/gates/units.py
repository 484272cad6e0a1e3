"""Gates on the units of an axis.

A gate multiplies its unit where that is read: every weight that sums over the axis is multiplied by z along it. This is
the same as multiplying the activation in front of each reader, and exact whatever made the unit: a bias, the shift of a
norm, an activation that is not zero at zero. It costs a product per weight, not per activation, and needs to know no
module. Where two activations are summed over the axis (queries and keys), what one of them is made by is multiplied
instead; norms, means, softmaxes and maxima over it are evaluated over what gates leave
(`espalier.parts.gates.left_out`).

So a network whose gate is 0 is the network without the unit, once that is removed by a plan that does not compensate
norms (``Plan.hold_norms``). Which tensors these are follows from what operators do along the axis, as the contract of
removing units does (`espalier.edit.neutral.absence`). Where one combines units in a way that nothing makes blind to one
of them (a median over units), or a constant of the forward follows the size and no weight holds it, the axis is
refused.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from espalier.edit.changes import find_axis
from espalier.edit.neutral import PER_UNIT, Absence, absence
from espalier.edit.plan import Plan, Resize
from espalier.errors import EspalierError, MethodError
from espalier.graph.dims import classes
from espalier.graph.topology import Topology
from espalier.parts.gates.norms import norm_gates
from espalier.parts.gates.places import GatePlace
from espalier.parts.units.scales import Place, place_of
from espalier.structure import Structure


def unit_place(structure: Structure, axis: str) -> GatePlace:
    """One gate for every unit of an axis.

    Raises:
        PlanError: there is no such axis.
        MethodError: it cannot have gates.
    """
    found = _found(structure.topology, axis)
    if isinstance(found, str):
        raise MethodError(f"{axis} cannot have gates: {found}.")
    return found


def gate_problem(structure: Structure, axis: str) -> str | None:
    """Why an axis cannot have gates; None if it can. Tries a change of its size out: a pass on fake tensors.

    Raises:
        PlanError: there is no such axis.
    """
    topology = structure.topology
    record = find_axis(topology, axis)
    if record.reasons:
        return "; ".join(one.text for one in record.reasons[:2])
    found = _found(topology, axis)
    if isinstance(found, str):
        return found
    edit = Resize(axis, add=1) if found.count == 1 else Resize(axis, (0,))
    try:
        preview = structure.preview(Plan((edit,), hold_norms=False), within_limits=False)
    except EspalierError as error:
        return str(error).rstrip(".")
    return preview.contract.unheld


def _found(topology: Topology, axis: str) -> GatePlace | str:
    """The gates of an axis, or why it cannot have any."""
    record = find_axis(topology, axis)
    what = absence(topology, record.number)
    if isinstance(what, str):
        return what
    norms = norm_gates(topology, record.number, what.sites)
    if isinstance(norms, str):
        return norms
    plain = all(tap.role in PER_UNIT for tap in record.taps)
    return GatePlace(axis, topology.sizes[record.number], tuple(_places(topology, axis, what)), norms, plain)


def _places(topology: Topology, axis: str, what: Absence) -> list[Place]:
    """Where the axis appears in tensors whose parts have to be zero."""
    number, found = topology.by_name[axis].number, []
    for (tensor, dim), starts in what.zero.items():
        place = place_of(topology, axis, tensor, dim)
        parts = [one.where for one in starts if one.where is not None]
        if len(parts) == len(starts):  # not all of the tensor
            kinds = classes(topology.tensors[tensor][dim], topology.sizes, frozenset((number,)))
            asked = torch.from_numpy(np.any(parts, axis=0)[kinds])
            place = replace(place, units=torch.where(asked, place.units, -1))
        found.append(place)
    return found


__all__ = ["gate_problem", "unit_place"]

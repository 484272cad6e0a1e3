"""The axes of a network as a person or a program wants to read them."""

from __future__ import annotations

from typing import Any

from espalier.attaching import attach
from espalier.bench.targets import find_target
from espalier.structure import Structure


def inspect(name: str) -> Structure:
    """The structure of a target (see `find_target`).

    Raises:
        DataError: there is no such target, or it could not be built.
        CaptureError: the network does not run on its example inputs.
    """
    target = find_target(name)
    return attach(target.model, target.example_inputs)


def as_json(name: str, structure: Structure) -> dict[str, Any]:
    """What `print(structure)` shows, as data."""
    cost = structure.cost()
    return {
        "target": name,
        "model": type(structure.model).__name__,
        "parameters": cost.parameters,
        "flops": cost.flops,
        "unknown_operators": dict(structure.topology.unknown),
        "axes": [
            {
                "name": axis.name,
                "size": axis.size,
                "prunable": axis.prunable,
                "growable": axis.growable,
                "reason": axis.reason,
                "unit_cost": {"parameters": axis.unit_cost.parameters, "flops": axis.unit_cost.flops},
                "slots": [{"tensor": slot.tensor, "dim": slot.dim, "role": slot.role} for slot in axis.slots],
            }
            for axis in structure.axes.values()
        ],
    }

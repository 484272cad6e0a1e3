"""The axes of a network as a person or a program wants to read them."""

from __future__ import annotations

from typing import Any

from espalier.attach import attach
from espalier.bench.targets import find_target
from espalier.structure import Structure


def inspect(name: str, *, check: bool = False) -> Structure:
    """The structure of a target (see `find_target`).

    With `check` every axis is tried once on fake tensors: this finds those that code ties together or holds fixed,
    which would otherwise show when they are first changed. It takes minutes for networks of a hundred axes.

    Raises:
        DataError: there is no such target, or it could not be built.
        CaptureError: the network does not run on its example inputs.
    """
    target = find_target(name)
    structure = attach(target.model, target.example_inputs)
    if check:
        structure.settle()
    return structure


def as_text(structure: Structure, *, checked: bool) -> str:
    """The table of axes, and whether it was tried out."""
    hint = "" if checked else "\n\nnot tried out; --check tries every axis once, which finds what only code knows"
    return f"{structure}{hint}"


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

"""Structures as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from espalier.structure import Structure


def structure_table(structure: Structure) -> str:
    """The axes of a structure as a table: name, size, what may be done, cost of one unit, places, reasons."""
    rows = [("axis", "units", "may", "per unit", "in", "why not")]
    for axis in structure.axes.values():
        may = {(True, True): "grow, prune", (True, False): "grow", (False, True): "prune"}
        allowed = may.get((axis.growable, axis.prunable), "-")
        tensors = len({slot.tensor for slot in axis.slots})
        places = f"{tensors} tensor{'s' if tensors != 1 else ''}"
        rows.append((axis.name, str(axis.size), allowed, f"{axis.unit_cost.parameters:,}", places, axis.reason or ""))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "-" * min(len(lines[0]), 100))
    cost = structure.cost()
    head = f"{type(structure.model).__name__}: {cost} for the example inputs"
    unknown = structure.topology.unknown
    tail = []
    if unknown:
        names = ", ".join(f"{name} ({count}x)" for name, count in unknown.items())
        tail.append(f"unknown operators, which freeze what they touch: {names}")
    return "\n".join([head, "", *lines, *structure.topology.notes, *tail])


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].ljust(widths[2]), row[3].rjust(widths[3])]
    return "  ".join([*cells, row[4].ljust(widths[4]), row[5]]).rstrip()

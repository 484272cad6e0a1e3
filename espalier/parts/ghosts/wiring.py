"""Wirings: which weights of new units are zero or cancel, so that the outputs stay as they are.

    out     incoming weights of real size, outgoing weights of zero: invisible whatever lies between
    in      incoming weights and shifts of zero, outgoing weights of real size: invisible where f(0) = 0
    pairs   two units each, equal but for outgoing weights Z and -Z: they cancel whatever lies between, and both sides
            get gradients. The last unit of an odd number is wired "out".

Which of them an axis allows is not guessed: the weights are put together and judged as any plan is
(`espalier.edit.given`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from espalier.parts.ghosts.ghosts import Ghosts, Part, Side, Tensors
from espalier.parts.score import Context
from espalier.structure import Structure

Wiring = Literal["out", "in", "pairs"]
_NORMS = frozenset({"batch_norm", "layer_norm", "rms_norm", "group_norm", "reduce", "sum"})
"""Roles of taps: norms, and what code that norms by itself is made of."""


@dataclass(frozen=True)
class Wired:
    """How new units of one axis begin."""

    wiring: Wiring
    incoming: Tensor
    """(n, d) incoming weights; only the first of each pair counts."""
    outgoing: Tensor
    """(n, d) outgoing weights, likewise."""

    def chosen(self, units: Iterable[int]) -> Wired:
        """Those of some units."""
        rows = list(units)
        return replace(self, incoming=self.incoming[rows], outgoing=self.outgoing[rows])


def written(ghosts: Ghosts, structure: Structure, tensors: Tensors, axis: str, wired: Wired) -> dict[str, Tensor]:
    """The tensors of the grown network in which the new units of an axis begin so."""
    sides, incoming, outgoing = ghosts.sides[axis], wired.incoming, wired.outgoing
    if wired.wiring == "out":
        return sides.outgoing.write(sides.incoming.write(tensors, incoming), torch.zeros_like(outgoing))
    if wired.wiring == "in":
        found = sides.outgoing.write(sides.incoming.write(tensors, torch.zeros_like(incoming)), outgoing)
        shifts = rest_of(structure, sides.rest, axis, "shift")
        return shifts.write(found, torch.zeros_like(shifts.read(found))) if shifts.parts else found
    found = sides.incoming.write(tensors, twice(incoming))
    found = sides.outgoing.write(found, opposite(outgoing))
    if sides.rest.parts:
        rest = sides.rest.read(found)
        if not torch.equal(rest, twice(rest)):
            found = sides.rest.write(found, twice(rest))
    return found


def allows(ghosts: Ghosts, context: Context, axis: str, wiring: Wiring) -> bool:
    """Whether new units of an axis that are wired so would be invisible in train and in eval mode."""
    sides, count = ghosts.sides[axis], ghosts.counts[axis]
    if not sides.incoming.parts or not sides.outgoing.parts or (wiring == "pairs" and count < 2):
        return False
    generator = context.generator(f"{axis}, as it may begin")
    drawn = [
        torch.randn(side.read(ghosts.tensors).shape, generator=generator).to(side.read(ghosts.tensors))
        for side in (sides.incoming, sides.outgoing)
    ]
    tensors = written(ghosts, context.structure, ghosts.tensors, axis, Wired(wiring, *drawn))
    return ghosts.seen(axis, tensors) is None


def is_normed(structure: Structure, axis: str) -> bool:
    """Whether units of an axis are scaled by a norm somewhere, so that the size of their weights says nothing."""
    return any(tap.role in _NORMS for tap in structure.axes[axis].taps)


def rest_of(structure: Structure, rest: Side, axis: str, *roles: str) -> Side:
    """The part of a side that plays one of the roles, such as ``shift`` or ``scale``."""
    slots = {slot[:2]: slot[2] for slot in structure.topology.by_name[axis].slots}
    parts: tuple[Part, ...] = tuple(part for part in rest.parts if slots[part.tensor, part.dim] in roles)
    return Side(parts)


def twice(rows: Tensor) -> Tensor:
    """Rows 0, 0, 2, 2, 4, ...: every second row as the one before it."""
    return rows[torch.arange(len(rows), device=rows.device) // 2 * 2]


def opposite(rows: Tensor) -> Tensor:
    """Rows 0, -0, 2, -2, ...; zero for the last of an odd number."""
    signs = torch.ones(len(rows), 1, dtype=rows.dtype, device=rows.device)
    signs[1::2] = -1
    if len(rows) % 2:
        signs[-1] = 0
    return twice(rows) * signs


__all__ = ["Wired", "Wiring", "allows", "is_normed", "opposite", "rest_of", "twice", "written"]

"""Sizes that suit fast kernels: what an axis has to be a multiple of, so that tensors come in round sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from espalier.edit.changes import Limits
from espalier.errors import MethodError
from espalier.parts.budget import terms_of
from espalier.structure import Structure

_MULTIPLIED = frozenset({"produce", "contract", "filter", "group", "lookup"})
"""Roles of the dimensions of matrices and kernels; tables and scales that go along with them are of no matter."""


def multiples(structure: Structure, axes: Iterable[str], round_to: int) -> dict[str, int]:
    """Axis -> number that its size has to be a multiple of by its limits and so that matrices divide by `round_to`.

    What multiplies an axis counts: any number of heads of 64 is a multiple of 8, and half of a rotary head has to be a
    multiple of 4. Of several `axes` that are multiplied with each other the largest is rounded, the others then need
    less of it, or nothing. What else is in the dimension (other parts of a concatenation) is not looked at: it is round
    by itself or not at all.
    """
    topology = structure.topology
    names, asked = topology.names(), set(axes)
    found: dict[str, int] = {}
    for name in sorted(asked, key=lambda one: (-topology.sizes[topology.by_name[one].number], one)):
        slots = topology.by_name[name].slots
        slots = tuple(slot for slot in slots if slot[2] in _MULTIPLIED) or slots
        multiple = structure.limits.get(name, Limits()).multiple_of
        for tensor, dim, _ in slots:
            share = 0
            for product, factor in terms_of(topology.tensors[tensor][dim], names, topology.sizes).items():
                if name in product:
                    others = (other for other in product if other != name)
                    known = (
                        found.get(other, 1) if other in asked else topology.sizes[topology.by_name[other].number]
                        for other in others
                    )
                    share = math.gcd(share, factor * math.prod(known))
            multiple = math.lcm(multiple, round_to // math.gcd(round_to, share))
        found[name] = multiple
    return found


def check_round_to(round_to: object) -> None:
    """Raise MethodError unless it is a whole number of at least 1."""
    if type(round_to) is not int or round_to < 1:
        raise MethodError(f"round_to: expected a whole number of at least 1, found {round_to!r}.")


__all__ = ["check_round_to", "multiples"]

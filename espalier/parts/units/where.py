"""Which axes a method may change, and which of them belong together."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from espalier.axis import Axis
from espalier.edit.changes import changes_of, find_axis
from espalier.edit.contract import contract_of
from espalier.edit.plan import grow_plan
from espalier.errors import MethodError
from espalier.graph.named_tensors import tensor_table
from espalier.parts.goal import Direction
from espalier.structure import Structure

_HEAD_SIZE_ROLES = frozenset({"bilinear", "scale_of_size"})
_HEAD_SIZE_HINTS = frozenset({"head_dim", "value_dim"})
_WILD = frozenset("*?[")


def choose_axes(structure: Structure, direction: Direction, asked: Sequence[str] | None) -> dict[str, str | None]:
    """Axis -> None if a method may change it, or why not. Limits are not looked at: sizes come and go.

    Axes that are asked for by name or pattern are taken if they may change at all. Otherwise the size of attention
    heads is left out (fewer or more numbers per head is another attention), and so is, for growing, every axis that
    cannot grow without changing the outputs.

    Raises:
        MethodError: a name or pattern fits no axis, or names exactly one that may not change.
    """
    names = list(structure.axes) if asked is None else _matching(structure, asked)
    found: dict[str, str | None] = {}
    for name in names:
        axis = structure.axes[name]
        found[name] = None if axis.reason is None else f"it {axis.reason}"
        if found[name] is None and asked is None:
            found[name] = _better_not(structure, axis, direction)
        elif found[name] is not None and asked is not None and name in asked:
            raise MethodError(f"{name} cannot {'grow' if direction == 'grow' else 'shrink'}: {found[name]}.")
    return found


def able_axes(structure: Structure, direction: Direction, names: Iterable[str], *, asked: bool) -> tuple[str, ...]:
    """Those of these axes that a method may change; `asked`: whether they were asked for, as in `choose_axes`."""
    axes = [structure.axes[name] for name in names]
    may = [axis for axis in axes if axis.reason is None]
    return tuple(axis.name for axis in may if asked or _better_not(structure, axis, direction) is None)


def fits_pattern(name: str, asked: Sequence[str] | None) -> bool:
    """Whether something that is new is meant by what a method was asked to change: all, or names by patterns.

    A name without `*`, `?` or `[` means one thing that was there when it was given.
    """
    return asked is None or any(_WILD & set(pattern) and fnmatchcase(name, pattern) for pattern in asked)


def alike(structure: Structure, axes: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Groups of two and more axes of the same role in repeated layers, and of one size now.

    The same role is the same name but for the numbers of the modules around it: ``layers.0.mlp.up`` and
    ``layers.1.mlp.up``. A number that ends a path is a module of its own and no repetition: ``0`` and ``2`` of an MLP
    are not alike.
    """
    groups: dict[tuple[str, int], list[str]] = defaultdict(list)
    topology = structure.topology
    for name in axes:
        role = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)
        groups[role, topology.sizes[topology.by_name[name].number]].append(name)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def holds_head_size(structure: Structure, axis: Axis) -> bool:
    """Whether the units of an axis are the numbers within an attention head."""
    roles, hints = {tap.role for tap in axis.taps}, set(structure.topology.by_name[axis.name].hints)
    return bool(roles & _HEAD_SIZE_ROLES or hints & _HEAD_SIZE_HINTS)


def _matching(structure: Structure, asked: Sequence[str]) -> list[str]:
    found: dict[str, None] = {}
    for pattern in asked:
        matched = [name for name in structure.axes if name == pattern or fnmatchcase(name, pattern)]
        if not matched and structure.layers_moved:
            continue  # it went with its layer, or will come back by its name of now with the state of the session
        if not matched:
            if not _WILD & set(pattern):
                find_axis(structure.topology, pattern)  # its error knows similar names
            raise MethodError(f"axes: no axis fits the pattern {pattern!r}; see print(structure) for all axes.")
        found.update(dict.fromkeys(matched))
    return [name for name in structure.axes if name in found]


def _better_not(structure: Structure, axis: Axis, direction: Direction) -> str | None:
    if holds_head_size(structure, axis):
        return "its units are the numbers within an attention head; name it in axes=[...] to change it anyway"
    if direction == "grow":
        changes = changes_of(grow_plan({axis.name: 1}), structure.topology, {})
        contract = contract_of(changes, tensor_table(structure.model).tensors)
        if contract.kind != "exact":
            return f"growing it would change the outputs ({contract.why}); name it in axes=[...] to grow it anyway"
    return None


__all__ = ["able_axes", "alike", "choose_axes", "fits_pattern", "holds_head_size"]

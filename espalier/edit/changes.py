"""Checks a plan against a topology and turns it into index maps."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from espalier.edit.plan import Plan, Resize
from espalier.edit.tensors import gone
from espalier.errors import PlanError
from espalier.graph.dims import NEW, IntArray, axes_of, source
from espalier.graph.topology import INTERFACE, AxisRecord, Topology


@dataclass(frozen=True)
class Limits:
    """The sizes that an axis may be given, None for no bound. The size that it has need not be one of them."""

    at_least: int | None = None
    at_most: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        for bound in (self.at_least, self.at_most):
            if bound is not None and (type(bound) is not int or bound < 1):
                raise PlanError(f"limits are whole numbers of at least 1 or None, found {bound!r}.")
        if type(self.multiple_of) is not int or self.multiple_of < 1:
            raise PlanError(f"multiple_of is a whole number of at least 1, found {self.multiple_of!r}.")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise PlanError(f"the smaller limit comes first, found ({self.at_least}, {self.at_most}).")
        if self.above(0) is None:
            raise PlanError(f"no multiple of {self.multiple_of} is from {self.at_least or 1} to {self.at_most}.")

    def below(self, size: int) -> int | None:
        """The largest size that is allowed and smaller than `size`."""
        highest = size - 1 if self.at_most is None else min(size - 1, self.at_most)
        found = highest // self.multiple_of * self.multiple_of
        return found if found >= max(1, self.at_least or 1) else None

    def above(self, size: int) -> int | None:
        """The smallest size that is allowed and larger than `size`."""
        lowest = max(size + 1, self.at_least or 1)
        found = -(-lowest // self.multiple_of) * self.multiple_of
        return found if self.at_most is None or found <= self.at_most else None


@dataclass(frozen=True)
class Changes:
    """A checked plan: for every edited axis, the old unit that each new one comes from (-1 for a new unit)."""

    axes: Mapping[int, IntArray]
    before: Topology
    after: Topology

    def sources(self, tensor: str) -> tuple[IntArray | None, ...] | None:
        """The index map of every dimension of a tensor; None if the plan does not touch it."""
        maps = tuple(
            source(dim, self.before.sizes, self.axes) if any(axis in self.axes for axis in axes_of(dim)) else None
            for dim in self.before.tensors[tensor]
        )
        return maps if any(one is not None for one in maps) else None

    def is_old(self, tensor: str) -> Tensor:
        """Which entries of a tensor in its new shape were there: of booleans, in a shape that broadcasts."""
        old = torch.ones((), dtype=torch.bool)
        for one in self.sources(tensor) or (None,) * len(self.before.tensors[tensor]):
            inside = torch.ones(1, dtype=torch.bool) if one is None else torch.from_numpy(one != NEW)
            old = old[..., None] & inside
        return old

    def grown(self) -> tuple[int, ...]:
        """Axes that get new units."""
        return tuple(number for number, units in self.axes.items() if (units == NEW).any())

    def pruned(self) -> dict[int, IntArray]:
        """Axes that lose units -> the units that go."""
        return {
            number: left for number, units in self.axes.items() if len(left := gone(units, self.before.sizes[number]))
        }


def changes_of(plan: Plan, topology: Topology, limits: Mapping[str, Limits]) -> Changes:
    """Check every edit of a plan and make its index maps.

    Raises:
        PlanError: an unknown axis or an axis named twice, units that are out of range, repeated or all there are, an
            axis that may not change, or a size outside the user's limits.
    """
    if not plan.edits and not plan.masks and not plan.deltas:
        raise PlanError("the plan is empty: there is nothing to do.")
    axes: dict[int, IntArray] = {}
    for edit in plan.edits:
        record = find_axis(topology, edit.axis)
        if record.number in axes:
            raise PlanError(f"{edit.axis}: named twice in one plan; put all of its changes into one edit.")
        axes[record.number] = _units(edit, record, topology, plan.interface, limits.get(record.name, Limits()))
    after = topology.resized({number: len(units) for number, units in axes.items()})
    return Changes(axes, topology, after)


def find_axis(topology: Topology, name: str) -> AxisRecord:
    """The axis of that name. Raises PlanError that lists similar names."""
    record = topology.by_name.get(name)
    if record is not None:
        return record
    close = difflib.get_close_matches(name, topology.by_name, n=3, cutoff=0.5)
    within = [other for other in topology.by_name if other.startswith(f"{name}:")]
    similar = ", ".join(within or close)
    hint = f"did you mean: {similar}?" if similar else "see print(structure) for all axes."
    raise PlanError(f"there is no axis {name!r}; {hint}")


def blocking_reason(record: AxisRecord, interface: bool) -> str | None:
    """Why an axis may not change, or None if it may."""
    reasons = [one for one in record.reasons if not (interface and one.kind in INTERFACE)]
    if not reasons:
        return None
    return "; ".join(one.text for one in reasons[:3])


def _units(edit: Resize, record: AxisRecord, topology: Topology, interface: bool, limits: Limits) -> IntArray:
    size = topology.sizes[record.number]
    if not edit.remove and not edit.add:
        raise PlanError(f"{edit.axis}: nothing to do; give units to remove or a number of units to add.")
    reason = blocking_reason(record, interface)
    if reason is not None:
        kinds = {one.kind for one in record.reasons}
        fix = " Pass interface=True to change the model's own interface." if kinds <= INTERFACE else ""
        raise PlanError(f"{edit.axis} (size {size}) may not change: {reason}.{fix}")
    out = [unit for unit in edit.remove if not 0 <= unit < size]
    if out:
        raise PlanError(f"{edit.axis}: expected units from 0 to {size - 1}, found {out[:5]}.")
    if len(set(edit.remove)) < len(edit.remove):
        twice = sorted({unit for unit in edit.remove if edit.remove.count(unit) > 1})
        raise PlanError(f"{edit.axis}: units {twice[:5]} are named more than once.")
    new_size = size - len(edit.remove) + edit.add
    if len(edit.remove) == size:
        raise PlanError(f"{edit.axis}: removing all {size} units would leave nothing; keep at least one.")
    if limits.at_least is not None and new_size < limits.at_least:
        raise PlanError(f"{edit.axis}: {new_size} units would be fewer than its limit of {limits.at_least}.")
    if limits.at_most is not None and new_size > limits.at_most:
        raise PlanError(f"{edit.axis}: {new_size} units would be more than its limit of {limits.at_most}.")
    if new_size != size and new_size % limits.multiple_of:
        nearest = [str(one) for one in (limits.below(new_size), limits.above(new_size)) if one is not None]
        raise PlanError(
            f"{edit.axis}: {new_size} units would not be a multiple of {limits.multiple_of}, which its limits ask for; "
            f"the nearest sizes that they allow: {' and '.join(nearest)}."
        )
    kept = gone(np.asarray(edit.remove, dtype=np.int64), size)
    return np.concatenate([kept, np.full(edit.add, NEW, dtype=np.int64)])

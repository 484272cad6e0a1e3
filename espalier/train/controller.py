"""The budget controller: one for all methods of a session, it says what each of them may do when its time has come.

Invariants: a pruning ramp ends at or below its budget; a growing method never exceeds its own budget, nor that of a
pruning method whose last event is over, since nobody would bring the network back under it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from espalier.errors import CheckpointError, MethodError
from espalier.graph.topology import Topology
from espalier.method import Method
from espalier.parts.budget import Polynomial
from espalier.parts.goal import Cap, Goal
from espalier.parts.schedule import Clock, Last
from espalier.parts.where import choose_axes
from espalier.structure import Structure

_UNBOUNDED = 1 << 40


@dataclass
class Running:
    """A method at work and all that it remembers between events."""

    method: Method
    axes: tuple[str, ...]
    initial: int
    """Cost of the network as it was attached, in what the method's budget counts."""
    largest: int
    """The largest cost that it has had since."""
    fired: int = 0
    """Events that are done."""
    last: Last | None = None
    over: bool = False
    """Whether the last event is done."""
    start: int | None = None
    """The cost at the first event."""
    reference: dict[str, float] = field(default_factory=dict)
    """Axis -> width that a uniform selection keeps in proportion; follows what other methods do."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Axis -> why surgery refused it."""

    @property
    def limit(self) -> int:
        """The cost that the budget allows in the end."""
        return self.method.schedule.amount.budget.limit(self.initial, self.largest)

    def to_json(self) -> dict[str, Any]:
        """The memory as what JSON can hold."""
        return {
            "method": repr(self.method),
            "axes": list(self.axes),
            "initial": self.initial,
            "largest": self.largest,
            "fired": self.fired,
            "last": None if self.last is None else [self.last.step, self.last.epoch],
            "over": self.over,
            "start": self.start,
            "reference": dict(self.reference),
            "left_out": dict(self.left_out),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], method: Method) -> Running:
        """What `to_json` gave. Raises CheckpointError if that was for another method."""
        if data["method"] != repr(method):
            raise CheckpointError(
                f"the state was saved with the method {data['method']}, and this session has {method!r} in its place; "
                "make the session with the methods that it was saved with."
            )
        return cls(
            method,
            tuple(map(str, data["axes"])),
            int(data["initial"]),
            int(data["largest"]),
            int(data["fired"]),
            None if data["last"] is None else Last(int(data["last"][0]), int(data["last"][1])),
            bool(data["over"]),
            None if data["start"] is None else int(data["start"]),
            {str(axis): float(width) for axis, width in data["reference"].items()},
            {str(axis): str(why) for axis, why in data["left_out"].items()},
        )


class Controller:
    """Decides for all methods together what each may cost and change."""

    def __init__(self, structure: Structure, methods: Iterable[Method]) -> None:
        self._structure = structure
        self.running = [self._begin(method) for method in methods]
        for one in self.running:
            self._check_reachable(one)

    def goal(self, one: Running, clock: Clock) -> Goal:
        """What the method should reach at the event that is due now."""
        self._refresh(one)
        method, structure = one.method, self._structure
        sizes = self._sizes(one.axes)
        free = {name: size for name, size in sizes.items() if self._may_change(one, name)}
        cost = self._cost(one)
        one.start = cost.at(sizes) if one.start is None else one.start
        for name, size in free.items():
            one.reference.setdefault(name, float(size))
        amount = method.schedule.amount
        tau = (one.fired + 1) / (one.fired + 1 + method.schedule.remaining(clock))
        way = 1 if method.direction == "grow" else -1
        target = amount.target(tau, cost.at(sizes), one.start, one.limit, way)
        held = {name: size for name, size in sizes.items() if name not in free}
        limits = {name: structure.axes[name].limits for name in free}
        if method.direction == "prune":
            least, most = {name: min(size, self._least(one, name)) for name, size in free.items()}, dict(free)
        else:
            least, most = dict(free), {name: limits[name].at_most or _UNBOUNDED for name in free}
        return Goal(
            method.direction,
            free,
            least,
            most,
            {name: one.reference[name] for name in free},
            Cap(cost.fixed(held), target),
            self._caps(one, tuple(free)),
        )

    def note_edit(self, by: Running, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Remember what a method did: others keep their proportions to the new sizes."""
        for one in self.running:
            if one is not by:
                for name, (before, after) in sizes.items():
                    if name in one.reference:
                        one.reference[name] *= after / before
            self._refresh(one)
            one.largest = max(one.largest, self._cost(one).at(self._sizes(one.axes)))

    def short_of_budget(self, one: Running) -> str | None:
        """In words, by how much a method whose last event is over missed its budget; None if it did not."""
        present = self._cost(one).at(self._sizes(one.axes))
        amount = one.method.schedule.amount
        if one.method.direction == "grow" or not amount.lasts or present <= one.limit:
            return None
        return (
            f"{one.method.name} ended at {present:,} where {amount.budget!r} allows {one.limit:,}: its axes are as "
            "small as min_fraction, limits and refused edits let them be."
        )

    def _begin(self, method: Method) -> Running:
        chosen = choose_axes(self._structure, method.direction, method.axes)
        axes = tuple(name for name, why in chosen.items() if why is None)
        if not axes:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(chosen.items())[:4])
            raise MethodError(f"{method.name}: no axis can {_verb(method)} ({reasons}).")
        one = Running(method, axes, 0, 0)
        one.initial = self._initial_cost(one)
        one.largest = max(one.initial, self._cost(one).at(self._sizes(axes)))
        return one

    def _check_reachable(self, one: Running) -> None:
        amount, method = one.method.schedule.amount, one.method
        if not amount.lasts:
            return
        if method.direction == "prune":
            least = {name: self._least(one, name) for name in one.axes}
            smallest = self._cost(one).at(least)
            if smallest > one.limit:
                raise MethodError(
                    f"{method.name}: {amount.budget!r} allows a cost of {one.limit:,}, but the smallest network that "
                    f"its axes, min_fraction={method.min_fraction} and the limits allow costs {smallest:,}; give a "
                    "larger budget, or more axes, or a smaller min_fraction."
                )
        elif one.limit <= one.initial and all(other.method.direction == "grow" for other in self.running):
            raise MethodError(
                f"{method.name}: {amount.budget!r} allows a cost of {one.limit:,}, and the network has "
                f"{one.initial:,} already, so nothing could grow; give a larger budget or width."
            )

    def _caps(self, one: Running, axes: Sequence[str]) -> tuple[Cap, ...]:
        if one.method.direction == "prune":
            return ()
        topology = self._structure.topology
        return tuple(
            # Units are counted over the axes of the method whose budget it is
            Cap(self._cost_for(other, axes, topology), other.limit)
            for other in self.running
            if other.method.direction == "prune" and other.over and other.method.schedule.amount.lasts
        )

    def _cost_for(self, owner: Running, axes: Sequence[str], topology: Topology) -> Polynomial:
        counted = dict.fromkeys((*owner.axes, *axes))
        cost = owner.method.schedule.amount.budget.cost(topology, counted)
        return cost.fixed(self._sizes(name for name in counted if name not in axes))

    def _cost(self, one: Running) -> Polynomial:
        return one.method.schedule.amount.budget.cost(self._structure.topology, one.axes)

    def _initial_cost(self, one: Running) -> int:
        topology, initial = self._structure.topology, self._structure.initial_sizes
        sizes = {record.number: initial[name] for name, record in topology.by_name.items() if name in initial}
        cost = one.method.schedule.amount.budget.cost(topology.resized(sizes), one.axes)
        return cost.at({**self._sizes(one.axes), **{name: initial[name] for name in one.axes if name in initial}})

    def _sizes(self, axes: Iterable[str]) -> dict[str, int]:
        topology = self._structure.topology
        return {name: topology.sizes[topology.by_name[name].number] for name in axes}

    def _least(self, one: Running, name: str) -> int:
        structure = self._structure
        first = structure.initial_sizes.get(name, structure.axes[name].size)
        return max(1, structure.axes[name].limits.at_least or 1, math.ceil(one.method.min_fraction * first))

    def _may_change(self, one: Running, name: str) -> bool:
        return name not in one.left_out and self._structure.axes[name].reason is None

    def _refresh(self, one: Running) -> None:
        """Edits can teach which axes code ties together; the names of those that follow others are gone then."""
        if all(name in self._structure.axes for name in one.axes):
            return
        known = tuple(name for name in one.axes if name in self._structure.axes)
        if one.method.axes is None:
            chosen = choose_axes(self._structure, one.method.direction, None)
            known = tuple(name for name, why in chosen.items() if why is None or name in known)
        one.axes = known


def _verb(method: Method) -> str:
    return "grow" if method.direction == "grow" else "shrink"

"""The budget controller: one for all methods of a session, it says what each of them may do when its time has come.

Invariants: a pruning ramp ends at or below its budget; a growing method never exceeds its own budget, nor that of a
pruning method whose last event is over, since nobody would bring the network back under it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from espalier.edit.changes import Limits, blocking_reason
from espalier.errors import CheckpointError, MethodError
from espalier.graph.topology import Topology
from espalier.measure.stats import without_a_trace
from espalier.measure.timing import latency
from espalier.method import Method
from espalier.parts.budget import Budget, Latency, Pace, Polynomial, Units
from espalier.parts.candidate import Catalogue
from espalier.parts.clock import Clock, Last
from espalier.parts.depth.cost import layer_sizes, layers_cost, least_layers
from espalier.parts.goal import UNBOUNDED, Cap, Goal
from espalier.parts.memory import Memory
from espalier.parts.units.rounding import multiples
from espalier.parts.units.where import alike, choose_axes
from espalier.parts.weights.weights import choose_weights, weight_tensors
from espalier.structure import Structure
from espalier.train.watch import Watch


@dataclass
class Running:
    """A method at work and all that it remembers between events."""

    method: Method
    axes: tuple[str, ...]
    initial: int
    """Cost of the network as it was attached, in what the method's budget counts."""
    largest: int
    """The largest cost that it has had since."""
    watch: Watch
    """What its triggers remember."""
    fired: int = 0
    """Events that were kept."""
    passed: int = 0
    """Times at which an event was due, or a trigger was asked, and nothing went wrong."""
    last: Last | None = None
    """The last of these times."""
    acted: Last | None = None
    """When an event happened, or was tried, before."""
    over: bool = False
    """Whether the last event is done."""
    start: int | None = None
    """The cost at the first event."""
    reference: dict[str, float] = field(default_factory=dict)
    """Axis -> width that a uniform selection keeps in proportion; follows what other methods do."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Axis -> why surgery refused it."""
    memory: Memory | None = None
    """What the method itself remembers."""
    pace: Pace | None = None
    """What was measured last, if its budget is one of time."""

    @property
    def limit(self) -> int:
        """The cost that the budget allows in the end."""
        budget = self.method.schedule.amount.budget
        if isinstance(budget, Latency) and self.pace is not None:
            return budget.limit_at(self.pace)
        return budget.limit(self.initial, self.largest)

    def to_json(self) -> dict[str, Any]:
        """The memory as what JSON can hold."""
        return {
            "method": repr(self.method),
            "axes": list(self.axes),
            "initial": self.initial,
            "largest": self.largest,
            "fired": self.fired,
            "passed": self.passed,
            "last": None if self.last is None else [self.last.step, self.last.epoch],
            "acted": None if self.acted is None else [self.acted.step, self.acted.epoch],
            "over": self.over,
            "start": self.start,
            "reference": dict(self.reference),
            "left_out": dict(self.left_out),
            "memory": None if self.memory is None else self.memory.state(),
            "watch": self.watch.state(),
            "pace": None if self.pace is None else [self.pace.initial, self.pace.seconds, self.pace.flops],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], method: Method) -> Running:
        """What `to_json` gave. Raises CheckpointError if that was for another method."""
        if data["method"] != repr(method):
            raise CheckpointError(
                f"the state was saved with the method {data['method']}, and this session has {method!r} in its place; "
                "make the session with the methods that it was saved with."
            )
        memory = None if method.memory is None else method.memory()
        if memory is not None:
            memory.restore(data["memory"])
        watch = Watch(method.schedule)
        watch.restore(data["watch"])
        return cls(
            method,
            tuple(map(str, data["axes"])),
            int(data["initial"]),
            int(data["largest"]),
            watch,
            int(data["fired"]),
            int(data["passed"]),
            None if data["last"] is None else Last(int(data["last"][0]), int(data["last"][1])),
            None if data["acted"] is None else Last(int(data["acted"][0]), int(data["acted"][1])),
            bool(data["over"]),
            None if data["start"] is None else int(data["start"]),
            {str(axis): float(width) for axis, width in data["reference"].items()},
            {str(axis): str(why) for axis, why in data["left_out"].items()},
            memory,
            _pace(data["pace"]),
        )


def _pace(data: Any) -> Pace | None:
    return None if data is None else Pace(float(data[0]), float(data[1]), int(data[2]))


class Controller:
    """Decides for all methods together what each may cost and change."""

    def __init__(self, structure: Structure, methods: Iterable[Method]) -> None:
        self._structure = structure
        self._catalogues: dict[int, tuple[Topology, Catalogue]] = {}
        self.running = [self._begin(method) for method in methods]
        for one in self.running:
            self.measure(one)
            self._check_reachable(one)

    def begin_event(self, one: Running, axes: Collection[str]) -> None:
        """Take in the network as a method finds it at an event in some or all of its axes, and how fast it is."""
        self.measure(one)
        sizes = self._sizes(one)
        if one.start is None:
            one.start = self._cost(one).at(sizes)
        if one.method.level != "units":
            return
        for name in axes:
            if len(axes) < len(one.axes):
                one.reference[name] = float(sizes[name])  # every axis at its own time: proportions say nothing
            one.reference.setdefault(name, float(sizes[name]))

    def goal(self, one: Running, clock: Clock, axes: Collection[str]) -> Goal:
        """What the method should reach, with some or all of its axes, at the event that is due now."""
        method, amount, sizes, cost = one.method, one.method.schedule.amount, self._sizes(one), self._cost(one)
        if method.level == "weights":
            one.initial = self._weights(one.axes)
        present = cost.at(sizes)
        start = present if one.start is None else one.start
        free = {name: sizes[name] for name in one.axes if name in axes and self._may_change(one, name)}
        growing = method.direction == "grow"
        others = 0 if amount.lasts else present - cost.at({name: free.get(name, 0) for name in sizes})
        tau = self._done(one, clock)
        target = others + amount.target(tau, present - others, start, one.limit, 1 if growing else -1)
        held = {name: size for name, size in sizes.items() if name not in free}
        caps = (self._cap(other, one, free) for other in self._settled(one)) if growing else ()
        return self._goal(one, free, Cap(cost.fixed(held), target), tuple(caps))

    def refresh(self, one: Running) -> None:
        """Have a method of layers see those that may go or come now."""
        if one.method.level == "layers":
            one.axes = tuple(self._catalogue(one.method).candidates)

    def measure(self, one: Running) -> bool:
        """Measure how fast the network is, if the method's budget is one of time; whether it is within that budget."""
        budget = one.method.schedule.amount.budget
        if not isinstance(budget, Latency):
            return True
        with without_a_trace(self._structure.model):
            seconds = (budget.measure or latency)(self._structure.model, self._structure.example)
        seconds = self._structure.peers.agreed("the latency", seconds)
        flops = self._cost(one).at(self._sizes(one))
        initial = seconds * one.initial / flops if one.pace is None else one.pace.initial
        one.pace = Pace(initial, seconds, flops)
        return seconds <= budget.seconds(one.pace)

    def note_edit(self, by: Running, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Remember what a method did: others keep their proportions to the new sizes."""
        for one in self.running:
            if one is not by:
                for name, (before, after) in sizes.items():
                    if name in one.reference:
                        one.reference[name] *= after / before
            one.largest = max(one.largest, self._cost(one).at(self._sizes(one)))

    def short_of_budget(self, one: Running) -> str | None:
        """In words, by how much a pruning method whose last event is over missed its budget; None if it did not."""
        amount, present = one.method.schedule.amount, self._cost(one).at(self._sizes(one))
        if one.method.direction == "grow" or not amount.lasts or present <= one.limit:
            return None
        ended = f"{one.method.name} ended at {present:,} where {amount.budget!r} allows {one.limit:,}: "
        if one.method.level == "weights":
            return f"{ended}its pattern, sizes that this does not divide, and edits that were refused keep more."
        return ended + (
            "its axes are as small as min_fraction, limits, young units and edits that were refused or rejected let "
            "them be."
        )

    def _done(self, one: Running, clock: Clock) -> float:
        """The part of the method's way that is done with the event that is due now."""
        schedule = one.method.schedule
        left, passed = schedule.remaining(clock), one.passed
        if schedule.max_events is not None:
            left, passed = min(left, schedule.max_events - one.fired - 1), one.fired
        return (passed + 1) / (passed + 1 + left)

    def _begin(self, method: Method) -> Running:
        memory = None if method.memory is None else method.memory()
        if method.level == "layers":
            return self._begin_layers(method, memory)
        if method.level == "weights":
            names = choose_weights(self._structure, method.axes)
            if not names and not self._structure.layers_moved:
                raise MethodError(f"{method.name}: the network has no parameters whose weights could be masked.")
            total = self._weights(names)
            return Running(method, names, total, total, Watch(method.schedule), memory=memory)
        chosen = choose_axes(self._structure, method.direction, method.axes)
        axes = tuple(name for name, why in chosen.items() if why is None)
        if not axes and not self._structure.layers_moved:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(chosen.items())[:4])
            verb = "grow" if method.direction == "grow" else "shrink"
            raise MethodError(f"{method.name}: no axis can {verb} ({reasons or 'the network has none'}).")
        sizes = self._axis_sizes()
        cost = method.schedule.amount.budget.cost(self._structure.topology, axes)
        initial = cost.at({name: self._structure.initial_sizes.get(name, size) for name, size in sizes.items()})
        return Running(method, axes, initial, max(initial, cost.at(sizes)), Watch(method.schedule), memory=memory)

    def _begin_layers(self, method: Method, memory: Memory | None) -> Running:
        catalogue = self._catalogue(method)
        if not catalogue.candidates and not self._structure.layers_moved:
            verb = "be inserted or repeated" if method.direction == "grow" else "be removed"
            raise MethodError(
                f"{method.name}: no layer can {verb}, of {catalogue.present} that it looks at; structure.sites() says "
                "why. Name others with axes=[...]."
            )
        cost = layers_cost(method.direction, method.schedule.amount.budget, self._structure.topology, catalogue)
        initial = cost.at(layer_sizes(method.direction, catalogue))
        axes = tuple(catalogue.candidates)
        return Running(method, axes, initial, initial, Watch(method.schedule), memory=memory)

    def _catalogue(self, method: Method) -> Catalogue:
        """What may go or come in the network as it is."""
        assert method.places is not None
        topology = self._structure.topology
        known = self._catalogues.get(id(method))
        if known is None or known[0] is not topology:
            known = topology, method.places(self._structure, method.axes)
            self._catalogues[id(method)] = known
        return known[1]

    def _check_reachable(self, one: Running) -> None:
        amount, method = one.method.schedule.amount, one.method
        if self._structure.layers_moved:  # what it may change comes with the state of the session that it goes on with
            return
        if method.level == "weights" and method.direction == "grow":
            others = [other.method for other in self.running if other is not one]
            full = sum(self._sizes(one).values()) >= one.limit
            if full and not any(each.direction == "prune" and each.level == "weights" for each in others):
                raise MethodError(
                    f"{method.name}: as many weights are live as {amount.budget!r} allows, and nothing prunes any; set "
                    "masks first, or add a method that prunes weights."
                )
        if not amount.lasts or method.level == "weights":
            return
        if method.direction == "prune":
            sizes = self._sizes(one)
            free = {name: sizes[name] for name in one.axes}
            goal = self._goal(one, free, Cap(self._cost(one), one.limit))
            smallest = self._cost(one).at({**sizes, **(goal.smallest() if not goal.layers else least_layers(goal))})
            if smallest > one.limit:
                raise MethodError(
                    f"{method.name}: {amount.budget!r} allows a cost of {one.limit:,}, but the smallest network that "
                    f"its axes, min_fraction={method.min_fraction} and the limits allow costs {smallest:,}; give a "
                    "larger budget, or more axes, or a smaller min_fraction (or round_to)."
                )
        elif one.limit <= one.initial and all(other.method.direction == "grow" for other in self.running):
            raise MethodError(
                f"{method.name}: {amount.budget!r} allows a cost of {one.limit:,}, and the network costs "
                f"{one.initial:,} already, so nothing could grow; give a larger budget or width."
            )

    def _goal(self, one: Running, sizes: Mapping[str, int], target: Cap, caps: tuple[Cap, ...] = ()) -> Goal:
        growing, method = one.method.direction == "grow", one.method
        if method.level == "weights":
            weights = weight_tensors(self._structure, sizes)
            entries = {name: each.live.numel() for name, each in weights.items()}
            least, most = (sizes, entries) if growing else (dict.fromkeys(sizes, 0), sizes)
            reference = {name: float(size) for name, size in sizes.items()}
            return Goal(method.direction, sizes, least, most, reference, target, caps, weights=weights)
        if method.level == "layers":
            catalogue = self._catalogue(method)
            ones, zeros = dict.fromkeys(sizes, 1), dict.fromkeys(sizes, 0)
            layers = {name: catalogue.candidates[name] for name in sizes}
            reference = dict.fromkeys(sizes, 1.0)
            return Goal(
                method.direction, sizes, zeros, ones, reference, target, caps, layers=layers, spare=catalogue.spare
            )
        young = self._young(method, sizes)
        least = {name: min(size, max(self._least(one, name), len(young.get(name, ())))) for name, size in sizes.items()}
        return Goal(
            method.direction,
            sizes,
            least=sizes if growing else least,
            most={name: self._limits(name).at_most or UNBOUNDED for name in sizes} if growing else sizes,
            reference={name: one.reference.get(name, float(size)) for name, size in sizes.items()},
            target=target,
            caps=caps,
            multiples=multiples(self._structure, sizes, method.round_to),
            equal=alike(self._structure, sizes) if method.uniform else (),
            young=young,
        )

    def _young(self, method: Method, axes: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """The units that came too short a time ago to be pruned."""
        if method.grace is None:
            return {}
        births, since = self._structure.births, self._structure.step - method.grace.count
        return {name: tuple(np.flatnonzero(births[name] > max(since, 0)).tolist()) for name in axes}

    def _cap(self, other: Running, by: Running, free: Collection[str]) -> Cap:
        if "layers" in (other.method.level, by.method.level):
            cost = self._cost(by, other.method.schedule.amount.budget)
            held = {name: size for name, size in self._sizes(by).items() if name not in free}
            return Cap(cost.fixed(held), other.limit)
        held = {name: size for name, size in self._sizes(other).items() if name not in free}
        return Cap(self._cost(other).fixed(held), other.limit)

    def _settled(self, by: Running) -> Iterator[Running]:
        """Pruning methods of the level of this one whose budget holds from now on."""
        for one in self.running:
            method = one.method
            settled = method.direction == "prune" and one.over and method.schedule.amount.lasts
            levels = {method.level, by.method.level}
            counted = not isinstance(method.schedule.amount.budget, Units)
            if settled and (len(levels) == 1 or ("weights" not in levels and counted)):
                yield one

    def _cost(self, one: Running, budget: Budget | None = None) -> Polynomial:
        """What a method's budget, or another one, counts, by the sizes that the method changes."""
        budget, topology = budget or one.method.schedule.amount.budget, self._structure.topology
        if one.method.level == "layers":
            return layers_cost(one.method.direction, budget, topology, self._catalogue(one.method))
        return budget.cost(topology, one.axes)

    def _sizes(self, one: Running) -> dict[str, int]:
        """The sizes of all axes; at the level of weights live weights of the parameters that the method may change; at
        that of layers 1 for each that may go and 0 for each that may come."""
        if one.method.level == "layers":
            return layer_sizes(one.method.direction, self._catalogue(one.method))
        if one.method.level == "units":
            return self._axis_sizes()
        weights = weight_tensors(self._structure, one.axes)
        return {name: int(each.live.sum()) for name, each in weights.items()}

    def _weights(self, names: Iterable[str]) -> int:
        return sum(one.live.numel() for one in weight_tensors(self._structure, names).values())

    def _axis_sizes(self) -> dict[str, int]:
        topology = self._structure.topology
        return {name: topology.sizes[record.number] for name, record in topology.by_name.items()}

    def _limits(self, name: str) -> Limits:
        return self._structure.limits.get(name, Limits())

    def _least(self, one: Running, name: str) -> int:
        first = self._structure.initial_sizes.get(name, self._axis_sizes()[name])
        return max(1, self._limits(name).at_least or 1, math.ceil(one.method.min_fraction * first))

    def _may_change(self, one: Running, name: str) -> bool:
        if name in one.left_out or one.method.level != "units":
            return name not in one.left_out
        record = self._structure.topology.by_name[name]
        return blocking_reason(record, interface=False) is None

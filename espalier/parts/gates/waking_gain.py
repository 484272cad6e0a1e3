"""Waking by predicted gain: units that sleep, and new ones, valued by the gradient that they would get.

All candidates of all axes are put into the network at once as ghosts that nothing reads, so that they do not see each
other. With D the gradient of the loss by a unit's outgoing weights, at zero, gradient descent of rate e lowers the loss
by e |D|^2 in its first step: the currency of GradMax (Evci et al. 2022, arXiv:2201.05125), here for units with weights
of any origin. A unit that slept has outgoing weights O of its own too, with which the loss changes by <D, O> to first
order: where that is a fall it wakes with them, else with outgoing weights as surgery lets them begin.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from espalier.graph.topology import Topology
from espalier.parts.checks import check_count
from espalier.parts.gates.dormant import Sleeper, values_of
from espalier.parts.gates.sleepers import Comer, Newcomer, Woken
from espalier.parts.gates.waking import Remembered, Seen, WhileFalling
from espalier.parts.ghosts.directions import directions
from espalier.parts.ghosts.ghosts import Ghosts, Side
from espalier.parts.ghosts.passes import Passes
from espalier.parts.ghosts.wiring import Wiring, allows
from espalier.parts.score import Context

_WHILE_FALLING = WhileFalling(fallen="never")


@dataclass(frozen=True)
class ByGain:
    """The units whose predicted gain per parameter is largest, several at once, whatever axes they are of.

    New units are candidates in the directions of largest gradient. What fell asleep does not wake again for a while:
    its gate has just found it useless. At events at which other units fall asleep nothing wakes.
    """

    units: int = 4
    """How many wake at an event, at most."""
    candidates: int = 4
    """How many new units of an axis are candidates."""
    rounds: int = 1
    """Of the search for their directions, two passes each."""
    asked: int = 64
    """How many units of an axis that sleep are candidates, those first that fell asleep first."""
    rest: int = 5
    """For how many epochs of the search a unit that fell asleep does not wake."""
    when: WhileFalling = _WHILE_FALLING

    def __post_init__(self) -> None:
        for name in ("units", "candidates", "rounds", "asked"):
            check_count(name, getattr(self, name))
        check_count("rest", self.rest, 0)

    @property
    def in_use(self) -> float:
        return self.when.in_use

    def check(self, context: Context, /) -> None:
        self.when.check(context)

    def begin(self) -> Remembered:
        return {**self.when.begin(), "since": None}

    def look(self, seen: Seen, remembered: Remembered, /) -> Remembered:
        known, now = remembered["since"], seen.context.epoch
        unknown = now - self.rest if known is None else now  # those that slept before the search have rested
        since = {
            str(one.number): (known or {}).get(str(one.number), unknown)
            for found in seen.units.asleep.values()
            for one in found
        }
        return {**self.when.look(seen, remembered), "since": since}

    def chosen(self, seen: Seen, remembered: Remembered, /) -> Woken:
        if seen.leaving:
            return {}
        candidates = {axis: self._sleepers(seen, axis, remembered) for axis in self.when.axes(seen, remembered)}
        fresh = self._fresh(seen, candidates) if seen.fresh else {}
        counts = {axis: len(found) + len(fresh.get(axis, ())) for axis, found in candidates.items()}
        counts = {axis: count for axis, count in counts.items() if count}
        if not counts:
            return {}
        with seen.all_there():
            valued = _valued(seen, counts, candidates, fresh)
        return self._best(seen, valued)

    def woke(self, remembered: Remembered, /) -> Remembered:
        return {**remembered, "improved": False}

    def _sleepers(self, seen: Seen, axis: str, remembered: Remembered) -> list[Sleeper]:
        since, now = remembered["since"] or {}, seen.context.epoch
        found = seen.units.asleep.get(axis, ())
        return [one for one in found if since.get(str(one.number), now) + self.rest <= now][: self.asked]

    def _fresh(self, seen: Seen, axes: Mapping[str, Any]) -> dict[str, Tensor]:
        """Axis -> the incoming weights of new units, one row for each, best first."""
        counts = {axis: min(self.candidates, seen.room[axis]) for axis in axes}
        if not counts:
            return {}
        with seen.all_there():
            ghosts = Ghosts(seen.context, counts)
            wirings: dict[str, Wiring] = {axis: "out" for axis in counts if allows(ghosts, seen.context, axis, "out")}
            found = directions(seen.context, ghosts, wirings, self.rounds)
        return {axis: one.incoming[: counts[axis]] for axis, one in found.items()}

    def _best(self, seen: Seen, valued: Mapping[str, list[tuple[float, Comer]]]) -> Woken:
        structure = seen.context.structure
        order = sorted(
            (
                (value / max(1, structure.axes[axis].unit_cost.parameters), axis, comer)
                for axis, found in valued.items()
                for value, comer in found
                if value > 0
            ),
            key=lambda one: -one[0],
        )
        taken: Counter[str] = Counter()
        woken: dict[str, list[Comer]] = {}
        for _, axis, comer in order:
            if taken.total() < self.units and taken[axis] < seen.room[axis]:
                taken[axis] += 1
                woken.setdefault(axis, []).append(comer)
        return woken


def _valued(
    seen: Seen, counts: Mapping[str, int], asleep: Mapping[str, list[Sleeper]], fresh: Mapping[str, Tensor]
) -> dict[str, list[tuple[float, Comer]]]:
    """Axis -> for every candidate the squared norm of the gradient by its outgoing weights, and how it would wake."""
    ghosts = Ghosts(seen.context, counts)
    passes = Passes(seen.context, ghosts)
    every = [one for axis in counts for one in asleep[axis]]
    comers: dict[str, list[Comer]] = {
        axis: [*asleep[axis], *(Newcomer(row) for row in fresh.get(axis, ()))] for axis in counts
    }
    numbers = seen.units.after({}, comers)
    own = {**ghosts.tensors, **values_of(every, ghosts.preview.after, numbers, ghosts.tensors)}
    tensors: Mapping[str, Tensor] = own
    for axis, rows in fresh.items():
        incoming = ghosts.sides[axis].incoming
        entries = incoming.read(tensors).clone()
        entries[len(asleep[axis]) :] = rows.to(entries)
        tensors = incoming.write(tensors, entries)
    for axis in counts:
        tensors = _unread(tensors, ghosts.sides[axis].outgoing)
    names = dict.fromkeys(name for axis in counts for name in ghosts.sides[axis].outgoing.names)
    gradients = ghosts.gradients(tensors, passes.batch, list(names))
    found: dict[str, list[tuple[float, Comer]]] = {}
    for axis, ones in comers.items():
        outgoing = ghosts.sides[axis].outgoing
        slope, weights = outgoing.read(gradients).double(), outgoing.read(own).double()
        gains = torch.nan_to_num(slope.square().sum(1), 0.0, 0.0, 0.0).tolist()
        falls = ((slope * weights).sum(1) < 0).tolist()
        readers = _readers(ghosts.preview.before, axis)
        found[axis] = [
            (gain, one.without(readers) if isinstance(one, Sleeper) and not fall else one)
            for gain, fall, one in zip(gains, falls, ones, strict=True)
        ]
    return found


def _unread(tensors: Mapping[str, Tensor], outgoing: Side) -> dict[str, Tensor]:
    """The tensors with nothing that reads the new units of an axis, other new units included."""
    found = dict(tensors)
    for part in outgoing.parts:
        found[part.tensor] = found[part.tensor].index_fill(
            part.dim, part.new.flatten().to(found[part.tensor].device), 0.0
        )
    return found


def _readers(topology: Topology, axis: str) -> set[tuple[str, int]]:
    return {slot[:2] for slot in topology.by_name[axis].slots if slot[2] == "contract"}


__all__ = ["ByGain"]

"""The units of a session by number: where they are now, which of them sleep, and which fell asleep again.

Every unit keeps its number for life. A plan that puts units to sleep, or wakes them, is noted when it is made; that it
was carried out shows when the edit is followed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor

from espalier.graph.dims import IntArray
from espalier.graph.topology import Topology
from espalier.parts.gates.dormant import Sleeper, give_state_back, handed_over, kept
from espalier.parts.names import Names, carried
from espalier.structure import Structure


@dataclass(frozen=True, eq=False)
class Newcomer:
    """A new unit that nothing reads at first, and which begins by weights of its own."""

    incoming: Tensor
    """(d,): the entries of all that makes it, in the order of `espalier.parts.ghosts.ghosts.Sides.incoming`."""


Comer: TypeAlias = Sleeper | Newcomer | None
"""A unit that comes; None for a new one that begins as surgery lets it begin."""
Woken = Mapping[str, Sequence[Comer]]
"""Axis -> the units that wake there, in this order behind the others."""


class Sleepers:
    """Units and where they are."""

    def __init__(self) -> None:
        self.numbers: dict[str, list[int]] = {}
        """Axis -> the numbers of its units, in order."""
        self.asleep: dict[str, list[Sleeper]] = {}
        """Axis -> its units that sleep, those first that fell asleep first."""
        self.fallen: dict[str, int] = {}
        """Axis -> how many of its units went to sleep after they had been awake."""
        self._next = 0
        self._restoring: list[Sleeper] = []
        self._leaving: dict[str, dict[int, Sleeper]] = {}
        self._were_awake: dict[str, int] = {}
        self._waking: dict[str, tuple[Comer, ...]] = {}

    def meet(self, topology: Topology) -> bool:
        """Give numbers to the units of axes that are not known yet; whether these were the first."""
        first = not self.numbers
        for name, record in topology.by_name.items():
            if name not in self.numbers:
                count = topology.sizes[record.number]
                self.numbers[name] = list(range(self._next, self._next + count))
                self._next += count
        return first

    def give_back(self, structure: Structure) -> None:
        """Put the optimizer's state of units that woke where they are now."""
        if self._restoring:
            give_state_back(structure, self._restoring, self.numbers)
            self._restoring = []

    # --- plans

    def forget(self) -> None:
        """No plan is under way."""
        self._leaving, self._were_awake, self._waking = {}, {}, {}

    def leave(self, structure: Structure, axis: str, units: Collection[int], awake: int) -> None:
        """Note that a plan puts these units of an axis to sleep, so many of which had been awake."""
        self._leaving[axis] = kept(structure, axis, units, self.numbers)
        self._were_awake[axis] = awake

    def wake(self, woken: Woken) -> None:
        """Note that a plan wakes these units."""
        self._waking = {axis: tuple(found) for axis, found in woken.items() if found}

    def after(self, left: Mapping[str, Sequence[int]], woken: Woken) -> dict[str, list[int]]:
        """The numbers of the units once only these (old) units of some axes are left, and others woke."""
        found, fresh = dict(self.numbers), self._next
        for axis, old in left.items():
            found[axis] = [self.numbers[axis][unit] for unit in old]
        for axis, sleepers in woken.items():
            for sleeper in sleepers:
                fresh += not isinstance(sleeper, Sleeper)
                found[axis] = [*found[axis], sleeper.number if isinstance(sleeper, Sleeper) else fresh - 1]
        return found

    def follow(self, axis: str, origins: IntArray) -> bool:
        """Units go and come: as `Memory.follow`. Whether those that came woke by a plan of ours."""
        if axis not in self.numbers:
            return False
        known, old = self.numbers[axis], origins.tolist()
        left = set(old)
        gone = {unit for unit in range(len(known)) if unit not in left}
        leaving, waking = self._leaving.pop(axis, {}), self._waking.pop(axis, ())
        ours = gone == leaving.keys() and sum(origin < 0 for origin in old) == len(waking)
        came = iter(waking if ours else ())
        numbers, woken = [], []
        for origin in old:
            sleeper = next(came, None) if origin < 0 else None
            if origin >= 0:
                numbers.append(known[origin])
            elif isinstance(sleeper, Sleeper):
                woken.append(sleeper)
                numbers.append(sleeper.number)
            else:
                numbers.append(self._next)
                self._next += 1
        self.numbers[axis] = numbers
        if ours and leaving:
            self.fallen[axis] = self.fallen.get(axis, 0) + self._were_awake[axis]
            self.asleep.setdefault(axis, []).extend(leaving.values())
        if woken:
            self._wake_up(axis, woken)
        return ours and bool(waking)

    def _wake_up(self, axis: str, woken: Sequence[Sleeper]) -> None:
        """What units that woke share with units that sleep, or that fall asleep in the same plan, waits with these."""
        up = {one.number for one in woken}
        self.asleep[axis] = [one for one in self.asleep[axis] if one.number not in up]
        self._restoring += woken
        self.asleep = {other: handed_over(woken, found) for other, found in self.asleep.items()}
        for other, leaving in self._leaving.items():
            self._leaving[other] = dict(zip(leaving, handed_over(woken, list(leaving.values())), strict=True))

    def rename(self, names: Names) -> None:
        """Units that sleep in a layer that is gone are forgotten."""
        self.forget()
        self.numbers, self.fallen = carried(self.numbers, names.axes), carried(self.fallen, names.axes)
        asleep = carried(self.asleep, names.axes)
        self.asleep = {axis: [_renamed(one, names) for one in found] for axis, found in asleep.items()}

    def state(self) -> dict[str, Any]:
        """All of it, as `Memory.state`."""
        return {
            "numbers": {axis: list(one) for axis, one in self.numbers.items()},
            "asleep": {axis: [one.to_state() for one in found] for axis, found in self.asleep.items()},
            "restoring": [one.to_state() for one in self._restoring],
            "fallen": dict(self.fallen),
            "next": self._next,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what `state` gave. Raises KeyError, TypeError or ValueError for anything else."""
        fresh = Sleepers()
        fresh.numbers = {str(axis): [int(one) for one in found] for axis, found in state["numbers"].items()}
        fresh.asleep = {str(axis): list(map(Sleeper.from_state, found)) for axis, found in state["asleep"].items()}
        fresh._restoring = list(map(Sleeper.from_state, state["restoring"]))
        fresh.fallen = {str(axis): int(one) for axis, one in state["fallen"].items()}
        fresh._next = int(state["next"])
        self.__dict__.update(fresh.__dict__)


def _renamed(sleeper: Sleeper, names: Names) -> Sleeper:
    slices = [
        replace(one, tensor=name)
        for one in sleeper.slices
        if (name := names.tensors.get(one.tensor, one.tensor)) is not None
    ]
    return replace(sleeper, slices=tuple(slices))


__all__ = ["Comer", "Newcomer", "Sleepers", "Woken"]

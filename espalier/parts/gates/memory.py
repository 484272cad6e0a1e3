"""Stochastic gates on units, trained with the weights: what a method with such gates remembers.

The memory holds the gates (`espalier.parts.gates.table`) and the units that sleep (`espalier.parts.gates.sleepers`).
It follows every edit: units that another method removes take their gates with them, and those that it adds start open.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.graph.dims import IntArray
from espalier.parts.gates.places import Gates
from espalier.parts.gates.settings import GateSettings
from espalier.parts.gates.sleepers import Sleepers, Woken
from espalier.parts.gates.subnetwork import SubNetwork, Worth
from espalier.parts.gates.table import GateTable
from espalier.parts.gates.units import gate_problem, unit_place
from espalier.parts.gates.waking import Remembered, Seen, Waking
from espalier.parts.names import Names
from espalier.parts.score import Context, derived_seed

_ASLEEP = -40.0
"""k times the logit of units that begin asleep."""


@dataclass(frozen=True)
class Gated:
    """Gates on units; makes the memory of a method with them."""

    settings: GateSettings = field(default_factory=GateSettings)
    waking: Waking | None = None
    """When units wake, or come new; None: never."""
    fill: float = 0.0
    """k times the logit of a unit that wakes: 0 for a probability of 1/2."""
    fresh: bool = True
    """Whether new units come where none sleep any more."""
    awake: Mapping[str, int] | None = field(default=None, hash=False)
    """Name or pattern of axes -> how many of their units, the first ones, are awake when a session begins; the others
    go to sleep at the first event. None: all are."""
    worth: Worth = field(default_factory=Worth)
    """When units whose gates are 0 in a step are left out of it, rather than multiplied (`SubNetwork`)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "awake", None if self.awake is None else dict(self.awake))
        if self.waking is not None and self.waking.in_use <= self.settings.low:
            raise MethodError(
                f"expected units to be in use from a higher probability on than that at which they fall asleep, found "
                f"in_use={self.waking.in_use!r} and low={self.settings.low!r}."
            )

    def __call__(self) -> GateMemory:
        return GateMemory(self)


class GateMemory:
    """The gates on units of one session."""

    def __init__(self, made_by: Gated) -> None:
        self.made_by = made_by
        self.table = GateTable(made_by.settings)
        """By axis."""
        self.sleepers = Sleepers()
        self.refused: dict[str, str] = {}
        """Axis -> why it has no gates."""
        self.remembered: Remembered = {} if made_by.waking is None else made_by.waking.begin()
        """What the policy of waking remembers."""
        self._epoch = 0
        self._gates: SubNetwork | None = None
        self._all_there = False

    @property
    def logits(self) -> dict[str, Tensor]:
        """Axis -> logits of its units, float64 on the CPU."""
        return self.table.logits

    # --- what training asks for

    def gates(self, context: Context) -> SubNetwork:
        """Where the gates act now.

        Raises:
            MethodError: no axis can have gates, or one that was asked for by name cannot.
        """
        structure = context.structure
        if self._gates is None or self._gates.topology is not structure.topology:
            self._meet(context)
            gates = Gates(structure, [unit_place(structure, axis) for axis in self.logits])
            self._gates = SubNetwork(structure, gates, self.made_by.worth)
            self.sleepers.give_back(structure)
        return self._gates

    def judged(self, context: Context) -> dict[str, Tensor]:
        """Axis -> what its units are multiplied by when the network is judged."""
        return {} if self._all_there else self.table.judged(context.progress)

    @contextmanager
    def all_there(self) -> Iterator[None]:
        """Run the body with all gates at 1 where the network is judged."""
        self._all_there = True
        try:
            yield
        finally:
            self._all_there = False

    # --- what events ask for

    def leaving(self, context: Context, axes: Iterable[str], least: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The units that go to sleep now, of some axes, each of which keeps at least so many."""
        self.gates(context)
        self.sleepers.forget()
        found, probabilities = {}, self.table.probabilities(context.progress)
        for axis, ready in self.table.ready(context.progress).items():
            if axis not in axes:
                continue
            p = probabilities[axis]
            order = [unit for unit in torch.argsort(p, stable=True).tolist() if bool(ready[unit])]
            chosen = tuple(sorted(order[: max(0, len(p) - least[axis])]))
            if chosen:
                found[axis] = chosen
                awake = sum(self._was_awake(axis, unit) for unit in chosen)
                self.sleepers.leave(context.structure, axis, chosen, awake)
        return found

    def woken(self, context: Context, room: Mapping[str, int], leaving: Collection[str]) -> Woken:
        """The units that wake now, in axes in which there is room for some, while others leave these axes."""
        policy = self.made_by.waking
        self.gates(context)
        if policy is None or self.table.stage != 1:
            return {}
        found = policy.chosen(self._seen(context, room, leaving), self.remembered)
        self.sleepers.wake(found)
        return found

    # --- what the session asks for

    def after_step(self, context: Context, /) -> None:
        """Move the logits, and look at all units once per epoch."""
        self.sleepers.forget()
        self.gates(context)
        self.table.step(context.progress)
        if context.epoch > self._epoch:
            self._epoch = context.epoch
            self.table.end_epoch(context.progress)
            policy = self.made_by.waking
            if policy is not None and self.table.stage == 1:
                self.remembered = policy.look(self._seen(context, {}), self.remembered)

    def follow(self, units: Mapping[str, IntArray], /) -> None:
        """Gates go and come with their units."""
        self._gates = None
        self.table.forget()
        woke = False
        for axis, origins in units.items():
            wakes = self.sleepers.follow(axis, origins)
            woke = woke or wakes
            if axis in self.logits:
                self.table.follow(axis, torch.from_numpy(origins), self._fresh(axis, wakes))
        if woke and self.made_by.waking is not None:
            self.remembered = self.made_by.waking.woke(self.remembered)

    def rename(self, names: Names, /) -> None:
        """Gates stay with their axes; units that sleep in a layer that is gone are forgotten."""
        self._gates = None
        self.table.forget()
        self.table.rename(names.axes)
        self.sleepers.rename(names)
        self.refused = {}

    def state(self) -> dict[str, Any]:
        """All of it."""
        return {
            "table": self.table.state(),
            "sleepers": self.sleepers.state(),
            "waking": dict(self.remembered),
            "epoch": self._epoch,
        }

    def restore(self, state: Mapping[str, Any], /) -> None:
        """Become what `state` gave."""
        fresh = GateMemory(self.made_by)
        fresh.table.restore(state["table"])
        fresh.sleepers.restore(state["sleepers"])
        fresh.remembered, fresh._epoch = dict(state["waking"]), int(state["epoch"])
        self.__dict__.update(fresh.__dict__)

    # --- how

    def _meet(self, context: Context) -> None:
        """Take in axes that are not known yet."""
        structure, settings = context.structure, self.made_by.settings
        first = self.sleepers.meet(structure.topology)
        for axis in context.axes:
            if axis in self.logits or axis in self.refused:
                continue
            why = gate_problem(structure, axis)
            if why is not None and settings.strict:
                raise MethodError(f"{axis} cannot have gates: {why}; leave it out of axes=.")
            if why is not None:
                self.refused[axis] = why
                continue
            self.table.add(axis, self._first(axis, first))
        if not self.logits:
            shown = "; ".join(f"{axis}: {why}" for axis, why in list(self.refused.items())[:3])
            raise MethodError(f"no axis can have gates ({shown}).")
        if self.made_by.waking is not None:
            self.made_by.waking.check(context)

    def _seen(self, context: Context, room: Mapping[str, int], leaving: Collection[str] = ()) -> Seen:
        progress = context.progress
        cost = float(self.table.cost(context.structure.topology, progress)[0])
        found = self.table.probabilities(progress)
        return Seen(
            context, found, self.sleepers, cost, room, self.made_by.fresh, frozenset(leaving), self.all_there
        )  # fmt: skip

    def _first(self, axis: str, first: bool) -> Tensor:
        """The logits of an axis that is met for the first time."""
        settings = self.made_by.settings
        k = settings.stages.k or 1.0
        awake = len(self.sleepers.numbers[axis])
        for pattern, wanted in (self.made_by.awake or {}).items() if first else ():
            if fnmatchcase(axis, pattern):
                awake = wanted
                break
        centre = torch.full((len(self.sleepers.numbers[axis]),), _ASLEEP / k, dtype=torch.float64)
        centre[:awake] = settings.kind.logit(settings.begin, k)
        return centre + self._noise(axis)

    def _fresh(self, axis: str, wakes: bool) -> Tensor:
        """The logits that units would have that come now."""
        settings = self.made_by.settings
        centre = settings.kind.logit(settings.begin, settings.stages.k or 1.0)
        if wakes:
            centre = self.made_by.fill / (self.table.k or 1.0)
        return centre + self._noise(axis)

    def _noise(self, axis: str) -> Tensor:
        rows = [torch.Generator().manual_seed(derived_seed("gate", axis, one)) for one in self.sleepers.numbers[axis]]
        return torch.stack([0.01 * torch.randn((), generator=one, dtype=torch.float64) for one in rows])

    def _was_awake(self, axis: str, unit: int) -> bool:
        """Whether a unit that goes to sleep ever was awake: those that begin asleep are far below all others."""
        return float(self.logits[axis][unit]) > _ASLEEP / 2 / (self.made_by.settings.stages.k or 1.0)


__all__ = ["GateMemory", "Gated"]

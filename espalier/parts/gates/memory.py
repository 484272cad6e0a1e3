"""Stochastic gates on units, trained with the weights: what a method with such gates remembers.

The memory holds the gates (`espalier.parts.gates.table`), some of which may be on columns, and the units that sleep
(`espalier.parts.gates.sleepers`).
It follows every edit: units that another method removes take their gates with them, and those that it adds start open.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.graph.dims import IntArray
from espalier.parts.gates.beginning import beginning, fresh_gates, noise_of
from espalier.parts.gates.by_sample import BySample, sample_problem
from espalier.parts.gates.columns import Columns, column_place
from espalier.parts.gates.dormant import Sleeper
from espalier.parts.gates.entries import EntryGates
from espalier.parts.gates.folding import Folding
from espalier.parts.gates.places import Gates
from espalier.parts.gates.settings import GateSettings
from espalier.parts.gates.sleepers import Sleepers, Woken
from espalier.parts.gates.subnetwork import SubNetwork, Worth
from espalier.parts.gates.table import GateTable
from espalier.parts.gates.units import gate_problem, unit_place
from espalier.parts.gates.waking import Remembered, Seen, Waking
from espalier.parts.names import Names
from espalier.parts.score import Context

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
    go to sleep at the first event, after the first step with `Schedule.at_once`. None: all are."""
    worth: Worth = field(default_factory=Worth)
    """When units whose gates are 0 in a step are left out of it, rather than multiplied (`SubNetwork`)."""
    per_sample: bool = False
    """Whether every sample of a batch draws gates of its own (`espalier.parts.gates.by_sample`)."""
    columns: Sequence[str] = ()
    """Dimensions of parameters that have a gate for every position beside those on units: ``fc1.weight[1]`` for the
    columns of one. What they shut is masked."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        wrong = next((one for one in self.columns if Columns.named(one) is None), None)
        if wrong is not None:
            raise MethodError(f"columns: expected a parameter and a dimension, such as fc1.weight[1], found {wrong!r}.")
        if self.per_sample and self.columns:
            raise MethodError("columns: gates on columns are shared by a batch; leave out per_sample=True.")
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
        self.table = GateTable(made_by.settings, never_empty=True)
        """By axis."""
        self.sleepers = Sleepers()
        self.entries = EntryGates(self.table, _columns)
        self.folding = Folding()
        self.refused: dict[str, str] = {}
        """Axis -> why it has no gates."""
        self.remembered: Remembered = {} if made_by.waking is None else made_by.waking.begin()
        """What the policy of waking remembers."""
        self._gates: SubNetwork | None = None
        self._by_sample: BySample | None = None
        self._all_there = False

    @property
    def logits(self) -> dict[str, Tensor]:
        """Axis, or columns -> logits, float64 on the CPU."""
        return self.table.logits

    @property
    def asleep(self) -> Mapping[str, Sequence[Sleeper]]:
        """Axis -> its units that sleep."""
        return self.sleepers.asleep

    # --- what training asks for

    def gates(self, context: Context) -> SubNetwork:
        """Where the gates act now.

        Raises:
            MethodError: no axis can have gates, or one that was asked for by name cannot.
        """
        structure = context.structure
        if self._gates is None or self._gates.topology is not structure.topology:
            self._meet(context)
            units = [unit_place(structure, axis) for axis in self.logits if axis not in self.entries.known]
            gates = Gates(structure, [*units, *self.entries.places(structure)])
            self._gates = SubNetwork(structure, gates, self.made_by.worth)
            self._by_sample = BySample(structure, units) if self.made_by.per_sample else None
            self.sleepers.give_back(structure)
        return self._gates

    def by_sample(self, context: Context) -> BySample | None:
        """What evaluates losses at gates of every sample; None where a batch shares its gates."""
        self.gates(context)
        return self._by_sample

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
        self.folding.forget()
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

    def shut(self, context: Context) -> dict[str, Tensor]:
        """Parameter -> of booleans, what of it gates on columns hold at zero for good now."""
        self.gates(context)
        return self.entries.shut(context.structure, self.table.ready(context.progress), context.progress)

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
        self.folding.forget()
        self.gates(context)
        ended, policy = self.table.step(context.progress, context.epoch), self.made_by.waking
        if ended and policy is not None and self.table.stage == 1:
            self.remembered = policy.look(self._seen(context, {}), self.remembered)

    def follow(self, units: Mapping[str, IntArray], /) -> None:
        """Gates go and come with their units."""
        self._gates = None
        self.table.forget()
        if self.folding.follow(units):
            self.entries.clear()
            self.table.clear()
        self.entries.note(units)
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
        self.table.rename({axis: now for axis, now in names.axes.items() if axis not in self.entries.known})
        self.entries.rename(names)
        self.sleepers.rename(names)
        self.refused = {}

    def state(self) -> dict[str, Any]:
        """All of it."""
        return {
            "table": self.table.state(),
            "entries": self.entries.state(),
            "folded": self.folding.done,
            "sleepers": self.sleepers.state(),
            "waking": dict(self.remembered),
        }

    def restore(self, state: Mapping[str, Any], /) -> None:
        """Become what `state` gave."""
        fresh = GateMemory(self.made_by)
        fresh.table.restore(state["table"])
        fresh.entries.restore(state["entries"])
        fresh.folding.done = bool(state["folded"])
        fresh.sleepers.restore(state["sleepers"])
        fresh.remembered = dict(state["waking"])
        self.__dict__.update(fresh.__dict__)

    # --- how

    def _meet(self, context: Context) -> None:
        """Take in axes that are not known yet."""
        structure, settings = context.structure, self.made_by.settings
        first = self.sleepers.meet(structure.topology)
        if self.folding.done:
            return
        self.entries.meet(structure, self._columns(context), partial(fresh_gates, settings))
        for axis in context.axes:
            if axis in self.logits or axis in self.refused:
                continue
            why = gate_problem(structure, axis)
            if why is None and settings.kind.lasting and unit_place(structure, axis).norms:
                why = "numbers between 0 and 1 could not join its weights, since a norm runs over it"
            if why is None and self.made_by.per_sample:
                why = sample_problem(structure, unit_place(structure, axis))
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

    def _columns(self, context: Context) -> list[str]:
        """The columns with gates, by the first names of their parameters."""
        found = []
        for key in self.made_by.columns if not self.entries.known else ():
            columns = _columns(key)
            column_place(context.structure, columns)  # complains if there are none
            first = context.structure.topology.aliases.get(columns.tensor, columns.tensor)
            found.append(replace(columns, tensor=first).key)
        return found

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
        centre[:awake] = beginning(settings)
        return centre + noise_of(axis, self.sleepers.numbers[axis])

    def _fresh(self, axis: str, wakes: bool) -> Tensor:
        """The logits that units would have that come now."""
        centre = beginning(self.made_by.settings)
        if wakes:
            centre = self.made_by.fill / (self.table.k or 1.0)
        return centre + noise_of(axis, self.sleepers.numbers[axis])

    def _was_awake(self, axis: str, unit: int) -> bool:
        """Whether a unit that goes to sleep ever was awake: those that begin asleep are far below all others."""
        return float(self.logits[axis][unit]) > _ASLEEP / 2 / (self.made_by.settings.stages.k or 1.0)


def _columns(key: str) -> Columns:
    found = Columns.named(key)
    assert found is not None
    return found


__all__ = ["GateMemory", "Gated"]

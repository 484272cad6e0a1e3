"""Triggers: what decides, from what is seen of the training, whether it is time for an event, and in which axes.

A trigger answers with the axes for which it holds: all or none where it looks at the training as a whole, some where it
looks at every axis by itself. So `&`, `|` and `~` are those of sets. Triggers are frozen values; what one remembers
between two looks is handed in and out as data that JSON can hold, and lives in the session.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from espalier.errors import MethodError
from espalier.graph.dims import IntArray
from espalier.graph.topology import Topology
from espalier.parts.checks import check_count
from espalier.parts.clock import Clock, Last, Metric
from espalier.parts.goal import Direction, Scores
from espalier.parts.names import Names, carried, renamed
from espalier.parts.score import Context, Score

State = Any
"""What a trigger remembers, as JSON can hold it; None at first."""
Need = Literal["loss", "probe", "units"]
"""What a session has to provide: the training loss of every step, held-out batches; a method that changes units."""


def _no_scores(score: Score | None) -> Scores:
    """Outside of a session there is nothing to score."""
    return Scores({})


@dataclass(frozen=True)
class View:
    """What a trigger may look at; it changes nothing of it."""

    context: Context
    clock: Clock
    metrics: tuple[Metric, ...] = ()
    """One for every epoch."""
    loss: float | None = None
    """Mean training loss, without penalties, of the steps since the last look; None if unknown or not finite."""
    events: int = 0
    """Events of the method so far."""
    acted: Last | None = None
    """When it last acted, or tried to."""
    scores: Callable[[Score | None], Scores] = _no_scores
    """Scores of all units of the method's axes, by this score or by the method's own, if that prunes."""

    @property
    def axes(self) -> frozenset[str]:
        """The axes that the method may change."""
        return frozenset(self.context.axes)


Answer = tuple[frozenset[str], State]
"""The axes for which a trigger holds, and what it remembers from now on."""


class Trigger(ABC):
    """Says whether it is time."""

    @abstractmethod
    def look(self, view: View, state: State, /) -> Answer:
        """Where it holds now. Pure: what it has to remember it returns."""

    @property
    def needs(self) -> frozenset[Need]:
        """What the session has to provide."""
        return frozenset()

    def check(self, topology: Topology, axes: Sequence[str], direction: Direction) -> None:
        """Raise an EspalierError if it could not look at this network for such a method; called before training."""
        return

    def follow(self, units: Mapping[str, IntArray], state: State, /) -> State:
        """What is remembered after an edit, given as in `Memory.follow`."""
        return state

    def rename(self, names: Names, state: State, /) -> State:
        """What is remembered after layers came or went, given as in `Memory.rename`: nothing, unless a trigger says
        so, since names of axes may mean others now."""
        return None

    def held(self, looks: int) -> Held:
        """This trigger, once it has held at so many looks in a row."""
        return Held(self, looks)

    def until(self, off: Trigger) -> Between:
        """This trigger, which then goes on until the other one holds: separate thresholds for on and off."""
        return Between(self, off)

    def __and__(self, other: Trigger) -> All:
        return All((self, other))

    def __or__(self, other: Trigger) -> Some:
        return Some((self, other))

    def __invert__(self) -> No:
        return No(self)


@dataclass(frozen=True)
class _Several(Trigger):
    """What is made of other triggers, all of which are asked every time."""

    triggers: tuple[Trigger, ...]

    def __post_init__(self) -> None:
        if len(self.triggers) < 1:
            raise MethodError(f"{type(self).__name__}: expected at least one trigger, found none.")
        for one in self.triggers:
            if not isinstance(one, Trigger):
                raise MethodError(f"{type(self).__name__}: expected triggers, found {one!r}.")

    @property
    def needs(self) -> frozenset[Need]:
        """All that the parts need."""
        return frozenset[Need]().union(*(one.needs for one in self.triggers))

    def check(self, topology: Topology, axes: Sequence[str], direction: Direction) -> None:
        """Every part for itself."""
        for one in self.triggers:
            one.check(topology, axes, direction)

    def follow(self, units: Mapping[str, IntArray], state: State, /) -> State:
        """Every part for itself."""
        return [one.follow(units, its) for one, its in zip(self.triggers, self._states(state), strict=True)]

    def rename(self, names: Names, state: State, /) -> State:
        """Every part for itself."""
        return [one.rename(names, its) for one, its in zip(self.triggers, self._states(state), strict=True)]

    def _answers(self, view: View, state: State) -> tuple[list[frozenset[str]], list[State]]:
        answers = [one.look(view, its) for one, its in zip(self.triggers, self._states(state), strict=True)]
        return [axes for axes, _ in answers], [its for _, its in answers]

    def _states(self, state: State) -> list[State]:
        return [None] * len(self.triggers) if state is None else list(state)


@dataclass(frozen=True)
class All(_Several):
    """Where all of them hold: ``a & b``."""

    def look(self, view: View, state: State, /) -> Answer:
        """The axes that all of them name."""
        found, states = self._answers(view, state)
        return frozenset.intersection(*found), states


@dataclass(frozen=True)
class Some(_Several):
    """Where at least one of them holds: ``a | b``."""

    def look(self, view: View, state: State, /) -> Answer:
        """The axes that any of them names."""
        found, states = self._answers(view, state)
        return frozenset.union(*found), states


@dataclass(frozen=True)
class No(Trigger):
    """Where a trigger does not hold: ``~a``."""

    trigger: Trigger

    @property
    def needs(self) -> frozenset[Need]:
        """What it needs."""
        return self.trigger.needs

    def look(self, view: View, state: State, /) -> Answer:
        """The axes that it does not name."""
        axes, state = self.trigger.look(view, state)
        return view.axes - axes, state

    def check(self, topology: Topology, axes: Sequence[str], direction: Direction) -> None:
        """As it does."""
        self.trigger.check(topology, axes, direction)

    def follow(self, units: Mapping[str, IntArray], state: State, /) -> State:
        """As it does."""
        return self.trigger.follow(units, state)

    def rename(self, names: Names, state: State, /) -> State:
        """As it does."""
        return self.trigger.rename(names, state)


@dataclass(frozen=True)
class Held(Trigger):
    """Where a trigger has held at so many looks in a row; counting starts anew after an event."""

    trigger: Trigger
    looks: int

    def __post_init__(self) -> None:
        check_count("looks", self.looks)

    @property
    def needs(self) -> frozenset[Need]:
        """What it needs."""
        return self.trigger.needs

    def look(self, view: View, state: State, /) -> Answer:
        """The axes that it named this time and the times before."""
        acted = None if view.acted is None else view.acted.step
        state = [None, {}, None] if state is None else state
        inner, before, then = state
        axes, inner = self.trigger.look(view, inner)
        counts = {axis: 1 + (before.get(axis, 0) if then == acted else 0) for axis in sorted(axes)}
        return frozenset(axis for axis, count in counts.items() if count >= self.looks), [inner, counts, acted]

    def check(self, topology: Topology, axes: Sequence[str], direction: Direction) -> None:
        """As the trigger does."""
        self.trigger.check(topology, axes, direction)

    def follow(self, units: Mapping[str, IntArray], state: State, /) -> State:
        """As the trigger does; counts stay."""
        return None if state is None else [self.trigger.follow(units, state[0]), *state[1:]]

    def rename(self, names: Names, state: State, /) -> State:
        """As the trigger does; counts stay with their axes."""
        if state is None:
            return None
        inner, counts, then = state
        return [self.trigger.rename(names, inner), carried(counts, names.axes), then]


@dataclass(frozen=True)
class Between(Trigger):
    """Holds from where one trigger does until another does: hysteresis. Where both hold, it does not."""

    on: Trigger
    off: Trigger

    @property
    def needs(self) -> frozenset[Need]:
        """What both need."""
        return self.on.needs | self.off.needs

    def look(self, view: View, state: State, /) -> Answer:
        """The axes in which it has begun and not ended."""
        state = [None, None, []] if state is None else state
        first, second, held = state
        on, first = self.on.look(view, first)
        off, second = self.off.look(view, second)
        axes = (frozenset(held) | on) - off
        return axes & view.axes, [first, second, sorted(axes)]

    def check(self, topology: Topology, axes: Sequence[str], direction: Direction) -> None:
        """As both do."""
        self.on.check(topology, axes, direction)
        self.off.check(topology, axes, direction)

    def follow(self, units: Mapping[str, IntArray], state: State, /) -> State:
        """As both do."""
        return None if state is None else [self.on.follow(units, state[0]), self.off.follow(units, state[1]), state[2]]

    def rename(self, names: Names, state: State, /) -> State:
        """As both do; what holds stays with its axes."""
        if state is None:
            return None
        on, off, held = state
        return [self.on.rename(names, on), self.off.rename(names, off), sorted(renamed(held, names.axes))]


__all__ = [
    "All", "Answer", "Between", "Held", "Metric", "Need", "No", "Some", "State", "Trigger", "View",
]  # fmt: skip

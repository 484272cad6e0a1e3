"""Schedules as data: when a method acts and how far it goes each time.

A schedule is a trigger (every n steps or epochs), a window (start, until) and an amount. Ramps follow Zhu & Gupta, "To
prune, or not to prune" (2017): s_t = s_f + (s_i - s_f) (1 - tau)^p, with tau the fraction of the events that are done;
p = 3 is theirs, p = 1 linear. The amount at each event is what remains to s_t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from espalier.errors import MethodError
from espalier.parts.budget import Budget, Units

Shape = Literal["constant", "linear", "cubic"]
_POWER: Mapping[str, float] = {"constant": math.inf, "linear": 1.0, "cubic": 3.0}


@dataclass(frozen=True)
class Clock:
    """How far training is, when an event may be due."""

    step: int
    """Optimizer steps that are done."""
    epoch: int
    """Epochs that are done."""
    boundary: int
    """Steps that were done when the last epoch ended; 0 before."""
    total_steps: int

    @property
    def epoch_steps(self) -> float | None:
        """Steps per epoch; None in the first one."""
        return self.boundary / self.epoch if self.epoch else None


@dataclass(frozen=True)
class Last:
    """When a method last acted."""

    step: int
    epoch: int


@dataclass(frozen=True)
class Steps:
    """A number of optimizer steps, or every so many of them."""

    count: int

    def __post_init__(self) -> None:
        _check_count("steps", self.count)

    def in_steps(self, clock: Clock) -> float | None:
        """The step that this many steps end at."""
        return float(self.count)

    def next_step(self, clock: Clock, last: Last | None, start: float) -> int | None:
        """The number of the next step after which an event is due, counted from 1; None: not known yet."""
        first = math.ceil(start) if start > 0 else self.count
        return max(first if last is None else last.step + self.count, clock.step + 1)

    def remaining(self, clock: Clock, until: float) -> int:
        """How many events are still to come after one at this step."""
        return max(0, math.floor((until - clock.step) / self.count))


@dataclass(frozen=True)
class Epochs:
    """A number of epochs, or every so many of them; events come after the first step of the next epoch."""

    count: int

    def __post_init__(self) -> None:
        _check_count("epochs", self.count)

    def in_steps(self, clock: Clock) -> float | None:
        """The step of an event after this many epochs; None in the first epoch, whose length nobody knows."""
        return None if clock.epoch_steps is None else self.count * clock.epoch_steps + 1

    def next_step(self, clock: Clock, last: Last | None, start: float) -> int | None:
        """The number of the next step after which an event is due, counted from 1; None: not known yet."""
        if clock.step != clock.boundary or clock.epoch == 0 or clock.step + 1 < start:
            return None
        due = self.count if start <= 0 else 1
        return clock.step + 1 if clock.epoch >= (due if last is None else last.epoch + self.count) else None

    def remaining(self, clock: Clock, until: float) -> int:
        """How many events are still to come after one in this epoch."""
        if clock.epoch_steps is None:
            return 0
        last_epoch = (min(until, clock.total_steps) - 1) / clock.epoch_steps
        return max(0, math.floor((last_epoch - clock.epoch) / self.count + 1e-9))


When = float | Steps | Epochs
"""A fraction of all steps, or a number of steps or epochs."""


class Amount(Protocol):
    """How far each event goes."""

    @property
    def budget(self) -> Budget:
        """What the target is counted in."""

    @property
    def lasts(self) -> bool:
        """Whether the budget still holds when the last event is over."""

    def target(self, tau: float, present: int, start: int, limit: int, direction: Literal[-1, 1], /) -> int:
        """The cost to reach at this event.

        Args:
            tau: fraction of the events that are done with this one.
            present: the cost now.
            start: the cost at the method's first event.
            limit: the cost that the budget allows in the end.
            direction: 1 to grow, -1 to prune.
        """


@dataclass(frozen=True)
class Ramp:
    """Approach a budget over the events; ``constant`` is at it from the first event on."""

    budget: Budget
    shape: Shape = "cubic"

    def __post_init__(self) -> None:
        if not isinstance(self.budget, Budget):
            raise MethodError(
                f"expected a budget such as FLOPs(0.5, of='initial') or Parameters(50_000), found {self.budget!r}."
            )
        if self.shape not in _POWER:
            raise MethodError(f"expected shape= one of {', '.join(_POWER)}, found {self.shape!r}.")

    @property
    def lasts(self) -> bool:
        """Yes: it is what the network may cost in the end."""
        return True

    def target(self, tau: float, present: int, start: int, limit: int, direction: Literal[-1, 1], /) -> int:
        """s_f + (s_i - s_f) (1 - tau)^p, rounded down."""
        remaining: float = (1.0 - tau) ** _POWER[self.shape]
        return math.floor(limit + (start - limit) * remaining)


@dataclass(frozen=True)
class Steady:
    """The same fraction of the present units at every event, at least one unit."""

    fraction: float

    def __post_init__(self) -> None:
        if isinstance(self.fraction, bool) or not isinstance(self.fraction, (int, float)) or not self.fraction > 0:
            raise MethodError(f"amount: expected a fraction of the units above 0, found {self.fraction!r}.")

    @property
    def budget(self) -> Budget:
        """Units, of which there is no limit in the end."""
        return Units(1.0, of="initial")

    @property
    def lasts(self) -> bool:
        """No: there is none."""
        return False

    def target(self, tau: float, present: int, start: int, limit: int, direction: Literal[-1, 1], /) -> int:
        """Units that there will be."""
        return max(0, present + direction * max(1, round(self.fraction * present)))


@dataclass(frozen=True)
class Schedule:
    """When a method acts, and how far it goes each time."""

    amount: Amount
    every: Steps | Epochs
    start: When = 0.0
    until: When = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.every, (Steps, Epochs)):
            raise MethodError(f"every: expected steps(n) or epochs(n), found {self.every!r}.")
        for name, when in (("start", self.start), ("until", self.until)):
            if isinstance(when, (Steps, Epochs)):
                continue
            if isinstance(when, bool) or not isinstance(when, (int, float)) or not 0 <= when <= 1:
                raise MethodError(f"{name}: expected a fraction from 0 to 1, steps(n) or epochs(n), found {when!r}.")
        if isinstance(self.start, float) and isinstance(self.until, float) and self.start >= self.until:
            raise MethodError(f"start={self.start!r} must come before until={self.until!r}.")

    def next_step(self, clock: Clock, last: Last | None) -> int | None:
        """The next step after which an event is due; None: not known before the next epoch ends, or never."""
        start = _in_steps(self.start, clock)
        if start is None:
            return None
        due = self.every.next_step(clock, last, start)
        return due if due is not None and due <= self._end(clock) else None

    def remaining(self, clock: Clock) -> int:
        """How many events are to come after one that happens now."""
        return self.every.remaining(clock, self._end(clock))

    def _end(self, clock: Clock) -> float:
        until = _in_steps(self.until, clock)
        return clock.total_steps if until is None else until


def _in_steps(when: When, clock: Clock) -> float | None:
    return when * clock.total_steps if isinstance(when, (int, float)) else when.in_steps(clock)


def _check_count(name: str, count: object) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise MethodError(f"{name}: expected a whole number of at least 1, found {count!r}.")


def steps(count: int) -> Steps:
    """So many optimizer steps. Raises MethodError if `count` is no whole number of at least 1."""
    return Steps(count)


def epochs(count: int) -> Epochs:
    """So many epochs, as counted by `Session.epoch_end`. Raises MethodError as `steps`."""
    return Epochs(count)


__all__ = [
    "Amount", "Clock", "Epochs", "Last", "Ramp", "Schedule", "Shape", "Steady", "Steps", "When", "epochs",
    "steps",
]  # fmt: skip

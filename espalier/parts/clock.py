"""Moments of a training: numbers of steps and epochs, and how far it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from espalier.parts.checks import check_count


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
class Metric:
    """What `Session.epoch_end` was told."""

    epoch: int
    value: float | None
    """None if nothing was said, or no finite number."""
    mode: str
    """``max`` or ``min``: whether a good one is large or small."""


@dataclass(frozen=True)
class Steps:
    """A number of optimizer steps, or every so many of them."""

    count: int

    def __post_init__(self) -> None:
        check_count("steps", self.count)

    def in_steps(self, clock: Clock) -> float | None:
        """The step that this many steps end at."""
        return float(self.count)

    def next_step(self, clock: Clock, last: Last | None, start: float) -> int | None:
        """The number of the next step after which an event is due, counted from 1; None: not known yet."""
        earliest = last.step + self.count if last is not None else self.count if start <= 0 else 1
        return max(earliest, math.ceil(start), clock.step + 1)

    def since(self, clock: Clock, last: Last) -> float | None:
        """The step at which so many steps have passed since then."""
        return float(last.step + self.count)

    def remaining(self, clock: Clock, until: float) -> int:
        """How many events are still to come after one at this step."""
        return max(0, math.floor((until - clock.step) / self.count))


@dataclass(frozen=True)
class Epochs:
    """A number of epochs, or every so many of them; events come after the first step of the next epoch."""

    count: int

    def __post_init__(self) -> None:
        check_count("epochs", self.count)

    def in_steps(self, clock: Clock) -> float | None:
        """The step of an event after this many epochs; None in the first epoch, whose length nobody knows."""
        return None if clock.epoch_steps is None else self.count * clock.epoch_steps + 1

    def next_step(self, clock: Clock, last: Last | None, start: float) -> int | None:
        """The number of the next step after which an event is due, counted from 1; None: not known yet."""
        if clock.step != clock.boundary or clock.epoch == 0 or clock.step + 1 < start:
            return None
        due = self.count if start <= 0 else 1
        return clock.step + 1 if clock.epoch >= (due if last is None else last.epoch + self.count) else None

    def since(self, clock: Clock, last: Last) -> float | None:
        """A step at which so many epochs have passed since then; None before."""
        return float(clock.step) if clock.epoch >= last.epoch + self.count else None

    def remaining(self, clock: Clock, until: float) -> int:
        """How many events are still to come after one in this epoch."""
        if clock.epoch_steps is None:
            return 0
        last_epoch = (min(until, clock.total_steps) - 1) / clock.epoch_steps
        return max(0, math.floor((last_epoch - clock.epoch) / self.count + 1e-9))


Moment = float | Steps | Epochs
"""A fraction of all steps, or a number of steps or epochs."""


def in_steps(moment: Moment, clock: Clock) -> float | None:
    """The step at which a moment is; None where nobody knows yet how long an epoch is."""
    return moment * clock.total_steps if isinstance(moment, (int, float)) else moment.in_steps(clock)


def steps(count: int) -> Steps:
    """So many optimizer steps. Raises MethodError if `count` is no whole number of at least 1."""
    return Steps(count)


def epochs(count: int) -> Epochs:
    """So many epochs, as counted by `Session.epoch_end`. Raises MethodError as `steps`."""
    return Epochs(count)


__all__ = ["Clock", "Epochs", "Last", "Metric", "Moment", "Steps", "epochs", "in_steps", "steps"]

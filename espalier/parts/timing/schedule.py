"""Schedules as data: when a method acts and how far it goes each time.

Every so many steps or epochs within a window the schedule looks whether it is time. Without a trigger it always is;
with one, when the trigger says so. What each event reaches is the amount's to say.
"""

from __future__ import annotations

from dataclasses import dataclass

from espalier.errors import MethodError
from espalier.parts.checks import check_count
from espalier.parts.clock import Clock, Epochs, Last, Moment, Steps, in_steps
from espalier.parts.timing.amount import Amount
from espalier.parts.timing.trigger import Trigger


@dataclass(frozen=True)
class Schedule:
    """When a method acts, and how far it goes each time."""

    amount: Amount
    every: Steps | Epochs
    """How often an event is due; with a trigger, how often that is asked."""
    start: Moment = 0.0
    until: Moment = 1.0
    when: Trigger | None = None
    """What has to hold for an event; it can name some axes, and then only they change. None: always."""
    cooldown: Steps | Epochs | None = None
    """Time after an event in which the trigger is not asked."""
    max_events: int | None = None
    """The largest number of events; a ramp is then at its end with the last of them."""
    stop: Trigger | None = None
    """There are no more events once this holds, asked before every event would be due."""
    at_once: bool = False
    """Whether an event is due after the very first step as well, whatever else is said."""
    at_last: bool = False
    """Whether an event is due after the very last step as well, whatever else is said."""

    def __post_init__(self) -> None:
        if not isinstance(self.every, (Steps, Epochs)):
            raise MethodError(f"every: expected steps(n) or epochs(n), found {self.every!r}.")
        for name, moment in (("start", self.start), ("until", self.until)):
            if isinstance(moment, (Steps, Epochs)):
                continue
            if isinstance(moment, bool) or not isinstance(moment, (int, float)) or not 0 <= moment <= 1:
                raise MethodError(f"{name}: expected a fraction from 0 to 1, steps(n) or epochs(n), found {moment!r}.")
        if isinstance(self.start, float) and isinstance(self.until, float) and self.start >= self.until:
            raise MethodError(f"start={self.start!r} must come before until={self.until!r}.")
        for name, trigger in (("when", self.when), ("stop", self.stop)):
            if trigger is not None and not isinstance(trigger, Trigger):
                raise MethodError(f"{name}: expected a trigger such as Plateau(), or None, found {trigger!r}.")
        if self.cooldown is not None and not isinstance(self.cooldown, (Steps, Epochs)):
            raise MethodError(f"cooldown: expected steps(n), epochs(n) or None, found {self.cooldown!r}.")
        if self.cooldown is not None and self.when is None:
            raise MethodError("cooldown is for schedules with a trigger (when=); without one give a larger every=.")
        if self.max_events is not None:
            check_count("max_events", self.max_events)

    @property
    def triggers(self) -> tuple[Trigger, ...]:
        """What is asked before an event."""
        return tuple(one for one in (self.when, self.stop) if one is not None)

    def next_step(self, clock: Clock, last: Last | None, acted: Last | None = None) -> int | None:
        """The next step after which an event is due, or the trigger asked.

        None: not known before the next epoch ends, or never.

        Args:
            clock: how far training is.
            last: when that was so before.
            acted: when an event happened before.
        """
        if self.at_once and last is None:
            return clock.step + 1
        found = self._next(clock, last, acted)
        if self.at_last and found is None and clock.step < clock.total_steps:
            return clock.total_steps
        return found

    def remaining(self, clock: Clock) -> int:
        """How many events, or times to ask, are to come after one that happens now."""
        found = self.every.remaining(clock, self._end(clock))
        unknown = self.at_once and clock.epoch_steps is None  # nobody knows yet how many
        return max(found, 1) if unknown or (self.at_last and clock.step < clock.total_steps) else found

    def _next(self, clock: Clock, last: Last | None, acted: Last | None) -> int | None:
        """As `next_step`, by all that is said."""
        start = in_steps(self.start, clock)
        if start is None:
            return None
        if self.cooldown is not None and acted is not None:
            rested = self.cooldown.since(clock, acted)
            if rested is None:
                return None
            start = max(start, rested)
        due = self.every.next_step(clock, last, start)
        return due if due is not None and due <= self._end(clock) else None

    def _end(self, clock: Clock) -> float:
        until = in_steps(self.until, clock)
        return clock.total_steps if until is None else until


__all__ = ["Schedule"]

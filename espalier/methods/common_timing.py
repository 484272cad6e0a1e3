"""The arguments of methods of every level: when a method acts, and what follows."""

from __future__ import annotations

from typing import TypedDict

from espalier.parts.clock import Epochs, Moment, Steps
from espalier.parts.timing.recovery import Accept, Recovery
from espalier.parts.timing.trigger import Trigger


class Timing(TypedDict, total=False):
    """When a method acts, and what follows; methods may have defaults of their own."""

    every: Steps | Epochs
    """steps(n) or epochs(n); every epoch by default. With `when`, how often that is asked."""
    start: Moment
    """When the first event may be: a fraction of all steps (default 0.1), steps(n) or epochs(n)."""
    until: Moment
    """When the last event may be, likewise (default 0.7 to prune, 0.6 to grow)."""
    when: Trigger | None
    """What has to hold for an event, such as ``Plateau() & ~Reached(Parameters(50_000))``; None (default): always. A
    pruning method with a budget meets it at its last time in any case."""
    cooldown: Steps | Epochs | None
    """With `when`: time after an event in which it is not asked (default None)."""
    max_events: int | None
    """The largest number of events, with the last of which shape and budget are at their end (default None)."""
    stop: Trigger | None
    """There are no more events once this holds, such as ``Futile()`` (default None)."""
    recovery: Recovery
    """Batch norms calibrated anew, and the learning rate of new units; by default ``Recovery()``."""
    accept: Accept | None
    """Undo events after which the held-out loss is worse; None (default) keeps them all."""


__all__ = ["Timing"]

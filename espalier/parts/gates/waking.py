"""When units wake, and which: policies of methods that grow under gates.

A policy is a frozen value. What it remembers is a mapping that JSON can hold, which it gets and gives back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from espalier.errors import MethodError
from espalier.measure.stats import eval_loss
from espalier.parts.gates.dormant import Sleeper
from espalier.parts.gates.sleepers import Woken
from espalier.parts.score import Context

Remembered = Mapping[str, Any]


@dataclass(frozen=True)
class Seen:
    """What a policy sees."""

    context: Context
    probabilities: Mapping[str, Tensor]
    """Axis -> probability of each of its units that are in the network."""
    asleep: Mapping[str, Sequence[Sleeper]]
    fallen: Mapping[str, int]
    """Axis -> how many of its units fell asleep again."""
    cost: float
    """The penalty on the gates now."""
    room: Mapping[str, int]
    """Axis -> how many units may come; axes in which none may are left out."""


class Waking(Protocol):
    """When units wake, and which."""

    @property
    def fill(self) -> float:
        """k times the logit of a unit that wakes: 0 for a probability of 1/2."""

    def check(self, context: Context, /) -> None:
        """Raises MethodError for what the session would have to give and does not."""

    def begin(self) -> Remembered:
        """What is remembered at first."""

    def look(self, seen: Seen, remembered: Remembered, /) -> Remembered:
        """Look at the end of an epoch of the search; what is remembered from then on. There is no `Seen.room` yet."""

    def chosen(self, seen: Seen, remembered: Remembered, /) -> Woken:
        """The units that wake now, in the search."""

    def woke(self, remembered: Remembered, /) -> Remembered:
        """What is remembered once they have woken."""


@dataclass(frozen=True)
class Algorithm1:
    """One unit in every axis whose units are all in use, where the held-out loss has fallen since units came last.

    Algorithm 1 of Li & Ji (2020, arXiv:1908.08118), looked at once per epoch: the held-out loss, with the penalty, is
    lower than it was when it was the lowest; in the axis no unit has a probability below 1/2, and none fell asleep
    again.
    """

    fill: float = 0.0
    fresh: bool = True
    """Whether new units come where none sleep any more."""

    def check(self, context: Context, /) -> None:
        if not context.probe:
            raise MethodError("units wake by the held-out loss; give the session probe=[batches].")

    def begin(self) -> Remembered:
        return {"best": None, "improved": False}

    def look(self, seen: Seen, remembered: Remembered, /) -> Remembered:
        context, best = seen.context, remembered["best"]
        losses = [eval_loss(context.structure.model, partial(context.loss, batch)) for batch in context.probe]
        value = sum(losses) / len(losses) + seen.cost
        improved = best is None or value < best
        return {"best": value if improved else best, "improved": improved}

    def chosen(self, seen: Seen, remembered: Remembered, /) -> Woken:
        found: dict[str, tuple[Sleeper | None, ...]] = {}
        for axis, p in seen.probabilities.items() if remembered["improved"] else ():
            in_use = bool((p >= 0.5).all()) and not seen.fallen.get(axis)
            sleepers = seen.asleep.get(axis, ())
            if in_use and seen.room.get(axis) and (sleepers or self.fresh):
                found[axis] = (sleepers[0] if sleepers else None,)
        return found

    def woke(self, remembered: Remembered, /) -> Remembered:
        return {**remembered, "improved": False}


__all__ = ["Algorithm1", "Remembered", "Seen", "Waking"]

"""When units wake, and which: policies of methods that grow under gates.

A policy is a frozen value. What it remembers is a mapping that JSON can hold, which it gets and gives back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from torch import Tensor

from espalier.errors import MethodError
from espalier.parts.checks import check_count
from espalier.parts.gates.sleepers import Comer, Sleepers, Woken
from espalier.parts.score import Context
from espalier.parts.timing.trigger_losses import probe_loss

Remembered = Mapping[str, Any]


Fallen = Literal["axis", "all", "never"]


@dataclass(frozen=True)
class Seen:
    """What a policy sees; it changes nothing of it."""

    context: Context
    probabilities: Mapping[str, Tensor]
    """Axis -> probability of each of its units that are in the network."""
    units: Sleepers
    """The units that sleep, and how many fell asleep again."""
    cost: float
    """The penalty on the gates now."""
    room: Mapping[str, int]
    """Axis -> how many units may come; axes in which none may are left out."""
    fresh: bool
    """Whether new units may come where none sleep."""
    leaving: Collection[str]
    """Axes in which units fall asleep at this event."""
    all_there: Callable[[], AbstractContextManager[None]]
    """Makes all gates 1 for a while, so that the loss is that of the network with all of its units."""


class Waking(Protocol):
    """When units wake, and which."""

    @property
    def in_use(self) -> float:
        """The probability from which on a unit is in use. More than that at which units fall asleep (`low`)."""

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
class WhileFalling:
    """Units may wake after epochs of the search in which the held-out loss, with the penalty, was lower than ever.

    And, with hysteresis, in axes whose units are all in use: one that wakes begins between the probability at which
    units fall asleep and that from which on they are in use, and has to find its use before others come.
    """

    least: float = 0.0
    """The part of the lowest loss by which a loss has to be lower to count."""
    patience: int | None = None
    """After so many epochs without one nothing wakes any more; None: something may at any later time."""
    fallen: Fallen = "axis"
    """Where nothing wakes any more once units fell asleep again: in their ``axis``, in ``all`` axes, or ``never``."""
    in_use: float = 0.5
    """The probability from which on a unit is in use."""

    def __post_init__(self) -> None:
        if self.patience is not None:
            check_count("patience", self.patience)
        if self.fallen not in get_args(Fallen):
            raise MethodError(f"fallen: expected 'axis', 'all' or 'never', found {self.fallen!r}.")
        if not (0 <= self.least < 1 and 0 < self.in_use < 1):
            raise MethodError(
                f"expected least from 0 to 1 and in_use between 0 and 1, found {self.least!r} and {self.in_use!r}."
            )

    def check(self, context: Context) -> None:
        """Raises MethodError without held-out batches."""
        if not context.probe:
            raise MethodError("units wake by the held-out loss; give the session probe=[batches].")

    def begin(self) -> dict[str, Any]:
        """What is remembered at first."""
        return {"best": None, "improved": False, "without": 0}

    def look(self, seen: Seen, remembered: Remembered) -> dict[str, Any]:
        """What is remembered after another epoch."""
        best, value = remembered["best"], probe_loss(seen.context) + seen.cost
        improved = math.isfinite(value) and (best is None or value < best - self.least * abs(best))
        without = 0 if improved else remembered["without"] + 1
        if self.over(remembered):
            without = remembered["without"]
        return {**remembered, "best": value if improved else best, "improved": improved, "without": without}

    def over(self, remembered: Remembered) -> bool:
        """Whether nothing wakes any more."""
        return self.patience is not None and remembered["without"] >= self.patience

    def axes(self, seen: Seen, remembered: Remembered) -> list[str]:
        """The axes in which units may wake now."""
        fallen = seen.units.fallen
        if not remembered["improved"] or self.over(remembered) or (self.fallen == "all" and any(fallen.values())):
            return []
        return [
            axis
            for axis, p in seen.probabilities.items()
            if seen.room.get(axis)
            and bool((p >= self.in_use).all())
            and not (self.fallen == "axis" and fallen.get(axis))
        ]


_WHILE_FALLING = WhileFalling()


@dataclass(frozen=True)
class Algorithm1:
    """One unit in every axis at a time, the one that fell asleep first, or a new one.

    With `WhileFalling` as it is by default this is Algorithm 1 of Li & Ji (2020, arXiv:1908.08118), looked at once per
    epoch. The paper's text also ends it on a plateau of the loss or when a unit that was added is switched off again:
    ``WhileFalling(patience=...)`` and `fallen`.
    """

    when: WhileFalling = _WHILE_FALLING

    @property
    def in_use(self) -> float:
        return self.when.in_use

    def check(self, context: Context, /) -> None:
        self.when.check(context)

    def begin(self) -> Remembered:
        return self.when.begin()

    def look(self, seen: Seen, remembered: Remembered, /) -> Remembered:
        return self.when.look(seen, remembered)

    def chosen(self, seen: Seen, remembered: Remembered, /) -> Woken:
        found: dict[str, tuple[Comer, ...]] = {}
        for axis in self.when.axes(seen, remembered):
            sleepers = seen.units.asleep.get(axis, ())
            if sleepers or seen.fresh:
                found[axis] = (sleepers[0] if sleepers else None,)
        return found

    def woke(self, remembered: Remembered, /) -> Remembered:
        return {**remembered, "improved": False}


__all__ = ["Algorithm1", "Fallen", "Remembered", "Seen", "Waking", "WhileFalling"]

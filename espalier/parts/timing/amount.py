"""Amounts: how far each event of a schedule goes.

Ramps approach a budget: s_t = s_f + (s_i - s_f) r(tau), with tau the fraction of the events that is done and r falling
from 1 to 0. ``cubic``, r = (1 - tau)^3, is Zhu & Gupta, "To prune, or not to prune" (2017, arXiv:1710.01878);
``cosine``, r = (1 + cos(pi tau)) / 2, starts and ends gently. ``exponential``, s_t = s_i (s_f / s_i)^tau, multiplies
the size by one factor at every event: the stages of Yuan et al. (2023, arXiv:2306.12700).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from espalier.errors import MethodError
from espalier.parts.budget import Budget, Units

Shape = Literal["constant", "linear", "cubic", "cosine", "exponential"]


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
    """Approach a budget over the events; ``constant`` is at it from the first event on.

    Whatever the shape, the way is monotone and its end, tau = 1, is the budget itself.
    """

    budget: Budget
    shape: Shape = "cubic"

    def __post_init__(self) -> None:
        if not isinstance(self.budget, Budget):
            raise MethodError(
                f"expected a budget such as FLOPs(0.5, of='initial') or Parameters(50_000), found {self.budget!r}."
            )
        if self.shape not in get_args(Shape):
            raise MethodError(f"expected shape= one of {', '.join(get_args(Shape))}, found {self.shape!r}.")

    @property
    def lasts(self) -> bool:
        """Yes: it is what the network may cost in the end."""
        return True

    def target(self, tau: float, present: int, start: int, limit: int, direction: Literal[-1, 1], /) -> int:
        """The cost on the way at `tau`, rounded down."""
        if tau >= 1:
            return limit
        match self.shape:
            case "exponential":
                factor: float = (max(limit, 1) / max(start, 1)) ** tau
                return math.floor(max(start, 1) * factor)
            case "cosine":
                remaining = (1 + math.cos(math.pi * tau)) / 2
            case "constant":
                remaining = 0.0
            case "linear" | "cubic":
                remaining = (1 - tau) ** (1 if self.shape == "linear" else 3)
        return math.floor(limit + (start - limit) * remaining)


@dataclass(frozen=True)
class _Unlimited:
    """What an amount without a limit in the end says of it."""

    @property
    def budget(self) -> Budget:
        """Units, of which there is no limit in the end."""
        return Units(1.0, of="initial")

    @property
    def lasts(self) -> bool:
        """No: there is none."""
        return False


@dataclass(frozen=True)
class Steady(_Unlimited):
    """The same fraction of the present units at every event, at least one unit."""

    fraction: float

    def __post_init__(self) -> None:
        if isinstance(self.fraction, bool) or not isinstance(self.fraction, (int, float)) or not self.fraction > 0:
            raise MethodError(f"amount: expected a fraction of the units above 0, found {self.fraction!r}.")

    def target(self, tau: float, present: int, start: int, limit: int, direction: Literal[-1, 1], /) -> int:
        """Units that there will be."""
        return max(0, present + direction * max(1, round(self.fraction * present)))


@dataclass(frozen=True)
class Fading(_Unlimited):
    """A fraction of the present units that falls to zero over the events: f (1 + cos(pi tau)) / 2.

    What dynamic sparse training removes and grows back (Evci et al. 2020, RigL, arXiv:1911.11134).
    """

    fraction: float = 0.3

    def __post_init__(self) -> None:
        Steady(self.fraction)

    def target(self, tau: float, present: int, start: int, limit: int, direction: Literal[-1, 1], /) -> int:
        """Units that there will be."""
        return max(0, present + direction * round(self.fraction * (1 + math.cos(math.pi * tau)) / 2 * present))


@dataclass(frozen=True)
class Free(_Unlimited):
    """No limit: how far an event goes is the selection's to say."""

    def target(self, tau: float, present: int, start: int, limit: int, direction: Literal[-1, 1], /) -> int:
        """None, or as many as there could ever be."""
        return 0 if direction < 0 else 1 << 40


__all__ = ["Amount", "Fading", "Free", "Ramp", "Shape", "Steady"]

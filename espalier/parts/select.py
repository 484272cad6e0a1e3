"""Selections: which units go or come, given their scores and what the event should reach.

Each meets the target as closely as whole units allow: after pruning the cost is at most the target (where the smallest
sizes permit), and no unit that went could have stayed; after growing no cap is exceeded, and no further unit would fit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.parts.goal import Goal, Scores, Selection

Scope = Literal["axis", "global"]
_TINY = 1e-9


class Select(Protocol):
    """Chooses units to remove or ghost units to add."""

    def __call__(self, scores: Scores, goal: Goal, /) -> Selection:
        """Axis -> units or ghost units, by index into the scores."""


@dataclass(frozen=True)
class Uniform:
    """All axes keep their proportions to each other; within each the scores decide."""

    def __call__(self, scores: Scores, goal: Goal, /) -> Selection:
        most = _available(scores, goal)
        sign = -1 if goal.direction == "prune" else 1

        def furthest_behind(axis: str, size: int, price: int) -> float:
            return -(size + (sign > 0)) / goal.reference[axis]

        return _chosen(scores, goal, _one_by_one(goal, _scaled(goal, most), most, furthest_behind))


@dataclass(frozen=True)
class Global:
    """All axes compete: units go or come in the order of their utility, score per unit of cost.

    Costs are evaluated anew as units go, since what a unit costs depends on its neighbours.
    """

    def __call__(self, scores: Scores, goal: Goal, /) -> Selection:
        ranked = {axis: _ranked(scores.values[axis], goal).values.tolist() for axis in goal.sizes}

        def utility(axis: str, size: int, price: int) -> float:
            return float(ranked[axis][abs(size - goal.sizes[axis])]) / max(price, 1)

        return _chosen(scores, goal, _one_by_one(goal, dict(goal.sizes), _available(scores, goal), utility))


def scope_of(name: Scope) -> Select:
    """The selection of that scope: ``axis`` (uniform over axes) or ``global``. Raises MethodError for another one."""
    if name not in get_args(Scope):
        raise MethodError(f"scope: expected 'axis' or 'global', found {name!r}.")
    return Global() if name == "global" else Uniform()


Value = Callable[[str, int, int], float]
"""(axis, its size, price of its next unit) -> value; the least valuable goes first, the most valuable comes first."""


def _ranked(values: Tensor, goal: Goal) -> torch.return_types.sort:
    """Sorted by who goes (or comes) first; equal scores by index, so that the result never depends on the device."""
    return values.double().cpu().sort(stable=True, descending=goal.direction == "grow")


def _chosen(scores: Scores, goal: Goal, sizes: Mapping[str, int]) -> Selection:
    return {
        axis: tuple(sorted(_ranked(scores.values[axis], goal).indices[: abs(sizes[axis] - size)].tolist()))
        for axis, size in goal.sizes.items()
        if sizes[axis] != size
    }


def _available(scores: Scores, goal: Goal) -> Mapping[str, int]:
    """The largest sizes, if no more units can come than the score has candidates for."""
    if goal.direction == "prune":
        return goal.most
    return {axis: min(goal.most[axis], size + len(scores.values[axis])) for axis, size in goal.sizes.items()}


def _scaled(goal: Goal, most: Mapping[str, int]) -> dict[str, int]:
    """Sizes in proportion to the reference: to prune, the smallest above the target; to grow, the largest that fit."""

    def at(scale: float) -> dict[str, int]:
        return {
            axis: max(goal.least[axis], min(most[axis], int(scale * goal.reference[axis] + _TINY)))
            for axis in goal.sizes
        }

    low, high = 0.0, 1.0
    while goal.fits(at(high)) and any(size < most[axis] for axis, size in at(high).items()):
        low, high = high, high * 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if goal.fits(at(middle)) else (low, middle)
    return at(high) if goal.direction == "prune" or goal.fits(at(high)) else at(low)


def _one_by_one(goal: Goal, sizes: dict[str, int], most: Mapping[str, int], value: Value) -> dict[str, int]:
    """Take or add one unit at a time until the target is met, or until no further unit fits."""
    run = _Greedy(goal, sizes, most, value)
    return run.pruned() if goal.direction == "prune" else run.grown()


class _Greedy:
    """The state of a selection that goes unit by unit."""

    def __init__(self, goal: Goal, sizes: dict[str, int], most: Mapping[str, int], value: Value) -> None:
        self._goal, self._sizes, self._most, self._value = goal, sizes, most, value
        self._prices: dict[str, int] = {}

    def pruned(self) -> dict[str, int]:
        """Remove the least valuable unit until the target is met."""
        excess = self._goal.target.excess(self._sizes)
        given: set[str] = set()
        self._price(self._sizes, -1)
        while excess > 0:
            able = [axis for axis, price in self._prices.items() if price > 0 and self._may_shrink(axis)]
            if not able:
                break
            axis = min(able, key=self._next)
            if self._prices[axis] > excess:
                axis = self._finishing(able, excess, given)
                given.add(axis)
            excess -= self._prices[axis]
            self._sizes[axis] -= 1
            self._price(self._goal.target.cost.neighbours(axis), -1)
        self._return_what_fits()
        return self._sizes

    def grown(self) -> dict[str, int]:
        """Add the most valuable ghost unit as long as any fits."""
        caps = (self._goal.target, *self._goal.caps)
        room = [-cap.excess(self._sizes) for cap in caps]
        self._price(self._sizes, 1)
        able = [axis for axis, size in self._sizes.items() if size < self._most[axis]]
        while able:
            axis = max(able, key=self._next)
            steps = [cap.cost.step(axis, self._sizes, 1) for cap in caps]
            if any(step > left for step, left in zip(steps, room, strict=True)):
                able.remove(axis)  # prices only rise and room only shrinks, so it will not fit later
                continue
            room = [left - step for step, left in zip(steps, room, strict=True)]
            self._sizes[axis] += 1
            self._price(self._goal.target.cost.neighbours(axis), 1)
            if self._sizes[axis] >= self._most[axis]:
                able.remove(axis)
        return self._sizes

    def _finishing(self, able: Sequence[str], excess: int, given: Collection[str]) -> str:
        """The axis whose unit goes where the next one in order would overshoot.

        The one that overshoots least, if that is by less than the cheapest unit. Else a smaller one first, but not more
        than one of an axis, or a cheap axis would pay for an expensive one with all of its units.
        """
        enough = min((axis for axis in able if self._prices[axis] >= excess), key=self._prices.__getitem__)
        smaller = [axis for axis in able if self._prices[axis] < excess and axis not in given]
        if not smaller or self._prices[enough] - excess < min(self._prices[axis] for axis in able):
            return enough
        return min(smaller, key=self._next)

    def _return_what_fits(self) -> None:
        """The last unit that went may have been an expensive one; cheaper ones have room again then."""
        gone = [axis for axis, size in self._goal.sizes.items() if self._sizes[axis] < size]
        for axis in sorted(gone, key=lambda one: self._goal.target.cost.step(one, self._sizes, 1), reverse=True):
            while self._sizes[axis] < self._goal.sizes[axis]:
                if not self._goal.fits({**self._sizes, axis: self._sizes[axis] + 1}):
                    break
                self._sizes[axis] += 1

    def _price(self, axes: Iterable[str], by: int) -> None:
        cost = self._goal.target.cost
        self._prices.update({axis: abs(cost.step(axis, self._sizes, by)) for axis in axes if axis in self._sizes})

    def _next(self, axis: str) -> float:
        return self._value(axis, self._sizes[axis], self._prices[axis])

    def _may_shrink(self, axis: str) -> bool:
        return self._sizes[axis] > self._goal.least[axis]


__all__ = ["Global", "Scope", "Select", "Uniform", "scope_of"]

"""Selections: which units go or come, given their scores and what the event should reach.

Each meets the target as closely as whole units allow: after pruning the cost is at most the target, and less than one
unit of the cheapest axis below it where the smallest sizes permit; after growing it never exceeds target or caps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
        available = _limited(goal, scores)
        sizes = _scaled(goal, available)
        counts = {axis: abs(sizes[axis] - size) for axis, size in goal.sizes.items()}
        return _first(scores, goal, counts)


@dataclass(frozen=True)
class Global:
    """All axes compete: units go or come in the order of their utility, score per unit of cost.

    Costs are evaluated anew as units go, since what a unit costs depends on its neighbours.
    """

    def __call__(self, scores: Scores, goal: Goal, /) -> Selection:
        ranked = {axis: _ranked(scores.values[axis], goal).values.tolist() for axis in goal.sizes}
        run = _Greedy(goal, ranked)
        sizes = run.pruned() if goal.direction == "prune" else run.grown()
        counts = {axis: abs(sizes[axis] - size) for axis, size in goal.sizes.items()}
        return _first(scores, goal, counts)


def scope_of(name: Scope) -> Select:
    """The selection of that scope: ``axis`` (uniform over axes) or ``global``. Raises MethodError for another one."""
    if name not in get_args(Scope):
        raise MethodError(f"scope: expected 'axis' or 'global', found {name!r}.")
    return Global() if name == "global" else Uniform()


def _ranked(values: Tensor, goal: Goal) -> torch.return_types.sort:
    """Sorted by who goes (or comes) first; equal scores by index, so that the result never depends on the device."""
    return values.double().cpu().sort(stable=True, descending=goal.direction == "grow")


def _first(scores: Scores, goal: Goal, counts: Mapping[str, int]) -> Selection:
    return {
        axis: tuple(sorted(_ranked(scores.values[axis], goal).indices[:count].tolist()))
        for axis, count in counts.items()
        if count
    }


def _limited(goal: Goal, scores: Scores) -> Mapping[str, int]:
    """The largest sizes, if no more units can come than the score has candidates for."""
    if goal.direction == "prune":
        return goal.most
    return {axis: min(goal.most[axis], size + len(scores.values[axis])) for axis, size in goal.sizes.items()}


def _scaled(goal: Goal, most: Mapping[str, int]) -> dict[str, int]:
    """The largest sizes in proportion to the reference that fit, filled up unit by unit."""

    def at(scale: float) -> dict[str, int]:
        return {
            axis: max(goal.least[axis], min(most[axis], int(scale * goal.reference[axis] + _TINY)))
            for axis in goal.sizes
        }

    low, high = 0.0, 1.0
    largest = {axis: max(goal.least[axis], most[axis]) for axis in goal.sizes}
    while goal.fits(at(high)) and at(high) != largest:
        low, high = high, high * 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if goal.fits(at(middle)) else (low, middle)
    sizes = at(high) if goal.fits(at(high)) else at(low)
    return _filled(goal, sizes, most, goal.sizes)


def _filled(goal: Goal, sizes: dict[str, int], most: Mapping[str, int], axes: Iterable[str]) -> dict[str, int]:
    """Add single units, each time to the axis that is furthest below its proportion, until none fits any more."""
    open_axes = [axis for axis in axes if sizes[axis] < most[axis]]
    while open_axes and goal.fits(sizes):
        axis = min(open_axes, key=lambda name: ((sizes[name] + 1) / goal.reference[name], name))
        larger = {**sizes, axis: sizes[axis] + 1}
        if not goal.fits(larger):
            open_axes.remove(axis)
            continue
        sizes = larger
        if sizes[axis] >= most[axis]:
            open_axes.remove(axis)
    return sizes


class _Greedy:
    """Takes one unit at a time, the next of the axis with the best utility."""

    def __init__(self, goal: Goal, ranked: Mapping[str, list[float]]) -> None:
        self._goal, self._ranked = goal, ranked
        self._sizes = dict(goal.sizes)
        self._taken = dict.fromkeys(goal.sizes, 0)
        self._prices: dict[str, int] = {}

    def pruned(self) -> dict[str, int]:
        """Sizes after removing the least useful units until the target is met."""
        cost = self._goal.target.cost
        excess = self._goal.target.excess(self._sizes)
        self._price(self._sizes, -1)
        while excess > 0:
            able = [axis for axis, price in self._prices.items() if price > 0 and self._may_shrink(axis)]
            if not able:
                break
            # An expensive unit must not overshoot by what a cheaper one could have saved: that would waste budget.
            cheapest = min(self._prices[axis] for axis in able)
            able = [axis for axis in able if self._prices[axis] - excess < cheapest]
            axis = min(able, key=self._utility)
            excess -= self._prices[axis]
            self._take(axis, -1)
            self._price(cost.neighbours(axis), -1)
        self._return_what_fits()
        return self._sizes

    def grown(self) -> dict[str, int]:
        """Sizes after adding the most useful ghost units as long as any fits."""
        caps = (self._goal.target, *self._goal.caps)
        room = [-cap.excess(self._sizes) for cap in caps]
        self._price(self._sizes, 1)
        able = {axis for axis in self._sizes if self._may_grow(axis)}
        while able:
            axis = max(able, key=lambda name: (self._utility(name), name))
            steps = [cap.cost.step(axis, self._sizes, 1) for cap in caps]
            if any(step > left for step, left in zip(steps, room, strict=True)):
                able.discard(axis)  # prices only rise and room only shrinks, so it will not fit later
                continue
            room = [left - step for step, left in zip(steps, room, strict=True)]
            self._take(axis, 1)
            self._price(self._goal.target.cost.neighbours(axis), 1)
            if not self._may_grow(axis):
                able.discard(axis)
        return self._sizes

    def _return_what_fits(self) -> None:
        for axis in sorted((name for name, count in self._taken.items() if count), key=self._last_utility)[::-1]:
            while self._taken[axis] and self._goal.fits({**self._sizes, axis: self._sizes[axis] + 1}):
                self._sizes[axis] += 1
                self._taken[axis] -= 1

    def _price(self, axes: Iterable[str], by: int) -> None:
        cost = self._goal.target.cost
        self._prices.update({axis: abs(cost.step(axis, self._sizes, by)) for axis in axes if axis in self._sizes})

    def _take(self, axis: str, by: int) -> None:
        self._sizes[axis] += by
        self._taken[axis] += 1

    def _utility(self, axis: str) -> float:
        return self._ranked[axis][self._taken[axis]] / max(self._prices[axis], 1)

    def _last_utility(self, axis: str) -> float:
        return self._ranked[axis][self._taken[axis] - 1] / max(self._prices[axis], 1)

    def _may_shrink(self, axis: str) -> bool:
        return self._sizes[axis] > self._goal.least[axis]

    def _may_grow(self, axis: str) -> bool:
        return self._sizes[axis] < self._goal.most[axis] and self._taken[axis] < len(self._ranked[axis])


__all__ = ["Global", "Scope", "Select", "Uniform", "scope_of"]

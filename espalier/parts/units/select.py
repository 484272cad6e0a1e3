"""Selections: which units go or come, given their scores and what the event should reach.

Each meets the target as closely as whole units allow: after pruning the cost is at most the target (where the smallest
sizes permit), and no unit that went could have stayed; after growing no cap is exceeded, and no further unit would fit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.parts.goal import Goal, Scores, Selection
from espalier.parts.units.threshold import Threshold

Scope = Literal["axis", "global"]
_TINY = 1e-9
_COARSE = 0.01
"""Part of the target: costs that differ by less are as good."""


class Select(Protocol):
    """Chooses units to remove or ghost units to add."""

    def __call__(self, scores: Scores, goal: Goal, /) -> Selection:
        """Axis -> units or ghost units, by index into the scores."""


@dataclass(frozen=True)
class Uniform:
    """All axes keep their proportions to each other; within each the scores decide."""

    def __call__(self, scores: Scores, goal: Goal, /) -> Selection:
        return _chosen(scores, goal, proportional(_available(scores, goal)))


@dataclass(frozen=True)
class Global:
    """All axes compete: units go or come in the order of their utility, score per unit of cost.

    Costs are evaluated anew as units go, since what a unit costs depends on its neighbours. Where several go or come at
    once (`Goal.multiples`, `Goal.equal`) their scores are summed.
    """

    per_cost: bool = True
    """Whether utility is score per cost; otherwise it is the score alone, which makes a percentile over all axes."""

    def __call__(self, scores: Scores, goal: Goal, /) -> Selection:
        return competing(scores, goal, lambda worth, units, price: worth / (max(price, 1) if self.per_cost else units))


@dataclass(frozen=True)
class Below:
    """Units whose score is below a threshold of all scores go first, the smallest first, whatever they cost.

    The budget decides how many: if too many are below it, the best of them stay; if too few, others go by score per
    cost, as in `Global`. To prune only. Where several go at once, their mean score is what is compared.
    """

    threshold: Threshold

    def __call__(self, scores: Scores, goal: Goal, /) -> Selection:
        if goal.direction != "prune":
            raise MethodError("Below chooses units to remove; growing methods need another selection.")
        border = self.threshold(torch.cat([scores.values[axis].double().cpu() for axis in goal.sizes]))

        def utility(worth: float, units: int, price: int) -> float:
            mean = worth / units
            return mean - border if mean < border else worth / max(price, 1)

        return competing(scores, goal, utility)


def competing(scores: Scores, goal: Goal, utility: Callable[[float, int, int], float]) -> Selection:
    """The selection in which all axes compete by (sum of scores, number of units, what they cost) -> utility."""
    merged, leaders = _available(scores, goal).merged(), goal.leaders()
    ranked: dict[str, Tensor] = {}
    for axis, leader in leaders.items():
        values = _ranked(scores.values[axis], goal).values
        known = ranked.get(leader)
        ranked[leader] = values if known is None else known[: len(values)] + values[: len(known)]
    worth = {axis: [0.0, *values.cumsum(0).tolist()] for axis, values in ranked.items()}

    def value(axis: str, size: int, then: int, price: int) -> float:
        now = merged.sizes[axis]
        first, last = sorted((abs(size - now), abs(then - now)))
        return utility(float(worth[axis][last] - worth[axis][first]), last - first, price)

    sizes = _one_by_one(merged, dict(merged.sizes), value)
    return _chosen(scores, goal, {axis: sizes[leader] for axis, leader in leaders.items()})


def proportional(goal: Goal) -> dict[str, int]:
    """The sizes of all axes that meet a goal as closely as may be, in the proportions of its reference."""
    merged = goal.merged()

    def furthest_behind(axis: str, size: int, then: int, price: int) -> float:
        return -max(size, then) / merged.reference[axis]

    start = _scaled(merged)
    merged = _free_held(merged, start)
    sizes = _one_by_one(merged, dict(start), furthest_behind)
    held = _coarse_held(merged, start)
    if goal.direction == "prune" and held.fits(held.smallest()):
        # The unit of a coarse axis may have gone for a little, and far too much with it.
        other = _one_by_one(held, _scaled(held), furthest_behind)
        if merged.target.excess(other) > merged.target.excess(sizes) + _COARSE * merged.target.most:
            sizes = other
    return {axis: sizes[leader] for axis, leader in goal.leaders().items()}


def _free_held(goal: Goal, sizes: Mapping[str, int]) -> Goal:
    """The goal in which axes whose units cost nothing keep these sizes at most: no budget would ever end their growth.

    Heads that run in train mode only cost no inference FLOPs.
    """
    if goal.direction == "prune":
        return goal
    free = [axis for axis, size in sizes.items() if not goal.target.cost.step(axis, sizes, 1)]
    return replace(goal, most={**goal.most, **{axis: sizes[axis] for axis in free}})


def _coarse_held(goal: Goal, sizes: Mapping[str, int]) -> Goal:
    """The goal in which axes whose next unit would lead from these sizes far beyond the target keep theirs at least."""
    least, excess = dict(goal.least), goal.target.excess(sizes)
    for axis, size in sizes.items():
        then = goal.below(axis, size)
        if then is not None and -goal.target.cost.step(axis, sizes, then - size) > excess + _COARSE * goal.target.most:
            least[axis] = size
    return replace(goal, least=least)


def scope_of(name: Scope) -> Select:
    """The selection of that scope: ``axis`` (uniform over axes) or ``global``. Raises MethodError for another one."""
    if name not in get_args(Scope):
        raise MethodError(f"scope: expected 'axis' or 'global', found {name!r}.")
    return Global() if name == "global" else Uniform()


Value = Callable[[str, int, int, int], float]
"""(axis, its size, its next size, price of that) -> value; the least valuable goes, the most valuable comes first."""


def _ranked(values: Tensor, goal: Goal) -> torch.return_types.sort:
    """Sorted by who goes (or comes) first; equal scores by index, so that the result never depends on the device."""
    return values.double().cpu().sort(stable=True, descending=goal.direction == "grow")


def _chosen(scores: Scores, goal: Goal, sizes: Mapping[str, int]) -> Selection:
    return {
        axis: tuple(sorted(_ranked(scores.values[axis], goal).indices[: abs(sizes[axis] - size)].tolist()))
        for axis, size in goal.sizes.items()
        if sizes[axis] != size
    }


def _available(scores: Scores, goal: Goal) -> Goal:
    """The goal in which no more units can come than the score has candidates for."""
    if goal.direction == "prune":
        return goal
    most = {axis: min(goal.most[axis], size + len(scores.values[axis])) for axis, size in goal.sizes.items()}
    return replace(goal, most=most)


def _scaled(goal: Goal) -> dict[str, int]:
    """Sizes in proportion to the reference: to prune, the smallest above the target; to grow, the largest that fit."""

    def at(scale: float) -> dict[str, int]:
        found = {}
        for axis, least in goal.smallest().items():
            below = goal.below(axis, min(int(scale * goal.reference[axis] + _TINY), goal.most[axis]) + 1)
            found[axis] = least if below is None else below
        return found

    low, high = 0.0, 1.0
    largest = {axis: goal.below(axis, goal.most[axis] + 1) for axis in goal.sizes}
    while goal.fits(at(high)) and at(high) != largest:
        low, high = high, high * 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if goal.fits(at(middle)) else (low, middle)
    return at(high) if goal.direction == "prune" or goal.fits(at(high)) else at(low)


def _one_by_one(goal: Goal, sizes: dict[str, int], value: Value) -> dict[str, int]:
    """Take or add one unit (or as few as may be) at a time until the target is met, or until nothing further fits."""
    run = _Greedy(goal, sizes, value)
    return run.pruned() if goal.direction == "prune" else run.grown()


class _Greedy:
    """The state of a selection that goes unit by unit."""

    def __init__(self, goal: Goal, sizes: dict[str, int], value: Value) -> None:
        self._goal, self._sizes, self._value = goal, sizes, value
        self._then: dict[str, int] = {}
        """Axis -> the next size that it may have, if there is one."""
        self._prices: dict[str, int] = {}
        """Axis -> what that saves or costs."""

    def pruned(self) -> dict[str, int]:
        """Remove the least valuable unit until the target is met."""
        excess = self._goal.target.excess(self._sizes)
        given: set[str] = set()
        self._price(self._sizes)
        while excess > 0:
            able = [axis for axis, price in self._prices.items() if price > 0]
            if not able:
                break
            axis = min(able, key=self._next)
            if self._prices[axis] > excess:
                axis = self._finishing(able, excess, given)
                given.add(axis)
            excess -= self._prices[axis]
            self._step(axis)
        self._return_what_fits()
        return self._sizes

    def grown(self) -> dict[str, int]:
        """Add the most valuable ghost unit as long as any fits."""
        caps = (self._goal.target, *self._goal.caps)
        room = [-cap.excess(self._sizes) for cap in caps]
        self._price(self._sizes)
        while self._prices:
            axis = max(self._prices, key=self._next)
            by = self._then[axis] - self._sizes[axis]
            steps = [cap.cost.step(axis, self._sizes, by) for cap in caps]
            if any(step > left for step, left in zip(steps, room, strict=True)):
                self._close(axis)  # prices only rise and room only shrinks, so it will not fit later
                continue
            room = [left - step for step, left in zip(steps, room, strict=True)]
            self._step(axis)
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
        gone = {axis: self._goal.above(axis, self._sizes[axis]) for axis in self._sizes}
        prices = {
            axis: self._goal.target.cost.step(axis, self._sizes, then - self._sizes[axis])
            for axis, then in gone.items()
            if then is not None
        }
        for axis in sorted(prices, key=prices.__getitem__, reverse=True):
            then = self._goal.above(axis, self._sizes[axis])
            while then is not None and self._goal.fits({**self._sizes, axis: then}):
                self._sizes[axis] = then
                then = self._goal.above(axis, then)

    def _step(self, axis: str) -> None:
        self._sizes[axis] = self._then[axis]
        self._price((self._goal.target.cost.neighbours(axis) & self._prices.keys()) | {axis})

    def _close(self, axis: str) -> None:
        del self._then[axis], self._prices[axis]

    def _price(self, axes: Iterable[str]) -> None:
        following = self._goal.below if self._goal.direction == "prune" else self._goal.above
        for axis in axes:
            size = self._sizes[axis]
            then = following(axis, size)
            if then is not None:
                self._then[axis] = then
                self._prices[axis] = abs(self._goal.target.cost.step(axis, self._sizes, then - size))
            elif axis in self._prices:
                self._close(axis)

    def _next(self, axis: str) -> float:
        return self._value(axis, self._sizes[axis], self._then[axis], self._prices[axis])


__all__ = ["Below", "Global", "Scope", "Select", "Uniform", "competing", "proportional", "scope_of"]

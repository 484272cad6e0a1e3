"""Selection of layers and cells: in the order of their scores, as far as the budget asks for or allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from espalier.errors import MethodError
from espalier.parts.checks import check_count
from espalier.parts.goal import Cap, Goal, Scores, Selection


@dataclass(frozen=True)
class Rank:
    """Layers go from the lowest score upwards until the target is met, or come from the highest downwards if they fit.

    After pruning none that went could have stayed; after growing no other one would fit. Equal scores go by the order
    in which the network runs, the last one first where layers go. One with a score of infinity never goes, one with a
    score of minus infinity never comes.
    """

    per_cost: bool = False
    """Whether scores are divided by what the layer costs in the budget's currency."""
    at_most: int | None = None
    """The largest number of layers that go or come in one event."""

    def __post_init__(self) -> None:
        if self.at_most is not None:
            check_count("at_most", self.at_most)

    def __call__(self, scores: Scores, goal: Goal, /) -> Selection:
        """Raises MethodError for candidates that are no layers."""
        if set(goal.layers) < set(goal.sizes):
            raise MethodError("Rank chooses layers; methods of units and of weights have selections of their own.")
        worth = {name: self._worth(scores, goal, name) for name in goal.sizes}
        chosen = self._pruned(worth, goal) if goal.direction == "prune" else self._grown(worth, goal)
        return {name: (0,) for name in goal.sizes if name in chosen}

    def _worth(self, scores: Scores, goal: Goal, name: str) -> float:
        value = float(scores.values[name].item())
        return value / max(_price(goal.target, name), 1) if self.per_cost and math.isfinite(value) else value

    def _pruned(self, worth: dict[str, float], goal: Goal) -> set[str]:
        excess, spare = goal.target.excess(goal.sizes), dict(goal.spare)
        last_first = [*worth][::-1]
        gone: list[str] = []
        for name in sorted(last_first, key=worth.__getitem__):
            stage = goal.layers[name].stage
            full = self.at_most is not None and len(gone) >= self.at_most
            if excess <= 0 or full or worth[name] == math.inf:
                break
            if spare[stage] > 0 and _price(goal.target, name) > 0:
                gone.append(name)
                spare[stage] -= 1
                excess -= _price(goal.target, name)
        for name in reversed(gone.copy()):
            if excess + _price(goal.target, name) <= 0:  # the last one that went was a large one
                gone.remove(name)
                excess += _price(goal.target, name)
        return set(gone)

    def _grown(self, worth: dict[str, float], goal: Goal) -> set[str]:
        caps = (goal.target, *goal.caps)
        room = [-cap.excess(goal.sizes) for cap in caps]
        come: set[str] = set()
        for name in sorted(worth, key=worth.__getitem__, reverse=True):
            if worth[name] == -math.inf or (self.at_most is not None and len(come) >= self.at_most):
                break
            prices = [_price(cap, name) for cap in caps]
            if all(price <= left for price, left in zip(prices, room, strict=True)):
                come.add(name)
                room = [left - price for price, left in zip(prices, room, strict=True)]
        return come


def _price(cap: Cap, name: str) -> int:
    return cap.cost.terms.get((name,), 0)


__all__ = ["Rank"]

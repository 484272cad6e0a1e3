"""The Pareto front of a search: of all networks that were judged, those that no other one beats in everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COSTS = ("parameters", "flops", "latency")
"""What a network costs, as results name it; latency where it is measured."""


@dataclass(frozen=True)
class Judged:
    """A network, how good it is on held-out data, and what it costs."""

    network: str
    """Address of its checkpoint."""
    accuracy: float
    loss: float
    """Held-out; decides between networks of the same accuracy."""
    costs: tuple[float, ...]
    """In the order of `COSTS`."""

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Judged:
        """Of the result of a branch that was judged."""
        costs = tuple(float(result[name]) for name in COSTS if name in result)
        return cls(str(result["network"]), float(result["accuracy"]), float(result["loss"]), costs)

    def record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        costs = dict(zip(COSTS, self.costs, strict=False))  # without a latency if none was measured
        return {"network": self.network, "accuracy": self.accuracy, "loss": self.loss, **costs}


def dominates(one: Judged, other: Judged) -> bool:
    """Whether one is at least as good and as cheap in everything, and not the same in all."""
    mine, its = (one.accuracy, -one.loss), (other.accuracy, -other.loss)
    if mine < its or any(a > b for a, b in zip(one.costs, other.costs, strict=True)):
        return False
    return mine > its or one.costs != other.costs


class Front:
    """The networks that no other one dominates; of those that are equal in everything the first."""

    def __init__(self) -> None:
        self._members: list[Judged] = []

    def add(self, new: Judged) -> None:
        """Take a network in, if it is not dominated, and leave out those that it dominates."""
        same = any((new.accuracy, new.loss, new.costs) == (one.accuracy, one.loss, one.costs) for one in self._members)
        if same or any(dominates(one, new) for one in self._members):
            return
        self._members = [one for one in self._members if not dominates(new, one)] + [new]

    def members(self) -> list[Judged]:
        """By parameters, the smallest first."""
        return sorted(self._members, key=lambda one: (one.costs, one.loss))


__all__ = ["COSTS", "Front", "Judged", "dominates"]

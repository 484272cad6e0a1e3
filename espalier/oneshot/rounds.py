"""Rounds of a shrinking: what each led to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from espalier.measure.repeated import Reading


@dataclass(frozen=True)
class Round:
    """One pruning and the training after it; the first of a result is the network as it was given."""

    number: int
    limit: float
    """What the network was to cost after this round."""
    cost: Reading
    """What it costs after the training, in what the target counts."""
    score: float
    """What the user's `evaluate` gave; NaN where it gave no number."""
    parameters: int
    flops: int
    sizes: Mapping[str, int] = field(repr=False)
    """Axis -> its size."""

    def to_json(self) -> dict[str, Any]:
        """As what JSON can hold."""
        cost = [self.cost.value, self.cost.low, self.cost.high, self.cost.count]
        return {
            "number": self.number, "limit": self.limit, "cost": cost, "score": self.score,
            "parameters": self.parameters, "flops": self.flops, "sizes": dict(self.sizes),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Round:
        """What `to_json` gave."""
        return cls(**{**data, "cost": Reading(*data["cost"])})


def shown(cost: Reading, scale: float) -> str:
    """A cost with its interval, as text, times a factor that goes with its unit."""
    low, value, high = (one * scale for one in (cost.low, cost.value, cost.high))
    return f"{value:,.6g}" if low == high else f"{value:,.4g} ({low:,.4g} to {high:,.4g})"


__all__ = ["Round", "shown"]

"""The stages of learning with gates: one parameter k takes a network through training, search and fine-tuning.

With k large every gate is 0 or 1, and the network is trained plainly; with k small gates are undecided, and the search
for units goes on. Started with all units on the search prunes, started with few it grows (Li & Ji 2020, Neural
Plasticity Networks, arXiv:1908.08118).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from espalier.errors import MethodError

DECIDED = 5000.0
"""The k at which gates are taken to be 0 or 1."""


@dataclass(frozen=True)
class Stages:
    """k by the fraction of training that is done: `DECIDED`, then the search, then `DECIDED` again."""

    k: float = 7.0
    """At the beginning of the search."""
    start: float = 0.25
    until: float = 0.5
    """Where the search begins and ends, as fractions of the training."""
    rise: float = 1.0
    """k is multiplied by this over the search, evenly: 1, as in the paper, leaves it constant. Gates that are undecided
    when the search ends are rounded, which costs accuracy; with a rise they decide themselves before."""

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.until <= 1:
            raise MethodError(f"expected 0 <= start < until <= 1, found {self.start!r} and {self.until!r}.")
        if not (math.isfinite(self.k) and self.k >= 0 and math.isfinite(self.rise) and self.rise >= 1):
            raise MethodError(f"expected k of at least 0 and rise of at least 1, found {self.k!r} and {self.rise!r}.")

    def stage(self, progress: float) -> int:
        """0 before the search, 1 in it, 2 after it."""
        return int(progress >= self.start) + int(progress >= self.until)

    def at(self, progress: float) -> float:
        """k at a fraction of the training."""
        if self.stage(progress) != 1:
            return DECIDED
        done = (progress - self.start) / (self.until - self.start)
        return self.k * math.exp(math.log(self.rise) * done)


__all__ = ["DECIDED", "Stages"]

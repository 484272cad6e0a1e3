"""What one event is asked to reach, and what a score and a selection say about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from espalier.parts.budget import Polynomial

Direction = Literal["grow", "prune"]
Selection = Mapping[str, tuple[int, ...]]
"""Axis -> units to remove, or ghost units (candidates of the score) to add; axes without any are left out."""


@dataclass(frozen=True)
class Scores:
    """The value of every unit (prune) or ghost unit (grow) of each axis: higher = keep it, or add it first."""

    values: Mapping[str, Tensor]
    """Axis -> one number per unit."""
    found: Mapping[str, Any] = field(default_factory=dict)
    """What the score computed on the way and the initialiser starts from, such as directions."""


@dataclass(frozen=True)
class Cap:
    """A cost that must not be exceeded."""

    cost: Polynomial
    most: int

    def excess(self, sizes: Mapping[str, int]) -> int:
        """How far above it these sizes are; negative: how much room there is."""
        return self.cost.at(sizes) - self.most


@dataclass(frozen=True)
class Goal:
    """Prune until the target is met, or grow as far as the target and every further cap allow."""

    direction: Direction
    sizes: Mapping[str, int]
    """The axes that the method may change -> their sizes now."""
    least: Mapping[str, int]
    most: Mapping[str, int]
    """Axis -> smallest and largest size it may have afterwards."""
    reference: Mapping[str, float]
    """Axis -> width whose proportions a uniform selection keeps."""
    target: Cap
    caps: tuple[Cap, ...] = ()

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Whether the target and all caps hold at these sizes."""
        return all(cap.excess(sizes) <= 0 for cap in (self.target, *self.caps))

    def room(self, axis: str) -> int:
        """How many units could be added to this axis alone; none if they cost nothing, since nothing bounds them."""
        if self.target.cost.step(axis, self.sizes, 1) <= 0:
            return 0
        low, high = 0, self.most[axis] - self.sizes[axis]
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits({**self.sizes, axis: self.sizes[axis] + middle}):
                low = middle
            else:
                high = middle - 1
        return low

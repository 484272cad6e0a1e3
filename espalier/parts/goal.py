"""What one event is asked to reach, and what a score and a selection say about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from espalier.parts.budget import Polynomial
from espalier.parts.candidate import Candidate

Direction = Literal["grow", "prune"]
Level = Literal["units", "weights", "layers"]
"""What a method grows or prunes: units of axes, single weights by masks, or whole layers and cells."""
UNBOUNDED = 1 << 40
"""The largest size of an axis that has no limit."""

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
class WeightTensor:
    """A parameter whose single weights come and go."""

    live: Tensor
    """Of its shape, True where a weight is live."""
    rows: int
    """Dimension of the units that it makes."""
    columns: int
    """Dimension of the units that it reads; that of the rows where it only filters."""


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
    multiples: Mapping[str, int] = field(default_factory=dict)
    """Axis -> number that its size has to be a multiple of, where it changes at all; 1 if it is not named."""
    equal: tuple[tuple[str, ...], ...] = ()
    """Groups of axes, of one size now, that have to stay of one size."""
    young: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Axis -> units that may not be removed yet; `least` leaves room for them."""
    weights: Mapping[str, WeightTensor] = field(default_factory=dict)
    """At the level of weights, where names are those of parameters and sizes numbers of live weights."""

    layers: Mapping[str, Candidate] = field(default_factory=dict)
    """At the level of layers, where names are those of candidates and sizes 1, for what is there, or 0."""
    spare: Mapping[str, int] = field(default_factory=dict)
    """At that level: stage -> how many of its layers may go."""

    def below(self, axis: str, size: int) -> int | None:
        """The largest size that the axis may have and that is smaller than `size`."""
        found = _rounded_down(min(size - 1, self.most[axis]), self.multiples.get(axis, 1))
        now = self.sizes[axis]
        if found < now < size:  # where an axis is now it may stay, round or not
            found = now
        return found if found >= self.least[axis] else None

    def above(self, axis: str, size: int) -> int | None:
        """The smallest size that the axis may have and that is larger than `size`."""
        found = -_rounded_down(-max(size + 1, self.least[axis]), self.multiples.get(axis, 1))
        now = self.sizes[axis]
        if size < now < found:
            found = now
        return found if found <= self.most[axis] else None

    def smallest(self) -> dict[str, int]:
        """The smallest size that every axis may have."""
        merged, leader = self.merged(), self.leaders()
        found = {axis: merged.above(axis, merged.least[axis] - 1) or size for axis, size in merged.sizes.items()}
        return {axis: found[leader[axis]] for axis in self.sizes}

    def merged(self) -> Goal:
        """The goal with one axis, the first, for each of the groups that have to stay equal."""
        leader = self.leaders()
        groups: dict[str, list[str]] = {}
        for axis in self.sizes:
            groups.setdefault(leader[axis], []).append(axis)

        def cap(one: Cap) -> Cap:
            return Cap(one.cost.merged(leader), one.most)

        return Goal(
            self.direction,
            {one: self.sizes[one] for one in groups},
            least={one: max(self.least[axis] for axis in group) for one, group in groups.items()},
            most={one: min(self.most[axis] for axis in group) for one, group in groups.items()},
            reference={one: self.reference[one] for one in groups},
            target=cap(self.target),
            caps=tuple(map(cap, self.caps)),
            multiples={
                one: math.lcm(*(self.multiples.get(axis, 1) for axis in group)) for one, group in groups.items()
            },
        )

    def leaders(self) -> dict[str, str]:
        """Axis -> the first axis of its group, itself if it is in none."""
        return {axis: axis for axis in self.sizes} | {axis: group[0] for group in self.equal for axis in group}

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Whether the target and all caps hold at these sizes."""
        return all(cap.excess(sizes) <= 0 for cap in (self.target, *self.caps))

    def live_weights(self) -> int:
        """At the level of weights: how many are to be live in all."""
        present = sum(self.sizes.values())
        if self.direction == "prune":
            return present - self.target.excess(self.sizes)
        return present + min(-cap.excess(self.sizes) for cap in (self.target, *self.caps))

    def room(self, axis: str) -> int:
        """How many units could be added to this axis alone; none if they cost nothing, since nothing bounds them."""
        if self.target.cost.step(axis, self.sizes, 1) <= 0:
            return 0
        if self.equal:
            merged = self.merged()
            return merged.room(self.leaders()[axis])
        low, high = 0, self.most[axis] - self.sizes[axis]
        caps = (self.target, *self.caps)
        left = [-cap.excess(self.sizes) for cap in caps]
        while low < high:
            middle = (low + high + 1) // 2
            if all(cap.cost.step(axis, self.sizes, middle) <= room for cap, room in zip(caps, left, strict=True)):
                low = middle
            else:
                high = middle - 1
        return low


def _rounded_down(size: int, multiple: int) -> int:
    return size // multiple * multiple

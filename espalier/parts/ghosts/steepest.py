"""Ghost units valued by the gradient that they would get, and new units that begin in those directions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.parts.ghosts.amplitude import row_norm, unit_rows
from espalier.parts.ghosts.directions import directions
from espalier.parts.ghosts.drawn import written_ones
from espalier.parts.ghosts.ghosts import Ghosts, Tensors
from espalier.parts.ghosts.passes import Passes
from espalier.parts.ghosts.rows import Found
from espalier.parts.ghosts.wiring import Wired, Wiring, allows, is_normed, written
from espalier.parts.goal import Goal, Scores, Selection
from espalier.parts.init import Beginning
from espalier.parts.score import Context
from espalier.parts.units.select import proportional

ZeroSide = Literal["auto", "in", "out"]
_SPARE = 8
"""Directions that are iterated beyond those needed, so that those needed converge sooner (Halko et al. 2011)."""
_CHOICE = 4
"""Candidates per unit that an even growth would add; those without a direction of their own are mixtures."""


@dataclass(frozen=True)
class Steepest:
    """The squared norm of the gradient by the weights of new units, which begin where it is largest.

    How the units of each axis are wired (`espalier.parts.ghosts.wiring`) is found out, not assumed: incoming weights
    of zero are used only where the outputs then stay, no norm sees the units, they get a gradient at all, and that
    gradient is the one of the neighbourhood. Axes on which nothing but the neutral beginning is invisible begin so,
    and are valued by the gradient that they then get.
    """

    side: ZeroSide = "auto"
    """Which weights of single units are zero: ``in``, ``out``, or what is possible, ``in`` before ``out``."""
    pairs: bool | None = None
    """Whether units come in pairs that cancel; None: on axes with a norm."""
    rounds: int = 2
    """Power iterations, two passes each; one pass more for the values."""
    outgoing: float = 0.5
    """Length of outgoing weights, as a part of the mean length of old ones (Evci et al. 2022)."""
    paired: float = 0.1
    """Likewise for pairs, which learn on both sides at once: where both are long, the first steps are too."""
    climb: float | None = None
    """Step of Adam, which then takes the place of the power iteration; None for the power iteration."""

    def __post_init__(self) -> None:
        if self.side not in get_args(ZeroSide):
            raise MethodError(f"side: expected 'auto', 'in' or 'out', found {self.side!r}.")
        if type(self.rounds) is not int or self.rounds < 1:
            raise MethodError(f"rounds: expected a whole number of at least 1, found {self.rounds!r}.")
        if self.climb is not None and not self.climb > 0:
            raise MethodError(f"climb: expected a step above 0, found {self.climb!r}.")

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        wanted = proportional(goal)
        needed = {axis: wanted[axis] - size for axis, size in goal.sizes.items()}
        counts = {axis: _allowed(goal, axis, needed[axis] + _SPARE) for axis in goal.sizes if goal.room(axis)}
        counts = {axis: count for axis, count in counts.items() if count}
        values: dict[str, Tensor] = {axis: torch.zeros(0) for axis in goal.sizes}
        if not counts:
            return Scores(values)
        ghosts = Ghosts(context, counts)
        wirings = self._wirings(context, ghosts)
        straight = self.side == "auto"
        climbed = directions(context, ghosts, wirings, self.rounds, straight=straight, climb=self.climb)
        found: dict[str, Wired] = {}
        for axis, one in climbed.items():
            candidates = min(goal.room(axis), _CHOICE * (needed[axis] + _SPARE))
            values[axis], found[axis] = self._candidates(context, ghosts, axis, wirings[axis], one, candidates)
        for axis, value in _neutral_values(context, ghosts, set(counts) - set(wirings)).items():
            values[axis] = torch.full((goal.room(axis),), value)
        return Scores(values, found)

    def _wirings(self, context: Context, ghosts: Ghosts) -> dict[str, Wiring]:
        """How units of each axis are to be wired; axes that have to begin neutrally are left out."""
        found: dict[str, Wiring] = {}
        for axis in ghosts.counts:
            normed = is_normed(context.structure, axis)
            options: list[Wiring] = ["out"]
            if self.side != "out" and not normed and row_norm(ghosts.sides[axis].outgoing, ghosts.tensors) > 0:
                options.insert(0, "in")
            if normed if self.pairs is None else self.pairs:
                options.insert(0, "pairs")
            first = next((one for one in options if allows(ghosts, context, axis, one)), None)
            if first is not None:
                found[axis] = first
        inward = [axis for axis, one in found.items() if one == "in"]
        if inward:
            passes = Passes(context, ghosts, silent=inward)
            safe = passes.alive(inward, straight=self.side == "auto")
            for axis in set(inward) - safe:
                del found[axis]
                if allows(ghosts, context, axis, "out"):
                    found[axis] = "out"
        return {axis: found[axis] for axis in ghosts.counts if axis in found}

    def _candidates(
        self, context: Context, ghosts: Ghosts, axis: str, wiring: Wiring, found: Found, count: int
    ) -> tuple[Tensor, Wired]:
        """The values of `count` ghost units and how they would begin, best first."""
        sides, generator = ghosts.sides[axis], context.generator(f"{axis}, mixtures")
        part = self.paired if wiring == "pairs" else self.outgoing
        length = part * row_norm(sides.outgoing, ghosts.tensors)
        gains = found.gains.double().cpu() * (length**2 if wiring == "in" else 1.0)
        each, size = (2 if wiring == "pairs" else 1), len(found.gains)
        more = max(0, math.ceil(count / each) - size)
        weights = torch.randn(more, size, generator=generator, dtype=torch.float64)
        incoming = torch.cat([found.incoming, weights.to(found.incoming) @ found.incoming])
        outgoing = torch.cat([found.outgoing, weights.to(found.outgoing) @ found.outgoing])
        if found.metric is not None:
            incoming = found.metric.weights(found.metric.unit(found.metric.coordinates(incoming)))
        # a mixture brings nothing that the directions do not bring: further ones are worth less and less
        tail = gains[-1] * size / (size + 1.0 + torch.arange(more, dtype=torch.float64))
        rows = torch.arange(size + more).repeat_interleave(each)[:count]
        wired = Wired(wiring, incoming[rows], unit_rows(outgoing[rows]) * length)
        return torch.cat([gains, tail])[rows], wired


@dataclass(frozen=True)
class AsFound:
    """New units begin as their score found them; where it found nothing, as surgery lets them begin."""

    def __call__(self, context: Context, chosen: Selection, scores: Scores, /) -> Beginning:
        axes = {name: units for name, units in chosen.items() if name in context.structure.topology.by_name}
        if not axes:
            return Beginning()  # only layers come
        ghosts = Ghosts(context, {axis: len(units) for axis, units in axes.items()})
        tensors: Tensors = ghosts.tensors
        for axis, units in axes.items():
            if axis in scores.found:
                wired: Wired = scores.found[axis]
                tensors = written(ghosts, context.structure, tensors, axis, wired.chosen(units))
        return Beginning(values=written_ones(ghosts, tensors))


def _allowed(goal: Goal, axis: str, count: int) -> int:
    """About as many new units of an axis as that, such that the size is one that it may have; 0 if there is none."""
    size = goal.sizes[axis]
    most = goal.below(axis, size + count + 1)
    if most is None or most <= size:
        most = goal.above(axis, size)
    return 0 if most is None else most - size


def _neutral_values(context: Context, ghosts: Ghosts, axes: set[str]) -> dict[str, float]:
    """The mean squared norm of the gradient by the outgoing weights of units that begin neutrally."""
    asked = [axis for axis in ghosts.counts if axis in axes and ghosts.sides[axis].outgoing.parts]
    found = Passes(context, ghosts).gradients({}, {}, dict.fromkeys(asked, "outgoing")) if asked else {}
    return {axis: float(found[axis].square().sum(1).mean()) if axis in found else 0.0 for axis in axes}


__all__ = ["AsFound", "Steepest", "ZeroSide"]

"""Triggers that look at the network itself: effective rank of activations, stability of scores, cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from espalier.errors import MethodError
from espalier.graph.dims import IntArray
from espalier.graph.topology import Topology
from espalier.measure.activations import check_read, effective_rank, grams
from espalier.parts.budget import Budget, Latency, Sparsity, Units
from espalier.parts.checks import check_count
from espalier.parts.goal import Direction
from espalier.parts.names import Names, carried
from espalier.parts.score import Score
from espalier.parts.timing.trigger import Answer, Need, State, Trigger, View


@dataclass(frozen=True)
class EffectiveRank(Trigger):
    """Holds in every axis whose activations fill more than `gamma` times the directions that they filled at first.

    The measure is the effective rank of the activations per unit, 1 where all units say something of their own; its
    value at the first look is the reference. It falls as units become redundant; an axis where it does not has use for
    more. NORTH grows in this way, layer by layer (Maile et al. 2022, arXiv:2202.08539), counting singular values above
    a threshold; this takes the entropy of all of them, which needs none. Held-out batches are looked at, or else the
    last training batch; they need more samples (and positions) than the axis has units.
    """

    gamma: float = 0.97

    def __post_init__(self) -> None:
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, (int, float)) or not self.gamma > 0:
            raise MethodError(f"EffectiveRank: gamma: expected a number above 0, found {self.gamma!r}.")

    @property
    def needs(self) -> frozenset[Need]:
        """Axes."""
        return frozenset({"units"})

    def check(self, topology: Topology, axes: Sequence[str], direction: Direction) -> None:
        """Raise CaptureError if an axis has no activations that weights read."""
        check_read(topology, axes)

    def look(self, view: View, state: State, /) -> Answer:
        """Axis by axis."""
        context, references = view.context, dict(state or {})
        batches = context.probe or (() if context.batch is None else (context.batch,))
        if not batches:
            return frozenset(), state
        structure = context.structure
        forwards = [partial(context.loss, batch) for batch in batches]
        found = grams(structure.model, structure.topology, context.axes, forwards)
        ranks = {axis: effective_rank(gram) / len(gram) for axis, gram in found.items()}
        holds = frozenset(axis for axis, rank in ranks.items() if rank > self.gamma * references.get(axis, math.inf))
        return holds, {**ranks, **references}

    def rename(self, names: Names, state: State, /) -> State:
        """First ranks stay with their axes; new axes have theirs from the next look on."""
        return None if state is None else carried(state, names.axes)


@dataclass(frozen=True)
class Stable(Trigger):
    """Holds where the units of lowest score have stayed the same, in all axes, over the last `looks` looks.

    The idea of Early-Bird tickets (You et al. 2020, arXiv:1909.11957): once the mask that pruning would draw no longer
    changes, training on will not change it either. Theirs are five looks and a distance below 0.1.
    """

    share: float = 0.5
    """The part of each axis whose lowest units are compared."""
    looks: int = 5
    tolerance: float = 0.1
    """The part of these units that may be others than at any of the looks before."""
    score: Score | None = None
    """By what; None: by the score of the method itself, which has to be one that prunes."""

    def __post_init__(self) -> None:
        check_count("looks", self.looks)
        for name, value in (("share", self.share), ("tolerance", self.tolerance)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise MethodError(f"Stable: {name}: expected a fraction from 0 to 1, found {value!r}.")

    @property
    def needs(self) -> frozenset[Need]:
        """Units to compare."""
        return frozenset({"units"})

    def check(self, topology: Topology, axes: Sequence[str], direction: Direction) -> None:
        """Raise MethodError if there are no scores to compare."""
        if direction == "grow" and self.score is None:
            raise MethodError("Stable compares scores of units that there are; give it a score=, such as GroupNorm().")

    def look(self, view: View, state: State, /) -> Answer:
        """All axes or none."""
        values = view.scores(self.score).values
        lowest = {axis: sorted(values[axis].sort(stable=True).indices[: self._count(len(values[axis]))].tolist())
                  for axis in sorted(values)}  # fmt: skip
        recent = [*(state or []), lowest][-self.looks :]
        total = sum(len(units) for units in lowest.values())
        distances = [
            sum(len(set(units) - set(earlier.get(axis, ()))) for axis, units in lowest.items()) for earlier in recent
        ]
        holds = len(recent) == self.looks and max(distances) <= self.tolerance * total
        return view.axes if holds else frozenset(), recent

    def follow(self, units: Mapping[str, IntArray], state: State, /) -> State:
        """Looks at another network do not count."""
        return None

    def _count(self, size: int) -> int:
        return min(size, max(1, round(self.share * size)))


@dataclass(frozen=True)
class Reached(Trigger):
    """Holds where the network costs as much as a budget or more: ``~Reached(budget)`` where it costs less."""

    budget: Budget

    def __post_init__(self) -> None:
        if not isinstance(self.budget, Budget):
            raise MethodError(f"Reached: expected a budget such as Parameters(50_000), found {self.budget!r}.")
        if isinstance(self.budget, Latency):
            raise MethodError("Reached: time is measured at events only; give FLOPs or Parameters.")
        if isinstance(self.budget, Sparsity):
            raise MethodError("Reached: masks are looked at by methods of weights only; give FLOPs or Parameters.")
        if self.budget.of == "largest":
            raise MethodError("Reached: a fraction of the largest network is no fixed cost; give one of='initial'.")

    @property
    def needs(self) -> frozenset[Need]:
        """Axes, if it counts their units."""
        return frozenset({"units"} if isinstance(self.budget, Units) else ())

    def look(self, view: View, state: State, /) -> Answer:
        """All axes or none."""
        structure = view.context.structure
        topology = structure.topology
        cost = self.budget.cost(topology, view.context.axes)
        present = {name: topology.sizes[record.number] for name, record in topology.by_name.items()}
        initial = cost.at({**present, **structure.initial_sizes})
        reached = cost.at(present) >= self.budget.limit(initial, initial)
        return view.axes if reached else frozenset(), state


__all__ = ["EffectiveRank", "Reached", "Stable"]

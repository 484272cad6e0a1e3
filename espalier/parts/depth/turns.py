"""AutoGrow: stages grow in turn, each until it does not pay any more (Wen et al. 2020, arXiv:1906.02909)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from espalier.errors import MethodError
from espalier.graph.dims import IntArray
from espalier.parts.clock import Metric
from espalier.parts.depth.places import Blocks
from espalier.parts.goal import Goal, Scores
from espalier.parts.names import Names
from espalier.parts.score import Context


@dataclass(frozen=True)
class Growths:
    """Makes the memory of `InTurn`: which stage grew when."""

    axes: Sequence[str] | None = None
    """As the method's."""

    def __call__(self) -> Grown:
        return Grown(self.axes)


class Grown:
    """The stages that have got a block, whoever added it, in that order, each with the epochs that were done then."""

    def __init__(self, axes: Sequence[str] | None = None) -> None:
        self._axes = axes
        self._counts: dict[str, int] = {}
        self._stale = True
        self.growths: list[tuple[int, str]] = []

    def follow(self, units: Mapping[str, IntArray], /) -> None:
        """Nothing is remembered of units."""

    def rename(self, names: Names, /) -> None:
        """Look at the stages again."""
        self._stale = True

    def after_step(self, context: Context, /) -> None:
        """Note what has grown since the last look."""
        if not self._stale:
            return
        self._stale = False
        counts = Blocks(context.structure, self._axes).stages
        if self._counts:
            self.growths += [
                (context.epoch, stage)
                for stage, count in counts.items()
                if stage in self._counts and count > self._counts[stage]
            ]
        self._counts = dict(counts)

    def state(self) -> dict[str, Any]:
        """All of it."""
        return {"counts": dict(self._counts), "stale": self._stale, "growths": [list(one) for one in self.growths]}

    def restore(self, state: Mapping[str, Any], /) -> None:
        """Become what `state` gave."""
        self._counts = {str(stage): int(count) for stage, count in state["counts"].items()}
        self._stale = bool(state["stale"])
        self.growths = [(int(epoch), str(stage)) for epoch, stage in state["growths"]]


@dataclass(frozen=True)
class InTurn:
    """The stage after the one that grew last comes first; one that grew without making the metric better, never again.

    A stage is judged when the next one grows: by the best metric since it grew against the best one before.
    """

    least: float = 0.0005
    """By how much the metric has to be better."""

    def __post_init__(self) -> None:
        if isinstance(self.least, bool) or not isinstance(self.least, (int, float)) or not self.least >= 0:
            raise MethodError(f"least: expected a number of at least 0, found {self.least!r}.")

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        assert isinstance(context.memory, Grown)
        growths = context.memory.growths
        stopped = self.stopped(growths, context.metrics, context.epoch)
        stages = list(dict.fromkeys(one.stage for one in goal.layers.values()))
        last = growths[-1][1] if growths else stages[-1] if stages else ""
        first = stages.index(last) + 1 if last in stages else 0
        turn = {stage: (number - first) % len(stages) for number, stage in enumerate(stages)}
        return Scores(
            {
                name: torch.tensor([-math.inf if one.stage in stopped else float(-turn[one.stage])])
                for name, one in goal.layers.items()
            }
        )

    def stopped(self, growths: Sequence[tuple[int, str]], metrics: Sequence[Metric], epoch: int) -> frozenset[str]:
        """The stages that do not grow any more."""
        found = set()
        ends = [*(then for then, _ in growths[1:]), epoch]
        for (begin, stage), end in zip(growths, ends, strict=False):
            before = _best(one for one in metrics if one.epoch <= begin)
            after = _best(one for one in metrics if begin < one.epoch <= end)
            if before is not None and after is not None and after < before + self.least:
                found.add(stage)
        return frozenset(found)


def _best(metrics: Any) -> float | None:
    """The best value, so turned that larger ones are better."""
    values = [one.value if one.mode == "max" else -one.value for one in metrics if one.value is not None]
    return max(values, default=None)


__all__ = ["Grown", "Growths", "InTurn"]

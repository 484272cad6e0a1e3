"""Wanda: single weights times the norms of what they read (`espalier.parts.units.inputs`)."""

from __future__ import annotations

from dataclasses import dataclass

from espalier.parts.checks import check_count
from espalier.parts.goal import Goal, Scores
from espalier.parts.score import Context
from espalier.parts.units.inputs import times_inputs
from espalier.parts.weights.saliency import live_tensors


@dataclass(frozen=True)
class WeightTimesInput:
    """|w| times the norm of its input over some batches in eval mode."""

    batches: int = 4

    def __post_init__(self) -> None:
        check_count("batches", self.batches)

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        return Scores(times_inputs(context, live_tensors(context, goal), self.batches))


__all__ = ["WeightTimesInput"]

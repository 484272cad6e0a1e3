"""Methods that evaluate the training loss in a way of their own, such as under gates that are drawn at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from espalier.edit.plan import Plan
from espalier.errors import MethodError
from espalier.parts.goal import Goal
from espalier.parts.score import Context


@dataclass(frozen=True)
class GateState:
    """Where training with gates stands."""

    stage: int
    """0 before the search for units, 1 in it, 2 after it."""
    k: float
    """How sharply gates are decided (`espalier.parts.gates.stages`)."""
    probabilities: Mapping[str, Tensor]
    """What has gates, such as an axis -> the probability of each of them, on the CPU."""
    asleep: Mapping[str, int]
    """Axis -> how many of its units sleep."""


def mean_of(losses: Tensor) -> Tensor:
    """A loss, or the mean of one per sample, shape (samples,). Raises MethodError for anything else."""
    if losses.dim() > 1 or not losses.numel():
        raise MethodError(
            f"expected a scalar loss, or one per sample, found one of shape {tuple(losses.shape)}; have the loss "
            "function return its mean."
        )
    return losses.mean() if losses.dim() else losses


class Gating(Protocol):
    """How the loss of training is evaluated; there is one such method at most in a session."""

    def loss(self, context: Context, forward: Callable[[], Tensor], /) -> Tensor:
        """The loss of a step, a scalar.

        `forward` evaluates the plain one, as often as wanted: a scalar, or one per sample (`mean_of`).
        """

    def decided(self, context: Context, /) -> AbstractContextManager[None]:
        """Makes the network for a while what it would be if all were decided now."""

    def state(self, context: Context, /) -> GateState:
        """Where training stands."""


class Planner(Protocol):
    """Makes the whole plan of an event, in which units may go and come."""

    def __call__(self, context: Context, goal: Goal, /) -> Plan:
        """The plan; changes nothing."""


__all__ = ["GateState", "Gating", "Planner", "mean_of"]

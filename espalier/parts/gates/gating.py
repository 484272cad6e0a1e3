"""Methods that evaluate the training loss in a way of their own, such as under gates that are drawn at every step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from espalier.edit.plan import Plan
from espalier.parts.goal import Goal
from espalier.parts.score import Context


class Gating(Protocol):
    """How the loss of training is evaluated; there is one such method at most in a session."""

    def loss(self, context: Context, forward: Callable[[], Tensor], /) -> Tensor:
        """The loss of a step: `forward` evaluates the plain one, as often as wanted."""

    def decided(self, context: Context, /) -> AbstractContextManager[None]:
        """Makes the network for a while what it would be if all were decided now."""


class Planner(Protocol):
    """Makes the whole plan of an event, in which units may go and come."""

    def __call__(self, context: Context, goal: Goal, /) -> Plan:
        """The plan; changes nothing."""


__all__ = ["Gating", "Planner"]

"""What the triggers of one method remember in one session, and the training losses that they listen to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from espalier.graph.dims import IntArray
from espalier.parts.names import Names
from espalier.parts.timing.schedule import Schedule
from espalier.parts.timing.trigger import State, View

_HELD_BACK = 256
"""Losses that are kept as they are, on their device, until they are summed."""


class Watch:
    """Asks the triggers of a schedule and keeps what they remember; follows edits as a `Memory` does."""

    def __init__(self, schedule: Schedule) -> None:
        self._triggers = schedule.triggers
        self._schedule = schedule
        self._states: list[State] = [None] * len(self._triggers)
        self._recent: list[Tensor] = []
        self._sum, self._count = 0.0, 0
        self.needs = frozenset(need for one in self._triggers for need in one.needs)
        """What the session has to provide."""

    def hear(self, loss: Tensor) -> None:
        """Take in the training loss of a step."""
        self._recent.append(loss.detach().clone())  # the user may divide it in place
        if len(self._recent) >= _HELD_BACK:
            self._add_up()

    def mean(self) -> float | None:
        """The mean of the losses heard since the last call; None if there are none, or if it is no number."""
        self._add_up()
        mean = self._sum / self._count if self._count else math.nan
        self._sum, self._count = 0.0, 0
        return mean if math.isfinite(mean) else None

    def look(self, view: View, loss: float | None) -> tuple[frozenset[str], bool]:
        """The axes in which an event may happen now, and whether there are to be none any more.

        `loss` is the mean training loss since the last look, None if unknown.
        """
        view = replace(view, loss=loss)
        axes, stopped = view.axes, False
        for number, trigger in enumerate(self._triggers):
            found, self._states[number] = trigger.look(view, self._states[number])
            if trigger is self._schedule.when:
                axes = found
            if trigger is self._schedule.stop:
                stopped = bool(found)
        return axes, stopped

    def follow(self, units: Mapping[str, IntArray], /) -> None:
        """Have the triggers follow an edit."""
        pairs = zip(self._triggers, self._states, strict=True)
        self._states = [one.follow(units, state) for one, state in pairs]

    def rename(self, names: Names, /) -> None:
        """Have the triggers go on with other names."""
        pairs = zip(self._triggers, self._states, strict=True)
        self._states = [one.rename(names, state) for one, state in pairs]

    def state(self) -> dict[str, Any]:
        """All of it as what JSON can hold."""
        self._add_up()
        total = self._sum if math.isfinite(self._sum) else None
        return {"states": list(self._states), "sum": total, "count": self._count}

    def restore(self, state: Mapping[str, Any], /) -> None:
        """Become what `state` gave. Raises KeyError, TypeError or ValueError for anything else."""
        if len(state["states"]) != len(self._triggers):
            raise ValueError(f"expected the states of {len(self._triggers)} triggers, found {len(state['states'])}")
        self._states, self._recent = list(state["states"]), []
        self._sum = math.nan if state["sum"] is None else float(state["sum"])
        self._count = int(state["count"])

    def _add_up(self) -> None:
        """Sum what was heard, one after the other, so that the sum does not depend on when it is taken."""
        if self._recent:
            for loss in torch.stack(self._recent).tolist():
                self._sum += loss
            self._count += len(self._recent)
            self._recent = []


__all__ = ["Watch"]

"""Triggers that look at how well the training goes: plateau, growth that no longer helps, train-validation gap."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from espalier.errors import MethodError
from espalier.measure.stats import eval_loss
from espalier.parts.checks import check_count
from espalier.parts.names import Names
from espalier.parts.score import Context
from espalier.parts.timing.trigger import Answer, Need, State, Trigger, View

Measure = Literal["metric", "loss", "probe"]
"""``metric``: what `Session.epoch_end` is told, once per epoch; ``loss``: the mean training loss between two looks;
``probe``: the loss in eval mode on the held-out batches, evaluated at every look."""


def probe_loss(context: Context) -> float:
    """The mean loss of the held-out batches in eval mode."""
    model = context.structure.model
    losses = [eval_loss(model, lambda batch=batch: context.loss(batch)) for batch in context.probe]  # type: ignore[misc]
    return math.fsum(losses) / len(losses)


@dataclass(frozen=True)
class _Curve(Trigger):
    """Follows one measure; a value is an improvement if it beats the best by the fraction `least` of it."""

    measure: Measure
    least: float

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.measure not in get_args(Measure):
            raise MethodError(f"{name}: expected one of {', '.join(get_args(Measure))}, found {self.measure!r}.")
        if isinstance(self.least, bool) or not isinstance(self.least, (int, float)) or not self.least >= 0:
            raise MethodError(f"{name}: least: expected a fraction of at least 0, found {self.least!r}.")

    @property
    def needs(self) -> frozenset[Need]:
        """What its measure needs."""
        return frozenset[Need]() if self.measure == "metric" else frozenset({self.measure})

    def rename(self, names: Names, state: State, /) -> State:
        """Losses have no names."""
        return state

    def _new(self, view: View, seen: int) -> list[float]:
        """The values since the epoch `seen`, so turned that smaller ones are better; what is no number is left out."""
        match self.measure:
            case "metric":
                signs = {"min": 1.0, "max": -1.0}
                return [
                    signs[one.mode] * one.value for one in view.metrics if one.epoch > seen and one.value is not None
                ]
            case "loss":
                found = view.loss
            case "probe":
                found = probe_loss(view.context)
        return [] if found is None or not math.isfinite(found) else [found]

    def _improved(self, value: float, best: float) -> bool:
        return value < best - self.least * abs(best)


@dataclass(frozen=True)
class Plateau(_Curve):
    """Holds where a measure has not improved for `patience` values in a row; begins anew after every event."""

    measure: Measure = "metric"
    least: float = 0.01
    """The part of the best value by which a value has to be better to count."""
    patience: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("patience", self.patience)

    def look(self, view: View, state: State, /) -> Answer:
        """All axes or none."""
        acted = -1 if view.acted is None else view.acted.step
        state = [None, 0, 0, acted] if state is None else state
        best, waited, seen, then = state
        if acted != then:
            best, waited = None, 0
        for value in self._new(view, seen):
            if best is None or self._improved(value, best):
                best, waited = value, 0
            else:
                waited += 1
        holds = waited >= self.patience
        return view.axes if holds else frozenset(), [best, waited, view.clock.epoch, acted]


@dataclass(frozen=True)
class Futile(_Curve):
    """Holds where the last `events` events together brought no improvement of the best value: a stop for growth.

    So AutoGrow stops (Wen et al. 2020, arXiv:1906.02909), which looks at the validation accuracy after each growth.
    """

    measure: Measure = "metric"
    least: float = 0.01
    """The part of the best value by which it has to become better."""
    events: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("events", self.events)

    def look(self, view: View, state: State, /) -> Answer:
        """All axes or none; as long as nothing was measured since the last event, none."""
        state = [None, [], 0, 0] if state is None else state
        best, before, seen, then = state
        if view.events > then and best is not None:
            before = [*before, best][-self.events :]
        new = self._new(view, seen)
        best = min(new if best is None else [best, *new], default=None)
        judged = bool(new) and len(before) == self.events
        holds = judged and best is not None and not self._improved(best, before[0])
        return view.axes if holds else frozenset(), [best, before, view.clock.epoch, view.events]


@dataclass(frozen=True)
class Gap(Trigger):
    """Holds where the held-out loss exceeds that of the last training batch by more than `above`, or less than `below`.

    Both are taken in eval mode. A wide gap calls for pruning, a narrow one says that the network can grow. One batch is
    a noisy measure: `Gap(above=0.2).held(3)`, or `Gap(above=0.2).until(Gap(below=0.1))`.
    """

    above: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        given = [one for one in (self.above, self.below) if one is not None]
        if len(given) != 1 or isinstance(given[0], bool) or not isinstance(given[0], (int, float)):
            raise MethodError(
                f"Gap: expected either above= or below=, a difference of losses, found above={self.above!r}, "
                f"below={self.below!r}."
            )

    @property
    def needs(self) -> frozenset[Need]:
        """Held-out batches."""
        return frozenset({"probe"})

    def look(self, view: View, state: State, /) -> Answer:
        """All axes or none."""
        context = view.context
        if context.batch is None:
            return frozenset(), state
        gap = probe_loss(context) - eval_loss(context.structure.model, lambda: context.loss(context.batch))
        holds = gap > self.above if self.above is not None else self.below is not None and gap < self.below
        return view.axes if holds else frozenset(), state


__all__ = ["Futile", "Gap", "Measure", "Plateau", "probe_loss"]

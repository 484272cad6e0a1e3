"""What a network has to come down to, and how that is found out: by counting, or by measuring again and again."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn

from espalier.errors import ShrinkError
from espalier.graph.topology import infer
from espalier.measure.cost import cost_of
from espalier.measure.memory import peak_memory
from espalier.measure.repeated import Reading, repeated
from espalier.measure.runtimes import Eager, Measure, Runtime, for_inference
from espalier.parts.budget import Budget, FLOPs, Latency, Memory, Parameters

PRECISION = 0.03
"""An interval is narrow if it is at most this part of the value."""
_ROUGH, _ROUGH_MOST = 0.1, 40
"""Likewise on the way, and how many measurements that may take."""


class Target(ABC):
    """A budget together with what it is counted or measured by."""

    def __init__(self, budget: Budget, initial: Reading) -> None:
        self.budget, self.initial = budget, initial

    @property
    def limit(self) -> float:
        """What the network may cost in the end."""
        value = float(self.budget.value)
        return value if self.budget.of is None else value * self.initial.value

    @abstractmethod
    def read(self, model: nn.Module, limit: float, *, rough: bool = False) -> Reading:
        """What a network costs, as surely as it takes to compare it with a limit; roughly, where much is compared."""

    @abstractmethod
    def text(self, value: float) -> str:
        """A value with its unit."""

    @property
    def unit(self) -> str:
        """What is counted, in words."""
        return {Latency: "latency", Memory: "memory", FLOPs: "FLOPs", Parameters: "parameters"}[type(self.budget)]


class Counted(Target):
    """FLOPs, parameters or memory: one number that is the same each time."""

    def __init__(self, budget: Budget, model: nn.Module, example: Any) -> None:
        self._example = example
        super().__init__(budget, Reading.exactly(_count(budget, model, example)))

    def read(self, model: nn.Module, limit: float, *, rough: bool = False) -> Reading:
        return Reading.exactly(_count(self.budget, model, self._example))

    def text(self, value: float) -> str:
        return f"{value:,.0f}{' bytes' if isinstance(self.budget, Memory) else f' {self.unit}'}"


class Timed(Target):
    """Seconds, as the user's function or a runtime measures them.

    Where the limit is a part of what the network took at first, both are timed in turn, pass by pass, and their ratio
    is what counts: other work on the machine then slows both.
    """

    def __init__(self, budget: Latency, model: nn.Module, example: Any) -> None:
        self._measure, self._example = budget.measure or Eager(), example
        self._first = self._prepared(model)
        super().__init__(budget, repeated(self._first, lambda found: found.narrow(PRECISION)))

    def read(self, model: nn.Module, limit: float, *, rough: bool = False) -> Reading:
        once = self._prepared(model)
        start = self.initial.value

        def ratio() -> float:
            before = self._first()
            return once() / before * start

        if self.budget.of is not None:
            self._first()  # edits throw away what was compiled, for this network too

        def enough(found: Reading) -> bool:
            return found.narrow(_ROUGH if rough else PRECISION) and found.within(limit) is not None

        count = _ROUGH_MOST if rough else 200
        return repeated(once if self.budget.of is None else ratio, enough, most=count)

    def text(self, value: float) -> str:
        return f"{value * 1000:.4g} ms"

    def _prepared(self, model: nn.Module) -> Callable[[], float]:
        measure: Measure = self._measure
        if isinstance(measure, Runtime):
            return measure.prepared(model, self._example)

        def once() -> float:
            with for_inference(model):
                found = float(measure(model, self._example))
            if not math.isfinite(found) or found <= 0:
                raise ShrinkError(f"Latency: measure= has to return seconds, a number above 0; it returned {found!r}.")
            return found

        once()  # what runs for the first time is slow
        return once


def target_of(budget: Budget, model: nn.Module, example: Any) -> Target:
    """The target of a budget for a network, which is measured as it is.

    Raises:
        ShrinkError: the budget is none that a whole network can be measured by.
    """
    if not isinstance(budget, Latency | FLOPs | Parameters | Memory):
        raise ShrinkError(
            f"target: expected Latency, FLOPs, Parameters or Memory, found {budget!r}; half of the FLOPs is "
            "FLOPs(0.5, of='initial')."
        )
    if budget.of == "largest":
        raise ShrinkError(f"{budget!r}: the network only shrinks; write of='initial'.")
    return Timed(budget, model, example) if isinstance(budget, Latency) else Counted(budget, model, example)


def _count(budget: Budget, model: nn.Module, example: Any) -> float:
    if isinstance(budget, Memory):
        return float(peak_memory(model, example))
    cost = cost_of(infer(model, example))
    return float(cost.flops if isinstance(budget, FLOPs) else cost.parameters)


__all__ = ["PRECISION", "Counted", "Target", "Timed", "target_of"]

"""Stochastic gates on single weights: what a method of the level ``weights`` with gates remembers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from espalier.errors import MethodError
from espalier.graph.dims import IntArray
from espalier.parts.gates.beginning import fresh_gates
from espalier.parts.gates.entries import EntryGates
from espalier.parts.gates.leaving import LeavingGates
from espalier.parts.gates.places import Gates
from espalier.parts.gates.settings import GateSettings
from espalier.parts.gates.weights import Weights
from espalier.parts.names import Names
from espalier.parts.score import Context


@dataclass(frozen=True)
class GatedWeights:
    """Gates on weights; makes the memory of a method with them."""

    settings: GateSettings = field(default_factory=GateSettings)

    def __call__(self) -> WeightGates:
        return WeightGates(self)


class WeightGates(LeavingGates):
    """The gates on weights of one session, by parameter."""

    def __init__(self, made_by: GatedWeights) -> None:
        super().__init__(made_by.settings, never_empty=True)
        self.made_by = made_by
        self.entries = EntryGates(self.table, Weights)

    def placed(self, context: Context) -> Gates:
        """Where the gates act in the network as it is now."""
        if not context.axes:
            raise MethodError("there are no parameters whose weights could have gates.")
        keys = () if self.folding.done else context.axes
        self.entries.meet(context.structure, keys, partial(fresh_gates, self.made_by.settings))
        return Gates(context.structure, self.entries.places(context.structure))

    def shut(self, context: Context) -> dict[str, Tensor]:
        """Parameter -> of booleans, what of it gates hold at zero for good now."""
        self.gates(context)
        return self.entries.shut(context.structure, self.table.ready(context.progress), context.progress)

    def follow(self, units: Mapping[str, IntArray], /) -> None:
        """Gates go and come with their weights."""
        super().follow(units)
        self.entries.note(units)

    def rename(self, names: Names, /) -> None:
        """Gates stay with their parameters."""
        super().rename(names)
        self.entries.rename(names)

    def state(self) -> dict[str, Any]:
        """All of it."""
        return {"table": self.table.state(), "entries": self.entries.state(), "folded": self.folding.done}

    def restore(self, state: Mapping[str, Any], /) -> None:
        """Become what `state` gave."""
        fresh = WeightGates(self.made_by)
        fresh.table.restore(state["table"])
        fresh.entries.restore(state["entries"])
        fresh.folding.done = bool(state["folded"])
        self.__dict__.update(fresh.__dict__)

    def _clear(self) -> None:
        self.entries.clear()
        super()._clear()


__all__ = ["GatedWeights", "WeightGates"]

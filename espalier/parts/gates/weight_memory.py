"""Stochastic gates on single weights: what a method of the level ``weights`` with gates remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from espalier.errors import MethodError
from espalier.graph.dims import IntArray
from espalier.parts.gates.beginning import fresh_gates
from espalier.parts.gates.dormant import Sleeper
from espalier.parts.gates.entries import EntryGates
from espalier.parts.gates.folding import Folding
from espalier.parts.gates.places import Gates
from espalier.parts.gates.settings import GateSettings
from espalier.parts.gates.subnetwork import SubNetwork
from espalier.parts.gates.table import GateTable
from espalier.parts.gates.weights import Weights
from espalier.parts.names import Names
from espalier.parts.score import Context


@dataclass(frozen=True)
class GatedWeights:
    """Gates on weights; makes the memory of a method with them."""

    settings: GateSettings = field(default_factory=GateSettings)

    def __call__(self) -> WeightGates:
        return WeightGates(self)


class WeightGates:
    """The gates on weights of one session, by parameter."""

    def __init__(self, made_by: GatedWeights) -> None:
        self.made_by = made_by
        self.table = GateTable(made_by.settings, never_empty=True)
        self.entries = EntryGates(self.table, Weights)
        self.folding = Folding()
        self.asleep: Mapping[str, Sequence[Sleeper]] = {}
        """Nothing: what leaves does not come back by itself."""
        self._gates: SubNetwork | None = None

    def gates(self, context: Context) -> SubNetwork:
        """Where the gates act now. Raises MethodError if there are no weights to gate."""
        structure = context.structure
        if self._gates is None or self._gates.topology is not structure.topology:
            keys = () if self.folding.done else context.axes
            if not context.axes:
                raise MethodError("there are no parameters whose weights could have gates.")
            self.entries.meet(structure, keys, partial(fresh_gates, self.made_by.settings))
            self._gates = SubNetwork(structure, Gates(structure, self.entries.places(structure)))
        return self._gates

    def judged(self, context: Context) -> dict[str, Tensor]:
        """Key -> what its gates multiply by when the network is judged."""
        self.gates(context)
        return self.table.judged(context.progress)

    def shut(self, context: Context) -> dict[str, Tensor]:
        """Parameter -> of booleans, what of it gates hold at zero for good now."""
        self.gates(context)
        return self.entries.shut(context.structure, self.table.ready(context.progress), context.progress)

    def after_step(self, context: Context, /) -> None:
        """Move the logits."""
        self.folding.forget()
        self.gates(context)
        self.table.step(context.progress, context.epoch)

    def follow(self, units: Mapping[str, IntArray], /) -> None:
        """Gates go and come with their weights."""
        self._gates = None
        self.table.forget()
        if self.folding.follow(units):
            self.entries.clear()
        self.entries.note(units)

    def rename(self, names: Names, /) -> None:
        """Gates stay with their parameters."""
        self._gates = None
        self.table.forget()
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


__all__ = ["GatedWeights", "WeightGates"]

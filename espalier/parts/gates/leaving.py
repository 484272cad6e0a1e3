"""What the memories of gates share whose shut places leave for good: those on weights, and those on layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from espalier.graph.dims import IntArray
from espalier.parts.gates.dormant import Sleeper
from espalier.parts.gates.folding import Folding
from espalier.parts.gates.places import Gates
from espalier.parts.gates.settings import GateSettings
from espalier.parts.gates.subnetwork import SubNetwork
from espalier.parts.gates.table import GateTable
from espalier.parts.names import Names
from espalier.parts.score import Context


class LeavingGates(ABC):
    """The gates of one session, none of which sleep."""

    def __init__(self, settings: GateSettings, *, never_empty: bool = False) -> None:
        self.table = GateTable(settings, never_empty=never_empty)
        self.folding = Folding()
        self.asleep: Mapping[str, Sequence[Sleeper]] = {}
        """Nothing: what leaves does not come back by itself."""
        self._gates: SubNetwork | None = None

    @abstractmethod
    def placed(self, context: Context) -> Gates:
        """Where the gates act in the network as it is now, after those that are new have been taken in."""

    def gates(self, context: Context) -> SubNetwork:
        """Where the gates act now. Raises MethodError if there is nothing to gate."""
        if self._gates is None or self._gates.topology is not context.structure.topology:
            self._gates = SubNetwork(context.structure, self.placed(context))
        return self._gates

    def judged(self, context: Context) -> dict[str, Tensor]:
        """Key -> what its gates multiply by when the network is judged."""
        self.gates(context)
        return self.table.judged(context.progress)

    def after_step(self, context: Context, /) -> None:
        """Move the logits."""
        self.folding.forget()
        self.gates(context)
        self.table.step(context.progress, context.epoch)

    def follow(self, units: Mapping[str, IntArray], /) -> None:
        """What has gates stays what it is; once gates have joined the weights there are none."""
        self._forget_places()
        if self.folding.follow(units):
            self._clear()

    def rename(self, names: Names, /) -> None:
        """Gates stay with what they are on."""
        self._forget_places()

    def _clear(self) -> None:
        """There are no gates any more."""
        self.table.clear()

    def _forget_places(self) -> None:
        self._gates = None
        self.table.forget()


__all__ = ["LeavingGates"]

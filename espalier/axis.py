"""One axis of a live network, as users see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from espalier.edit.changes import Limits
from espalier.graph.topology import Slot, Tap, Topology
from espalier.measure.cost import Cost, axis_cost


@dataclass(frozen=True)
class Axis:
    """One independent width of the network, as it is now."""

    name: str
    size: int
    """Number of units."""
    reason: str | None
    """Why it may not change; None if it may."""
    taps: tuple[Tap, ...]
    """Every place in the forward pass where something is done along it."""
    limits: Limits
    _topology: Topology = field(repr=False, compare=False)

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """Every place in parameters and buffers where it appears."""
        record = self._topology.by_name[self.name]
        return tuple(self._topology.slot(record.number, *slot) for slot in record.slots)

    @cached_property
    def unit_cost(self) -> Cost:
        """What one more unit costs, everything coupled to it included."""
        return axis_cost(self._topology, self._topology.by_name[self.name].number)

    @property
    def prunable(self) -> bool:
        """Whether it may be given a smaller size."""
        return self.reason is None and self.limits.below(self.size) is not None

    @property
    def growable(self) -> bool:
        """Whether it may be given a larger size."""
        return self.reason is None and self.limits.above(self.size) is not None


__all__ = ["Axis"]

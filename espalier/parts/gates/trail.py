"""Edits of units that are still to be carried over to what is kept by tensor.

A memory is told of edits while the network is not at hand, which alone says where an axis lies in a tensor. A trail
notes them until it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from espalier.graph.dims import IntArray
from espalier.graph.topology import Topology
from espalier.parts.names import Names, carried

Units = Mapping[str, IntArray]
"""Axis -> the old unit that each of its units was before an edit, -1 for a new one."""


class Trail:
    """The edits since the last look."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._edits: list[Units] = []

    def note(self, units: Units) -> None:
        """An edit was made."""
        self._edits.append(dict(units))

    def rename(self, names: Names) -> bool:
        """Layers came or went; False if nobody knows any more where units were that changed since the last look."""
        now = names.axes
        changed = {axis for units in self._edits for axis in units}
        apart = [now.get(axis, axis) for axis in self._sizes]
        if any(now.get(axis, axis) is None or apart.count(now.get(axis, axis)) > 1 for axis in changed):
            self._sizes, self._edits = {}, []
            return False
        self._sizes = carried(self._sizes, now)
        self._edits = [carried(units, now) for units in self._edits]
        return True

    def walked(self, topology: Topology) -> Iterator[tuple[Topology, Units]]:
        """Every edit with the sizes before it, in order. Take all: then there are none left."""
        for units in self._edits:
            sizes = {topology.by_name[axis].number: size for axis, size in self._sizes.items()}
            yield topology.resized(sizes), units
            self._sizes |= {axis: len(found) for axis, found in units.items()}
        self._edits = []
        self._sizes = {name: topology.sizes[record.number] for name, record in topology.by_name.items()}

    def state(self) -> dict[str, Any]:
        """All of it as JSON."""
        edits = [{axis: units.tolist() for axis, units in one.items()} for one in self._edits]
        return {"sizes": dict(self._sizes), "edits": edits}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what `state` gave."""
        self._sizes = {str(axis): int(size) for axis, size in state["sizes"].items()}
        self._edits = [{str(axis): np.array(units, np.int64) for axis, units in one.items()} for one in state["edits"]]


__all__ = ["Trail", "Units"]

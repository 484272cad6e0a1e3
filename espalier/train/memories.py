"""What a session remembers of units and of names, kept in step with edits, whoever makes or undoes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from espalier.graph.dims import IntArray
from espalier.parts.names import Names
from espalier.record import Edit
from espalier.structure import Structure
from espalier.train.members import Members


class Follower(Protocol):
    """What follows edits: memories of methods, what their triggers remember, which axes they may change, slow units."""

    def follow(self, units: Mapping[str, IntArray], /) -> None:
        """As `Memory.follow`."""

    def rename(self, names: Names, /) -> None:
        """As `Memory.rename`."""

    def state(self) -> dict[str, Any]:
        """As `Memory.state`."""

    def restore(self, state: Mapping[str, Any], /) -> None:
        """As `Memory.restore`."""


class Memories:
    """Follows the history of a structure: edits that came since the last look, and those that were undone."""

    def __init__(self, structure: Structure, memories: Sequence[Follower], members: Sequence[Members]) -> None:
        self._structure = structure
        self._members = tuple(members)
        self._memories: tuple[Follower, ...] = (*memories, *members)
        self._known: tuple[Edit, ...] = structure.history
        self._before: list[list[dict[str, Any]]] = []
        """What all of them were before each of the last known edits, as far as these can still be undone."""

    def catch_up(self) -> None:
        """Have all memories follow what happened to the network since the last call."""
        history = self._structure.history
        if len(history) == len(self._known) and (not history or history[-1] is self._known[-1]):
            return
        shared = 0
        for known, edit in zip(self._known, history, strict=False):
            if known is not edit:
                break
            shared += 1
        undone = len(self._known) - shared
        if undone:
            for memory, state in zip(self._memories, self._before[-undone], strict=True):
                memory.restore(state)
            del self._before[-undone:]
        for edit in history[shared:]:
            self._before.append([memory.state() for memory in self._memories])
            for memory in self._memories:
                memory.follow({axis: np.array(units, np.int64) for axis, units in edit.units.items()})
                if edit.plan.depth:
                    memory.rename(Names.of(edit))
        self._known = history
        del self._before[: max(0, len(self._before) - self._structure.undoable)]
        for one in self._members:
            one.settle()


__all__ = ["Memories"]

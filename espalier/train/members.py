"""Which axes, or parameters, each method of a session may change, kept in step with layers that come and go."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from espalier.graph.dims import IntArray
from espalier.parts.budget import Units
from espalier.parts.candidate import module_of
from espalier.parts.names import Names, carried, renamed
from espalier.parts.units.where import able_axes, fits_pattern
from espalier.parts.weights.weights import choose_weights
from espalier.structure import Structure
from espalier.train.controller import Running


class Members:
    """What goes by names in the work of one method.

    Axes that stay, stay with the method under their names of now; those of layers that are gone leave it; those that
    are new join it if it changes all that may change, or if one of its patterns (a name with `*`, `?` or `[`) fits.
    A budget of units counts the first units of the axes that there are.
    """

    def __init__(self, structure: Structure, running: Running) -> None:
        self._structure = structure
        self._running = running
        self._known = self._present()
        self._stale = False

    def follow(self, units: Mapping[str, IntArray], /) -> None:
        """Names stay."""

    def rename(self, names: Names, /) -> None:
        """Go on with the names of now; what is new joins when `settle` is called."""
        one = self._running
        now = names.tensors if one.method.level == "weights" else names.axes
        if one.method.level == "layers":
            one.left_out = {
                new: why for name, why in one.left_out.items() if (new := _renamed_layer(name, names)) is not None
            }
            return
        self._known = renamed(self._known, now)
        one.axes = renamed(one.axes, now)
        one.reference, one.left_out = carried(one.reference, now), carried(one.left_out, now)
        self._stale = True

    def settle(self) -> None:
        """Once the network is what all edits say: take in what is new."""
        if not self._stale:
            return
        self._stale = False
        one, present = self._running, self._present()
        new = set(present) - set(self._known)
        joined = self._joining(new)
        one.axes = tuple(name for name in present if name in joined or name in one.axes)
        self._known = present
        if isinstance(one.method.schedule.amount.budget, Units) and one.method.level == "units":
            self._recount()

    def state(self) -> dict[str, Any]:
        """All of it."""
        one = self._running
        return {
            "known": self._known,
            "axes": one.axes,
            "reference": dict(one.reference),
            "left_out": dict(one.left_out),
            "costs": (one.initial, one.largest, one.start),
        }

    def restore(self, state: Mapping[str, Any], /) -> None:
        """Become what `state` gave."""
        one = self._running
        self._known, one.axes = state["known"], state["axes"]
        one.reference, one.left_out = dict(state["reference"]), dict(state["left_out"])
        one.initial, one.largest, one.start = state["costs"]

    def _present(self) -> tuple[str, ...]:
        if self._running.method.level == "layers":  # they are looked up anew at every event
            return ()
        if self._running.method.level == "weights":
            return choose_weights(self._structure, None)
        return tuple(self._structure.axes)

    def _joining(self, new: Collection[str]) -> set[str]:
        method = self._running.method
        fitting = {name for name in new if fits_pattern(name, method.axes)}
        if method.level == "weights":
            return fitting
        return set(able_axes(self._structure, method.direction, sorted(fitting), asked=method.axes is not None))

    def _recount(self) -> None:
        one, first = self._running, self._structure.initial_sizes
        initial = sum(first[name] for name in one.axes)
        if one.initial and initial:
            one.largest = round(one.largest * initial / one.initial)
            one.start = None if one.start is None else round(one.start * initial / one.initial)
            one.initial = initial


def _renamed_layer(name: str, names: Names) -> str | None:
    path = module_of(name)
    new = (names.axes if name.endswith(" units") else names.modules).get(path, path)
    return None if new is None else new + name.removeprefix(path)


__all__ = ["Members"]

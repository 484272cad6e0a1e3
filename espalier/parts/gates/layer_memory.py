"""Stochastic gates on layers and cells: what a method of the level ``layers`` with gates remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from espalier.errors import MethodError
from espalier.graph.regions import Boundaries
from espalier.parts.depth.places import Places, Removable
from espalier.parts.gates.beginning import fresh_gates
from espalier.parts.gates.branches import branch_place
from espalier.parts.gates.leaving import LeavingGates
from espalier.parts.gates.places import GatePlace, Gates
from espalier.parts.gates.settings import GateSettings
from espalier.parts.names import Names
from espalier.parts.score import Context


@dataclass(frozen=True)
class GatedLayers:
    """Gates on layers and cells; makes the memory of a method with them."""

    settings: GateSettings = field(default_factory=GateSettings)
    places: Places = field(default_factory=Removable)
    asked: Sequence[str] | None = None
    """Names or patterns of modules; None for all blocks."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "asked", None if self.asked is None else tuple(self.asked))

    def __call__(self) -> LayerGates:
        return LayerGates(self)


class LayerGates(LeavingGates):
    """The gates on layers and cells of one session, by the names of these."""

    def __init__(self, made_by: GatedLayers) -> None:
        super().__init__(made_by.settings)
        self.made_by = made_by
        self.refused: dict[str, str] = {}
        """Name -> why it has no gate."""

    def placed(self, context: Context) -> Gates:
        """Where the gates act in the network as it is now. Raises MethodError where one was asked for by name."""
        structure = context.structure
        places = () if self.folding.done else self._places(context)
        if not places and not self.folding.done and not structure.layers_moved:
            shown = "; ".join(f"{name}: {why}" for name, why in list(self.refused.items())[:3])
            raise MethodError(f"no layer can have a gate ({shown or 'the network has no blocks'}).")
        for place in places:
            if place.key not in self.table.logits:
                self.table.add(place.key, fresh_gates(self.made_by.settings, place.key, 1))
        known = {place.key for place in places}
        self.table.rename({name: None for name in self.table.logits if name not in known})
        return Gates(structure, places)

    def shut(self, context: Context) -> dict[str, float]:
        """Name -> probability, of those whose gates say that they may leave."""
        self.gates(context)
        p = self.table.probabilities(context.progress)
        ready = self.table.ready(context.progress)
        return {name: float(p[name]) for name, one in ready.items() if bool(one.all())}

    def rename(self, names: Names, /) -> None:
        """Gates stay with their layers, and go with them."""
        super().rename(names)
        self.table.rename(names.modules)

    def state(self) -> dict[str, Any]:
        """All of it."""
        return {"table": self.table.state(), "folded": self.folding.done}

    def restore(self, state: Mapping[str, Any], /) -> None:
        """Become what `state` gave."""
        fresh = LayerGates(self.made_by)
        fresh.table.restore(state["table"])
        fresh.folding.done = bool(state["folded"])
        self.__dict__.update(fresh.__dict__)

    def _places(self, context: Context) -> list[GatePlace]:
        catalogue = self.made_by.places(context.structure, self.made_by.asked)
        boundaries, found = Boundaries(context.structure.topology), []
        self.refused = {}
        for name, candidate in catalogue.candidates.items():
            place = branch_place(boundaries, name, candidate)
            if isinstance(place, GatePlace):
                found.append(place)
            elif self.made_by.settings.strict:
                raise MethodError(f"{name} cannot have a gate: {place}; leave it out of axes=.")
            else:
                self.refused[name] = place
        return found


__all__ = ["GatedLayers", "LayerGates"]

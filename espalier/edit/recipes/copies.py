"""A copy of a layer or cell that the network has."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from espalier.edit.promise import Promise
from espalier.edit.recipes.base import Lookup, Recipe, recipe
from espalier.errors import PlanError
from espalier.graph.bounds import activation
from espalier.graph.regions import Boundaries, Refusal
from espalier.graph.silence import settled, silenced
from espalier.graph.topology import Topology


@recipe
@dataclass(frozen=True)
class CopyOf(Recipe):
    """A copy; with the tensors in `zero` set to zero it may begin as one that changes nothing."""

    kind: ClassVar[str] = "copy"
    source: str
    """Path of what is copied."""
    zero: tuple[str, ...] = ()
    """Parameters of the copy, by their names in it, that begin at zero."""

    def build(self, module: Lookup, at: str) -> nn.Module:
        """A deep copy, without gradients, of which no module writes its result into what it gets: that may be needed.

        Raises PlanError if a tensor to set to zero is none of its parameters.
        """
        copied = copy.deepcopy(module(self.source))
        for inner in copied.modules():
            if inner.__dict__.get("inplace") is True:
                inner.__dict__["inplace"] = False
        parameters = dict(copied.named_parameters())
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.grad = None
            for name in self.zero:
                if name not in parameters:
                    raise PlanError(f"{self.source} has no parameter {name!r} that could begin at zero.")
                parameters[name].zero_()
        return copied

    def promise(self, topology: Topology, module: Lookup, at: str, *, before: bool) -> Promise:
        """Exact if what begins at zero leaves of the copy only its input, there as where the original is."""
        boundaries = Boundaries(topology)
        silence = silenced(boundaries, self.source)
        if isinstance(silence, Refusal):
            return Promise("changing", f"a second {self.source} computes something of its own: it {silence.reason}")
        missing = {name.removeprefix(f"{self.source}.") for name in silence.tensors}.difference(self.zero)
        if missing:
            return Promise("changing", f"a second {self.source} computes something of its own: {min(missing)} is not 0")
        here = settled(boundaries, at, "entry" if before else "exit")
        for name in settled(boundaries, self.source, "entry"):
            if name not in here and name in self._activations(topology):
                return Promise("changing", f"what the copy gets may be changed by its {name}, unlike before")
        return Promise("exact", f"the copy of {self.source} hands on what it gets")

    def origins(self) -> Mapping[str, str]:
        """The copy itself."""
        return {"": self.source}

    def _activations(self, topology: Topology) -> set[str | None]:
        """Those that run in the original."""
        return {
            activation(call)
            for prediction in topology.predictions
            for visit in prediction.visits
            if visit.module == self.source
            for call in prediction.calls[visit.first : visit.last]
        }


__all__ = ["CopyOf"]

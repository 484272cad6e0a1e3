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
        for name in silence.settled:
            if name not in here:
                return Promise("changing", f"what the copy gets may be changed by its {name}, unlike before")
        return Promise("exact", f"the copy of {self.source} hands on what it gets")

    def silent(self) -> tuple[str, ...]:
        """What begins at zero."""
        return self.zero

    def origins(self) -> Mapping[str, str]:
        """The copy itself."""
        return {"": self.source}


__all__ = ["CopyOf"]

"""A new residual connection around a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from espalier.edit.layers import at as found_at
from espalier.edit.promise import Promise
from espalier.edit.recipes.base import Lookup, Recipe, recipe
from espalier.edit.recipes.placing import setting
from espalier.errors import PlanError
from espalier.graph.regions import Refusal, region_of
from espalier.graph.topology import Topology
from espalier.graph.visits import Place


class Skipped(nn.Module):
    """What a module makes of x, plus `gate` times x: a number that is learnt and begins at zero.

    In ReZero (Bachlechner et al. 2020, arXiv:2003.04887) it is the branch that is multiplied so.
    """

    def __init__(self, inner: nn.Module, entry: Place, gate: Tensor) -> None:
        super().__init__()
        self.inner, self.entry = inner, entry
        self.gate = nn.Parameter(gate)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's result and the connection past it."""
        passed = found_at({**dict(enumerate(args)), **kwargs}, self.entry)
        out: Tensor = self.inner(*args, **kwargs) + self.gate * passed
        return out


@recipe
@dataclass(frozen=True)
class Skip(Recipe):
    """A connection past the module that it replaces, which goes on inside of it with its parameters and their state."""

    kind: ClassVar[str] = "skip"
    entry: tuple[int | str, ...] = (0,)
    """Where among the arguments of the module is what goes past it."""

    def build(self, module: Lookup, at: str) -> nn.Module:
        """The module with the connection."""
        inner = module(at)
        place = setting(module, at)
        gate = torch.zeros((), device=place.device, dtype=place.dtype)
        new = Skipped(inner, self.entry, gate)
        new.training = inner.training
        return new

    def promise(self, topology: Topology, module: Lookup, at: str, *, before: bool) -> Promise:
        """Exact. Raises PlanError where nothing can go past the module, or does already."""
        region = region_of(topology, at)
        if isinstance(region, Refusal):
            raise PlanError(f"{at}: no connection can go past it: it {region.reason}.")
        if region.entry != self.entry or region.result != "tensor":
            why = (
                region.no_removal or f"gives back a {region.result}, and takes what could go past it at {region.entry}"
            )
            raise PlanError(f"{at}: no connection can go past it from argument {self.entry}: it {why}.")
        return Promise("exact", "the new connection adds zero times its entry at first")


__all__ = ["Skip", "Skipped"]

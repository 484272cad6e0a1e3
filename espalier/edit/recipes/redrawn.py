"""A layer or cell like one that the network has, with random weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from espalier.edit.promise import Promise
from espalier.edit.recipes.base import Lookup, Recipe, recipe
from espalier.edit.recipes.placing import drawing, setting
from espalier.graph.topology import Topology

_INITIALISED = (
    nn.Linear, nn.Bilinear, _ConvNd, nn.Embedding, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RNNBase,
)  # fmt: skip


@recipe
@dataclass(frozen=True)
class Redrawn(Recipe):
    """A copy whose weights are initialised anew.

    Layers and norms of torch begin as they do in torch. Matrices and filters that belong to other modules are drawn
    from a normal distribution as wide as that of the source's; vectors, such as scales of layers, stay as they are.
    """

    kind: ClassVar[str] = "redrawn"
    source: str
    """Path of what it is like."""
    seed: int = 0

    def build(self, module: Lookup, at: str) -> nn.Module:
        """The new module, without gradients."""
        new = copy.deepcopy(module(self.source)).to("cpu")
        with drawing(self.seed), torch.no_grad():
            for one in new.modules():
                redraw(one)
            for parameter in new.parameters():
                parameter.grad = None
        return new.to(setting(module, at).device)

    def promise(self, topology: Topology, module: Lookup, at: str, *, before: bool) -> Promise:
        """Always changing."""
        return Promise("changing", f"a new {self.source} begins with random weights")

    def origins(self) -> Mapping[str, str]:
        """What it is like: its shapes, attributes and masks are the source's."""
        return {"": self.source}


@torch.no_grad()
def redraw(module: nn.Module) -> None:
    """Initialise the parameters of a module, not those of modules in it, anew, as `Redrawn` says."""
    if isinstance(module, _INITIALISED):
        module.reset_parameters()
        return
    for parameter in module.parameters(recurse=False):
        if parameter.dim() > 1:
            parameter.normal_(0.0, float(parameter.float().std()))


__all__ = ["Redrawn", "redraw"]

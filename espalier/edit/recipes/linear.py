"""One linear map in place of a layer or cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from espalier.edit.promise import Promise
from espalier.edit.recipes.around import Around
from espalier.edit.recipes.base import Lookup, Recipe, recipe
from espalier.edit.recipes.edges import edge
from espalier.edit.recipes.placing import setting
from espalier.edit.residual import layer
from espalier.errors import PlanError
from espalier.graph.dims import size_of
from espalier.graph.regions import Refusal, region_of
from espalier.graph.topology import Topology


@recipe
@dataclass(frozen=True)
class LinearMap(Recipe):
    """A linear layer, or a convolution of kernel 1, in place of a module that gives as many places as it gets.

    It hands on what it gets at first, as far as there are features for it: `espalier.parts.depth.linear_fit` finds
    better values.
    """

    kind: ClassVar[str] = "linear"
    into: int
    out: int
    dimensions: int = 0
    """Those after the features, 1 to 3; 0 where features are the last dimension."""
    bias: bool = True

    def build(self, module: Lookup, at: str) -> nn.Module:
        """The new layer. Raises PlanError if there is no such layer."""
        with torch.device("meta"):
            new = layer(self.into, self.out, (1,) * self.dimensions or None, bias=self.bias)
        new.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.zero_()
            new.get_parameter("weight").view(self.out, self.into).fill_diagonal_(1.0)
        return setting(module, at).put(new)

    def promise(self, topology: Topology, module: Lookup, at: str, *, before: bool) -> Promise:
        """Changing. Raises PlanError unless the module gets and gives one tensor, of these features."""
        if (self.into, self.out, self.dimensions) not in _shapes(topology, at):
            wanted = f"{self.into} features and gives {self.out}, with {self.dimensions} dimensions after them"
            raise PlanError(f"{at} does not become a linear layer that gets {wanted}: its own sizes are others.")
        return Promise("changing", f"a linear map is in place of {at}")


def linear_like(topology: Topology, at: str) -> LinearMap:
    """The linear map that fits in place of a module. Raises PlanError if there is none."""
    shapes = _shapes(topology, at)
    first = Around(topology, edge(topology, at, before=False)).features_first
    fitting = [one for one in shapes if (one[2] > 0) is first]
    if not fitting:
        raise PlanError(f"{at} gives features in another dimension than it gets them.")
    return LinearMap(*fitting[0])


def _shapes(topology: Topology, at: str) -> list[tuple[int, int, int]]:
    """(features in, features out, dimensions after them) of the linear maps that fit in place of a module.

    Raises PlanError if there is none.
    """
    region = region_of(topology, at)
    if isinstance(region, Refusal):
        raise PlanError(f"{at or 'the model itself'} cannot be replaced as a whole: it {region.reason}.")
    if not region.lone or region.result != "tensor":
        raise PlanError(f"{at} cannot become a linear layer: it does not get one tensor alone and give one back.")
    found: list[list[tuple[int, int, int]]] = []
    for prediction in topology.predictions:
        for visit in prediction.visits:
            if visit.module == at:
                leaves = visit.entries[0].value, visit.exits[0].value
                entry, exit = (tuple(size_of(one, topology.sizes) for one in prediction.dims[leaf]) for leaf in leaves)
                same_type = prediction.dtypes[leaves[0]] == prediction.dtypes[leaves[1]]
                found.append(
                    _fitting(entry, exit) if same_type and prediction.dtypes[leaves[0]].is_floating_point else []
                )
                if not found[-1]:
                    raise PlanError(
                        f"{at} turns {list(entry)} into {list(exit)}, which no linear map of features does."
                    )
    return [one for one in found[0] if all(one in other for other in found)]


def _fitting(entry: tuple[int, ...], exit: tuple[int, ...]) -> list[tuple[int, int, int]]:
    result = []
    if len(entry) == len(exit) > 1 and entry[:-1] == exit[:-1]:
        result.append((entry[-1], exit[-1], 0))
    if 2 < len(entry) == len(exit) < 6 and entry[0] == exit[0] and entry[2:] == exit[2:]:
        result.append((entry[1], exit[1], len(entry) - 2))
    return result


__all__ = ["LinearMap", "linear_like"]

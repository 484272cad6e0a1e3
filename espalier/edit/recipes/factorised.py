"""A layer as the product of two thinner ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from espalier.edit.low_rank import factors, relative_error
from espalier.edit.promise import Promise
from espalier.edit.recipes.affine import Affine, Window, in_mode, made, read
from espalier.edit.recipes.base import Lookup, Recipe, recipe
from espalier.edit.recipes.wiring import check_own
from espalier.errors import PlanError
from espalier.graph.topology import Topology


@recipe
@dataclass(frozen=True)
class Factorised(Recipe):
    """A linear layer, or a convolution without groups, as one to `rank` features without bias and one from these.

    The second one of a convolution is 1 x 1. The weights are those of the truncated singular value decomposition (see
    `espalier.edit.low_rank`; for convolutions: Zhang et al. 2015, arXiv:1505.06798).
    """

    kind: ClassVar[str] = "factorised"
    rank: int

    def build(self, module: Lookup, at: str) -> nn.Module:
        """The two layers in an `nn.Sequential`; trained if the weight is. Raises PlanError if there are none."""
        whole = _layer(module, at)
        first, second = factors(whole.weight, self.rank)
        trained = whole.weight.requires_grad
        window = whole.window and Window(
            (1,) * len(whole.kernel), (0,) * len(whole.kernel), (1,) * len(whole.kernel), 1, "zeros"
        )
        pair = (
            replace(whole, weight=first.requires_grad_(trained), bias=None),
            Affine(
                second.reshape(*second.shape, *(1 for _ in whole.kernel)).requires_grad_(trained), whole.bias, window
            ),
        )
        like = module(at)
        return in_mode(nn.Sequential(*(made(one, like) for one in pair)), like)

    def promise(self, topology: Topology, module: Lookup, at: str, *, before: bool) -> Promise:
        """Exact at full rank.

        Raises PlanError if the layer cannot be taken apart: its class, its rank, or others that use its weight.
        """
        weight = _layer(module, at).weight
        check_own(topology, module(at), at)
        full = min(weight.shape[0], weight[0].numel())
        if type(self.rank) is not int or not 1 <= self.rank <= full:
            raise PlanError(f"{at}: expected a rank from 1 to {full}, found {self.rank}.")
        if self.rank == full:
            return Promise("exact", f"rank {full} is the full one of {at}")
        error = relative_error(weight, self.rank)
        return Promise("changing", f"rank {self.rank} of {full} leaves a relative error of {error:.2g} in {at}")


def _layer(module: Lookup, at: str) -> Affine:
    layer = read(module(at), at)
    if layer.window is not None and layer.window.groups != 1:
        raise PlanError(f"{at} is a convolution of {layer.window.groups} groups, which is not one matrix.")
    return layer


__all__ = ["Factorised"]

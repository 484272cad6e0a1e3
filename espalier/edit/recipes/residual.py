"""A residual branch that begins at zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from espalier.edit.promise import Promise
from espalier.edit.recipes.base import Lookup, Recipe, recipe
from espalier.edit.recipes.edges import check_features, edge
from espalier.edit.recipes.placing import drawing, setting
from espalier.edit.residual import Residual
from espalier.errors import PlanError
from espalier.graph.topology import Topology


@recipe
@dataclass(frozen=True)
class ResidualLayer(Recipe):
    """x + out(act(mid(norm(x)))) with `out` zero: see `espalier.edit.residual.Residual`, whose arguments these are."""

    kind: ClassVar[str] = "residual"
    features: int
    hidden: int
    kernel: tuple[int, ...] | None = None
    norm: str | None = None
    activation: str = "relu"
    groups: int = 1
    eps: float = 1e-5
    pointwise_out: bool = True
    seed: int = 0
    """Seeds the weights of `mid`."""

    def build(self, module: Lookup, at: str) -> nn.Module:
        """The new layer. Raises PlanError if none can be made of these fields."""
        with drawing(self.seed):
            new = Residual(
                self.features,
                self.hidden,
                kernel=self.kernel,
                norm=self.norm,
                groups=self.groups,
                eps=self.eps,
                activation=self.activation,
                pointwise_out=self.pointwise_out,
            )
        return setting(module, at).put(new)

    def promise(self, topology: Topology, module: Lookup, at: str, *, before: bool) -> Promise:
        """Always exact. Raises PlanError if the layer does not fit there."""
        found = edge(topology, at, before=before)
        check_features(found, self.features, self.kernel)
        if self.norm == "batch" and self.kernel is None and len(found.shape) != 2:
            raise PlanError(
                f"{found}: a batch norm beside linear layers takes values of shape [N, {self.features}], found "
                f"{list(found.shape)}; take a layer norm."
            )
        return Promise("exact", "the new branch adds zero at first")

    def silent(self) -> tuple[str, ...]:
        """The layer that the branch ends with."""
        return "out.weight", "out.bias"


__all__ = ["ResidualLayer"]

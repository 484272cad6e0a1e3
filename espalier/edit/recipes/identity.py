"""A layer that begins as the identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from espalier.edit.activations import IDEMPOTENT, activation
from espalier.edit.promise import Promise
from espalier.edit.recipes.base import Lookup, Recipe, recipe
from espalier.edit.recipes.edges import check_features, edge
from espalier.edit.recipes.placing import setting
from espalier.edit.residual import layer
from espalier.graph.topology import Topology


@recipe
@dataclass(frozen=True)
class Identity(Recipe):
    """A linear layer whose weight is the identity matrix, or a convolution of Dirac kernels, and an activation.

    Net2Net's deeper student (Chen et al. 2016, arXiv:1511.05641). With an activation that leaves its own results as
    they are it is exact after such an activation. There is no norm: in train mode a batch norm takes the statistics
    of the batch, and no scale makes it an identity for every batch.
    """

    kind: ClassVar[str] = "identity"
    features: int
    kernel: tuple[int, ...] | None = None
    """Odd kernel sizes of a convolution in one, two or three dimensions; None for a linear layer, features last."""
    activation: str | None = None
    """One of `espalier.edit.activations.ACTIVATIONS`."""
    bias: bool = True
    """Zero at first."""

    def build(self, module: Lookup, at: str) -> nn.Module:
        """The layer alone, or with its activation in an `nn.Sequential`. Raises PlanError if there is no such layer."""
        with torch.device("meta"):
            new = layer(self.features, self.features, self.kernel, bias=self.bias)
        new.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.zero_()
            kernels = new.get_parameter("weight").view(self.features, self.features, -1)
            kernels[:, :, kernels.shape[2] // 2] = torch.eye(self.features, dtype=kernels.dtype, device="cpu")
        if self.activation is not None:
            new = nn.Sequential(new, activation(self.activation))
        return setting(module, at).put(new)

    def promise(self, topology: Topology, module: Lookup, at: str, *, before: bool) -> Promise:
        """Exact without activation, and with one under which what comes there is a fixed point.

        Raises PlanError if the layer does not fit there.
        """
        found = edge(topology, at, before=before)
        check_features(found, self.features, self.kernel)
        if self.activation is None:
            return Promise("exact", "the new layer is an identity")
        if self.activation not in IDEMPOTENT:
            return Promise("changing", f"{self.activation} changes its own results")
        if self.activation in found.settled:
            return Promise(
                "exact", f"the new layer is an identity, and what comes {found} a fixed point of its activation"
            )
        return Promise("changing", f"what comes {found} is not known to be a fixed point of {self.activation}")


__all__ = ["Identity"]

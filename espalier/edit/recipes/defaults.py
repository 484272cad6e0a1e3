"""Which layer to insert where the user names none: one like those around it."""

from __future__ import annotations

from espalier.edit.activations import IDEMPOTENT
from espalier.edit.recipes.around import Around
from espalier.edit.recipes.base import Recipe
from espalier.edit.recipes.edges import edge
from espalier.edit.recipes.identity import Identity
from espalier.edit.recipes.residual import ResidualLayer
from espalier.graph.topology import Topology


def default_layer(topology: Topology, at: str, *, before: bool = False) -> Recipe:
    """A layer that fits after (`before`: before) a module and changes nothing at first.

    Where an activation would leave what comes there as it is, as a ReLU does after a ReLU, and no norm is near, it is
    an identity with that activation. Elsewhere it is a residual branch with the norm and the activation of its
    neighbours, as wide inside as the nearest branch that comes back to its own width and with its kernel; failing such
    a branch, as wide as its input and with the kernel of the nearest convolution. Where features are the last dimension
    it has linear layers.

    Raises:
        PlanError: no dimension of what comes there is known to be its features.
    """
    found = edge(topology, at, before=before)
    around = Around(topology, found)
    branch = around.branch()
    norm, groups, eps = around.norm(branch.kernel)
    settled = [name for name in found.settled if name in IDEMPOTENT]
    if settled and norm is None:
        return Identity(around.features, around.kernel(), settled[0])
    return ResidualLayer(around.features, branch.hidden, branch.kernel, norm, around.activation(), groups, eps)


__all__ = ["default_layer"]

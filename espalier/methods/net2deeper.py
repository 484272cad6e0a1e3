"""Net2DeeperNet: new layers that begin as the identity."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common_depth import LayerOptions, of_layers
from espalier.parts.depth.order import InOrder, Order
from espalier.parts.depth.places import New, NewLayers

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def net2deeper(new: New = "suited", order: Order = "spread", **options: Unpack[LayerOptions]) -> Method:
    """Insert layers that change nothing at first; the network is deeper where it was identity.

    Args:
        new: ``identity``, identity matrices and Dirac kernels, only where what comes is a result of an activation that
            leaves its own results as they are (relu, not gelu); ``residual``, branches whose last layer is zero, after
            blocks; ``suited``, both.
        order: where first: ``spread`` evenly over the depth, ``middle`` or ``last``.
        options: those of `espalier.methods.common_depth.LayerOptions`, which says what raises MethodError.
    """
    return of_layers(
        "net2deeper",
        "grow",
        InOrder(order),
        NewLayers(new),
        paper="Chen et al. 2016, Net2Net: Accelerating learning via knowledge transfer (arXiv:1511.05641)",
        description="inserts layers that begin as the identity",
        **options,
    )

"""Taylor's criterion for whole layers: remove those without which the loss would change least, to the first order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common_depth import LayerOptions, of_layers
from espalier.parts.depth.places import Removable
from espalier.parts.depth.scores import GateTaylor

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def layer_taylor(batches: int = 4, kept: int = 1, **options: Unpack[LayerOptions]) -> Method:
    """Remove the layers with the smallest gradient of a gate on what they add; branches may be among them.

    Args:
        batches: to look at, at most.
        kept: how many blocks of each stage stay at least.
        options: those of `espalier.methods.common_depth.LayerOptions`, which says what raises MethodError.
    """
    return of_layers(
        "layer-taylor",
        "prune",
        GateTaylor(batches),
        Removable(kept),
        paper="Molchanov et al. 2017, Pruning convolutional neural networks for resource efficient inference "
        "(arXiv:1611.06440), with a layer as the unit",
        description="removes the layers with the smallest gradient of a gate on what they add",
        **options,
    )

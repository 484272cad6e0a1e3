"""Layer pruning by the scales of batch norms, and of other norms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common_depth import LayerOptions, of_layers
from espalier.parts.depth.norms import NormScales, RemovableNormed

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def layer_scales(kept: int = 1, **options: Unpack[LayerOptions]) -> Method:
    """Remove the layers whose norms have the smallest scales; it needs no batch.

    Layers without a norm stay; where there are no others, or one is asked for, a session refuses to begin.

    Args:
        kept: how many blocks of each stage stay at least.
        options: those of `espalier.methods.common_depth.LayerOptions`, which says what raises MethodError.
    """
    return of_layers(
        "layer-scales",
        "prune",
        NormScales(),
        RemovableNormed(kept),
        paper="Elkerdawy et al. 2020, To filter prune, or to layer prune, that is the question (arXiv:2007.05667), "
        "with the scales of norms",
        description="removes the layers whose norms have the smallest scales",
        **options,
    )

"""SensLI: insert the layer to whose parameters the loss is most sensitive."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common_depth import LayerOptions, of_layers
from espalier.parts.depth.places import Virtual, virtual_layers
from espalier.parts.depth.trial import Sensitivity

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def sensli(new: Virtual = "residual", **options: Unpack[LayerOptions]) -> Method:
    """Insert the layers whose parameters get the largest gradient, found in one pass with all of them in place.

    Args:
        new: what layers may come: ``residual`` branches whose last layer is zero, ``identity`` layers, ``suited``, both
            of these, or ``copy``, copies of blocks that begin as nothing.
        options: those of `espalier.methods.common_depth.LayerOptions`, which says what raises MethodError.
    """
    return of_layers(
        "sensli",
        "grow",
        Sensitivity(),
        virtual_layers(new),
        paper="Kreis et al. 2023, SensLI: Sensitivity-based layer insertion for neural networks (arXiv:2311.15995)",
        description="inserts the layers whose parameters get the largest gradient",
        **options,
    )

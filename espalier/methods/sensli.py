"""SensLI: insert the layer to whose parameters the loss is most sensitive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from espalier.errors import MethodError
from espalier.method import Method, register
from espalier.methods.common_depth import LayerOptions, of_layers
from espalier.parts.depth_places import Copies, NewLayers, Places
from espalier.parts.depth_trial import Sensitivity

if TYPE_CHECKING:
    from typing_extensions import Unpack

Virtual = Literal["residual", "identity", "suited", "copy"]


@register
def sensli(new: Virtual = "residual", **options: Unpack[LayerOptions]) -> Method:
    """Insert the layers whose parameters get the largest gradient, found in one pass with all of them in place.

    Args:
        new: what layers may come: ``residual`` branches whose last layer is zero, ``identity`` layers, ``suited``, both
            of these, or ``copy``, copies of blocks that begin as nothing.
        options: those of `espalier.methods.common_depth.LayerOptions`, which says what raises MethodError.
    """
    if new not in ("residual", "identity", "suited", "copy"):
        raise MethodError(f"new: expected 'residual', 'identity', 'suited' or 'copy', found {new!r}.")
    places: Places = Copies("zero") if new == "copy" else NewLayers(new)
    return of_layers(
        "sensli",
        "grow",
        Sensitivity(),
        places,
        paper="Kreis et al. 2023, SensLI: Sensitivity-based layer insertion for neural networks (arXiv:2311.15995)",
        description="inserts the layers whose parameters get the largest gradient",
        **options,
    )

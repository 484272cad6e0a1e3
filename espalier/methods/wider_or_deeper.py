"""One budget for widths and depth: at every event the wider axis or the new layer that gains most for what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common_depth import LayerOptions, of_layers
from espalier.parts.budget import Parameters
from espalier.parts.depth.levels import PredictedGain, WiderOrDeeper
from espalier.parts.depth.places import New, NewLayers
from espalier.parts.ghosts.steepest import AsFound

if TYPE_CHECKING:
    from typing_extensions import Unpack

_TWICE = Parameters(2.0, of="initial")


@register
def wider_or_deeper(
    new: New = "residual", fraction: float = 0.25, widths: Sequence[str] | None = None, **options: Unpack[LayerOptions]
) -> Method:
    """Make one axis wider or insert one layer, whichever makes the loss fall fastest for its cost, to the first order.

    Args:
        new: what layers may come, as in `net2deeper`.
        fraction: how many units an axis would get, as a fraction of its size.
        widths: names or patterns of axes that may become wider; None for all that can without a change of the outputs.
        options: those of `espalier.methods.common_depth.LayerOptions`, which says what raises MethodError; `axes` are
            modules. By default one choice per event, by gain per parameter, up to ``Parameters(2.0, of="initial")``.
    """
    given: LayerOptions = {"per_event": 1, "per_cost": True, "budget": _TWICE, **options}
    method = of_layers(
        "wider-or-deeper",
        "grow",
        PredictedGain(),
        WiderOrDeeper(NewLayers(new), fraction, None if widths is None else tuple(widths)),
        paper="Evci et al. 2022, GradMax (arXiv:2201.05125) for units; Kreis et al. 2023, SensLI (arXiv:2311.15995) "
        "for layers",
        description="makes an axis wider or inserts a layer, whichever gains more for its cost",
        **given,
    )
    return replace(method, init=AsFound())

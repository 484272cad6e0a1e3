"""Random layers go: the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common_depth import LayerOptions, of_layers
from espalier.parts.depth.places import Removable
from espalier.parts.score import Chance

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def layers_random(kept: int = 1, **options: Unpack[LayerOptions]) -> Method:
    """Remove layers or cells that are drawn anew at every event; at least `kept` of each stage stay.

    Raises MethodError for an option that is not what `espalier.methods.common_depth.LayerOptions` says.
    """
    return of_layers(
        "layers-random", "prune", Chance(), Removable(kept), paper="",
        description="removes random layers or cells, as a baseline", **options,
    )  # fmt: skip

"""Movement pruning: mask the weights that training moves towards zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common_weights import WeightPruning, pruning_weights
from espalier.parts.weights.movement import Moved, Movement

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def movement(**options: Unpack[WeightPruning]) -> Method:
    """Mask the weights with the smallest sum of -w dL/dw over the steps so far, all parameters compared.

    Gradients have to be there at `session.step`: call ``optimizer.zero_grad()`` after it or before ``backward()``.

    Raises MethodError for an option that is not what `espalier.methods.common_weights.WeightPruning` says.
    """
    chosen: WeightPruning = {"density": "global", **options}
    return pruning_weights(
        "movement",
        Moved(),
        memory=Movement,
        paper="Sanh et al. 2020, Movement pruning (arXiv:2005.07683)",
        description="masks the weights that training moves towards zero",
        **chosen,
    )

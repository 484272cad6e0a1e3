"""Magnitude pruning of single weights: mask the smallest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common_weights import WeightPruning, pruning_weights
from espalier.parts.weights.saliency import Size

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def weights_magnitude(**options: Unpack[WeightPruning]) -> Method:
    """Mask the weights of smallest absolute value, by the cubic schedule, at one density for all parameters.

    Raises MethodError for an option that is not what `espalier.methods.common_weights.WeightPruning` says.
    """
    return pruning_weights(
        "weights-magnitude",
        Size(),
        paper="Zhu & Gupta 2017, To prune, or not to prune (arXiv:1710.01878)",
        description="masks the smallest single weights",
        **options,
    )

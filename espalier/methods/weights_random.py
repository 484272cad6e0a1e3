"""Random masks: the baseline, and what dynamic sparse training starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common_weights import WeightPruning, once_at_the_start, pruning_weights
from espalier.parts.weights.saliency import AnyWeight

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def weights_random(**options: Unpack[WeightPruning]) -> Method:
    """Mask weights at random, once, after the first step, at ERK densities.

    Raises MethodError for an option that is not what `espalier.methods.common_weights.WeightPruning` says.
    """
    chosen: WeightPruning = {"density": "erk", **once_at_the_start(options)}
    return pruning_weights(
        "weights-random",
        AnyWeight(),
        paper="Mocanu et al. 2018, Scalable training of artificial neural networks (arXiv:1707.04780)",
        description="masks single weights at random",
        **chosen,
    )

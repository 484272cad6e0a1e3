"""SNIP: mask once, before training, what the loss depends on least."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common_weights import WeightPruning, once_at_the_start, pruning_weights
from espalier.parts.weights.saliency import Slope

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def snip(batches: int = 1, **options: Unpack[WeightPruning]) -> Method:
    """Mask the weights with the smallest |g w| over so many `batches`, once, after the first step.

    Raises MethodError for an option that is not what `espalier.methods.common_weights.WeightPruning` says.
    """
    chosen: WeightPruning = {"density": "global", **once_at_the_start(options)}
    return pruning_weights(
        "snip",
        Slope("gradient_times_weight", batches),
        paper="Lee, Ajanthan & Torr 2019, SNIP: single-shot network pruning (arXiv:1810.02340)",
        description="masks the weights on which the loss depends least, once",
        **chosen,
    )

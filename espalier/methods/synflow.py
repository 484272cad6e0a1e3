"""SynFlow: mask once, without data, and keep every layer connected."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common_weights import WeightPruning, once_at_the_start, pruning_weights
from espalier.parts.weights.synflow import SynapticFlow

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def synflow(rounds: int = 100, **options: Unpack[WeightPruning]) -> Method:
    """Mask the weights through which least flows from inputs of ones, in so many `rounds`, once, after the first step.

    Raises MethodError for an option that is not what `espalier.methods.common_weights.WeightPruning` says.
    """
    chosen: WeightPruning = {"density": "global", **once_at_the_start(options)}
    return pruning_weights(
        "synflow",
        SynapticFlow(rounds),
        paper="Tanaka et al. 2020, Pruning neural networks without any data (arXiv:2006.05467)",
        description="masks the weights through which least flows, without data, once",
        **chosen,
    )

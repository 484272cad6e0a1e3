"""LAMP: single weights of all parameters compete by the share of their parameter that they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common_weights import WeightPruning, pruning_weights
from espalier.parts.weights.saliency import Size

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def lamp(**options: Unpack[WeightPruning]) -> Method:
    """Mask the weights of the smallest w^2 / sum of v^2 over all v as large or larger, all parameters compared.

    Raises MethodError for an option that is not what `espalier.methods.common_weights.WeightPruning` says.
    """
    chosen: WeightPruning = {"density": "global", **options}
    return pruning_weights(
        "lamp",
        Size(share=True),
        paper="Lee et al. 2021, Layer-adaptive sparsity for the magnitude-based pruning (arXiv:2010.07931)",
        description="masks the weights with the smallest share of their parameter",
        **chosen,
    )

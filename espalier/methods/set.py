"""SET: let random weights live in place of those that were pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common_weights import WeightScheduling, growing_weights
from espalier.parts.weights.saliency import AnyWeight

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def sparse_evolution(**options: Unpack[WeightScheduling]) -> Method:
    """Let random weights live, up to the budget; they start at zero.

    With a pruning method beside it that drops as many (`espalier.train.settings.sparse_training`) this is sparse
    evolutionary training.

    Raises MethodError for an option that is not what `espalier.methods.common_weights.WeightScheduling` says.
    """
    return growing_weights(
        "set",
        AnyWeight(),
        paper="Mocanu et al. 2018, Scalable training of artificial neural networks (arXiv:1707.04780)",
        description="lets random weights live, up to a sparsity",
        **options,
    )

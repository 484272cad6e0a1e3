"""RigL: let those weights live whose gradient is largest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common_weights import WeightScheduling, growing_weights
from espalier.parts.clock import Steps
from espalier.parts.weights.saliency import Slope

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def rigl(batches: int = 1, **options: Unpack[WeightScheduling]) -> Method:
    """Let the weights with the largest dense gradient live, up to the budget, every 100 steps; they start at zero.

    The gradient over so many `batches` is computed at events only. With a pruning method beside it that drops as many
    (`espalier.train.settings.sparse_training`) this is RigL. In the authors' code such a step replaces that of the
    optimizer; here it follows one.

    Raises MethodError for an option that is not what `espalier.methods.common_weights.WeightScheduling` says.
    """
    chosen: WeightScheduling = {"every": Steps(100), **options}
    return growing_weights(
        "rigl",
        Slope("gradient", batches),
        paper="Evci et al. 2020, Rigging the lottery: making all tickets winners (arXiv:1911.11134)",
        description="lets the weights with the largest gradients live, up to a sparsity",
        **chosen,
    )

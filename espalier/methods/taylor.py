"""Taylor pruning: remove the units without which the loss would change least, to the first order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common import Pruning, pruning
from espalier.parts.units.taylor import Order, Taylor

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def taylor(order: Order = "squared", group: bool = True, batches: int = 4, **options: Unpack[Pruning]) -> Method:
    """Remove the units with the smallest |<g, w>|, or its square, over the weights that read them.

    `order` is ``squared`` (Molchanov et al. 2019) or ``absolute`` (Molchanov et al. 2017, arXiv:1611.06440); without
    `group`, it is taken of every weight by itself before the sum. Scores are changes of the loss, so axes may compete
    with ``scope="global"``. The papers sum over the batches of a few epochs, 10 steps and more between removals; four
    batches are our compromise, at the cost of four training steps per event.

    Raises MethodError for an option that is not what `espalier.methods.common.Pruning` says.
    """
    return pruning(
        "taylor",
        Taylor(order, group, batches),
        paper="Molchanov et al. 2019, Importance estimation for neural network pruning (arXiv:1906.10771)",
        description="removes the units without which the loss would change least, to the first order",
        **options,
    )

"""GradMax: new units begin where their gradient is largest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common import Growing, growing
from espalier.parts.ghosts.steepest import AsFound, Steepest, ZeroSide

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def gradmax(side: ZeroSide = "auto", pairs: bool | None = None, rounds: int = 2, **options: Unpack[Growing]) -> Method:
    """Add units in the orthonormal directions in which the gradient by their weights is largest, on the last batch.

    Args:
        side: which weights of a unit are zero, so that the outputs stay. ``in`` is the paper's: the gradient is then
            linear in the outgoing weights, and its best directions are singular vectors. It is used only where f(0) = 0
            and f'(0) is not (in PyTorch relu'(0) = 0), and never with a norm on the units. ``out`` is safe everywhere,
            and better in the paper's own appendix. ``auto`` (default): ``in`` where that works, else ``out``.
        pairs: whether units come in pairs with equal incoming and opposite outgoing weights instead, which cancel
            whatever lies between and learn on both sides at once. None (default): on axes with a norm on their units.
        rounds: power iterations of two passes each (default 2, which with 8 spare directions reaches 99% of the largest
            gradient norm).

    Outgoing weights are half as long as old ones (the paper's ``mean_norm``), a tenth in pairs; incoming ones are as
    long, and behind a norm respond as strongly. With ``scope="global"`` axes compete by squared gradient norm per cost.
    The gradient is one batch's, as in the paper.

    Raises MethodError for an option that is not what `espalier.methods.common.Growing` says.
    """
    return growing(
        "gradmax",
        Steepest(side, pairs, rounds),
        init=AsFound(),
        paper="Evci et al. 2022, GradMax: growing neural networks using gradient information (arXiv:2201.05125)",
        description="adds units in the directions of largest gradient, in pairs that cancel where there is a norm",
        **options,
    )

"""TINY: new units that give the loss what the present weights cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common import Growing, growing
from espalier.parts.ghosts.tiny import TinyInit, TinyScore
from espalier.parts.units.select import Global

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def tiny(batches: int = 2, floor: float = 1e-3, update: bool = False, **options: Unpack[Growing]) -> Method:
    """Add the units of largest first-order gain, at the amplitude that lowers the training loss most.

    On so many `batches` (the authors' code takes all data). `floor` is relative to the largest singular value: the
    absolute thresholds of the authors' code drop nearly all units where gradients are small. No axis gets more units
    than the layers that read it have outputs, times the positions of their kernels. `update` also gives the weights
    that read new units their best update, as the authors do; otherwise that is left to training. What few samples do
    not tell of the inputs is smoothed, and new units are made as strongly as old ones are: without either, units that
    fit a batch by huge weights die. Axes compete by gain per cost. Only axes between one linear layer or convolution
    and those that read it take part, whatever activations, norms and pooling lie between: not residual streams, gated
    units or attention.

    Raises MethodError for an option that is not what `espalier.methods.common.Growing` says, or is not positive.
    """
    return growing(
        "tiny",
        TinyScore(batches, floor=floor),
        init=TinyInit(update, batches),
        select=Global(),
        paper="Verbockhaven et al. 2024, Growing tiny networks (arXiv:2405.19816)",
        description="adds the units whose contribution the loss asks for and the present weights cannot give",
        **options,
    )

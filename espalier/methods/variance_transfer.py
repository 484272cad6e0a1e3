"""Variance transfer: new units in pairs that cancel, of the variance that trained weights have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common import Growing, growing
from espalier.parts.ghosts.drawn import Drawn, Rescaled
from espalier.parts.score import Equal

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def variance_transfer(rescale: bool = False, **options: Unpack[Growing]) -> Method:
    """Add units in pairs (V, V) with outgoing weights (Z, -Z), which cancel whatever lies between.

    V and Z are Gaussian, as long as old weights times sqrt(fan-in now / fan-in then), since trained weights tell the
    scale that suits the layer better than the paper's 1 / fan-in does. Where dropout would tell the two of a pair
    apart, outgoing weights are zero instead. The learning rate per stage is a matter of `recovery`..

    Args:
        rescale: also multiply old weights that read grown axes by sqrt(n/n'), and by n/n' where they make the outputs,
            so that sums over more units keep their variance (the paper's table 1; worth 0.4 points on CIFAR there). The
            outputs then change, and the edit says so. Off by default.

    Raises MethodError for an option that is not what `espalier.methods.common.Growing` says.
    """
    drawn = Drawn("pairs", narrower=True)
    return growing(
        "variance-transfer",
        Equal(),
        init=Rescaled(drawn) if rescale else drawn,
        paper="Yuan et al. 2023, Accelerated training via incrementally growing neural networks (arXiv:2306.12700)",
        description="adds pairs of units that cancel, of the variance that trained weights have",
        **options,
    )

"""Magnitude pruning: remove the units with the smallest weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common import Pruning, pruning
from espalier.parts.score import GroupNorm, Norm, Share

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def magnitude(norm: Norm = "l2", **options: Unpack[Pruning]) -> Method:
    """Remove the units of smallest ``l1`` or ``l2`` norm over all coupled weights and norm scales.

    Axes compete (``scope="global"``) by the share of an axis that a unit holds, per cost.

    Raises MethodError for an option that is not what `espalier.methods.common.Pruning` says.
    """
    return pruning(
        "magnitude",
        Share(GroupNorm(norm)),
        paper="Li et al. 2017, Pruning filters for efficient ConvNets (arXiv:1608.08710)",
        description="removes the units with the smallest weights, coupled ones counted together",
        **options,
    )

"""Network slimming: L1 on the scales of norms, and a percentile of them over the whole network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common import Pruning, pruning
from espalier.parts.units.folded import Folded
from espalier.parts.units.penalty import ScalesL1
from espalier.parts.units.select import Global
from espalier.parts.units.unit_scale import UnitScale

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def slimming(strength: float = 1e-4, rate: float | None = None, **options: Unpack[Pruning]) -> Method:
    """Add strength * the sum of |scale| to the loss; remove the units of smallest |scale| over all axes.

    The default strength is the authors' for VGG; theirs for ResNet and DenseNet is 1e-5. Scales are those of norms,
    several for a unit that several norms see (their mean counts); axes without any get a folded one
    (`espalier.parts.units.folded`), which learns at `rate`, by default that of the weights it is folded into. Units go
    in the order of |scale| alone, where the authors' code compares signed ones and so removes the most negative. Give
    a `scope` to remove otherwise. With an adaptive optimizer, whose steps do not grow with the gradient, the strength
    means something else than in the paper, which trains by SGD for 160 epochs.

    Raises MethodError for an option that is not what `espalier.methods.common.Pruning` says.
    """
    return pruning(
        "slimming",
        UnitScale(),
        penalty=ScalesL1(strength),
        memory=Folded(rate=rate),
        select=Global(per_cost=False),
        paper="Liu et al. 2017, Learning efficient convolutional networks through network slimming (arXiv:1708.06519)",
        description="drives scales of norms to zero by an L1 penalty and removes the units with the smallest ones",
        **options,
    )

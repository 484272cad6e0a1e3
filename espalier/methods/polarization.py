"""Polarization: drive some scales to zero and the others away from it, and cut in the valley between."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common import Pruning, pruning
from espalier.parts.units.folded import Folded
from espalier.parts.units.penalty import Polarization
from espalier.parts.units.select import Below
from espalier.parts.units.threshold import Valley
from espalier.parts.units.unit_scale import UnitScale

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def polarization(
    strength: float = 5e-5,
    t: float = 1.4,
    most: float = 1.0,
    by_flops: tuple[float, float] | None = None,
    rate: float | None = None,
    **options: Unpack[Pruning],
) -> Method:
    """Add strength * sum(t |g| - |g - mean g|) over all scales g to the loss, keep them in [0, most], remove the small.

    The mean is one over all scales. Small are those below the valley of the histogram of all units' scales; they go
    first, and the budget decides how many (`espalier.parts.units.select.Below`). The defaults are those of the authors'
    README for ResNet-56 on CIFAR-10; for VGG-16 it has strength=3e-5, t=1.5. `by_flops` weighs axes by what a unit of
    theirs costs, from smallest to largest, as the paper's variant does; it gives no numbers. `search_lambda`
    (`espalier.parts.units.search`) finds the strength for a target as in the paper, by whole trainings.

    Scales are those of norms; axes without any get a folded one (`espalier.parts.units.folded`), which starts at most
    / 2, as the paper's scales do, and learns at `rate`, by default that of the weights it is folded into. The scales
    of norms start where the network has them: set them to 0.5 for the paper's start. A network that was trained
    before, with scales outside of the bounds, is refused at the first loss. The paper trains with SGD, prunes once and
    fine-tunes for as long again: shape="constant" with start= and until= late.

    Raises MethodError for an option that is not what `espalier.methods.common.Pruning` says.
    """
    return pruning(
        "polarization",
        UnitScale(),
        penalty=Polarization(strength, t, by_flops),
        memory=Folded(start=most / 2, most=most, rate=rate),
        select=Below(Valley()),
        paper="Zhuang et al. 2020, Neuron-level structured pruning using polarization regularizer (NeurIPS 2020)",
        description="parts scales into zeros and others by a polarization penalty and cuts in the valley between",
        **options,
    )

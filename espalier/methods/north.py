"""NORTH: new units whose activations are orthogonal to those of the units there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common import Growing, growing
from espalier.parts.ghosts.north import Activations, NorthInit, NorthScore

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def north(activations: Activations = "post", pool: float = 4.0, batches: int = 2, **options: Unpack[Growing]) -> Method:
    """Draw `pool` times as many candidates as are needed, and add those whose activations are most orthogonal.

    ``post`` activations as in NORTH-Select; with ``pre`` the same is asked of what comes before the activation function
    (NORTH-Pre of the paper solves for such weights instead of choosing among random ones). Nothing reads new units at
    first, so that the outputs stay as they are. The paper grows when the effective rank of activations is high: that is
    a trigger here, ``when=EffectiveRank(...)``.

    Raises MethodError for an option that is not what `espalier.methods.common.Growing` says, or is not positive.
    """
    return growing(
        "north",
        NorthScore(activations, pool, batches),
        init=NorthInit(),
        paper="Maile et al. 2022, When, where, and how to add new neurons to ANNs (arXiv:2202.08539)",
        description="adds those of many random units whose activations are most orthogonal to all others",
        **options,
    )

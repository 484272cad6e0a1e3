"""L1 regularisation: push weights, or scales, to zero while the network trains, and remove what became small."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common import Pruning, pruning
from espalier.parts.score import GroupNorm, Share
from espalier.parts.units.penalty import L1, On, RememberWeights

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def l1(strength: float = 1e-5, on: On = "weights", **options: Unpack[Pruning]) -> Method:
    """Add strength * the sum of |w| over all weights of all units to the loss; remove units of smallest L1 norm.

    `on` is ``weights``, ``scales`` (of norms, layer scales) or ``both``; units are judged by all that is coupled, as
    `magnitude` does. The default strength is ours: on a weight of 0.02, as large convolutions have, it pulls as hard as
    the usual weight decay of 5e-4 does. Before a batch norm the size of a filter has no effect on the outputs; there
    the penalty says only which weights of a filter, and which filters among those that are read together, stay.

    Raises MethodError for an option that is not what `espalier.methods.common.Pruning` says.
    """
    return pruning(
        "l1",
        Share(GroupNorm("l1")),
        penalty=L1(strength, on),
        memory=RememberWeights(),
        paper="Han et al. 2015, Learning both weights and connections for efficient neural networks (arXiv:1506.02626)",
        description="drives weights to zero by an L1 penalty and removes the units with the smallest ones",
        **options,
    )

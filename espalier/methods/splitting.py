"""Splitting steepest descent: split the units that gain most by it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common import Growing, growing
from espalier.parts.ghosts.splitting import Split, SplittingGain
from espalier.parts.units.select import Global

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def splitting(step: float = 0.1, passes: int = 6, batches: int = 2, **options: Unpack[Growing]) -> Method:
    """Split units in two: incoming weights theta + d and theta - d, outgoing ones halved.

    d is `step` times the mean norm of an axis' weights, along the lowest eigenvector of the splitting matrix (in the
    authors' code its length is 0.01). The eigenvector comes from so many `passes` over so many `batches`, for all units
    at once, instead of from epochs. All axes compete by the gain per cost. The loss falls by the gain, which is of the
    second order in d.

    Raises MethodError for an option that is not what `espalier.methods.common.Growing` says, or is not positive.
    """
    return growing(
        "splitting",
        SplittingGain(step, passes, batches),
        init=Split(),
        select=Global(),
        paper="Liu, Wu & Wang 2019, Splitting steepest descent for growing neural architectures (arXiv:1910.02366)",
        description="splits the units in two whose halves lower the loss most",
        **options,
    )

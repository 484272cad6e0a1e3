"""Firefly: splits and new units, optimised together a little, of which the best of all axes stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common import Growing, growing
from espalier.parts.ghosts.firefly import FireflyInit, FireflyScore
from espalier.parts.units.select import Global

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def firefly(
    step: float = 0.1, steps: int = 10, points: int = 3, batches: int = 2, **options: Unpack[Growing]
) -> Method:
    """Try splits of all units and some new units, all small; keep those that lower the loss most, per cost.

    The candidates take so many `steps` of descent with norms of at most 1 (the authors' code takes an epoch and never
    clips), on at most so many `batches`; then each is valued by a path integral with so many `points` (3 as in the
    paper; the authors' code has 1). `step` is eps, relative to the weights that there are. The outputs change, by what
    the loss falls. New layers, the third kind of candidate in the paper, are `firefly_deeper`'s.

    Raises MethodError for an option that is not what `espalier.methods.common.Growing` says, or is not positive.
    """
    return growing(
        "firefly",
        FireflyScore(step, steps, points=points, batches=batches),
        init=FireflyInit(),
        select=Global(),
        paper="Wu et al. 2020, Firefly neural architecture descent (arXiv:2102.08574)",
        description="tries splits and new units, optimised together a little, and keeps the best",
        **options,
    )

"""Wanda by units: remove the units that contribute least, weights times what they read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common import Pruning, pruning
from espalier.parts.units.inputs import ReadInput

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def wanda_units(batches: int = 4, **options: Unpack[Pruning]) -> Method:
    """Remove the units with the smallest sum of |w| times the norm of what they read, over the weights that read them.

    No gradients are needed, only activations over so many `batches`; so it serves large models that are not trained
    further. Axes whose units no linear layer or convolution reads cannot be scored.

    Raises MethodError for an option that is not what `espalier.methods.common.Pruning` says.
    """
    return pruning(
        "wanda-units",
        ReadInput(batches),
        paper="Wanda (Sun et al. 2023, arXiv:2306.11695) by units, as An et al. 2024 (arXiv:2312.11983) compare with",
        description="removes the units whose readers' weights, times what they read, are smallest",
        **options,
    )

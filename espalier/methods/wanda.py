"""Wanda: mask the weights that, times what they read, are small in their row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common_weights import WeightPruning, pruning_weights
from espalier.parts.weights.wanda import WeightTimesInput

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def wanda(batches: int = 4, **options: Unpack[WeightPruning]) -> Method:
    """Mask in every row the weights with the smallest |w| times the norm of what they read over so many `batches`.

    Raises MethodError for an option that is not what `espalier.methods.common_weights.WeightPruning` says.
    """
    return pruning_weights(
        "wanda",
        WeightTimesInput(batches),
        per="row",
        paper="Sun et al. 2023, A simple and effective pruning approach for large language models (arXiv:2306.11695)",
        description="masks the weights that are smallest in their row, times what they read",
        **options,
    )

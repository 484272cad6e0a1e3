"""Random pruning and random growing: the baselines that every other method has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.method import Method, register
from espalier.methods.common import Growing, Pruning, growing, pruning
from espalier.parts.score import Chance, Equal

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register
def random_pruning(**options: Unpack[Pruning]) -> Method:
    """Remove units at random.

    Raises MethodError for an option that is not what `espalier.methods.common.Pruning` says.
    """
    return pruning(
        "random",
        Chance(),
        paper="Mittal et al. 2018, Recovering from random pruning (arXiv:1801.10447)",
        description="removes units at random",
        **options,
    )


@register
def random_growing(**options: Unpack[Growing]) -> Method:
    """Add units with Gaussian incoming and zero outgoing weights, so that the outputs stay as they are.

    Raises MethodError for an option that is not what `espalier.methods.common.Growing` says.
    """
    return growing(
        "random",
        Equal(),
        paper="the random baseline of Evci et al. 2022, GradMax (arXiv:2201.05125), made Gaussian and kept exact",
        description="adds units with Gaussian incoming and zero outgoing weights",
        **options,
    )

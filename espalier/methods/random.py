"""Random pruning and random growing: the baselines that every other method has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from espalier.errors import MethodError
from espalier.method import Method, register
from espalier.methods.common import Growing, Pruning, growing, pruning
from espalier.parts.ghosts.drawn import Distribution, Drawn
from espalier.parts.init import Neutral
from espalier.parts.score import Chance, Equal

if TYPE_CHECKING:
    from typing_extensions import Unpack

Side = Literal["out", "in"]


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
def random_growing(side: Side = "out", distribution: Distribution = "gaussian", **options: Unpack[Growing]) -> Method:
    """Add units with random weights on one side and zero on the other, so that the outputs stay as they are.

    Args:
        side: ``out`` (default): outgoing weights are zero and incoming ones are what surgery draws, Gaussian mixtures
            of old units. ``in``: incoming weights are zero, outgoing ones random, half as long as old ones; axes on
            which such units would be seen or could not learn, and those with a norm, are grown as with ``out``.
        distribution: ``gaussian`` (default) or ``orthogonal``, in which case incoming weights are drawn afresh too, and
            are as long as old ones. The uniform positive weights of the paper's code are nearly collinear.

    Raises MethodError for an option that is not what `espalier.methods.common.Growing` says.
    """
    if side not in get_args(Side):
        raise MethodError(f"side: expected 'out' or 'in', found {side!r}.")
    plain = side == "out" and distribution == "gaussian"
    return growing(
        "random",
        Equal(),
        init=Neutral() if plain else Drawn(side, distribution),
        paper="the random baseline of Evci et al. 2022, GradMax (arXiv:2201.05125), made Gaussian and kept exact",
        description="adds units with Gaussian incoming and zero outgoing weights",
        **options,
    )

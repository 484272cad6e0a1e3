"""Random pruning and random growing: the baselines that every other method has to beat."""

from collections.abc import Sequence

from espalier.method import Method, register
from espalier.parts.budget import Budget, FLOPs, Units
from espalier.parts.init import Neutral
from espalier.parts.schedule import Epochs, Schedule, Shape, Steps, When, amount_of
from espalier.parts.score import Chance, Equal
from espalier.parts.select import Scope, Uniform, scope_of


@register
def random_pruning(
    *,
    scope: Scope = "axis",
    budget: Budget | None = None,
    amount: float | None = None,
    shape: Shape = "cubic",
    every: Steps | Epochs = Epochs(1),
    start: When = 0.1,
    until: When = 0.7,
    min_fraction: float = 0.1,
    axes: Sequence[str] | None = None,
) -> Method:
    """Remove units at random. Arguments and errors as `espalier.prune.Magnitude`."""
    return Method(
        "random",
        "prune",
        score=Chance(),
        select=scope_of(scope),
        schedule=Schedule(amount_of(budget, amount, shape, FLOPs(0.5, of="initial")), every, start, until),
        axes=None if axes is None else tuple(axes),
        min_fraction=min_fraction,
        paper="Mittal et al. 2018, Recovering from random pruning (arXiv:1801.10447)",
        description="removes units at random",
    )


@register
def random_growing(
    *,
    width: float | None = None,
    budget: Budget | None = None,
    amount: float | None = None,
    shape: Shape = "linear",
    every: Steps | Epochs = Epochs(1),
    start: When = 0.1,
    until: When = 0.6,
    axes: Sequence[str] | None = None,
) -> Method:
    """Add units with Gaussian incoming and zero outgoing weights, so that the outputs stay as they are.

    Args:
        width: number of units at the last event, as a multiple of those at first; 1.5 if nothing else is given.
        budget: instead of a width: what the network may cost, which is never exceeded.
        amount: instead of either: the fraction of the present units that each event adds.
        shape, every, start, until: as in `espalier.prune.Magnitude`.
        axes: names or patterns of axes; None for all that can grow without changing the outputs.

    Raises:
        MethodError: an argument is not what it should be.
    """
    return Method(
        "random",
        "grow",
        score=Equal(),
        select=Uniform(),
        init=Neutral(),
        schedule=Schedule(growth_of(width, budget, amount, shape), every, start, until),
        axes=None if axes is None else tuple(axes),
        paper="the random baseline of Evci et al. 2022, GradMax (arXiv:2201.05125), made Gaussian",
        description="adds units with Gaussian incoming and zero outgoing weights",
    )

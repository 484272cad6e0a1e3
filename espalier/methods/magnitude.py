"""Magnitude pruning: remove the units with the smallest weights."""

from collections.abc import Sequence

from espalier.method import Method, register
from espalier.parts.budget import Budget, FLOPs
from espalier.parts.schedule import Epochs, Schedule, Shape, Steps, When, amount_of
from espalier.parts.score import GroupNorm, Norm
from espalier.parts.select import Scope, scope_of


@register
def magnitude(
    norm: Norm = "l2",
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
    """Remove the units of smallest norm over all coupled weights and norm scales (Li et al. 2017).

    Args:
        norm: ``l2`` or ``l1``.
        scope: ``axis`` cuts all axes in proportion; ``global`` lets them compete by norm per cost.
        budget: what the network may cost after the last event; FLOPs(0.5, of="initial") if no amount is given either.
        amount: instead of a budget: the fraction of the present units that each event removes.
        shape: how events approach the budget: ``cubic`` (Zhu & Gupta 2017), ``linear`` or ``constant`` (at once).
        every: steps(n) or epochs(n).
        start: when the first event may be: a fraction of all steps, steps(n) or epochs(n).
        until: when the last event may be, likewise.
        min_fraction: part of its first units that every axis keeps.
        axes: names or patterns of axes; None for all that may shrink.

    Raises:
        MethodError: an argument is not what it should be.
    """
    return Method(
        "magnitude",
        "prune",
        score=GroupNorm(norm),
        select=scope_of(scope),
        schedule=Schedule(amount_of(budget, amount, shape, FLOPs(0.5, of="initial")), every, start, until),
        axes=None if axes is None else tuple(axes),
        min_fraction=min_fraction,
        paper="Li et al. 2017, Pruning filters for efficient ConvNets (arXiv:1608.08710)",
        description="removes the units with the smallest weights, coupled ones counted together",
    )

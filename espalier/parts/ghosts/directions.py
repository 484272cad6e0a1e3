"""Directions in which new units would learn fastest, found without ever writing down a matrix.

For units with incoming weights of zero the gradient G(O) is linear in the outgoing weights: the best k orthonormal O
are the leading singular vectors (Evci et al. 2022, GradMax, section 3), and a power iteration of a block of them takes
one pass for G and one for its transpose. For units with outgoing weights of zero the gradient D(A) goes through the
activation and whatever else lies there; |D(A)|^2 over orthonormal A is climbed in the same way, with the generalised
power method (Journee et al. 2010): A becomes the gradient, made orthonormal again. All axes go together.
"""

from __future__ import annotations

from collections.abc import Mapping

from espalier.parts.ghosts.ghosts import Ghosts
from espalier.parts.ghosts.inward import Inward
from espalier.parts.ghosts.metric import metrics
from espalier.parts.ghosts.outward import Outward
from espalier.parts.ghosts.passes import Passes
from espalier.parts.ghosts.rows import Found
from espalier.parts.ghosts.wiring import Wiring, is_normed
from espalier.parts.score import Context

_Search = Inward | Outward


def directions(
    context: Context,
    ghosts: Ghosts,
    wirings: Mapping[str, Wiring],
    rounds: int,
    *,
    straight: bool = False,
    climb: float | None = None,
) -> dict[str, Found]:
    """The best directions for the ghost units of every axis in `wirings`: 2 * rounds + 1 passes for all of them.

    Args:
        context: of the method that asks.
        ghosts: the units.
        wirings: axis -> how its units are to be wired.
        rounds: power iterations.
        straight: whether G is known to be the derivative of D wherever incoming weights are zero. Otherwise this is
            looked at, and where it is not so, as behind max-pooling, its transpose is had by differentiating twice.
        climb: a step of Adam, which then climbs |D(A)| instead, where outgoing weights are zero.
    """
    passes = Passes(context, ghosts, silent=[axis for axis, wiring in wirings.items() if wiring == "in"])
    outward = [axis for axis, wiring in wirings.items() if wiring != "in"]
    white = [axis for axis in outward if climb is None and is_normed(context.structure, axis)]
    metric = metrics(context, ghosts, passes.batch, outward, white)
    searches: dict[str, _Search] = {
        axis: Inward(passes, axis, straight) if axis not in metric else Outward(passes, axis, metric[axis], climb)
        for axis in wirings
    }
    for _ in range(2 * rounds + 1 if searches else 0):
        _half(passes, searches)
    return {axis: one.found() for axis, one in searches.items()}


def _half(passes: Passes, searches: Mapping[str, _Search]) -> None:
    """One pass for all axes, of which each takes what it asked for."""
    incoming = {axis: one.incoming for axis, one in searches.items()}
    outgoing = {axis: one.outgoing for axis, one in searches.items()}
    found = passes.gradients(incoming, outgoing, {axis: one.asked for axis, one in searches.items()})
    for axis, one in searches.items():
        one.take(found[axis])


__all__ = ["directions"]

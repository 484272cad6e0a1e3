"""The initialisation that fails behind a batch norm, kept as a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from espalier.method import Method, register
from espalier.methods.common import Growing, growing
from espalier.parts.ghosts.amplitude import row_norm, unit_rows
from espalier.parts.ghosts.drawn import written_ones
from espalier.parts.ghosts.ghosts import Ghosts, Tensors
from espalier.parts.ghosts.wiring import Wired, rest_of, written
from espalier.parts.goal import Scores, Selection
from espalier.parts.init import Beginning
from espalier.parts.score import Context, Equal

if TYPE_CHECKING:
    from typing_extensions import Unpack

_FRESH = {"scale": 1.0, "mean": 0.0, "variance": 1.0}
"""Role -> what a fresh norm holds."""


@dataclass(frozen=True)
class NaiveZeroIn:
    """Incoming weights next to zero, shifts of zero, positive random outgoing weights, norms as they are when made."""

    incoming: float = 1e-8
    """Length of incoming rows, as a part of that of old ones: what the paper's code reaches by a ReLU of its own, whose
    slope at zero is 1, so that the gradient passes."""
    outgoing: float = 0.5
    """Length of outgoing rows, as a part of the mean length of old ones."""

    def __call__(self, context: Context, chosen: Selection, scores: Scores, /) -> Beginning:
        ghosts = Ghosts(context, {axis: len(units) for axis, units in chosen.items()})
        tensors: Tensors = ghosts.tensors
        for axis, sides in ghosts.sides.items():
            if not sides.incoming.parts or not sides.outgoing.parts:
                continue
            like = sides.outgoing.read(ghosts.tensors)
            drawn = torch.rand(like.shape, generator=context.generator(axis)).to(like)
            rows = unit_rows(drawn) * self.outgoing * row_norm(sides.outgoing, ghosts.tensors)
            like = sides.incoming.read(ghosts.tensors)
            faint = torch.randn(like.shape, generator=context.generator(f"{axis}, faint")).to(like)
            tensors = written(ghosts, context.structure, tensors, axis, Wired("in", faint, rows))
            length = self.incoming * row_norm(sides.incoming, ghosts.tensors)
            tensors = sides.incoming.write(tensors, unit_rows(faint) * length)
            for role, value in _FRESH.items():
                place = rest_of(context.structure, sides.rest, axis, role)
                if place.parts:
                    tensors = place.write(tensors, torch.full_like(place.read(tensors), value))
        return Beginning(values=written_ones(ghosts, tensors))


@register
def naive_zero_in(**options: Unpack[Growing]) -> Method:
    """Add units with incoming weights next to zero, whatever follows them: a baseline that is meant to fail.

    Behind a batch norm such units are seen by nobody at first, but its backward pass multiplies their gradient by
    1/sqrt(eps), 316, and one step later it gives the microscopic units unit variance. With weights of exactly zero a
    ReLU, whose slope at zero is zero in PyTorch, would keep them dead for ever, which is the other way to fail.

    Raises MethodError for an option that is not what `espalier.methods.common.Growing` says.
    """
    return growing(
        "naive-zero-in",
        Equal(),
        init=NaiveZeroIn(),
        paper="the random baseline as in the code of Evci et al. 2022, GradMax (arXiv:2201.05125)",
        description="baseline that fails: incoming weights next to zero, which a batch norm amplifies",
        **options,
    )

"""New units that respond as no others do: chosen from random candidates by what of their activations is new.

Maile, Rachelson, Luga & Wilson 2022, When, where, and how to add new neurons to ANNs (arXiv:2202.08539), NORTH-Select.
With G = A'A of the activations A of old units o and candidates c, what a candidate has that no old unit has is

    R = G_cc - G_co G_oo^-1 G_oc,    value R_jj / G_jj

and after each choice R loses what the chosen candidate explains: QR with pivoting, on the scale of each candidate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from espalier.errors import CaptureError, MethodError
from espalier.measure.activations import grams
from espalier.measure.stats import without_a_trace
from espalier.parts.checks import check_count, check_positive
from espalier.parts.ghosts.ghosts import Ghosts, counts_for
from espalier.parts.ghosts.halves import beginning
from espalier.parts.ghosts.products import Watched
from espalier.parts.goal import Goal, Scores, Selection
from espalier.parts.init import Beginning
from espalier.parts.score import Context
from espalier.parts.units.taylor import batches_of

Activations = Literal["post", "pre"]
_SMALL = 1e-10
"""Part of the largest eigenvalue, or of a candidate's own activation, that is taken for rounding."""


@dataclass(frozen=True)
class NorthScore:
    """The part of each candidate's activations that neither old units nor better candidates have, from 0 to 1.

    Candidates begin as surgery lets new units begin. Their activations are those in eval mode: ``post``, what the
    weights that read the axis are given; ``pre``, what the linear layer or convolution that makes the axis puts out.
    Axes whose activations cannot be told get no candidates.
    """

    activations: Activations = "post"
    pool: float = 4.0
    """Candidates, as a multiple of the units that a uniform growth would add to an axis."""
    batches: int = 2
    """Batches to look at, at most: held-out ones, or the last training batch where there are none."""

    def __post_init__(self) -> None:
        if self.activations not in get_args(Activations):
            raise MethodError(f"activations: expected 'post' or 'pre', found {self.activations!r}.")
        check_positive("pool", self.pool)
        check_count("batches", self.batches)

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        batches = batches_of(context, self.batches)
        counts = {axis: math.ceil(self.pool * count) for axis, count in counts_for(goal).items()}
        ghosts = Ghosts(context, counts)
        found = self._grams(context, ghosts, batches)
        values = {axis: torch.zeros(0) for axis in goal.sizes}
        for axis, gram in found.items():
            values[axis] = novelty(gram, goal.sizes[axis])
        made = {axis: ghosts.sides[axis].incoming for axis in found}
        return Scores(values, {axis: side.read(ghosts.tensors) for axis, side in made.items() if side.parts})

    def _grams(self, context: Context, ghosts: Ghosts, batches: Sequence[Any]) -> dict[str, Tensor]:
        """Axis -> A'A of old units and candidates, for those axes where it can be told.

        Raises MethodError if axes may grow and it can be told for none of them.
        """
        gram = _read if self.activations == "post" else _made
        found, problems = {}, {}
        try:
            found = gram(context, ghosts, tuple(ghosts.counts), batches)
        except CaptureError:
            for axis in ghosts.counts:
                try:
                    found.update(gram(context, ghosts, (axis,), batches))
                except CaptureError as error:
                    problems[axis] = str(error)
        if problems and not found:
            raise MethodError(f"north finds no axis whose activations it can tell ({'; '.join(problems.values())}).")
        return found


@dataclass(frozen=True)
class NorthInit:
    """The incoming weights that the chosen candidates had; nothing reads them yet."""

    def __call__(self, context: Context, chosen: Selection, scores: Scores, /) -> Beginning:
        ghosts = Ghosts(context, {axis: len(units) for axis, units in chosen.items()})
        tensors = dict(ghosts.tensors)
        for axis, units in chosen.items():
            if axis in scores.found:
                written = ghosts.sides[axis].incoming.write(tensors, scores.found[axis][list(units)])
                if ghosts.preview.contract.kind != "exact" or ghosts.seen(axis, written) is None:
                    tensors = written
        return beginning(ghosts, tensors)


def novelty(gram: Tensor, old: int) -> Tensor:
    """For each candidate, those after the first `old` units, its R_jj / G_jj when its turn comes, the best first."""
    own = gram.diagonal()[old:]
    values, vectors = torch.linalg.eigh(gram[:old, :old])
    root = vectors * torch.where(values > _SMALL * values.max(), values, torch.inf).rsqrt()
    explained = gram[old:, :old] @ root
    left = gram[old:, old:] - explained @ explained.T
    dead = own <= _SMALL * gram.diagonal().max()
    waiting = torch.ones(len(own), dtype=torch.bool)
    found = torch.zeros_like(own)
    for _ in range(len(own)):
        share = torch.where(dead, 0.0, left.diagonal() / torch.where(dead, 1.0, own)).clamp(0.0, 1.0)
        best = int(torch.where(waiting, share, -1.0).argmax())
        waiting[best] = False
        found[best] = share[best]
        if float(share[best]) > _SMALL:
            left = left - torch.outer(left[:, best], left[best]) / left[best, best]
    return found


def _read(context: Context, ghosts: Ghosts, axes: Sequence[str], batches: Sequence[Any]) -> dict[str, Tensor]:
    forwards = [partial(ghosts.loss, ghosts.tensors, batch) for batch in batches]
    return grams(context.structure.model, ghosts.preview.after, axes, forwards)


def _made(context: Context, ghosts: Ghosts, axes: Sequence[str], batches: Sequence[Any]) -> dict[str, Tensor]:
    makers = {axis: _maker(ghosts, axis) for axis in axes}
    model, total = context.structure.model, dict[str, Tensor]()
    with without_a_trace(model):
        for module in model.modules():
            module.training = False
        for batch in batches:
            with Watched({name: ghosts.tensors[name] for name, _ in makers.values()}) as watched:
                ghosts.loss(ghosts.tensors, batch)
            for axis, (name, units) in makers.items():
                product = watched.only(name)
                if isinstance(product, str):
                    raise CaptureError(f"{axis}: {product}")
                rows = product.units_last(product.output)[:, units.flatten()].double().cpu()
                rows = rows.reshape(len(rows), *units.shape).movedim(2, 1).flatten(0, 1)
                total[axis] = total.get(axis, torch.zeros(())) + rows.T @ rows
    return total


def _maker(ghosts: Ghosts, axis: str) -> tuple[str, Tensor]:
    """The weight that makes the units of an axis, and where they are in its outputs: (units, places of each)."""
    parts = ghosts.sides[axis].incoming.parts
    if len(parts) != 1 or parts[0].dim != 0:
        raise CaptureError(f"{axis}: {len(parts)} weights make its units, and before activations just one can be told")
    return parts[0].tensor, torch.cat([parts[0].old, parts[0].new])


__all__ = ["NorthInit", "NorthScore", "novelty"]

"""Splitting steepest descent: units whose splitting in two lowers the loss, and the direction in which it does most.

With a unit replaced by two halves with the weights theta + d and theta - d the loss is

    L(d) = L + 1/2 d'S d + O(|d|^4)

where S is the splitting matrix of Liu, Wu & Wang 2019 (arXiv:1910.02366). L is even in the d of every unit, so all
units of all axes are looked at in one pass, whose gradient by d is S d. A few such passes span for every unit a Krylov
space, in which the Rayleigh-Ritz method finds the smallest eigenvalue of S and its vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from espalier.parts.checks import check_count, check_positive, check_some
from espalier.parts.ghosts.ghosts import Ghosts
from espalier.parts.ghosts.halves import Copies, beginning, between_weights, unchanged_by
from espalier.parts.goal import Goal, Scores, Selection
from espalier.parts.init import Beginning
from espalier.parts.score import Context
from espalier.parts.units.taylor import batches_of

Rows = dict[str, Tensor]
"""Axis -> one row per unit."""


@dataclass(frozen=True)
class SplittingGain:
    """By how much the loss falls if a unit is split: -1/2 d'S d, for the d of the given length that lowers it most.

    S d is a difference of gradients at the two halves, `step` apart, not a derivative: that of a ReLU network would be
    zero almost everywhere (the paper smooths the ReLU instead). Axes whose units cannot be copied without a change of
    the loss, such as those that a LayerNorm reads, get no candidates.
    """

    step: float = 0.1
    """Length of d, in units of the mean norm of the weights that make a unit of the axis."""
    passes: int = 6
    """Products with S: the dimension of the Krylov space."""
    batches: int = 2
    """Batches to look at, at most: held-out ones, or the last training batch where there are none."""

    def __post_init__(self) -> None:
        check_positive("step", self.step)
        check_count("passes", self.passes)
        check_count("batches", self.batches)

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        batches = batches_of(context, self.batches)
        sizes = between_weights(context, goal)
        able = splittable(context, sizes, batches[0])
        values = {axis: torch.zeros(0) for axis in goal.sizes}
        if not able:
            check_some("splitting", sizes, "units can be copied without a change of the loss")
            return Scores(values)
        ghosts = Ghosts(context, {axis: sizes[axis] for axis in able})
        norms = typical_norms(ghosts)
        lengths = {axis: self.step * norm for axis, norm in norms.items() if norm > 0}
        curved = curvature(ghosts, lengths, batches)
        start = {axis: at_random(context, ghosts, axis) for axis in lengths}
        eigenvalues, vectors = lowest(curved, start, self.passes)
        gains = {axis: -0.5 * lengths[axis] ** 2 * one for axis, one in eigenvalues.items()}
        apart = {axis: lengths[axis] * one for axis, one in vectors.items()}
        return Scores({**values, **gains}, apart)


@dataclass(frozen=True)
class Split:
    """Both halves of a unit go the way that the score found, and share its outgoing weights."""

    def __call__(self, context: Context, chosen: Selection, scores: Scores, /) -> Beginning:
        if not chosen:
            return Beginning()
        ghosts = Ghosts(context, {axis: len(units) for axis, units in chosen.items()})
        apart = {axis: scores.found[axis][list(units)] for axis, units in chosen.items()}
        return beginning(ghosts, Copies(ghosts, chosen).made(ghosts.tensors, apart))


def splittable(context: Context, sizes: Mapping[str, int], batch: Any) -> tuple[str, ...]:
    """The axes whose units can be copied without a change of the loss, in order."""
    halves = {axis: (size + 1) // 2 for axis, size in sizes.items()}  # a norm does not notice that all are doubled

    def copied(ghosts: Ghosts) -> Mapping[str, Tensor]:
        return Copies(ghosts, {axis: range(count) for axis, count in ghosts.counts.items()}).made(ghosts.tensors, {})

    found = unchanged_by(context, halves, copied, batch)
    return tuple(axis for axis in sizes if axis in found)


def typical_norms(ghosts: Ghosts) -> dict[str, float]:
    """Axis -> mean norm of the weights that make an old unit; axes that no weights make are left out."""
    sides = {axis: ghosts.sides[axis].incoming for axis in ghosts.counts}
    return {axis: float(side.read_old(ghosts.tensors).norm(dim=1).mean()) for axis, side in sides.items() if side.parts}


def at_random(context: Context, ghosts: Ghosts, axis: str) -> Tensor:
    """Gaussian rows of the shape of the weights that make the old units of an axis."""
    like = ghosts.sides[axis].incoming.read_old(ghosts.tensors)
    return torch.randn(like.shape, generator=context.generator(axis)).to(like)


def curvature(ghosts: Ghosts, lengths: Mapping[str, float], batches: Sequence[Any]) -> Callable[[Rows], Rows]:
    """Rows v -> S v for every old unit, from differences over the given lengths; every old unit has a copy."""
    copies = Copies(ghosts, {axis: range(count) for axis, count in ghosts.counts.items()})

    def product(rows: Rows) -> Rows:
        apart = {axis: (lengths[axis] * one).requires_grad_() for axis, one in rows.items()}
        total = {axis: torch.zeros_like(one) for axis, one in rows.items()}
        for batch in batches:
            with torch.enable_grad():
                loss = ghosts.loss(copies.made(ghosts.tensors, apart), batch)
                found = torch.autograd.grad(loss, list(apart.values()), allow_unused=True)
            for axis, grad in zip(apart, found, strict=True):
                if grad is not None:
                    total[axis] += grad / (lengths[axis] * len(batches))
        return total

    return product


def lowest(product: Callable[[Rows], Rows], start: Rows, passes: int) -> tuple[Rows, Rows]:
    """The smallest eigenvalue of every unit's matrix that a Krylov space of that dimension shows, and its vector."""
    bases: dict[str, list[Tensor]] = {axis: [_unit(one)] for axis, one in start.items()}
    images: dict[str, list[Tensor]] = {axis: [] for axis in start}
    for number in range(passes):
        for axis, image in product({axis: basis[-1] for axis, basis in bases.items()}).items():
            images[axis].append(image)
            if number + 1 < passes:
                bases[axis].append(_orthogonal(image, bases[axis]))
    eigenvalues, vectors = {}, {}
    for axis, rows in bases.items():
        basis, image = torch.stack(rows, 1), torch.stack(images[axis], 1)  # (units, passes, weights)
        small = basis @ image.mT
        beyond = (1 + small.abs().sum((1, 2)))[:, None] * (basis.norm(dim=2) == 0)  # no eigenvalue of a full space
        values, combinations = torch.linalg.eigh((small + small.mT) / 2 + torch.diag_embed(beyond))
        eigenvalues[axis], vectors[axis] = values[:, 0], torch.einsum("upw,up->uw", basis, combinations[:, :, 0])
    return eigenvalues, vectors


def _orthogonal(rows: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """The rows without their parts along those of each basis, at length 1; zero where the space is full."""
    before = rows.norm(dim=1, keepdim=True)
    for _ in range(2):
        for one in bases:
            rows = rows - (rows * one).sum(1, keepdim=True) * one
    enough = rows.norm(dim=1, keepdim=True) > 100 * torch.finfo(rows.dtype).eps * before
    return torch.where(enough, _unit(rows), 0.0)


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


__all__ = ["Split", "SplittingGain", "at_random", "curvature", "lowest", "splittable", "typical_norms"]

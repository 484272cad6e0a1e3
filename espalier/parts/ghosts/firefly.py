"""Firefly: small splits and new units of all axes, optimised together and valued one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from espalier.parts.checks import check_count, check_positive, check_some
from espalier.parts.ghosts.ghosts import Ghosts, Sides, counts_for
from espalier.parts.ghosts.halves import beginning, between_weights, later, unchanged_by
from espalier.parts.ghosts.neighbourhood import Candidates, falls, network
from espalier.parts.ghosts.splitting import splittable
from espalier.parts.goal import Goal, Scores, Selection
from espalier.parts.init import Beginning
from espalier.parts.score import Context
from espalier.parts.units.taylor import batches_of


@dataclass(frozen=True)
class FireflyScore:
    """What the loss falls by along each candidate's part of the way into the neighbourhood: -int dL/d eps_i d eps_i.

    The integral goes along the straight line from no candidate to all of them, so that the values of all add up to what
    the loss falls by in all (with enough points), and is taken at midpoints. Units that cannot be copied without a
    change of the loss are not split, and axes on which units contribute that nothing reads get no candidates.
    """

    step: float = 0.1
    """eps."""
    steps: int = 10
    """Steps of the optimisation, each of length `rate` and projected to norms of at most 1."""
    rate: float = 0.3
    points: int = 3
    """Points of the path."""
    spare: float = 2.0
    """New units to try, as a multiple of those that a uniform growth would add to an axis."""
    batches: int = 2
    """Batches to look at, at most: held-out ones, or the last training batch where there are none."""

    def __post_init__(self) -> None:
        for name, number in (("step", self.step), ("rate", self.rate), ("spare", self.spare)):
            check_positive(name, number)
        check_count("steps", self.steps, least=0)
        check_count("points", self.points)
        check_count("batches", self.batches)

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        batches = batches_of(context, self.batches)
        ghosts, splits = self._ghosts(context, goal, batches[0])
        found = self._optimised(context, ghosts, splits, batches) if ghosts.counts else {}
        values = {axis: torch.zeros(0) for axis in goal.sizes}
        return Scores({**values, **(falls(ghosts, found, batches, self.points) if found else {})}, found)

    def _ghosts(self, context: Context, goal: Goal, batch: Any) -> tuple[Ghosts, dict[str, int]]:
        """Ghosts for all candidates, and for how many of the first of them old units are split."""
        sizes = between_weights(context, goal)
        ready = unchanged_by(context, dict.fromkeys(sizes, 1), _unread, batch)
        new = {axis: count for axis, count in counts_for(goal, spare=self.spare).items() if axis in ready}
        splits = {axis: sizes[axis] for axis in splittable(context, sizes, batch)}
        counts = {axis: splits.get(axis, 0) + new.get(axis, 0) for axis in sizes}
        if not any(counts.values()):
            check_some("firefly", sizes, "units can be copied, or come unread, without a change of the loss")
        ghosts = Ghosts(context, {axis: count for axis, count in counts.items() if count})
        return ghosts, {axis: splits.get(axis, 0) for axis in ghosts.counts}

    def _optimised(
        self, context: Context, ghosts: Ghosts, splits: Mapping[str, int], batches: Sequence[Any]
    ) -> dict[str, Candidates]:
        sizes = {axis: self._sizes(ghosts.sides[axis], ghosts) for axis in splits}
        found = {axis: _drawn(context, ghosts, axis, count) for axis, count in splits.items()}
        for number in range(self.steps):
            leaves = {axis: Candidates(*(side.requires_grad_() for side in one.sides)) for axis, one in found.items()}
            with torch.enable_grad():
                sized = {axis: one.times(*sizes[axis]) for axis, one in leaves.items()}
                loss = ghosts.loss(network(ghosts, sized), batches[number % len(batches)])
                flat = [side for one in leaves.values() for side in one.sides]
                gradients = iter(torch.autograd.grad(loss, flat, allow_unused=True))
            found = {
                axis: Candidates(*(self._stepped(side.detach(), next(gradients)) for side in one.sides))
                for axis, one in leaves.items()
            }
        return {axis: one.times(*sizes[axis]) for axis, one in found.items()}

    def _sizes(self, sides: Sides, ghosts: Ghosts) -> tuple[float, float, float]:
        """The largest lengths of the three sides of candidates."""
        made, read = (
            float(one.read_old(ghosts.tensors).norm(dim=1).mean()) for one in (sides.incoming, sides.outgoing)
        )
        return self.step * made, made, self.step * read

    def _stepped(self, rows: Tensor, gradient: Tensor | None) -> Tensor:
        if gradient is None:
            return rows
        moved: Tensor = rows - self.rate * torch.nn.functional.normalize(gradient, dim=1)
        longest: Tensor = moved.norm(dim=1, keepdim=True).clamp(min=1.0)
        return moved / longest


@dataclass(frozen=True)
class FireflyInit:
    """The chosen candidates, as they were optimised."""

    def __call__(self, context: Context, chosen: Selection, scores: Scores, /) -> Beginning:
        if not chosen:
            return Beginning()
        ghosts = Ghosts(context, {axis: len(units) for axis, units in chosen.items()})
        parts = {axis: scores.found[axis].of(units) for axis, units in chosen.items()}
        origins = {
            axis: [unit for unit in units if unit < len(scores.found[axis].apart)] for axis, units in chosen.items()
        }
        return beginning(ghosts, network(ghosts, parts, origins))


def _unread(ghosts: Ghosts) -> dict[str, Tensor]:
    """The ghosts' tensors with other incoming weights and without outgoing ones."""
    tensors = dict(ghosts.tensors)
    for axis in ghosts.counts:
        sides = ghosts.sides[axis]
        tensors = sides.outgoing.write(tensors, torch.zeros_like(sides.outgoing.read(tensors)))
        incoming = sides.incoming.read(tensors)
        tensors = sides.incoming.write(tensors, incoming + incoming.abs().mean())
    return tensors


def _drawn(context: Context, ghosts: Ghosts, axis: str, splits: int) -> Candidates:
    """Candidates to start from, of length 1: at random, but for what makes new units, which is as surgery does it."""
    sides, generator, new = ghosts.sides[axis], context.generator(axis), ghosts.counts[axis] - splits
    made, read = (one.read_old(ghosts.tensors) for one in (sides.incoming, sides.outgoing))
    incoming = later(sides.incoming, splits).read(ghosts.tensors) if new else made[:0]
    apart, outgoing = (
        torch.randn(count, like.shape[1], generator=generator).to(like) for count, like in ((splits, made), (new, read))
    )
    return Candidates(*(torch.nn.functional.normalize(side, dim=1) for side in (apart, incoming, outgoing)))


__all__ = ["FireflyInit", "FireflyScore"]

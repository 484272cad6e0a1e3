"""Copies of units: a network in which new units repeat old ones and share with them the weights that read them.

    w f(x; theta)  ->  w/2 f(x; theta + d) + w/2 f(x; theta - d)

With d = 0 nothing changes (Chen et al. 2016, Net2Net). With any d the loss is even in the d of every single unit, since
its sign only swaps the two halves; so what splitting one unit does is, to the second order, independent of all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from espalier.graph.dims import NEW
from espalier.measure.stats import eval_loss, without_a_trace
from espalier.parts.ghosts.ghosts import INCOMING, OUTGOING, Ghosts, Part, Side, Tensors
from espalier.parts.goal import Goal
from espalier.parts.init import Beginning
from espalier.parts.score import Context

Origins = Mapping[str, Sequence[int]]
"""Axis -> the old units, each at most once, that its first new units are copies of."""

_SAME = 1e-4
"""Relative difference of losses that rounding may explain."""


class Copies:
    """The first new units of axes, made copies of old ones."""

    def __init__(self, ghosts: Ghosts, origins: Origins) -> None:
        self._sides = {axis: ghosts.sides[axis] for axis in origins}
        self._origins = {axis: torch.tensor(units, dtype=torch.int64) for axis, units in origins.items()}
        self._along: dict[str, list[tuple[int, Tensor, Tensor | None]]] = {}
        for axis, sides in self._sides.items():
            for side in (sides.incoming, sides.outgoing, sides.rest):
                for part in side.parts:
                    size = ghosts.tensors[part.tensor].shape[part.dim]
                    index, share = self._map(axis, part, size)
                    entry = (part.dim, index, share if side is sides.outgoing else None)
                    self._along.setdefault(part.tensor, []).append(entry)

    def made(self, tensors: Tensors, apart: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with copies in them; differentiable.

        Args:
            tensors: all tensors of the ghosts; what they hold for the copies is not looked at.
            apart: axis -> d, one row per copy, in the order of the incoming side: what the copy has more and its
                original has less than the original had.
        """
        result = {name: self._repeated(name, tensor) for name, tensor in tensors.items()}
        for axis, entries in apart.items():
            start = 0
            for part in self._sides[axis].incoming.parts:
                width = part.read(tensors[part.tensor], part.old[:1]).shape[1]
                moved = self._moved(axis, part, tensors[part.tensor], entries[:, start : start + width])
                result[part.tensor] = result[part.tensor] + moved
                start += width
        return result

    def _map(self, axis: str, part: Part, size: int) -> tuple[Tensor, Tensor]:
        """For every position along the part's dimension which one it repeats, and its share of what reads it."""
        origins = self._origins[axis]
        old, new = part.old[origins].flatten(), part.new[: len(origins)].flatten()
        index, share = torch.arange(size), torch.ones(size)
        index[new] = old
        share[old], share[new] = 0.5, 0.5
        return index, share

    def _repeated(self, name: str, tensor: Tensor) -> Tensor:
        for dim, index, share in self._along.get(name, ()):
            tensor = tensor.index_select(dim, index.to(tensor.device))
            if share is not None:
                tensor = tensor * share.to(tensor).reshape([-1 if one == dim else 1 for one in range(tensor.dim())])
        return tensor

    def _moved(self, axis: str, part: Part, like: Tensor, entries: Tensor) -> Tensor:
        """The entries, added to what copies have and taken from what their originals have."""
        origins = self._origins[axis]
        at_origins = replace(part, new=part.old[origins])
        placed = self._repeated(part.tensor, at_origins.written(torch.zeros_like(like), entries))
        sign = torch.zeros(like.shape[part.dim])
        sign[at_origins.new.flatten()], sign[part.new[: len(origins)].flatten()] = -1.0, 1.0
        return placed * sign.to(placed).reshape([-1 if one == part.dim else 1 for one in range(placed.dim())])


def later(side: Side, first: int) -> Side:
    """One side of the new units from the given one on."""
    return Side(tuple(replace(part, new=part.new[first:]) for part in side.parts))


def beginning(ghosts: Ghosts, tensors: Tensors) -> Beginning:
    """What leads surgery to these tensors: values at new positions, and changes at old ones."""
    values, deltas = {}, {}
    for name, tensor in tensors.items():
        usual = ghosts.tensors[name]
        if torch.equal(tensor, usual):
            continue
        values[name] = tensor.detach()
        delta = tensor.detach() - usual
        for dim, source in enumerate(ghosts.preview.sources(name)):
            if source is not None:
                delta.index_fill_(dim, torch.from_numpy((source == NEW).nonzero()[0]).to(delta.device), 0.0)
        if bool(delta.any()):
            deltas[name] = delta
    return Beginning(values, deltas)


def between_weights(context: Context, goal: Goal) -> dict[str, int]:
    """The axes that weights make and weights read, and that may grow, with their sizes."""
    found = {}
    for axis, size in goal.sizes.items():
        roles = {role for _, _, role in context.structure.topology.by_name[axis].slots}
        if roles & INCOMING and roles & OUTGOING and goal.room(axis) > 0:
            found[axis] = size
    return found


def unchanged_by(
    context: Context, counts: Mapping[str, int], make: Callable[[Ghosts], Tensors], batch: Any
) -> frozenset[str]:
    """The axes in which new units, made so, leave the loss in eval mode as it is.

    Args:
        context: of the method that asks.
        counts: axis -> number of new units.
        make: ghosts of some of these axes -> their tensors.
        batch: on which the loss is compared.
    """
    model = context.structure.model
    present = eval_loss(model, partial(context.loss, batch))

    def same(some: Mapping[str, int]) -> bool:
        ghosts = Ghosts(context, some)
        with without_a_trace(model):
            for module in model.modules():
                module.training = False
            return math.isclose(float(ghosts.loss(make(ghosts), batch)), present, rel_tol=_SAME, abs_tol=_SAME**2)

    if not counts or same(counts):
        return frozenset(counts)
    return frozenset(axis for axis, count in counts.items() if same({axis: count}))


__all__ = ["Copies", "Origins", "beginning", "between_weights", "later", "unchanged_by"]

"""Selections of single weights: which ones are live after an event, given their scores and how many may be.

Pruning takes only live weights away and growing only brings others, so that what one event says is a new mask for each
parameter. Of equal scores the first ones in memory are kept.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from espalier.errors import MethodError
from espalier.parts.checks import check_count
from espalier.parts.goal import Goal, Scores, WeightTensor
from espalier.parts.weights.densities import Density, live_counts

Per = Literal["tensor", "row"]


class Keep(ABC):
    """Chooses the weights that are live."""

    @abstractmethod
    def __call__(self, scores: Scores, goal: Goal, /) -> dict[str, Tensor]:
        """Parameter -> mask of its shape."""


@dataclass(frozen=True)
class Entries(Keep):
    """Single weights, wherever they are."""

    density: Density = "uniform"
    per: Per = "tensor"
    """``row``: every unit that is made keeps as many weights, up to one."""

    def __post_init__(self) -> None:
        if self.density not in get_args(Density):
            raise MethodError(f"density: expected one of {', '.join(get_args(Density))}, found {self.density!r}.")
        if self.per not in get_args(Per):
            raise MethodError(f"per: expected 'tensor' or 'row', found {self.per!r}.")
        if self.density == "global" and self.per == "row":
            raise MethodError("per='row' compares the weights of a row; it does not go with density='global'.")

    def __call__(self, scores: Scores, goal: Goal, /) -> dict[str, Tensor]:
        if self.density == "global":
            return _globally(scores, goal)
        found = {}
        for name, count in live_counts(self.density, goal).items():
            one = goal.weights[name]
            values = _worth(scores.values[name], one.live, goal)
            order = _by_rows(values, one.rows) if self.per == "row" else _order(values)
            found[name] = _first(order, count).view(one.live.shape).to(one.live.device)
        return found


@dataclass(frozen=True)
class NM(Keep):
    """At most n live weights of every m consecutive ones along the units that are read, as sparse kernels want them.

    On the way there a group keeps ceil(d m) of m where the density is to be d. A parameter whose size there is no
    multiple of m stays as it is. To prune only (Mishra et al. 2021, arXiv:2104.08378).
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        check_count("n", self.n)
        check_count("m", self.m, self.n + 1)

    def __call__(self, scores: Scores, goal: Goal, /) -> dict[str, Tensor]:
        _check_prunes(self, goal)
        entries = sum(one.live.numel() for one in goal.weights.values())
        kept = max(self.n, math.ceil(goal.live_weights() / max(entries, 1) * self.m - 1e-9))
        return {name: self._kept(scores.values[name], one, goal, kept) for name, one in goal.weights.items()}

    def _kept(self, values: Tensor, one: WeightTensor, goal: Goal, kept: int) -> Tensor:
        if one.live.shape[one.columns] % self.m:
            return one.live
        groups = _worth(values, one.live, goal).movedim(one.columns, -1)
        order = groups.reshape(-1, self.m).sort(dim=1, descending=True, stable=True).indices
        best = torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, :kept], True)
        return best.view(groups.shape).movedim(-1, one.columns).to(one.live.device) & one.live


@dataclass(frozen=True)
class Blocks(Keep):
    """Whole blocks of the matrix (units that are made) x (all that they read); those at the edges may be smaller.

    A block is worth the mean score of its weights. The density is reached as closely from below as whole blocks allow.
    To prune only.
    """

    rows: int = 4
    columns: int = 4
    density: Density = "uniform"

    def __post_init__(self) -> None:
        check_count("rows", self.rows)
        check_count("columns", self.columns)
        if self.density not in get_args(Density) or self.density == "global":
            raise MethodError(f"density: expected uniform, erk or present for blocks, found {self.density!r}.")

    def __call__(self, scores: Scores, goal: Goal, /) -> dict[str, Tensor]:
        _check_prunes(self, goal)
        counts = live_counts(self.density, goal)
        return {name: self._kept(scores.values[name], one, counts[name]) for name, one in goal.weights.items()}

    def _kept(self, values: Tensor, one: WeightTensor, count: int) -> Tensor:
        live = one.live.cpu().movedim(one.rows, 0)
        matrix, alive = values.detach().double().cpu().movedim(one.rows, 0).flatten(1), live.flatten(1)
        height, width = -(-len(matrix) // self.rows), -(-matrix.shape[1] // self.columns)
        edges = (0, width * self.columns - matrix.shape[1], 0, height * self.rows - len(matrix))

        def blocks(entries: Tensor) -> Tensor:
            padded = pad(entries, edges).view(height, self.rows, width, self.columns)
            return padded.sum((1, 3)).flatten()

        sizes = blocks(alive.double())
        worth = torch.where(sizes > 0, blocks(matrix * alive) / sizes.clamp(min=1), -torch.inf)
        order = _order(worth)
        fits = sizes[order].cumsum(0) <= count
        chosen = torch.zeros(len(order), dtype=torch.bool).index_fill_(0, order[fits], True).view(height, width)
        whole = chosen.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
        kept = whole[: len(matrix), : matrix.shape[1]].reshape(live.shape) & live
        return kept.movedim(0, one.rows).contiguous().to(one.live.device)


def check_entries(scores: Scores, goal: Goal, method: str) -> None:
    """Raise MethodError if a parameter has no scores, scores of another shape, or one that is not a number."""
    for name, one in goal.weights.items():
        values = scores.values.get(name)
        if values is None or values.shape != one.live.shape:
            found = "none" if values is None else tuple(values.shape)
            raise MethodError(f"{method}: expected scores of shape {tuple(one.live.shape)} for {name}, found {found}.")
        if bool(torch.isnan(values).any()):
            raise MethodError(f"{method}: scores of {name} are not numbers; mend the training or use a checkpoint.")


def _globally(scores: Scores, goal: Goal) -> dict[str, Tensor]:
    pieces = [_worth(scores.values[name], one.live, goal).flatten() for name, one in goal.weights.items()]
    best = _first(_order(torch.cat(pieces)), goal.live_weights())
    parts = torch.split(best, [len(piece) for piece in pieces])
    shapes = {name: one.live for name, one in goal.weights.items()}
    return {
        name: part.view(live.shape).to(live.device) for (name, live), part in zip(shapes.items(), parts, strict=True)
    }


def _worth(values: Tensor, live: Tensor, goal: Goal) -> Tensor:
    """Scores on the CPU in which what is not live comes last if it cannot come, and what is live first if it stays."""
    values, live = values.detach().double().cpu(), live.cpu()
    if goal.direction == "prune":
        return torch.where(live, values, -torch.inf)
    return torch.where(live, torch.inf, values)


def _order(values: Tensor) -> Tensor:
    return values.flatten().sort(descending=True, stable=True).indices


def _by_rows(values: Tensor, rows: int) -> Tensor:
    """The best of every row first, then the second best of each, and so on."""
    places = torch.arange(values.numel()).view(values.shape).movedim(rows, 0).flatten(1)
    by_worth = values.movedim(rows, 0).flatten(1).sort(dim=1, descending=True, stable=True)
    ranked = by_worth.values.T  # row r: the r-th best of each unit
    within = ranked.sort(dim=1, descending=True, stable=True).indices
    return places.gather(1, by_worth.indices).T.gather(1, within).flatten()


def _first(order: Tensor, count: int) -> Tensor:
    return torch.zeros(len(order), dtype=torch.bool).index_fill_(0, order[:count], True)


def _check_prunes(keep: Keep, goal: Goal) -> None:
    if goal.direction != "prune":
        raise MethodError(f"{keep!r} is a pattern to prune to; a growing method takes Entries.")


__all__ = ["NM", "Blocks", "Entries", "Keep", "Per", "check_entries"]

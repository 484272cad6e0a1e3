"""Firefly's third kind of candidate: new layers near the identity, optimised together and valued one by one.

A candidate begins as nothing, at parameters p with which the network computes what it did, and is moved to p + d. As
the network's own weights stay, all of them are trained at once, each with a path of its own from p to p + d.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from espalier.parts.checks import check_count, check_positive
from espalier.parts.depth.trial import together
from espalier.parts.goal import Goal, Scores, Selection
from espalier.parts.init import Beginning
from espalier.parts.score import Context
from espalier.parts.units.taylor import batches_of


@dataclass(frozen=True)
class FireflyLayers:
    """What the loss falls by along each candidate's way from nothing to its magnitude: -int_0^1 <dL/dp_i, d_i> dt.

    The integral (Wu et al. 2020; with one point a first-order gain, from half of the magnitude) goes along the straight
    line from no candidate to all of them, and is taken at midpoints, so that the values of all add up to what the loss
    falls by in all, with enough points. Ways have the length `step` times that of the layer's matrices
    as torch draws them: the root of a third of the number of their rows. In the mode in which the network trains. What
    surgery refuses has a score of minus infinity.
    """

    step: float = 0.1
    """eps."""
    steps: int = 10
    """Steps of normalised descent, each of `rate` times the length of the whole way, after which it is projected."""
    rate: float = 0.3
    points: int = 3
    """Points of the path."""
    batches: int = 2
    """Batches to look at, at most: held-out ones, or the last training batch where there are none."""

    def __post_init__(self) -> None:
        check_positive("step", self.step)
        check_positive("rate", self.rate)
        check_count("steps", self.steps)
        check_count("points", self.points)
        check_count("batches", self.batches)

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        batches = batches_of(context, self.batches) if goal.layers else ()
        found = together(context, goal.layers, partial(self._trained, context, batches))
        values = {name: found[name][0] if name in found else -math.inf for name in goal.layers}
        return Scores(
            {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()},
            {name: tensors for name, (_, tensors) in found.items()},
        )

    def _trained(
        self, context: Context, batches: Sequence[Any], new: Mapping[str, nn.Module]
    ) -> dict[str, tuple[float, dict[str, Tensor]]]:
        """Candidate -> what the loss falls by, and its parameters at the end of the way."""
        ways = {name: _Way(module, self.step) for name, module in new.items()}
        for number in range(self.steps):
            gradients = _gradients(context, batches[number % len(batches)], ways)
            for name, way in ways.items():
                way.descend(gradients[name], self.rate)
        falls = dict.fromkeys(ways, 0.0)
        for point in range(self.points):
            for way in ways.values():
                way.go((point + 0.5) / self.points)
            for batch in batches:
                gradients = _gradients(context, batch, ways)
                for name, way in ways.items():
                    falls[name] -= way.along(gradients[name]) / (self.points * len(batches))
        return {name: (falls[name], way.ends()) for name, way in ways.items()}


@dataclass(frozen=True)
class AsTrained:
    """New layers begin as their score trained them."""

    def __call__(self, context: Context, chosen: Selection, scores: Scores, /) -> Beginning:
        return Beginning(layers={name: scores.found[name] for name in chosen})


class _Way:
    """The way of one candidate: where its parameters begin, how far they went, and how far they may go."""

    def __init__(self, module: nn.Module, step: float) -> None:
        self.parameters = {name: one for name, one in module.named_parameters() if one.requires_grad}
        self._begin = {name: one.detach().clone() for name, one in self.parameters.items()}
        self._shift = {name: torch.zeros_like(one) for name, one in self._begin.items()}
        rows = sum(one.shape[0] for one in self._begin.values() if one.dim() > 1)
        self._length = step * math.sqrt((rows or sum(one.numel() for one in self._begin.values())) / 3)

    def descend(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        """A step against the gradient, not beyond the end of the longest way there is."""
        size = _norm(gradients)
        if size > 0 and math.isfinite(size):
            for name, gradient in gradients.items():
                self._shift[name] -= gradient * (rate * self._length / size)
            beyond = _norm(self._shift) / self._length
            for shift in self._shift.values():
                shift /= max(beyond, 1.0)
        self.go(1.0)

    def go(self, part: float) -> None:
        """Put the parameters at that part of the way."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self._begin[name] + part * self._shift[name])

    def along(self, gradients: Mapping[str, Tensor]) -> float:
        """The slope of the loss along the way."""
        return sum(float((one.double() * self._shift[name].double()).sum()) for name, one in gradients.items())

    def ends(self) -> dict[str, Tensor]:
        """The parameters at the end."""
        return {name: self._begin[name] + shift for name, shift in self._shift.items()}


def _gradients(context: Context, batch: Any, ways: Mapping[str, _Way]) -> dict[str, dict[str, Tensor]]:
    flat = [one for way in ways.values() for one in way.parameters.values()]
    if not flat:  # copies of blocks that do not train
        return {name: {} for name in ways}
    with torch.enable_grad():
        found = iter(torch.autograd.grad(context.loss(batch), flat, allow_unused=True, materialize_grads=True))
    return {name: {one: next(found) for one in way.parameters} for name, way in ways.items()}


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(one.double().square().sum()) for one in tensors.values()))


__all__ = ["AsTrained", "FireflyLayers"]

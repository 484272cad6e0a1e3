"""TINY: new units that give the loss what the weights there are cannot, at the amplitude at which it falls most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.graph.dims import NEW
from espalier.graph.named_tensors import tensor_table
from espalier.parts.checks import check_count, check_positive
from espalier.parts.ghosts.bottleneck import new_units, wanted
from espalier.parts.ghosts.ghosts import Ghosts, Side, counts_for
from espalier.parts.ghosts.halves import beginning
from espalier.parts.ghosts.line_search import best_amplitude
from espalier.parts.ghosts.reach import Between, between, tried
from espalier.parts.goal import Goal, Scores, Selection
from espalier.parts.init import Beginning
from espalier.parts.score import Context
from espalier.parts.units.taylor import batches_of


@dataclass(frozen=True)
class Directions:
    """The new units of one axis, the best first."""

    incoming: Tensor
    """(units, weights that make a unit)."""
    outgoing: Tensor
    """(units, weights that read a unit)."""
    biases: Mapping[str, Tensor]
    """Bias of the layer that makes the units, if it has one -> (units, 1)."""
    updates: Mapping[str, Tensor]
    """Weights and biases that read the axis -> their best update, in their shape."""


@dataclass(frozen=True)
class TinyScore:
    """What each of the best new units contributes to the direction in which the loss falls: a squared singular value.

    Axes between one linear layer or convolution and the ones that read it are looked at; others get no candidates, and
    no axis gets more than there are directions with at least `floor` times the largest singular value (at most as many
    as the readers have outputs).
    """

    batches: int = 2
    """Batches to look at, at most: held-out ones, or the last training batch where there are none."""
    spare: float = 2.0
    """Candidates, as a multiple of the units that a uniform growth would add to an axis."""
    floor: float = 1e-3
    """Singular values below this part of the largest one are left out."""
    ridge: float = 1.0
    """How much what few samples do not tell is smoothed: see `espalier.parts.ghosts.bottleneck.wanted`."""

    def __post_init__(self) -> None:
        check_count("batches", self.batches)
        check_positive("spare", self.spare)
        check_positive("floor", self.floor)
        check_positive("ridge", self.ridge)

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        batches = batches_of(context, self.batches)
        counts = counts_for(goal, spare=self.spare)
        axes, biases = _axes(context, counts, batches[0])
        needs, updates = wanted(context, axes, batches, self.ridge)
        values, found = {axis: torch.zeros(0) for axis in goal.sizes}, {}
        for axis, need in needs.items():
            incoming, outgoing, values[axis] = new_units(need, counts[axis], self.floor)
            found[axis] = taken_apart(context, axes[axis], incoming, outgoing, updates, biases)
        return Scores(values, found)


@dataclass(frozen=True)
class TinyInit:
    """The new units at one amplitude for all axes, that of the lowest training loss; silent if none lowers it."""

    update: bool = False
    """Whether the weights that read them get their best update as well, at the same amplitude."""
    batches: int = 2
    """Batches to measure the loss on, at most."""

    def __post_init__(self) -> None:
        check_count("batches", self.batches)

    def __call__(self, context: Context, chosen: Selection, scores: Scores, /) -> Beginning:
        if not chosen:
            return Beginning()
        ghosts = Ghosts(context, {axis: len(units) for axis, units in chosen.items()})
        batches = batches_of(context, self.batches)
        table = tensor_table(context.structure.model).tensors

        def tensors(amplitude: float) -> dict[str, Tensor]:
            found = with_units(ghosts, chosen, scores.found, amplitude)
            if self.update:
                updates = {name: by for axis in chosen for name, by in scores.found[axis].updates.items()}
                for name, by in updates.items():
                    before = found.get(name, table[name].detach())
                    found[name] = before + amplitude * _placed(ghosts, name, by).to(before)
            return found

        def loss(amplitude: float) -> float:
            with torch.no_grad():
                return sum(float(ghosts.loss(tensors(amplitude), batch)) for batch in batches)

        best = tensors(best_amplitude(loss))
        start = beginning(ghosts, {name: one for name, one in best.items() if name in ghosts.tensors})
        others = {name: one - table[name].detach() for name, one in best.items() if name not in ghosts.tensors}
        return Beginning(start.values, {**start.deltas, **others})


def with_units(
    ghosts: Ghosts, chosen: Selection, found: Mapping[str, Directions], amplitude: float
) -> dict[str, Tensor]:
    """The ghosts' tensors with the chosen units: made as strongly as old ones are, and read in proportion."""
    tensors = dict(ghosts.tensors)
    for axis, units in chosen.items():
        one, sides, rows = found[axis], ghosts.sides[axis], list(units)
        norms = one.incoming[rows].norm(dim=1, keepdim=True)
        usual = sides.incoming.read_old(ghosts.tensors).norm(dim=1).mean().to(norms)
        longer = torch.where((norms > 0) & (usual > 0), usual / norms, 1.0)
        tensors = sides.incoming.write(tensors, longer * one.incoming[rows])
        tensors = sides.outgoing.write(tensors, amplitude / longer * one.outgoing[rows])
        for name, bias in one.biases.items():
            side = Side(tuple(part for part in sides.rest.parts if part.tensor == name))
            tensors = side.write(tensors, longer * bias[rows])
    return tensors


def _axes(context: Context, counts: Mapping[str, int], batch: Any) -> tuple[dict[str, Between], dict[str, str]]:
    """The axes that can be looked at, and the biases of weights.

    Raises MethodError if axes may grow and none of them can be looked at.
    """
    around = {axis: between(context.structure.topology, axis) for axis in counts}
    refused = {axis: one for axis, one in around.items() if isinstance(one, str)}
    found = {axis: one for axis, one in around.items() if isinstance(one, Between)}
    problems, biases = tried(context, found, batch)
    refused.update(problems)
    if counts and len(refused) == len(counts):
        reasons = "; ".join(f"{axis}: {why}" for axis, why in list(refused.items())[:4])
        raise MethodError(f"tiny finds no axis between linear layers or convolutions that it can grow ({reasons}).")
    return {axis: one for axis, one in found.items() if axis not in refused}, biases


def taken_apart(
    context: Context,
    around: Between,
    incoming: Tensor,
    outgoing: Tensor,
    updates: Mapping[str, Tensor],
    biases: Mapping[str, str],
) -> Directions:
    """The rows taken apart into weights and biases."""
    table = tensor_table(context.structure.model).tensors

    def apart(name: str, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        width = table[name][0].numel()
        return rows[:, :width], {biases[name]: rows[:, width:]} if name in biases else {}

    shaped: dict[str, Tensor] = {}
    for name in around.readers:
        weight, bias = apart(name, updates[name])
        shaped[name] = weight.reshape(table[name].shape)
        shaped.update({key: one.flatten() for key, one in bias.items()})
    weights, of_bias = apart(around.maker, incoming)
    return Directions(weights, outgoing, of_bias, shaped)


def _placed(ghosts: Ghosts, name: str, values: Tensor) -> Tensor:
    """Values of a tensor's present shape in its new one, zero where it is new."""
    if name not in ghosts.tensors:
        return values
    for dim, source in enumerate(ghosts.preview.sources(name)):
        if source is not None:
            index = torch.from_numpy(source.clip(min=0)).to(values.device)
            values = values.index_select(dim, index)
            values = values.index_fill(dim, torch.from_numpy((source == NEW).nonzero()[0]).to(values.device), 0.0)
    return values


__all__ = ["Directions", "TinyInit", "TinyScore", "taken_apart", "with_units"]

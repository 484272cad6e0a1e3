"""Contexts and goals for parts of methods, outside of a session."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from espalier import attach
from espalier.edit.plan import Plan, Resize
from espalier.parts.budget import Polynomial
from espalier.parts.goal import UNBOUNDED, Cap, Goal, Selection
from espalier.parts.init import Beginning
from espalier.parts.score import Context
from espalier.record import Edit
from espalier.structure import Structure

SEED = 1


def loss(model: nn.Module, batch: Any) -> Tensor:
    """The mean squared error of (inputs, targets)."""
    inputs, targets = batch
    return (model(inputs) - targets).square().mean()


def loss_now(structure: Structure, batch: Any) -> float:
    """The loss in the present mode."""
    with torch.no_grad():
        return float(loss(structure.model, batch))


def context_of(structure: Structure, *batches: Any, seed: int = SEED) -> Context:
    """What a method is shown, with these held-out batches."""
    model_loss = partial(loss, structure.model)
    return Context(structure, tuple(structure.axes), 0, 0, 0.0, seed, model_loss, batches[0], batches)


def goal_of(structure: Structure, *axes: str, by: int = 4) -> Goal:
    """So many more units in all, wherever."""
    sizes = {axis: structure.axes[axis].size for axis in axes}
    cost = Polynomial({(axis,): 1 for axis in axes})
    reference = {axis: float(size) for axis, size in sizes.items()}
    return Goal("grow", sizes, sizes, dict.fromkeys(axes, UNBOUNDED), reference, Cap(cost, sum(sizes.values()) + by))


def grown(structure: Structure, chosen: Selection, start: Beginning) -> Edit:
    """The structure with the chosen candidates."""
    edits = tuple(Resize(axis, add=len(units)) for axis, units in chosen.items())
    return structure.apply(Plan(edits, seed=SEED, values=start.values, deltas=start.deltas))


def perceptron(activation: nn.Module, *, count: int = 64) -> tuple[Structure, tuple[Tensor, Tensor]]:
    """4-5-6-2 units in double precision, and a batch of noise."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 5), activation, nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)
    inputs, targets = torch.randn(count, 4, dtype=torch.float64), torch.randn(count, 2, dtype=torch.float64)
    return attach(nn.Sequential(*layers).double(), inputs), (inputs, targets)

"""Scores: what every unit, or ghost unit, of an axis is worth. Higher = keep it (prune), or add it first (grow)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.graph.dims import labels
from espalier.graph.named_tensors import tensor_table
from espalier.parts.clock import Metric
from espalier.parts.goal import Goal, Scores
from espalier.structure import Structure

Norm = Literal["l1", "l2"]
Side = Literal["all", "made"]
_NORMED: Mapping[str, frozenset[str]] = {
    "all": frozenset({"produce", "filter", "group", "scale", "contract"}),
    "made": frozenset({"produce", "filter", "group"}),
}


@dataclass(frozen=True)
class Context:
    """What a method may look at: the live network, the loss function and batches. It changes none of them."""

    structure: Structure
    axes: tuple[str, ...]
    """The axes that the method may change."""
    step: int
    epoch: int
    progress: float
    """Fraction of the training that is done."""
    seed: int
    """Another one for every event and method; the same in every run with the session's seed."""
    loss: Callable[[Any], Tensor]
    """batch -> loss of the live network, as it trains (train mode, gradients allowed)."""
    batch: Any
    """The last training batch; None before the first."""
    probe: Sequence[Any]
    """Held-out batches; may be empty."""
    total_steps: int = 0
    """Optimizer steps of the whole training; 0 outside of a session."""
    memory: Any = None
    """What `Method.memory` made for this method in this session; its type only the method knows. None without."""

    metrics: Sequence[Metric] = ()
    """What `Session.epoch_end` was told, one for every epoch."""

    def generator(self, name: str) -> torch.Generator:
        """A random generator on the CPU for one axis or tensor; repeats in every process."""
        return torch.Generator().manual_seed(derived_seed(self.seed, name))


class Score(Protocol):
    """Values every unit or ghost unit of the axes of `goal`."""

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        """Scores of every axis in `goal.sizes`."""


def derived_seed(*parts: int | str) -> int:
    """A seed that differs as soon as one part does, and is the same in every process."""
    return int.from_bytes(sha256(repr(parts).encode()).digest()[:7], "big")


def seed_random_numbers(seed: int) -> None:
    """As `torch.manual_seed`, but for devices that are in use only: for the others, that keeps every call in a list,
    with the lines of code that it came from, until they are."""
    torch.default_generator.manual_seed(seed)
    for backend in (torch.cuda, torch.xpu):
        if backend.is_initialized():
            backend.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


@dataclass(frozen=True)
class GroupNorm:
    """The norm of everything that is a unit: all weights that produce it and all that read it, norm scales included.

    Each tensor's norms are divided by their mean over the axis, so that layers and axes can be compared, and the mean
    over the tensors is the score (Li et al. 2017; over coupled groups, readers included, as in Fang et al. 2023). New
    units start with large incoming and zero outgoing weights: by their incoming side alone they would push out trained
    ones.
    """

    norm: Norm = "l2"
    side: Side = "all"
    """``made``: only the weights that a unit is made by, the filters of convolutions."""

    def __post_init__(self) -> None:
        if self.norm not in ("l1", "l2"):
            raise MethodError(f"norm: expected 'l1' or 'l2', found {self.norm!r}.")
        if self.side not in _NORMED:
            raise MethodError(f"side: expected 'all' or 'made', found {self.side!r}.")

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        table = tensor_table(context.structure.model).tensors
        tensors = {tensor: table[tensor] for tensor in context.structure.topology.parameters}
        return Scores({name: self._axis(context.structure, name, tensors) for name in goal.sizes})

    def _axis(self, structure: Structure, name: str, tensors: dict[str, Tensor]) -> Tensor:
        topology, record = structure.topology, structure.topology.by_name[name]
        places = [slot for slot in record.slots if slot[2] in _NORMED[self.side] and slot[0] in tensors]
        places = places or [slot for slot in record.slots if slot[0] in tensors]
        total = torch.zeros(topology.sizes[record.number], dtype=torch.float64)
        for tensor, dim, _ in places:
            units = torch.from_numpy(labels(topology.tensors[tensor][dim], topology.sizes, record.number))
            total += self._tensor(name, tensor, tensors[tensor].detach(), dim, units, len(total))
        return total / max(len(places), 1)

    def _tensor(self, axis: str, name: str, tensor: Tensor, dim: int, units: Tensor, size: int) -> Tensor:
        if tensor.device.type == "meta":
            raise MethodError(f"{axis}: {name} is on the meta device, without weights to compare; score by Chance().")
        others = [other for other in range(tensor.dim()) if other != dim]
        magnitudes = tensor.float().abs() if self.norm == "l1" else tensor.float().square()
        along = (magnitudes.sum(others) if others else magnitudes).double().cpu()
        if not bool(torch.isfinite(along).all()):
            raise MethodError(
                f"{axis}: {name} holds values that are not finite, so its units cannot be compared; mend the training "
                "(a smaller learning rate, gradient clipping) or go back to a checkpoint."
            )
        inside = units >= 0
        sums = torch.zeros(size, dtype=torch.float64).index_add_(0, units[inside], along[inside])
        norms = sums if self.norm == "l1" else sums.sqrt()
        mean = norms.mean()
        return norms / mean if mean > 0 else norms


@dataclass(frozen=True)
class Share:
    """Scores of another kind, none of them negative, as what is lost of an axis if its units go one after the other.

    The score of a unit is s^2 / sum of t^2 over the units of its axis that are worth as much or more (Lee et al. 2021,
    LAMP, arXiv:2010.07931). The order within an axis stays; between axes, the fewer units of worth are left, the more
    each counts, so that no axis collapses while others keep what they do not need.
    """

    score: Score

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        scores = self.score(context, goal)
        return Scores({name: shares(values) for name, values in scores.values.items()}, scores.found)


def shares(values: Tensor) -> Tensor:
    """s^2 / sum of t^2 over the values that are as large or larger, of a vector without negative values."""
    order = values.sort(stable=True).indices
    squares = values[order].double().square()
    remaining = squares.flip(0).cumsum(0).flip(0)
    found = torch.empty_like(squares)
    found[order] = torch.where(remaining > 0, squares / remaining, 0.0)
    return found


@dataclass(frozen=True)
class Chance:
    """Uniform random numbers: every unit is worth the same, in another order at every event."""

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        counts = dict.fromkeys(goal.layers, 1) or goal.sizes
        return Scores({name: torch.rand(size, generator=context.generator(name)) for name, size in counts.items()})


@dataclass(frozen=True)
class Equal:
    """Every ghost unit is worth the same, and there are as many as there is room for."""

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        if goal.layers:
            return Scores({name: torch.ones(1) for name in goal.sizes})
        return Scores({name: torch.ones(goal.room(name)) for name in goal.sizes})


def spared(scores: Scores, goal: Goal) -> Scores:
    """The scores with those of young units a hair above all others of their axis, so that these go last."""
    values = dict(scores.values)
    for axis, units in goal.young.items():
        if units and axis in values:
            raised = values[axis].clone()
            raised[list(units)] = torch.nextafter(values[axis].max(), torch.tensor(torch.inf).to(values[axis]))
            values[axis] = raised
    return Scores(values, scores.found)


def check_scores(scores: Scores, context: Context, goal: Goal, method: str) -> None:
    """Raise MethodError if an axis has no scores, the wrong number of them, or one that is not a number."""
    for name, size in goal.sizes.items():
        values = scores.values.get(name)
        if values is None:
            raise MethodError(f"{method} gave no scores for {name}; expected some for every axis of the goal.")
        if values.dim() != 1 or (goal.direction == "prune" and len(values) != size):
            wanted = f"({size},)" if goal.direction == "prune" else "(candidates,)"
            raise MethodError(f"{method}: expected scores of shape {wanted} for {name}, found {tuple(values.shape)}.")
        if bool(torch.isnan(values).any()):
            unit = int(torch.isnan(values).nonzero()[0])
            damaged = _not_finite(context.structure, name)
            cause = f"{', '.join(damaged)} is not finite" if damaged else "the score itself computed it"
            raise MethodError(f"{method}: the score of unit {unit} of {name} is not a number: {cause}.")


def check_layers(scores: Scores, goal: Goal, method: str) -> None:
    """Raise MethodError if a layer has no score, not one number, or one that is not a number."""
    for name in goal.sizes:
        values = scores.values.get(name)
        if values is None or values.numel() != 1:
            found = "none" if values is None else f"{values.numel()} numbers"
            raise MethodError(f"{method}: expected one score for {name}, found {found}.")
        if bool(torch.isnan(values).any()):
            raise MethodError(
                f"{method}: the score of {name} is not a number; the batches or the weights hold values that are not "
                "finite."
            )


def _not_finite(structure: Structure, axis: str) -> list[str]:
    tensors = tensor_table(structure.model).tensors
    names = dict.fromkeys(tensor for tensor, _, _ in structure.topology.by_name[axis].slots)
    return [name for name in names if name in tensors and not bool(torch.isfinite(tensors[name]).all())]


__all__ = [
    "Chance", "Context", "Equal", "GroupNorm", "Norm", "Score", "Share", "Side", "check_layers", "check_scores",
    "derived_seed", "seed_random_numbers", "shares", "spared",
]  # fmt: skip

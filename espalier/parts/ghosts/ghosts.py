"""Ghost units: the network as it would be with new units in it, run without changing anything.

Every scoring rule for units that are not there yet asks the same of the network: what the loss and its gradient would
be if the weights of new units held certain values. `Ghosts` answers for any network and any number of axes at once: all
tensors that growth touches are made as surgery would make them, are put into the modules while the loss is evaluated,
and are taken out again. A pass costs what an ordinary training step costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.edit.given import seen
from espalier.edit.plan import grow_plan
from espalier.edit.verify import attributes_set
from espalier.graph.dims import NEW, labels
from espalier.graph.named_tensors import TensorTable, tensor_table
from espalier.graph.undisturbed import Attributes
from espalier.measure.stats import without_a_trace
from espalier.parts.goal import Goal
from espalier.parts.score import Context, seed_random_numbers
from espalier.parts.units.select import proportional
from espalier.record import Preview

INCOMING = frozenset({"produce", "filter", "group", "lookup"})
OUTGOING = frozenset({"contract"})

Tensors = Mapping[str, Tensor]
_NOTHING: Tensors = MappingProxyType({})


@dataclass(frozen=True)
class Part:
    """The entries of one tensor that belong to units of an axis along one of its dimensions."""

    tensor: str
    dim: int
    new: Tensor
    """(k, m): positions of each new unit along the dimension."""
    old: Tensor
    """(n, m): those of each unit that was there."""
    others: tuple[Tensor | None, ...]
    """For every dimension the positions that are not new in another axis; None for all, and for `dim` itself."""

    def read(self, tensor: Tensor, positions: Tensor) -> Tensor:
        """The entries of the units at some of `new` or `old`: (units, entries of each)."""
        return self._picked(tensor, positions).reshape(len(positions), -1)

    def written(self, tensor: Tensor, entries: Tensor) -> Tensor:
        """A copy of the tensor in which the new units have the entries given as (k, entries of each)."""
        slices = self._picked(tensor, self.new)
        index: list[Tensor] = []
        for dim, size in enumerate(tensor.shape):
            kept = self.new.flatten() if dim == self.dim else self.others[dim]
            at = torch.arange(size) if kept is None else kept
            index.append(at.to(tensor.device).reshape([-1 if other == dim else 1 for other in range(tensor.dim())]))
        values = entries.to(tensor).reshape(slices.shape).flatten(0, 1).movedim(0, self.dim)
        return tensor.index_put(tuple(index), values)

    def _picked(self, tensor: Tensor, positions: Tensor) -> Tensor:
        """(units, m, the other dimensions in order)."""
        for dim, kept in enumerate(self.others):
            if kept is not None:
                tensor = tensor.index_select(dim, kept.to(tensor.device))
        picked = tensor.index_select(self.dim, positions.flatten().to(tensor.device)).movedim(self.dim, 0)
        return picked.reshape(*positions.shape, *picked.shape[1:])


@dataclass(frozen=True)
class Side:
    """All entries on one side of the units of an axis, one row per unit."""

    parts: tuple[Part, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that hold them."""
        return tuple(dict.fromkeys(part.tensor for part in self.parts))

    def read(self, tensors: Tensors) -> Tensor:
        """The entries of the new units: (k, d)."""
        return torch.cat([part.read(tensors[part.tensor], part.new) for part in self.parts], dim=1)

    def read_old(self, tensors: Tensors) -> Tensor:
        """The entries of the units that were there, in the same order: (n, d)."""
        return torch.cat([part.read(tensors[part.tensor], part.old) for part in self.parts], dim=1)

    def write(self, tensors: Tensors, entries: Tensor) -> dict[str, Tensor]:
        """The tensors, those of this side with other entries (k, d) for the new units; differentiable."""
        result, start = dict(tensors), 0
        for part in self.parts:
            width = part.read(result[part.tensor], part.new[:1]).shape[1]
            result[part.tensor] = part.written(result[part.tensor], entries[:, start : start + width])
            start += width
        return result


@dataclass(frozen=True)
class Sides:
    """The entries of new units of one axis: what makes them, what reads them, and what else there is."""

    incoming: Side
    """Weights that produce the units."""
    outgoing: Side
    """Weights that read the units."""
    rest: Side
    """Biases, scales and running statistics."""


class Ghosts:
    """A network with new units that are not there.

    Args:
        context: of the method that asks.
        counts: axis -> number of new units, at least one in each. Without any axis it is the network as it is.
    """

    def __init__(self, context: Context, counts: Mapping[str, int]) -> None:
        self._context = context
        self._model = context.structure.model
        self.counts = dict(counts)
        self.preview = context.structure.preview(grow_plan(self.counts, seed=context.seed), within_limits=False)
        """What surgery would do by itself."""
        self.tensors: dict[str, Tensor] = dict(self.preview.tensors)
        """Every tensor that growth touches, in its new shape, with what surgery would put into it."""
        self._table = tensor_table(self._model)

    @cached_property
    def sides(self) -> Mapping[str, Sides]:
        """The entries of the new units, by axis."""
        return {axis: sides_of(self.preview, axis) for axis in self.counts}

    def is_old(self, name: str) -> Tensor:
        """Which entries of a tensor in its new shape were there: of booleans, in a shape that broadcasts."""
        return self.preview.changes.is_old(name).to(self.tensors[name].device)

    def seen(self, axis: str, tensors: Tensors, deltas: Tensors = _NOTHING) -> str | None:
        """Why the outputs would show the new units of an axis if growth began with these; None if they would not."""
        full = {**tensors, **{name: tensors[name] + delta.to(tensors[name]) for name, delta in deltas.items()}}
        return seen(self.preview.changes, axis, lambda name: full.get(name, self._table.tensors[name]), deltas)

    def loss(self, tensors: Tensors, batch: Any) -> Tensor:
        """The loss of the grown network with these tensors, in the present mode, with a graph if they ask for one.

        Every evaluation sees the same random numbers (dropout masks). Buffers are copied first and stay as they are.
        """
        kept = {name: one for name, one in self._table.tensors.items() if not isinstance(one, nn.Parameter)}
        copied = {name: tensors.get(name, one).clone() for name, one in kept.items()}
        with self._in_place({**tensors, **copied}):
            return self._context.loss(batch)

    def gradients(self, tensors: Tensors, batch: Any, names: Sequence[str]) -> dict[str, Tensor]:
        """The gradient of the loss by each of the named tensors, at these values: zeros where the loss ignores it."""
        if not names:
            return {}
        leaves = {name: tensors[name].detach().requires_grad_() for name in names}
        with torch.enable_grad():
            loss = self.loss({**tensors, **leaves}, batch)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), found, strict=True)
        }

    @contextmanager
    def _in_place(self, tensors: Tensors) -> Iterator[None]:
        enabled, attributes = torch.is_grad_enabled(), Attributes(self._model.modules())
        try:
            with (
                without_a_trace(self._model),
                torch.set_grad_enabled(enabled),
                attributes_set(self._model, self.preview.attributes),
            ):
                put_tensors(self._table, tensors)
                seed_random_numbers(self._context.seed)
                yield
        finally:
            attributes.restore()


def put_tensors(table: TensorTable, tensors: Tensors) -> None:
    """Put other tensors in place of parameters and buffers, shared ones everywhere at once."""
    for name, tensor in tensors.items():
        for module, key, is_parameter in table.places[name]:
            store: dict[str, Any] = module._parameters if is_parameter else module._buffers
            store[key] = tensor


def counts_for(goal: Goal, *, spare: float = 1.0) -> dict[str, int]:
    """How many ghost units of each axis are worth scoring: those of a uniform growth, times `spare`, where they fit."""
    sizes = proportional(goal)
    found = {}
    for axis, size in goal.sizes.items():
        count = min(int(np.ceil(spare * (sizes[axis] - size))), goal.room(axis))
        if count > 0:
            found[axis] = count
    return found


def sides_of(preview: Preview, axis: str) -> Sides:
    """Where the new units of an axis are in the tensors of a preview."""
    parts: dict[str, list[Part]] = {"incoming": [], "outgoing": [], "rest": []}
    record = preview.before.by_name[axis]
    for name, dim, role in record.slots:
        if name in preview.tensors and preview.tensors[name].is_floating_point():
            kind = "incoming" if role in INCOMING else "outgoing" if role in OUTGOING else "rest"
            parts[kind].append(_part(preview, record.number, name, dim))
    return Sides(Side(tuple(parts["incoming"])), Side(tuple(parts["outgoing"])), Side(tuple(parts["rest"])))


def _part(preview: Preview, number: int, name: str, dim: int) -> Part:
    units = labels(preview.after.tensors[name][dim], preview.after.sizes, number)
    order = np.argsort(units, kind="stable")
    count, inside = preview.after.sizes[number], int((units >= 0).sum())
    positions = torch.from_numpy(order[len(units) - inside :].copy()).reshape(count, -1)
    was_there = preview.before.sizes[number]
    others: list[Tensor | None] = []
    for other, source in enumerate(preview.sources(name)):
        kept = None if other == dim or source is None else torch.from_numpy(np.flatnonzero(source != NEW))
        others.append(kept)
    return Part(name, dim, positions[was_there:], positions[:was_there], tuple(others))


__all__ = ["INCOMING", "OUTGOING", "Ghosts", "Part", "Side", "Sides", "counts_for", "put_tensors", "sides_of"]

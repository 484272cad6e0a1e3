"""What an edit promises whose plan brings values for new units or changes weights that stay.

New units are invisible if taking them away again would change nothing: they are zero where they are read, or read with
weights of zero. Units that are equal in everything but the weights that read them are one unit, read with the sum

    w_1 f + w_2 f = (w_1 + w_2) f

so pairs with opposite weights cancel, and an old unit may share its weights with copies of itself (Chen et al. 2016,
Net2Net, section 2.2). Any other change of weights that stay may change the outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from espalier.edit.changes import Changes
from espalier.edit.contract import Contract
from espalier.edit.neutral import Invisible, invisible_removal
from espalier.edit.operands import is_attention, summed, sums_over
from espalier.graph.dims import NEW, labels
from espalier.graph.flow import operator_name
from espalier.graph.topology import AxisRecord, TracePrediction
from espalier.graph.trace import Call

_ROUNDING = 16
"""Units in the last place by which sums of weights may differ."""
_REARRANGING = frozenset(
    "view _unsafe_view _reshape_alias transpose permute t unsqueeze squeeze expand slice select split split_with_sizes "
    "unbind alias detach clone contiguous _to_copy".split()
)

_RANDOM = frozenset(
    "native_dropout _fused_dropout bernoulli rrelu_with_noise rand_like randn_like normal uniform exponential".split()
)
"""Operators whose random numbers differ between units, as do those of an attention with dropout between heads."""


class Made(Protocol):
    """The tensors as they will be."""

    def __call__(self, name: str, /) -> Tensor:
        """The tensor of that name after the edit."""


def judged(
    contract: Contract, changes: Changes, made: Made, values: Iterable[str], deltas: Mapping[str, Tensor]
) -> Contract:
    """The contract of a plan that brings tensors of its own.

    Args:
        contract: that of the same edit with what surgery fills in by itself.
        changes: the edit.
        made: the tensors as they will be.
        values: names of the tensors for which the plan brings values of new units.
        deltas: what it adds to tensors.
    """
    if contract.kind != "exact":
        return contract
    touched, sums = {*values, *deltas}, False
    axes = [changes.before.axes[number] for number in changes.grown()]
    readers = {name for record in axes for name, _, role in record.slots if role == "contract"}
    stray = next((name for name in deltas if name not in readers), None)
    if stray is not None:
        return replace(contract, kind="changing", why=f"the plan changes {stray}")
    for record in axes:
        if not touched.isdisjoint(name for name, _, _ in record.slots):
            answer = _Axis(changes, record, made, deltas).answer()
            if isinstance(answer, str):
                return replace(contract, kind="changing", why=f"{record.name} {answer}")
            sums |= answer
    why = contract.why if not sums else f"{contract.why}, or cancel with units that are equal to them"
    return replace(contract, why=why)


def seen(changes: Changes, axis: str, made: Made, deltas: Mapping[str, Tensor]) -> str | None:
    """Why the outputs would show the new units of one axis in these tensors; None if they would not.

    Args:
        changes: the edit.
        axis: the axis asked about; of the others nothing is said.
        made: the tensors as they would be, `deltas` included.
        deltas: what was added to tensors, at the positions of old units.
    """
    answer = _Axis(changes, changes.before.by_name[axis], made, deltas).answer()
    return f"{axis} {answer}" if isinstance(answer, str) else None


class _Axis:
    """The units of one grown axis as they will be."""

    def __init__(self, changes: Changes, record: AxisRecord, made: Made, deltas: Mapping[str, Tensor]) -> None:
        self._changes = changes
        self._record = record
        self._deltas = deltas
        floating = [slot for slot in record.slots if made(slot[0]).is_floating_point()]
        self._readers = [slot[:2] for slot in floating if slot[2] == "contract"]
        self._others = [slot[:2] for slot in floating if slot[2] != "contract"]
        self._tensors = {name: made(name) for name in dict.fromkeys(slot[0] for slot in floating)}
        units = changes.axes[record.number]
        self._new = np.flatnonzero(units == NEW)
        self._size = len(units)

    def answer(self) -> bool | str:
        """Why new units are seen; if they are not, whether that takes sums of weights that read equal units."""
        plain = self._problem([])
        if plain is None:
            return False
        groups = self._groups()
        if not groups:
            return plain
        crooked = next((name for name, _ in self._readers if not self._is_read_as_it_is(name)), None)
        if crooked is not None:
            return f"has equal units, whose weights in {crooked} are not read as they are"
        chance = self._chance()
        if chance is not None:
            return f"has equal units, which chance tells apart {chance.where}"
        return self._problem(groups) or True

    def _problem(self, groups: list[list[int]]) -> str | None:
        """Why new units are seen if the weights that read units of a group are added up."""
        tensors = dict(self._tensors)
        before = {name: self._before(name) for name, _ in self._readers if name in self._deltas}
        for name, dim in self._readers:
            tensors[name] = self._merged(tensors[name], name, dim, groups)
            if name in before:
                before[name] = self._merged(before[name], name, dim, groups)
        for name, expected in before.items():
            if not self._is_as_before(tensors[name], expected, name):
                return f"is read with other weights in {name}"
        edited, after = frozenset(self._changes.axes), self._changes.after
        found = invisible_removal(after, self._record.number, self._new, edited, tensors)
        if isinstance(found, Invisible) or (not self._readers and self._is_output()):
            return None
        return f"gets units that contribute: {found}"

    def _is_output(self) -> bool:
        return any(reason.kind == "output" for reason in self._record.reasons)

    def _positions(self, name: str, dim: int) -> list[Tensor]:
        """For every unit its positions along a dimension."""
        found = labels(self._changes.after.tensors[name][dim], self._changes.after.sizes, self._record.number)
        order = np.argsort(found, kind="stable")
        bounds = np.searchsorted(found[order], np.arange(self._size + 1))
        return [torch.from_numpy(order[a:b].copy()) for a, b in pairwise(bounds)]

    def _groups(self) -> list[list[int]]:
        """Units that are equal to each other, the first of them an old one if there is any, and new ones among them."""
        parts: list[list[bytes]] = [[] for _ in range(self._size)]
        among = dict.fromkeys(range(self._size) if self._deltas else self._new.tolist())
        for name, dim in self._others:
            tensor = self._tensors[name].detach()
            for unit, at in enumerate(self._positions(name, dim)):
                if unit in among:
                    one = tensor.index_select(dim, at.to(tensor.device)).cpu().contiguous()
                    parts[unit].append(one.view(torch.uint8).numpy().tobytes() if one.numel() else b"")
        alike: dict[tuple[bytes, ...], list[int]] = {}
        new = set(self._new.tolist())
        for unit in among:
            alike.setdefault(tuple(parts[unit]), []).append(unit)
        return [members for members in alike.values() if len(members) > 1 and not new.isdisjoint(members)]

    def _merged(self, tensor: Tensor, name: str, dim: int, groups: list[list[int]]) -> Tensor:
        """The weights that read, those of equal units added up in the first of them."""
        if not groups:
            return tensor
        positions, result, new = self._positions(name, dim), tensor.detach().clone(), set(self._new.tolist())
        for first, *others in groups:
            slices = [result.index_select(dim, positions[unit].to(result.device)) for unit in (first, *others)]
            total = torch.stack(slices).sum(0)
            if first in new:
                tolerance = _ROUNDING * torch.finfo(total.dtype).eps * torch.stack(slices).abs().sum(0)
                total = torch.where(total.abs() <= tolerance, torch.zeros_like(total), total)
            result.index_copy_(dim, positions[first].to(result.device), total)
            for unit in others:
                result.index_fill_(dim, positions[unit].to(result.device), 0.0)
        return result

    def _is_as_before(self, merged: Tensor, expected: Tensor, name: str) -> bool:
        """Whether the weights of old units, those of a group added up, are what they would be without the delta."""
        now = self._tensors[name]
        largest = now.abs().max() + self._deltas[name].to(now).abs().max()
        tolerance = _ROUNDING * torch.finfo(now.dtype).eps * largest
        return bool(((merged - expected).abs() <= tolerance).logical_or(~self._is_old(name)).all())

    def _before(self, name: str) -> Tensor:
        """A tensor without the delta, zero at new positions."""
        now = self._tensors[name].detach()
        return torch.where(self._is_old(name), now - self._deltas[name].to(now), torch.zeros_like(now))

    def _is_old(self, name: str) -> Tensor:
        """Which entries of a tensor were there before the edit."""
        return self._changes.is_old(name).to(self._tensors[name].device)

    def _chance(self) -> Call | None:
        """The first operator that draws other random numbers for every unit."""
        calls = (
            one.calls[index]
            for one in self._changes.before.predictions
            for index in one.flow.touching.get(self._record.number, ())
        )
        return next((call for call in calls if operator_name(call) in _RANDOM or _drops_heads(call)), None)

    def _is_read_as_it_is(self, name: str) -> bool:
        if any(name == other for other, _ in self._others):
            return False
        number = self._record.number
        return all(_is_summed_with(one, name, number) for one in self._changes.before.predictions)


def _drops_heads(call: Call) -> bool:
    return is_attention(call) and bool(call.arguments().get("dropout_p"))


def _is_summed_with(prediction: TracePrediction, name: str, axis: int) -> bool:
    """Whether a parameter does nothing but to weight sums over an axis, rearranged at most."""
    flow = prediction.flow
    pending = [value for value, known in flow.names.items() if known == name]
    while pending:
        value = pending.pop()
        for index in flow.readers.get(value, ()):
            call = prediction.calls[index]
            if operator_name(call) in _REARRANGING:
                pending.extend(out.index for out in call.outputs if out is not None)
                continue
            product = summed(prediction, call)
            sides = () if product is None else (product.left.ref.index, product.right.ref.index)
            if product is None or value not in sides or not sums_over(prediction, call, product, axis):
                return False
    return True


__all__ = ["judged", "seen"]

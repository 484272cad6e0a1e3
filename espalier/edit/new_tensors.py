"""What every tensor becomes in an edit: the one place where that is worked out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from espalier.edit.changes import Changes
from espalier.edit.contract import Contract, Scale
from espalier.edit.fill import fill
from espalier.edit.masks import Masking
from espalier.edit.plan import Plan
from espalier.edit.tensors import gather


@dataclass(frozen=True)
class NewTensors:
    """A plan, and what follows from it for every tensor."""

    plan: Plan
    changes: Changes
    contract: Contract
    masking: Masking

    def sources(self, name: str, tensor: Tensor) -> Sequence[np.ndarray | None] | None:
        """The index map of every dimension; None if the tensor stays as it is."""
        sources = self.changes.sources(name)
        if sources is None and (not self._keeps_values(name) or name in self.masking.remasked):
            return (None,) * tensor.dim()
        return sources

    def is_only_gathered(self, name: str) -> bool:
        """Whether all entries that stay keep their values."""
        return self._keeps_values(name) and self.masking.zero(name) is None

    def factor(self, name: str) -> Tensor | None:
        """What its entries are multiplied by, at the new sizes; None for one."""
        scale = self._scale(name)
        return None if scale is None else scale.factor

    def made(self, name: str, tensor: Tensor, sources: Sequence[np.ndarray | None]) -> Tensor:
        """The new tensor. Values of a plan are taken as they are; what surgery fills in by itself follows scales."""
        return self._masked(name, self._unmasked(name, tensor, sources))

    def silenced(self, name: str, tensor: Tensor) -> int:
        """How many weights masks set to zero which would not be zero."""
        sources, zero = self.sources(name, tensor), self.masking.zero(name)
        if sources is None or zero is None:
            return 0
        return int((self._unmasked(name, tensor, sources)[zero] != 0).sum())

    def _unmasked(self, name: str, tensor: Tensor, sources: Sequence[np.ndarray | None]) -> Tensor:
        given = self._of(name, self.plan.values)
        if given is None:
            start = fill(name, tensor, tuple(sources), self.changes, self.contract, self.plan.seed)
            new = _scaled(gather(tensor, sources, start), self._scale(name))
        else:
            new = gather(self._scaled_before(name, tensor), sources, given, like=tensor)
        return self._moved(name, new)

    def made_of_copy(self, name: str, tensor: Tensor, sources: Sequence[np.ndarray | None], new: Tensor) -> Tensor:
        """The new tensor of a copy of the model, in which new units start as in the model."""
        delta = self._of(name, self.plan.deltas)
        start = new if delta is None else new - delta.to(new)
        moved = self._moved(name, gather(self._scaled_before(name, tensor), sources, start, like=tensor))
        return self._masked(name, moved)

    def _masked(self, name: str, new: Tensor) -> Tensor:
        zero = self.masking.zero(name)
        return new if zero is None else new.masked_fill_(zero.to(new.device), 0)

    def _keeps_values(self, name: str) -> bool:
        return self._scale(name) is None and self._of(name, self.plan.deltas) is None

    def _scaled_before(self, name: str, tensor: Tensor) -> Tensor:
        scale = self.contract.scale_for(name, self.changes.before, self.changes)
        return tensor if scale is None else _scaled(tensor.detach().clone(), scale)

    def _moved(self, name: str, new: Tensor) -> Tensor:
        delta = self._of(name, self.plan.deltas)
        return new if delta is None else new.add_(delta.to(new))

    def _scale(self, name: str) -> Scale | None:
        return self.contract.scale_for(name, self.changes.after, self.changes)

    def _of(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
        found = tensors.get(name)
        if found is None and tensors:
            aliases = self.changes.before.aliases
            found = next((one for other, one in tensors.items() if aliases.get(other) == name), None)
        return found


def masked(work: NewTensors, tensors: Mapping[str, Tensor]) -> Contract:
    """The contract with masks, too: they change the network where they set to zero what is not."""
    contract = work.contract
    if contract.kind == "changing":
        return contract
    for name in sorted({*work.masking.before, *work.masking.after}):  # however the masks came
        count = work.silenced(name, tensors[name])
        if count:
            return replace(contract, kind="changing", why=f"masks set {count:,} weights of {name} to zero")
    return contract


def _scaled(tensor: Tensor, scale: Scale | None) -> Tensor:
    return tensor if scale is None else tensor.mul_(scale.factor.to(tensor)).add_(scale.offset)


__all__ = ["NewTensors", "masked"]

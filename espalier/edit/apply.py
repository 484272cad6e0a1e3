"""Carries out a plan: check, stage, verify, commit; or leave everything as it was.

The executor takes no decisions: what happens to every tensor follows from the index maps of the plan, the roles in the
topology and the contract.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from espalier.edit.attributes import AttributeChange
from espalier.edit.changes import Changes
from espalier.edit.contract import Contract, Scale
from espalier.edit.fill import fill
from espalier.edit.journal import Journal
from espalier.edit.masks import Masking
from espalier.edit.norms import DEFAULT_EPS
from espalier.edit.optimizer import check_shapes, plan_state
from espalier.edit.plan import Plan
from espalier.edit.tensors import gather
from espalier.edit.verify import changed_attribute
from espalier.errors import EspalierError, PlanError, SurgeryError
from espalier.graph.caches import drop_caches
from espalier.graph.capture import TensorTable, tensor_table


@dataclass(frozen=True)
class Copy:
    """A copy of the model that shares every edit, such as an averaged one."""

    root: nn.Module
    """The module in it that has the model's own paths."""
    table: TensorTable


def copy_of(table: TensorTable, module: nn.Module) -> Copy:
    """A copy with its tensors under the names of the model, also inside a wrapper that calls it ``module``."""
    inner = module._modules.get("module")
    for root in (module,) if inner is None else (module, inner):
        other = tensor_table(root)
        if table.tensors.keys() <= other.tensors.keys():
            for name, tensor in table.tensors.items():
                if other.tensors[name].shape != tensor.shape:
                    raise PlanError(
                        f"follow: {name} has shape {tuple(tensor.shape)} in the model and "
                        f"{tuple(other.tensors[name].shape)} in the copy; copy the model as it is now."
                    )
            return Copy(root, TensorTable({name: other.tensors[name] for name in table.tensors}, {}, {}, other.modules))
    missing = [name for name in table.tensors if name not in other.tensors]
    raise PlanError(
        f"follow: {type(module).__name__} is no copy of the model: it has no {missing[0]}. For an averaged model pass "
        "torch.optim.swa_utils.AveragedModel(model, use_buffers=True) or a deep copy."
    )


def compensating_attributes(model: nn.Module, contract: Contract) -> tuple[list[AttributeChange], str | None]:
    """The eps of every compensated norm multiplied by the ratio of sizes, and the first norm that holds none."""
    changes: list[AttributeChange] = []
    missing: str | None = None
    for path, (site, ratio) in {site.module: (site, ratio) for site, ratio in contract.norms}.items():
        module = model.get_submodule(path)
        name = next((name for name, value in vars(module).items() if _is_eps(name, value, site.eps)), None)
        if name is None:
            missing = missing or path
            continue
        value = getattr(module, name)
        if value is None:
            dtype = next(iter(module.parameters())).dtype
            new = (DEFAULT_EPS[str(dtype).removeprefix("torch.")] if site.eps is None else site.eps) * ratio
        else:
            new = value * ratio
        if new != value:
            changes.append(AttributeChange(path, (name,), value, new))
    return changes, missing


def _is_eps(name: str, value: object, eps: float | None) -> bool:
    """Whether an attribute holds the eps of a norm: by its name, or by the value that the operator got at the capture.

    An earlier compensation may have changed the value since; the operator may have got it rounded to single precision.
    """
    if value is None:
        return name == "eps"
    if not isinstance(value, float):
        return False
    return "eps" in name or (eps is not None and math.isclose(value, eps, rel_tol=1e-6))


def check_values(plan: Plan, changes: Changes, table: TensorTable) -> None:
    """Raise PlanError if the values or deltas that a plan brings do not fit."""
    for what, tensors in (("values", plan.values), ("deltas", plan.deltas)):
        for name, value in tensors.items():
            known = changes.before.aliases.get(name, name)
            if known not in table.tensors:
                raise PlanError(f"the plan brings {what} for {name!r}, which is no parameter or buffer of the model.")
            if what == "values" and changes.sources(known) is None:
                raise PlanError(f"the plan brings values for {name!r}, which it does not change.")
            _check_value(f"the plan's {what} for {name}", value, table.tensors[known], changes.after.shape(known))


def _check_value(what: str, value: object, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or not torch.can_cast(value.dtype, tensor.dtype):
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise PlanError(f"{what} are {found}; expected a tensor of type {tensor.dtype}.")
    try:
        torch.broadcast_to(value, shape)
    except RuntimeError as error:
        raise PlanError(
            f"{what} have shape {tuple(value.shape)}; expected one that broadcasts to the new shape {shape}."
        ) from error
    if not bool(torch.isfinite(value).all()):
        raise PlanError(f"{what} are not all finite.")


@dataclass(frozen=True)
class NewTensors:
    """What every tensor becomes: the one place where that is worked out."""

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


def masked(contract: Contract, work: NewTensors, tensors: Mapping[str, Tensor]) -> Contract:
    """The contract of a plan, masks included: they change the network where they set to zero what is not."""
    if contract.kind == "changing":
        return contract
    for name in sorted({*work.masking.before, *work.masking.after}):  # however the masks came
        count = work.silenced(name, tensors[name])
        if count:
            return replace(contract, kind="changing", why=f"masks set {count:,} weights of {name} to zero")
    return contract


def commit(
    journal: Journal,
    model: nn.Module,
    table: TensorTable,
    plan: Plan,
    changes: Changes,
    contract: Contract,
    masking: Masking,
    attributes: Sequence[AttributeChange],
    optimizers: Sequence[Optimizer],
    followers: Sequence[Copy],
    *,
    undoable: bool = True,
) -> None:
    """Replace every tensor that the plan touches, its gradient and its optimizer state, and set the attributes.

    Every old tensor is freed before the next one is replaced, where the new one and what that leaves out give it back;
    if the edit will not be undone (`undoable`), gradients and buffers too.

    Raises:
        SurgeryError: something failed half-way; everything is as it was before.
    """
    work = NewTensors(plan, changes, contract, masking)
    try:
        for name, tensor in table.tensors.items():
            sources = work.sources(name, tensor)
            if sources is None:
                continue
            new, factor, zero = work.made(name, tensor, sources), work.factor(name), masking.zero(name)
            _replace(journal, tensor, new, sources, optimizers, name, factor, zero)
            if work.is_only_gathered(name):
                journal.forget(tensor, sources, undoable)
            for follower in followers:
                other = follower.table.tensors[name]
                copied = work.made_of_copy(name, other, sources, new)
                _replace(journal, other, copied, sources, optimizers, name, factor, zero)
                if work.is_only_gathered(name):
                    journal.forget(other, sources, undoable)
            del new
        for root in (model, *(follower.root for follower in followers)):
            for change in attributes:
                journal.set_attribute(*changed_attribute(root, change))
        for root in (model, *(follower.root for follower in followers)):
            drop_caches(root.modules())
        for optimizer in optimizers:
            check_shapes(optimizer, model.named_parameters())
    except BaseException as error:
        journal.rollback()
        if isinstance(error, EspalierError) or not isinstance(error, Exception):
            raise
        raise SurgeryError(
            f"the edit failed half-way and was rolled back; nothing was changed: {type(error).__name__}: {error}"
        ) from error


def _scaled(tensor: Tensor, scale: Scale | None) -> Tensor:
    return tensor if scale is None else tensor.mul_(scale.factor.to(tensor)).add_(scale.offset)


def _replace(
    journal: Journal,
    tensor: Tensor,
    new: Tensor,
    sources: Sequence[np.ndarray | None],
    optimizers: Iterable[Optimizer],
    name: str,
    factor: Tensor | None,
    zero: Tensor | None,
) -> None:
    grad = None if tensor.grad is None else gather(tensor.grad, sources, 0.0, like=tensor)
    if grad is not None and factor is not None:
        grad.div_(factor.to(grad))
    states: list[tuple[Optimizer, Mapping[str, Tensor]]] = []
    if isinstance(tensor, nn.Parameter):
        states = [(one, plan_state(one, tensor, sources, new, name, factor, zero)) for one in optimizers]
    journal.replace_tensor(tensor, new, grad, name)
    for optimizer, entries in states:
        journal.replace_state(optimizer, tensor, entries, name)

"""Carries out a plan: check, stage, verify, commit; or leave everything as it was.

The executor takes no decisions: what happens to every tensor follows from the index maps of the plan, the roles in the
topology and the contract.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from espalier.edit.attributes import AttributeChange
from espalier.edit.changes import Changes
from espalier.edit.contract import Contract
from espalier.edit.journal import Journal
from espalier.edit.new_tensors import NewTensors
from espalier.edit.norms import DEFAULT_EPS
from espalier.edit.optimizer import check_shapes, plan_state
from espalier.edit.plan import Plan
from espalier.edit.tensors import gather
from espalier.edit.verify import changed_attribute
from espalier.errors import EspalierError, PlanError, SurgeryError
from espalier.graph.caches import drop_caches
from espalier.graph.named_tensors import TensorTable, tensor_table


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
class Ready:
    """An edit that is ready to be carried out: all that it touches, and what becomes of it."""

    model: nn.Module
    table: TensorTable
    work: NewTensors
    attributes: Sequence[AttributeChange]
    optimizers: Sequence[Optimizer]
    followers: Sequence[Copy]
    undoable: bool = True
    """Whether it may be undone; gradients and buffers are freed on the way if not."""


def commit(journal: Journal, ready: Ready) -> None:
    """Replace every tensor that the plan touches, its gradient and its optimizer state, and set the attributes.

    Every old tensor is freed before the next one is replaced, where the new one and what that leaves out give it back.

    Raises:
        SurgeryError: something failed half-way; everything is as it was before.
    """
    model, work, optimizers, followers = ready.model, ready.work, ready.optimizers, ready.followers
    with taken_back_on_failure(journal):
        for name, tensor in ready.table.tensors.items():
            sources = work.sources(name, tensor)
            if sources is None:
                continue
            new, factor, zero = work.made(name, tensor, sources), work.factor(name), work.masking.zero(name)
            _replace(journal, tensor, new, sources, optimizers, name, factor, zero)
            if work.is_only_gathered(name):
                journal.forget(tensor, sources, ready.undoable)
            for follower in followers:
                other = follower.table.tensors[name]
                copied = work.made_of_copy(name, other, sources, new)
                _replace(journal, other, copied, sources, optimizers, name, factor, zero)
                if work.is_only_gathered(name):
                    journal.forget(other, sources, ready.undoable)
            del new
        for root in (model, *(follower.root for follower in followers)):
            for change in ready.attributes:
                journal.set_attribute(*changed_attribute(root, change))
        for root in (model, *(follower.root for follower in followers)):
            drop_caches(root.modules())
        for optimizer in optimizers:
            check_shapes(optimizer, model.named_parameters())


@contextmanager
def taken_back_on_failure(journal: Journal) -> Iterator[None]:
    """Roll back if what is done meanwhile fails; any error that is not this package's own becomes a SurgeryError."""
    try:
        yield
    except BaseException as error:
        journal.rollback()
        if isinstance(error, EspalierError) or not isinstance(error, Exception):
            raise
        raise SurgeryError(
            f"the edit failed half-way and was rolled back; nothing was changed: {type(error).__name__}: {error}"
        ) from error


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

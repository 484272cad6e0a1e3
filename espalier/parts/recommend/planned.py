"""The network as a plan would make it, run for a while in eval mode; then it is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from espalier.edit.plan import Plan
from espalier.edit.verify import attributes_set
from espalier.graph.named_tensors import TensorTable, tensor_table
from espalier.graph.undisturbed import Attributes
from espalier.measure.cost import Cost, cost_of
from espalier.measure.stats import without_a_trace
from espalier.parts.ghosts.ghosts import put_tensors
from espalier.record import Preview
from espalier.structure import Structure

Loss = Callable[[nn.Module, Any], Tensor]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Planned:
    """A network that is as a plan makes it while `as_planned` holds it so."""

    parameters: Tensors
    """By name, as the plan makes them, without a graph."""
    trained: frozenset[str]
    """Those of them that gradients are asked for in training."""
    fresh: Mapping[str, Tensor]
    """Parameter -> which of its entries are new, of booleans in its shape; those without new entries are left out."""
    kept: Callable[[str, Tensor], Tensor | None]
    """(old name, tensors in its old shape, stacked) -> their entries that stay; None if it goes whole."""
    cost: Cost
    contract: str
    _model: nn.Module = field(repr=False)
    _table: TensorTable = field(repr=False)
    _tensors: Tensors = field(repr=False)
    _loss: Loss = field(repr=False)

    def loss(self, batch: Any, values: Tensors | None = None) -> Tensor:
        """The mean loss of a batch, with other values for some parameters if they are given.

        Gradients are recorded if they are enabled and the values ask for them.
        """
        attributes = Attributes(self._model.modules())
        try:
            put_tensors(self._table, {**self._tensors, **(values or {})})
            for module in self._model.modules():
                if isinstance(module, nn.RNNBase):  # which keeps a list of its weights beside them
                    module._flat_weights = [module._parameters[name] for name in module._flat_weights_names]
            return self._loss(self._model, batch)
        finally:
            attributes.restore()

    def losses(self, parts: Sequence[Any], values: Tensors | None = None) -> Tensor:
        """The mean loss of each of several batches: (parts,), in double precision on the CPU."""
        with torch.no_grad():
            found = [self.loss(part, values) for part in parts]
        return torch.stack([one.detach().double().cpu() for one in found])

    def gradients(self, batch: Any, values: Tensors, names: Sequence[str]) -> tuple[float, dict[str, Tensor]]:
        """The loss of a batch and its gradients by named parameters, zeros where it does not depend on them."""
        leaves = {name: values[name].detach().requires_grad_() for name in names}
        with torch.enable_grad():
            loss = self.loss(batch, {**values, **leaves})
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) if loss.requires_grad else ()
        full = found or (None,) * len(names)
        return float(loss), {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), full, strict=True)
        }


@contextmanager
def as_planned(structure: Structure, plan: Plan, loss: Loss) -> Iterator[Planned]:
    """Hold a network as a plan of either units or layers would make it, while the body runs; the empty plan as it is.

    Raises:
        PlanError, SurgeryError: as `Structure.apply`.
    """
    if plan.depth:
        before = {id(one) for one in structure.model.parameters()}
        names = dict(structure.model.named_parameters())
        with structure.tried(plan) as edit, _eval_mode(structure.model):
            table = tensor_table(structure.model)
            found = _parameters(table)
            fresh = {
                name: torch.ones(one.shape, dtype=torch.bool, device=one.device)
                for name, one in found.items()
                if id(one) not in before
            }
            present = {id(one) for one in found.values()}

            def kept(name: str, tensor: Tensor) -> Tensor | None:
                return tensor if id(names[name]) in present else None

            yield _planned(structure, table, {}, loss, fresh, kept, edit.cost_after, edit.contract)
        return
    preview = structure.preview(plan)
    table = tensor_table(structure.model)
    new = {
        name: ~preview.changes.is_old(name).expand(tensor.shape).to(tensor.device)
        for name, tensor in preview.tensors.items()
        if isinstance(table.tensors[name], nn.Parameter)
    }
    fresh = {name: mask for name, mask in new.items() if bool(mask.any())}
    cost = cost_of(preview.after)
    with _eval_mode(structure.model), attributes_set(structure.model, preview.attributes):
        yield _planned(
            structure, table, preview.tensors, loss, fresh, _kept(preview), cost, preview.contract.kind
        )  # fmt: skip


def _planned(
    structure: Structure,
    table: TensorTable,
    tensors: Tensors,
    loss: Loss,
    fresh: Mapping[str, Tensor],
    kept: Callable[[str, Tensor], Tensor | None],
    cost: Cost,
    contract: str,
) -> Planned:
    own = _parameters(table)
    trained = frozenset(name for name, one in own.items() if one.requires_grad)
    values = {name: tensors.get(name, one).detach() for name, one in own.items()}
    return Planned(values, trained, fresh, kept, cost, contract, structure.model, table, tensors, loss)


def _kept(preview: Preview) -> Callable[[str, Tensor], Tensor | None]:
    def kept(name: str, tensor: Tensor) -> Tensor | None:
        if name not in preview.before.tensors:
            return tensor
        for dim, source in enumerate(preview.sources(name), 1):
            if source is not None:
                old = torch.from_numpy(source[source >= 0]).to(tensor.device)
                tensor = tensor.index_select(dim, old)
        return tensor

    return kept


def _parameters(table: TensorTable) -> dict[str, nn.Parameter]:
    return {
        name: one
        for name, one in table.tensors.items()
        if isinstance(one, nn.Parameter) and one.is_floating_point() and not one.is_meta
    }


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    with without_a_trace(model):
        for module in model.modules():
            module.training = False
        yield


__all__ = ["Loss", "Planned", "as_planned"]

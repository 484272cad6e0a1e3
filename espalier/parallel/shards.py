"""Edits of a network that is shared out: tensor by tensor, each with its gradient and optimizer state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from espalier.edit.apply import Ready, taken_back_on_failure
from espalier.edit.journal import Journal
from espalier.edit.new_tensors import NewTensors
from espalier.edit.optimizer import aged, check_shapes, followed
from espalier.edit.plan import Plan
from espalier.edit.tensors import Sources, gather, new_shape
from espalier.edit.verify import changed_attribute
from espalier.edit.whole import whole
from espalier.errors import PlanError
from espalier.graph.caches import drop_caches
from espalier.graph.named_tensors import TensorTable, tensor_table
from espalier.parallel.fully_shard import FullyShard, empty, fill_shards, shared_out
from espalier.parallel.ranks import Ranks


class Shards(Ranks):
    """The processes that share a network out; see `espalier.peers.Peers`."""

    whole = False

    def __init__(self, fully: FullyShard) -> None:
        parameter = next(fully.model.parameters())
        assert isinstance(parameter, DTensor)
        members = sorted(parameter.device_mesh.mesh.flatten().tolist())
        super().__init__(members, parameter.device_mesh.get_group(0), parameter.to_local().device)
        self._fully = fully
        self.store = ShardStore(fully, self)

    def live(self, model: nn.Module) -> nn.Module:
        """The model that is shared out."""
        return self._fully.model

    def rebind(self) -> None:
        """Show the new values to those who are looking; the edit itself made the new model."""
        self._fully.show()

    def looking(self) -> AbstractContextManager[None]:
        """The values are put together on every rank."""
        return self._fully.looking()

    def put_together(self, name: str) -> None:
        """Before a tensor is put together: raise ParallelError unless all ask for this one."""
        self.exchange(f"the values of {name}")


class ShardStore:
    """Entries in shards; see `espalier.edit.store.Store`."""

    def __init__(self, fully: FullyShard, peers: Shards) -> None:
        self.fully = fully
        self._peers = peers

    def check(self, plan: Plan) -> None:
        """Raise PlanError for masks and for layers that come or go."""
        if plan.masks:
            raise PlanError("masks are not supported for a network that is sharded; prune units, or use replicas.")
        if plan.depth:
            raise PlanError(
                "layers cannot come or go in a network that is sharded; edit them before it is given to FullyShard."
            )

    def values(self, table: TensorTable) -> Mapping[str, Tensor]:
        """Every tensor, put together when it is asked for."""
        return self.fully.values(self._peers.put_together)

    def commit(self, journal: Journal, ready: Ready) -> None:
        """As `espalier.edit.apply.commit`: the sizes of the plain model first, then a new live one and its optimizer.

        One tensor at a time is whole: a parameter, its gradient, or one entry of its state.
        """
        self.fully.hide()
        try:
            with taken_back_on_failure(journal):
                self._carry_out(journal, ready)
        except BaseException:
            self.fully.show()
            raise

    def _carry_out(self, journal: Journal, ready: Ready) -> None:
        work = ready.work
        found: dict[str, Sources] = {}
        for name, tensor in ready.table.tensors.items():
            sources = work.sources(name, tensor)
            if sources is None:
                continue
            if isinstance(tensor, nn.Parameter):
                found[name] = sources
                new = empty(tensor, new_shape(tensor.shape, sources))
            else:
                new = work.made(name, tensor, sources)
            journal.replace_tensor(tensor, new, None, name)
        for change in ready.attributes:
            journal.set_attribute(*changed_attribute(ready.model, change))
        drop_caches(ready.model.modules())
        _Move(self.fully, work, found, ready.optimizers).carry_out(journal)


@dataclass
class _Move:
    """Everything that goes from one live model to the next."""

    fully: FullyShard
    work: NewTensors
    sources: Mapping[str, Sources]
    """Of the parameters that change."""
    optimizers: Sequence[Optimizer]
    states: list[dict[Tensor, Any]] = field(default_factory=list)
    """The new state of each optimizer."""

    def carry_out(self, journal: Journal) -> None:
        """Make the next live model, fill it, and let it and its parameters take the places of the old ones."""
        old, new = self.fully.model, self.fully.fresh()
        before, after = tensor_table(old).tensors, tensor_table(new).tensors
        parameters = {name: one for name, one in before.items() if isinstance(one, nn.Parameter)}
        self.states = [{} for _ in self.optimizers]
        for name, parameter in parameters.items():
            self._move(name, parameter, after[name])
        successors = {id(one): after[name] for name, one in parameters.items()}
        _swap(journal, self.fully, new)
        for optimizer, state in zip(self.optimizers, self.states, strict=True):
            _rewire(journal, optimizer, successors, state)
            check_shapes(optimizer, new.named_parameters())

    def _move(self, name: str, old: Tensor, new: Tensor) -> None:
        assert isinstance(old, DTensor)
        assert isinstance(new, DTensor)
        sources = self.sources.get(name)
        if sources is None:
            new.to_local().detach().copy_(old.to_local().detach())
            new.grad = old.grad
            for optimizer, state in zip(self.optimizers, self.states, strict=True):
                if old in optimizer.state:
                    state[new] = optimizer.state[old]
            return
        full = whole(old)
        made, factor = self.work.made(name, full, sources), self.work.factor(name)
        fill_shards(new, made)
        if old.grad is not None:
            grad = gather(whole(old.grad), sources, 0.0)
            new.grad = shared_out(grad if factor is None else grad.div_(factor.to(grad)), new)
        for optimizer, state in zip(self.optimizers, self.states, strict=True):
            if old in optimizer.state:
                state[new] = {
                    key: self._followed(type(optimizer), name, full, made, key, value)
                    for key, value in aged(optimizer, old, sources).items()
                }

    def _followed(self, kind: type[Optimizer], name: str, full: Tensor, made: Tensor, key: str, value: Any) -> Any:
        """One entry of the state of a parameter, which was `full` and has become `made`."""
        entry = whole(value) if isinstance(value, Tensor) else value
        factor = self.work.factor(name)
        planned = followed(kind, {key: entry}, full, self.sources[name], made, name, factor, None)
        if key not in planned:
            return value
        return shared_out(planned[key], value) if isinstance(value, DTensor) else planned[key]


def _swap(journal: Journal, fully: FullyShard, model: nn.Module) -> None:
    old = fully.model

    def back() -> None:
        fully.model = old

    journal.keep_way_back(back)
    fully.model = model


def _rewire(
    journal: Journal, optimizer: Optimizer, successors: Mapping[int, Tensor], state: Mapping[Tensor, Any]
) -> None:
    """Have an optimizer go on with other parameters, in its own groups."""
    groups = [(group["params"], list(group["params"])) for group in optimizer.param_groups]
    old = dict(optimizer.state)

    def back() -> None:
        for present, before in groups:
            present[:] = before
        optimizer.state.clear()
        optimizer.state.update(old)

    journal.keep_way_back(back)
    for present, before in groups:
        present[:] = [successors.get(id(one), one) for one in before]
    others = {one: entries for one, entries in old.items() if id(one) not in successors}
    optimizer.state.clear()
    optimizer.state.update({**others, **state})


__all__ = ["ShardStore", "Shards"]

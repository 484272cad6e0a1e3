"""Everything that edits do to the live objects of a structure: model, optimizer, copies, and what is known of them.

An edit is tried out first, carried out through one journal, and then what is known is replaced as a whole; whatever
fails on the way leaves all of them as they were.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from espalier.compiled import CompiledCode
from espalier.edit.apply import Ready, check_values, compensating_attributes, copy_of
from espalier.edit.attributes import AttributeChange
from espalier.edit.births import followed
from espalier.edit.changes import Changes, Limits, find_axis
from espalier.edit.contract import Contract, contract_of
from espalier.edit.depth import promise_of, regrow
from espalier.edit.given import judged
from espalier.edit.interrupt import uninterrupted
from espalier.edit.journal import Journal, UndoStack
from espalier.edit.known import Known, regrown
from espalier.edit.masks import Enforcer, Masking, Masks, masking_of
from espalier.edit.new_tensors import NewTensors, masked
from espalier.edit.optimizer import check as check_optimizer
from espalier.edit.optimizer import check_shapes
from espalier.edit.plan import Plan
from espalier.edit.refresh import verified
from espalier.edit.repair import UnrepairedError
from espalier.edit.scales import Constant
from espalier.edit.stage import Staged, settled, stage, with_refusal
from espalier.edit.store import Here, Store
from espalier.edit.verify import Subject, Verification, resized_example, verify
from espalier.edit.young import Youth
from espalier.errors import PlanError, SurgeryError
from espalier.graph.caches import drop_caches
from espalier.graph.eager import eagerly
from espalier.graph.named_tensors import TensorTable, tensor_table
from espalier.graph.topology import Topology
from espalier.measure.cost import cost_of
from espalier.peers import Alone, Peers
from espalier.record import Edit, Preview


@dataclass(frozen=True)
class _Prepared:
    """A plan that was tried out, with what follows from it for the network as it is now."""

    table: TensorTable
    work: NewTensors
    attributes: tuple[AttributeChange, ...]


class Surgery:
    """A live model, its optimizer and its copies under the knife."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None, known: Known, follow: Sequence[nn.Module], undo_limit: int
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.known = known
        self.follow = tuple(follow)
        self.peers: Peers = Alone(model)
        """The processes that train it together."""
        self.store: Store = Here()
        """Where the entries of its tensors are."""
        self.enforcer = Enforcer(optimizer)
        self.youth = Youth(optimizer)
        self.youth.look()
        self.compiled = CompiledCode()
        self.history: list[Edit] = []
        """The edits that hold, oldest first."""
        self.step = 0
        """Optimizer steps that are done: the birth of units that come now."""
        self._undo_limit = undo_limit
        self._undo = UndoStack([optimizer] if optimizer is not None else [], undo_limit)
        self._undone: deque[Known] = deque(maxlen=undo_limit)
        self._learnt: set[tuple[type, tuple[str, ...]]] = set()
        self._constants_moved = False

    @property
    def undoable(self) -> int:
        """How many of the last edits can be undone."""
        return len(self._undo)

    @property
    def may_undo(self) -> bool:
        """Whether edits are kept to be undone at all."""
        return self._undone.maxlen != 0

    @property
    def topology(self) -> Topology:
        """What is known of the network.

        When it is first asked for, every axis is tried out on fake tensors, so that one which says that it may change
        really can.
        """
        if not self.known.settled:
            with uninterrupted():
                found = settled(self.subject(), self.known.topology)
                if found is not None:
                    self.topology = found
        return self.known.topology

    @topology.setter
    def topology(self, topology: Topology) -> None:
        self.known = replace(self.known, topology=topology, settled=True)

    def train_with(self, optimizer: Optimizer) -> None:
        """See `Structure.train_with`."""
        table = tensor_table(self.model)
        check_optimizer(optimizer, self.model.named_parameters())
        check_shapes(optimizer, list(table.tensors.items()))
        self._enforce({})  # the hook of the optimizer before goes
        if optimizer is not self.optimizer:
            self.youth = Youth(optimizer)
        self.youth.look()
        self.optimizer, self.enforcer = optimizer, Enforcer(optimizer)
        self._undo = UndoStack([optimizer], self._undo_limit)
        self._undone.clear()
        self._enforce(self.known.masks)

    def check(self, plan: Plan) -> tuple[Contract, tuple[AttributeChange, ...]]:
        """What applying a plan would promise and which attributes would follow; changes nothing.

        Layers come and go for a moment to find out: parameters, their gradients and the optimizer are as before.

        Raises:
            PlanError, SurgeryError: as `apply`.
        """
        with uninterrupted():
            if plan.depth:
                journal, _, edit = self._carried_out(plan)
                journal.rollback()
                return Contract(edit.contract, edit.why), edit.attributes
            prepared = self._prepare(plan)
        return prepared.work.contract, prepared.attributes

    @contextmanager
    def tried(self, plan: Plan) -> Iterator[Edit]:
        """See `Structure.tried`."""
        if plan.edits or plan.masks:
            raise PlanError("only layers are tried out; preview what resizes or masks.")
        with uninterrupted():
            journal, _, edit = self._carried_out(plan)
        try:
            with eagerly():
                yield edit
        finally:
            journal.rollback()

    def preview(self, plan: Plan, *, within_limits: bool = True) -> Preview:
        """Every tensor as a plan would make it; changes nothing. A plan without edits makes nothing.

        Args:
            plan: what would be applied.
            within_limits: whether the limits that the user set hold; False for what is only looked at.

        Raises:
            PlanError, SurgeryError: as `apply`; PlanError also for a plan in which layers come or go.
        """
        if plan.depth:
            raise PlanError("a plan in which layers come or go cannot be previewed; check or apply it.")
        if not plan.edits and not plan.masks and not plan.deltas:
            return Preview({}, (), Contract("exact", "nothing changes"), Changes({}, self.topology, self.topology))
        with uninterrupted():
            prepared, found = self._prepare(plan, within_limits=within_limits), {}
            work = prepared.work
            for name, tensor in self.store.values(prepared.table).items():
                sources = work.sources(name, tensor)
                if sources is not None:
                    found[name] = work.made(name, tensor, sources).detach()
        return Preview(found, prepared.attributes, work.contract, work.changes)

    def apply(self, plan: Plan) -> Edit:
        """Carry out a plan whole, or leave everything as it is.

        Raises:
            PlanError: the plan does not fit the structure as it is now.
            SurgeryError: the changed model would not run as predicted, or the commit failed; nothing was changed.
            ParallelError: other processes would do another edit, or the model's wrapper cannot follow one.
        """
        with uninterrupted():
            return self._apply(plan)

    def _apply(self, plan: Plan) -> Edit:
        self.peers.meet("an edit", plan, self._sizes())
        try:
            journal, known, edit = self._carried_out(plan)
        except Exception as error:
            self.peers.settle("an edit", error)
            raise
        try:
            self.peers.settle("an edit", None)
            self._enforce(known.masks)
            self.youth.look()
            self._renew_compiled(edit)
            self.peers.rebind()
            self._undo.push(journal)
        except BaseException:
            journal.rollback()
            self._enforce(self.known.masks)
            self.youth.look()
            raise
        while self._undone and len(self._undone) >= len(self._undo):  # an optimizer step ended what was kept before
            self._undone.popleft()
        self._undone.append(self.known)
        self.known = known
        self.history.append(edit)
        return edit

    def _enforce(self, masks: Masks) -> None:
        self.enforcer.enforce(masks, tensor_table(self.model).tensors if masks else {})

    def _carried_out(self, plan: Plan) -> tuple[Journal, Known, Edit]:
        """A plan done to model and optimizer, of which this object knows nothing yet."""
        self.store.check(plan)
        journal = Journal()
        if not plan.depth or plan.edits or plan.masks or plan.values or plan.deltas:
            known, edit = self._resized(journal, plan)
        else:
            known, edit = self.known, Edit.nothing(replace(plan, starts={}), cost_of(self.known.topology))
        if plan.depth:
            try:
                known, edit = self._regrown(journal, plan, known, edit)
            except BaseException:
                journal.rollback()
                raise
        return journal, known, edit

    def _resized(self, journal: Journal, plan: Plan) -> tuple[Known, Edit]:
        """The part of a plan that resizes axes and sets masks."""
        prepared, known = self._prepare(plan), self.known
        changes, contract, masking = prepared.work.changes, prepared.work.contract, prepared.work.masking
        origins = {changes.before.axes[number].name: units for number, units in changes.axes.items()}
        edit = Edit(
            replace(plan, values={}, deltas={}, starts={}, masks=()),
            contract.kind,
            contract.why,
            {
                changes.before.axes[number].name: (changes.before.sizes[number], changes.after.sizes[number])
                for number in changes.axes
            },
            cost_of(changes.before),
            cost_of(changes.after),
            prepared.attributes,
            {axis: tuple(units.tolist()) for axis, units in origins.items()},
            tuple(changes.before.aliases.get(name, name) for name in plan.values),
            masking.counts({name: changes.after.shape(name) for name in masking.remasked}),
        )
        after = replace(
            known.with_masks(masking.after),
            topology=changes.after,
            example=resized_example(self.known.example, changes.after.predictions[0], changes.after),
            births=followed(known.births, origins, self.step),
            attributes=(*known.attributes, *prepared.attributes),
        )
        optimizers = [self.optimizer] if self.optimizer is not None else []
        followers = [copy_of(prepared.table, module) for module in self.follow]
        ready = Ready(
            self.model, prepared.table, prepared.work, prepared.attributes, optimizers, followers, self.may_undo
        )
        self.store.commit(journal, ready)
        return after, edit

    def _regrown(self, journal: Journal, plan: Plan, known: Known, edit: Edit) -> tuple[Known, Edit]:
        """The part of a plan in which layers come or go, after its other parts."""
        promise = promise_of(known.topology, self.model, plan.depth, plan.starts)
        table = tensor_table(self.model)
        found = regrow(
            journal,
            self.model,
            known.example,
            known.topology,
            plan.depth,
            [self.optimizer] if self.optimizer is not None else [],
            [copy_of(table, module).root for module in self.follow],
            plan.starts,
        )
        after, renamed = regrown(known, found, self.step)
        tensors = tensor_table(self.model).tensors
        with torch.no_grad():
            for name in after.masks.keys() & found.copies.keys():
                tensors[name].mul_(after.masks[name])  # a copy may begin with other weights than its original
        return after, edit.followed_by(promise, found.attributes, renamed, cost_of(after.topology))

    def undo(self) -> Edit:
        """Take back the last edit, every byte of it; possible until the next optimizer step. Returns that edit.

        Raises:
            SurgeryError: there is nothing to undo, or something else changed the tensors since.
            ParallelError: other processes do not undo it.
        """
        with uninterrupted():
            self.peers.meet("undo", None, self._sizes())
            try:
                self._undo.undo()
            except Exception as error:
                self.peers.settle("undo", error)
                raise
            self.peers.settle("undo", None)
            for module in (self.model, *self.follow):
                drop_caches(module.modules())
            self.known = self._undone.pop()
            self._enforce(self.known.masks)
            self.youth.look()
            edit = self.history.pop()
            self._renew_compiled(edit)
            self.peers.rebind()
            return edit

    def _renew_compiled(self, edit: Edit) -> None:
        if edit.plan.depth or edit.sizes:
            self.compiled.renew(layers=bool(edit.plan.depth))

    def _sizes(self) -> dict[str, int]:
        topology = self.known.topology
        return {record.name: topology.sizes[number] for number, record in topology.axes.items()}

    def subject(self) -> Subject:
        table = tensor_table(self.model)
        self.check_untouched(table)
        return Subject(self.model, self.known.example, table, self.known.topology.sizes, learnt=self._learnt)

    def _prepare(self, plan: Plan, *, within_limits: bool = True) -> _Prepared:
        subject = self.subject()
        staged = self._staged(subject, plan, self.known.limits if within_limits else {})
        check_values(plan, staged.changes, subject.table)
        masking = masking_of(plan, staged.changes, self.known.masks, subject.table.tensors)
        constants, values = self._changed_constants(subject, staged), self.store.values(subject.table)
        contract = contract_of(staged.changes, values, constants, hold_norms=plan.hold_norms)
        if not staged.changes.axes:
            contract = replace(contract, why="what is masked is zero, and what is live anew starts at zero")
        if plan.values or plan.deltas:
            contract = self._judged(contract, staged.changes, plan, values, masking)
        work = NewTensors(plan, staged.changes, contract, masking)
        contract = masked(work, values)
        compensating, without_eps = compensating_attributes(self.model, contract)
        if without_eps is not None and contract.kind == "exact":
            why = f"the norm in {without_eps or 'the model'} keeps its eps, which is not in an attribute of the module"
            contract = replace(contract, kind="bounded", why=why)
        return _Prepared(subject.table, replace(work, contract=contract), (*staged.attributes, *compensating))

    def _judged(
        self, contract: Contract, changes: Changes, plan: Plan, values: Mapping[str, Tensor], masking: Masking
    ) -> Contract:
        """The contract of a plan that brings tensors of its own, which are made for it as they will be."""
        work, made = NewTensors(plan, changes, contract, masking), {}

        def after(name: str) -> Tensor:
            if name not in made:
                tensor = values[name]
                sources = work.sources(name, tensor)
                made[name] = tensor if sources is None else work.made(name, tensor, sources)
            return made[name]

        names = dict.fromkeys(changes.before.aliases.get(name, name) for name in plan.values)
        deltas = {changes.before.aliases.get(name, name): delta for name, delta in plan.deltas.items()}
        return judged(contract, changes, after, names, deltas)

    def _changed_constants(self, subject: Subject, staged: Staged) -> list[Constant]:
        """Numbers of the forward that are others than those recorded, before the edit or after it."""
        if not staged.changes.axes:
            return []
        scalars = staged.verification.scalars
        if not scalars and not self._constants_moved:
            return []
        self._constants_moved = True
        present = {one[:3]: one[3] for one in verified(subject, staged.changes.before, ()).scalars}
        new = {one[:3]: one[3] for one in scalars}
        return [
            Constant(*key, present.get(key, key[2]), new.get(key, key[2])) for key in dict.fromkeys((*present, *new))
        ]

    def _staged(self, subject: Subject, plan: Plan, limits: Mapping[str, Limits]) -> Staged:
        """The plan tried out; whatever this teaches about the network is kept, also if the plan is refused."""
        if (plan.masks or plan.deltas) and not plan.edits:  # no size changes, so everything runs as it does
            return Staged(Changes({}, self.topology, self.topology), (), Verification(None))
        try:
            staged = stage(subject, self.topology, plan, limits)
        except UnrepairedError as error:
            if len(plan.edits) == 1 and verify(subject, self.topology, ()).mismatch is None:
                number = find_axis(self.topology, plan.edits[0].axis).number
                self.topology = with_refusal(self.topology, number, error)
            raise
        self.topology = staged.changes.before
        return staged

    def check_untouched(self, table: TensorTable) -> None:
        """Raise SurgeryError if something else changed the model. A forward may resize buffers of its own."""
        topology = self.known.topology
        rebuilt: dict[str, tuple[int, ...]] = {}
        for name, tensor in table.tensors.items():
            if name not in topology.tensors:
                raise SurgeryError(f"{name} was added to the model after attach; attach to the model again.")
            if tuple(tensor.shape) == topology.shape(name):
                continue
            if topology.may_be_rebuilt(name):
                rebuilt[name] = tuple(tensor.shape)
            else:
                raise SurgeryError(
                    f"{name} should have shape {topology.shape(name)}, but has {tuple(tensor.shape)}: it was "
                    "changed by something else; attach to the model again."
                )
        missing = [name for name in topology.tensors if name not in table.tensors]
        if missing:
            raise SurgeryError(f"{missing[0]} was removed from the model after attach; attach to the model again.")
        if rebuilt:
            self.known = replace(self.known, topology=topology.rebuilt(rebuilt))


__all__ = ["Surgery"]

"""What `attach` returns: the axes of a live model, and the edits that can be made to them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from espalier.edit.apply import NewTensors, check_values, commit, compensating_attributes, copy_of, masked
from espalier.edit.attributes import AttributeChange
from espalier.edit.births import Births, followed
from espalier.edit.changes import Changes, Limits, blocking_reason, find_axis
from espalier.edit.contract import Contract, contract_of
from espalier.edit.given import judged
from espalier.edit.interrupt import uninterrupted
from espalier.edit.journal import UndoStack
from espalier.edit.masks import NO_MASKS, Enforcer, Masking, Masks, masking_of
from espalier.edit.plan import Plan, grow_plan, mask_plan, prune_plan
from espalier.edit.refresh import verified
from espalier.edit.repair import UnrepairedError
from espalier.edit.scales import Constant
from espalier.edit.stage import Staged, settled, stage, with_refusal
from espalier.edit.verify import Subject, Verification, resized_example, verify
from espalier.errors import PlanError, SurgeryError
from espalier.graph.caches import drop_caches
from espalier.graph.capture import TensorTable, tensor_table
from espalier.graph.dims import IntArray
from espalier.graph.topology import Slot, Tap, Topology
from espalier.measure.cost import Cost, axis_cost, cost_of
from espalier.table import text_table

LimitLike = Limits | tuple[int | None, int | None]


@dataclass(frozen=True)
class Axis:
    """One independent width of the network, as it is now."""

    name: str
    size: int
    """Number of units."""
    reason: str | None
    """Why it may not change; None if it may."""
    taps: tuple[Tap, ...]
    """Every place in the forward pass where something is done along it."""
    limits: Limits
    _topology: Topology = field(repr=False, compare=False)

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """Every place in parameters and buffers where it appears."""
        record = self._topology.by_name[self.name]
        return tuple(self._topology.slot(record.number, *slot) for slot in record.slots)

    @cached_property
    def unit_cost(self) -> Cost:
        """What one more unit costs, everything coupled to it included."""
        return axis_cost(self._topology, self._topology.by_name[self.name].number)

    @property
    def prunable(self) -> bool:
        """Whether it may be given a smaller size."""
        return self.reason is None and self.limits.below(self.size) is not None

    @property
    def growable(self) -> bool:
        """Whether it may be given a larger size."""
        return self.reason is None and self.limits.above(self.size) is not None


@dataclass(frozen=True)
class Edit:
    """The record of one applied plan."""

    plan: Plan
    contract: str
    """``exact``, ``bounded`` or ``changing``."""
    why: str
    sizes: Mapping[str, tuple[int, int]]
    """Axis -> (size before, size after)."""
    cost_before: Cost
    cost_after: Cost
    attributes: tuple[AttributeChange, ...]
    """Module attributes that followed."""
    units: Mapping[str, tuple[int, ...]] = field(repr=False)
    """Axis -> for every unit after the edit the old unit that it was; -1 for a new one."""
    given: tuple[str, ...] = field(default=(), repr=False)
    """Tensors whose new entries the plan brought itself."""
    masks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Parameters whose mask the plan set or took away -> (live weights before, after), at the new shape."""

    def __str__(self) -> str:
        sizes = [f"{name} {old} -> {new}" for name, (old, new) in self.sizes.items()]
        sizes += [f"{name} {old:,} -> {new:,} live" for name, (old, new) in self.masks.items()]
        return f"{', '.join(sizes)} ({self.contract}: {self.why})"


@dataclass(frozen=True)
class Preview:
    """What a plan would make of the network; nothing is changed."""

    tensors: Mapping[str, Tensor]
    """Parameters and buffers that would change -> new tensors, which share no memory with the old ones."""
    attributes: tuple[AttributeChange, ...]
    """Module attributes that would follow."""
    contract: Contract
    changes: Changes

    @property
    def before(self) -> Topology:
        """The topology as it is."""
        return self.changes.before

    @property
    def after(self) -> Topology:
        """The topology as it would be."""
        return self.changes.after

    @property
    def aliases(self) -> Mapping[str, str]:
        """Other names of shared tensors -> the names they go by."""
        return self.changes.before.aliases

    def sources(self, tensor: str) -> tuple[IntArray | None, ...]:
        """For every dimension of a tensor the old position of each new one, -1 for new; None where all stay."""
        return self.changes.sources(tensor) or (None,) * len(self.changes.before.tensors[tensor])


class Axes(Mapping[str, Axis]):
    """Axes by name, in the order in which the network runs; made anew from the present sizes at each access."""

    def __init__(self, structure: Structure) -> None:
        self._structure = structure

    def __getitem__(self, name: str) -> Axis:
        return self._structure._axis(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._structure.topology.by_name)

    def __len__(self) -> int:
        return len(self._structure.topology.by_name)

    def get(self, name: str, default: Any = None) -> Any:
        """The axis of that name, or the default."""
        return self[name] if name in self else default  # noqa: SIM401 - that would be this very function

    def __contains__(self, name: object) -> bool:
        return name in self._structure.topology.by_name


class Structure:
    """The topology of a live model, its optimizer, and the history of edits. Made by `attach`."""

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        topology: Topology,
        optimizer: Optimizer | None,
        limits: Mapping[str, Limits],
        follow: Sequence[nn.Module],
        undo_limit: int,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.example = example
        self._topology = topology
        self._settled = False
        self.limits = dict(limits)
        self._follow = tuple(follow)
        self._undo = UndoStack([optimizer] if optimizer is not None else [], undo_limit)
        self._undone: deque[tuple[Topology, Any, Births, Masks]] = deque(maxlen=undo_limit)
        self._masks: Masks = NO_MASKS
        self._enforcer = Enforcer(optimizer)
        self._history: list[Edit] = []
        self._learnt: set[tuple[type, tuple[str, ...]]] = set()
        self._constants_moved = False
        self.initial_sizes = {record.name: topology.sizes[record.number] for record in topology.axes.values()}
        self.initial_shapes = {name: topology.shape(name) for name in topology.tensors}
        self.births: Births = {name: np.zeros(size, np.int64) for name, size in self.initial_sizes.items()}
        """Axis -> for every unit the step at which it came, 0 for those that `attach` or `load` found."""
        self.step = 0
        """Optimizer steps that are done, as the session counts them: the birth of units that come now."""

    @property
    def topology(self) -> Topology:
        """What is known of the network.

        When it is first asked for, every axis is tried out on fake tensors, so that one which says that it may change
        really can.
        """
        if not self._settled:
            with uninterrupted():
                found = settled(self._subject(), self._topology)
                if found is not None:
                    self._topology, self._settled = found, True
        return self._topology

    @topology.setter
    def topology(self, topology: Topology) -> None:
        self._topology, self._settled = topology, True

    @property
    def axes(self) -> Axes:
        """The axes, by name."""
        return Axes(self)

    @property
    def history(self) -> tuple[Edit, ...]:
        """The edits that hold, oldest first."""
        return tuple(self._history)

    @property
    def masks(self) -> Masks:
        """Parameters -> what of them is live, as boolean tensors that are not to be changed; others are live whole.

        A network with masks computes with their zeros as with any other numbers: masks save no time. A tied parameter
        goes by its first name.
        """
        return self._masks

    @property
    def undoable(self) -> int:
        """How many of the last edits can be undone."""
        return len(self._undo)

    @property
    def may_undo(self) -> bool:
        """Whether edits are kept to be undone at all: `undo_limit` of `attach`."""
        return self._undone.maxlen != 0

    def axis(self, tensor: str, dim: int) -> Axis:
        """The axis at a dimension of a parameter or buffer.

        Raises:
            PlanError: no such tensor or dimension, a plain size, or several axes there (their names are listed).
        """
        name = self.topology.aliases.get(tensor, tensor)
        if name not in self.topology.tensors:
            raise PlanError(f"there is no parameter or buffer {tensor!r} in the model.")
        rank = len(self.topology.tensors[name])
        if not -rank <= dim < rank:
            raise PlanError(f"{tensor} has {rank} dimensions, found dim={dim}.")
        found = [
            record.name
            for record in self.topology.axes.values()
            if any(slot[:2] == (name, dim % rank) for slot in record.slots)
        ]
        if not found:
            raise PlanError(f"dimension {dim} of {tensor} is a plain size (a kernel position, for one), not an axis.")
        if len(found) > 1:
            raise PlanError(f"dimension {dim} of {tensor} is made of several axes: {', '.join(found)}; name one.")
        return self._axis(found[0])

    def cost(self) -> Cost:
        """Parameters and FLOPs (of the example inputs) as the network is now."""
        return cost_of(self.topology)

    def prune(self, axis: str | Mapping[str, Iterable[int]], units: Iterable[int] | None = None, *,
              interface: bool = False) -> Edit:  # fmt: skip
        """Remove units: of one axis, or of several in one atomic plan given as ``{axis: units}``.

        Raises:
            PlanError: unknown axis, units out of range, repeated or all there are, or an axis that may not change.
            SurgeryError: the changed model would not run as predicted; nothing was changed.
        """
        if isinstance(axis, str):
            if units is None:
                raise PlanError(f"{axis}: which units? Give units=[...].")
            return self.apply(prune_plan({axis: units}, interface=interface))
        if units is not None:
            raise PlanError("give either an axis and units, or a mapping of axes to units, not both.")
        return self.apply(prune_plan(axis, interface=interface))

    def grow(self, axis: str | Mapping[str, int], by: int | None = None, *, interface: bool = False,
             seed: int = 0, values: Mapping[str, Tensor] | None = None) -> Edit:  # fmt: skip
        """Add units: to one axis, or to several in one atomic plan given as ``{axis: count}``.

        New units are wired so that the outputs stay as they are, in train and in eval mode, wherever the axis allows
        it; the edit's contract says whether it does.

        Args:
            axis: name of the axis, or a mapping of names to counts.
            by: number of new units.
            interface: allow axes of the model's own inputs, outputs and lookup tables.
            seed: seeds the random part of what new units start from.
            values: tensor name -> values for its new positions instead of the default ones.

        Raises:
            PlanError: unknown axis, a count below 1, values that do not fit, or an axis that may not change.
            SurgeryError: the changed model would not run as predicted; nothing was changed.
        """
        if isinstance(axis, str):
            if by is None:
                raise PlanError(f"{axis}: by how many units? Give by=n.")
            counts: Mapping[str, int] = {axis: by}
        elif by is not None:
            raise PlanError("give either an axis and by=n, or a mapping of axes to numbers of units, not both.")
        else:
            counts = axis
        return self.apply(grow_plan(counts, interface=interface, seed=seed, values=values or {}))

    def mask(self, tensor: str | Mapping[str, Tensor], live: Tensor | None = None) -> Edit:
        """Hold weights at zero: those of one parameter, or of several in one atomic plan given as ``{name: live}``.

        What is live anew starts at zero. Masks replace those that there are, follow every edit (new weights are live)
        and are kept by the optimizer that was attached, whatever the gradients are.

        Args:
            tensor: name of a parameter, or a mapping of names to masks.
            live: a boolean tensor of its shape, True for what is live.

        Raises:
            PlanError: no such parameter, or a mask that does not fit.
            SurgeryError: the commit failed; nothing was changed.
        """
        if isinstance(tensor, str):
            if live is None:
                raise PlanError(f"{tensor}: which weights are live? Give a mask, or call unmask.")
            return self.apply(mask_plan({tensor: live}))
        if live is not None:
            raise PlanError("give either a parameter and a mask, or a mapping of parameters to masks, not both.")
        return self.apply(mask_plan(tensor))

    def unmask(self, *tensors: str) -> Edit:
        """Take masks away: what they held at zero stays zero, as a plain value that trains on.

        Raises:
            PlanError: one of the parameters has no mask.
        """
        return self.apply(mask_plan(dict.fromkeys(tensors)))

    def check(self, plan: Plan) -> tuple[Contract, tuple[AttributeChange, ...]]:
        """What applying a plan would promise and which attributes would follow; changes nothing.

        Raises:
            PlanError, SurgeryError: as `apply`.
        """
        with uninterrupted():
            _, contract, attributes, _, _ = self._prepare(plan)
        return contract, tuple(attributes)

    def preview(self, plan: Plan, *, within_limits: bool = True) -> Preview:
        """Every tensor as a plan would make it; changes nothing. A plan without edits makes nothing.

        Args:
            plan: what would be applied.
            within_limits: whether the limits that the user set hold; False for what is only looked at.

        Raises:
            PlanError, SurgeryError: as `apply`.
        """
        if not plan.edits and not plan.masks:
            return Preview({}, (), Contract("exact", "nothing changes"), Changes({}, self.topology, self.topology))
        with uninterrupted():
            staged, contract, attributes, table, masking = self._prepare(plan, within_limits=within_limits)
            work, found = NewTensors(plan, staged.changes, contract, masking), {}
            for name, tensor in table.tensors.items():
                sources = work.sources(name, tensor)
                if sources is not None:
                    found[name] = work.made(name, tensor, sources).detach()
        return Preview(found, tuple(attributes), contract, staged.changes)

    def apply(self, plan: Plan) -> Edit:
        """Carry out a plan whole, or leave everything as it is.

        Raises:
            PlanError: the plan does not fit the structure as it is now.
            SurgeryError: the changed model would not run as predicted, or the commit failed; nothing was changed.
        """
        with uninterrupted():
            return self._apply(plan)

    def _apply(self, plan: Plan) -> Edit:
        staged, contract, attributes, table, masking = self._prepare(plan)
        changes = staged.changes
        edit = Edit(
            replace(plan, values={}, deltas={}, masks=()),
            contract.kind,
            contract.why,
            {
                changes.before.axes[number].name: (changes.before.sizes[number], changes.after.sizes[number])
                for number in changes.axes
            },
            cost_of(changes.before),
            cost_of(changes.after),
            tuple(attributes),
            {changes.before.axes[number].name: tuple(units.tolist()) for number, units in changes.axes.items()},
            tuple(changes.before.aliases.get(name, name) for name in plan.values),
            masking.counts({name: changes.after.shape(name) for name in masking.remasked}),
        )
        optimizers = [self.optimizer] if self.optimizer is not None else []
        followers = [copy_of(table, module) for module in self._follow]
        example = resized_example(self.example, changes.after.predictions[0], changes.after)
        keep = self.may_undo
        origins = {changes.before.axes[number].name: units for number, units in changes.axes.items()}
        births = followed(self.births, origins, self.step)
        journal = commit(
            self.model, table, plan, changes, contract, masking, attributes, optimizers, followers, undoable=keep
        )
        try:
            self._enforcer.enforce(masking.after, table.tensors)
            self._undo.push(journal)
        except BaseException:
            journal.rollback()
            self._enforcer.enforce(self._masks, table.tensors)
            raise
        while self._undone and len(self._undone) >= len(self._undo):  # an optimizer step ended what was kept before
            self._undone.popleft()
        self._undone.append((self._topology, self.example, self.births, self._masks))
        self._topology, self.example = changes.after, example
        self.births, self._masks = births, MappingProxyType(dict(masking.after))
        self._history.append(edit)
        return edit

    def undo(self) -> Edit:
        """Take back the last edit, every byte of it; possible until the next optimizer step. Returns that edit.

        Raises:
            SurgeryError: there is nothing to undo, or something else changed the tensors since.
        """
        with uninterrupted():
            self._undo.undo()
            for module in (self.model, *self._follow):
                drop_caches(module.modules())
            self._topology, self.example, self.births, masks = self._undone.pop()
            self._keep_masks(masks, tensor_table(self.model))
            return self._history.pop()

    def _keep_masks(self, masks: Masks, table: TensorTable) -> None:
        self._masks = MappingProxyType(dict(masks))
        self._enforcer.enforce(self._masks, table.tensors)

    def _subject(self) -> Subject:
        table = tensor_table(self.model)
        self._check_untouched(table)
        return Subject(self.model, self.example, table, self._topology.sizes, learnt=self._learnt)

    def _prepare(
        self, plan: Plan, *, within_limits: bool = True
    ) -> tuple[Staged, Contract, list[AttributeChange], TensorTable, Masking]:
        subject = self._subject()
        staged = self._staged(subject, plan, self.limits if within_limits else {})
        check_values(plan, staged.changes, subject.table)
        masking = masking_of(plan, staged.changes, self._masks, subject.table.tensors)
        constants = self._changed_constants(subject, staged)
        contract = contract_of(staged.changes, subject.table.tensors, constants)
        if not staged.changes.axes:
            contract = replace(contract, why="what is masked is zero, and what is live anew starts at zero")
        if plan.values or plan.deltas:
            contract = self._judged(contract, staged.changes, plan, subject.table, masking)
        contract = masked(contract, NewTensors(plan, staged.changes, contract, masking), subject.table.tensors)
        compensating, without_eps = compensating_attributes(self.model, contract)
        if without_eps is not None and contract.kind == "exact":
            why = f"the norm in {without_eps or 'the model'} keeps its eps, which is not in an attribute of the module"
            contract = replace(contract, kind="bounded", why=why)
        return staged, contract, [*staged.attributes, *compensating], subject.table, masking

    def _judged(
        self, contract: Contract, changes: Changes, plan: Plan, table: TensorTable, masking: Masking
    ) -> Contract:
        """The contract of a plan that brings tensors of its own, which are made for it as they will be."""
        work, made = NewTensors(plan, changes, contract, masking), {}

        def after(name: str) -> Tensor:
            if name not in made:
                tensor = table.tensors[name]
                sources = work.sources(name, tensor)
                made[name] = tensor if sources is None else work.made(name, tensor, sources)
            return made[name]

        names = {changes.before.aliases.get(name, name) for name in plan.values}
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
        if plan.masks and not plan.edits:  # no size changes, so everything runs as it does
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

    def _check_untouched(self, table: TensorTable) -> None:
        """Raise SurgeryError if something else changed the model. A forward may resize buffers of its own."""
        rebuilt: dict[str, tuple[int, ...]] = {}
        for name, tensor in table.tensors.items():
            if name not in self._topology.tensors:
                raise SurgeryError(f"{name} was added to the model after attach; attach to the model again.")
            if tuple(tensor.shape) == self._topology.shape(name):
                continue
            if self._topology.may_be_rebuilt(name):
                rebuilt[name] = tuple(tensor.shape)
            else:
                raise SurgeryError(
                    f"{name} should have shape {self._topology.shape(name)}, but has {tuple(tensor.shape)}: it was "
                    "changed by something else; attach to the model again."
                )
        missing = [name for name in self._topology.tensors if name not in table.tensors]
        if missing:
            raise SurgeryError(f"{missing[0]} was removed from the model after attach; attach to the model again.")
        if rebuilt:
            self._topology = self._topology.rebuilt(rebuilt)

    def _axis(self, name: str) -> Axis:
        record = find_axis(self.topology, name)
        return Axis(
            name,
            self.topology.sizes[record.number],
            blocking_reason(record, interface=False),
            record.taps,
            self.limits.get(name, Limits()),
            self.topology,
        )

    def __repr__(self) -> str:
        cost = self.cost()
        return f"Structure({type(self.model).__name__}: {len(self.axes)} axes, {cost})"

    def __str__(self) -> str:
        rows = []
        for axis in self.axes.values():
            may = ", ".join(word for word, can in (("grow", axis.growable), ("prune", axis.prunable)) if can) or "-"
            places = str(len({tensor for tensor, _, _ in self.topology.by_name[axis.name].slots}))
            rows.append((axis.name, str(axis.size), may, f"{axis.unit_cost.parameters:,}", places, axis.reason or ""))
        header = ("axis", "units", "may", "parameters per unit", "tensors", "why not")
        lines = [f"{type(self.model).__name__}: {self.cost()} for the example inputs", ""]
        lines += [*text_table(header, rows, right=(1, 3, 4)), *self.topology.notes]
        if self._masks:
            size, live = (sum(int(one) for one in each) for each in zip(
                *((mask.numel(), mask.sum()) for mask in self._masks.values()), strict=True
            ))  # fmt: skip
            lines += ["", f"masks hold {size - live:,} of {size:,} weights of {len(self._masks)} parameters at zero"]
            lines += _mask_table(self._masks)
        if self.topology.unknown:
            names = ", ".join(f"{name} ({count}x)" for name, count in self.topology.unknown.items())
            lines.append(f"unknown operators, which freeze what they touch: {names}")
        return "\n".join(lines)


def _mask_table(masks: Masks) -> list[str]:
    """A line for each parameter that has a mask."""
    counts = [(name, mask.numel(), int(mask.sum())) for name, mask in masks.items()]
    rows = [(name, f"{size:,}", f"{live:,}", f"{1 - live / max(size, 1):.1%}") for name, size, live in counts]
    return text_table(("parameter", "weights", "live", "sparsity"), rows, right=(1, 2, 3))


__all__ = ["Axes", "Axis", "Edit", "Preview", "Structure"]

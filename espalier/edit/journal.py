"""The journal: every change of an edit is made through it, so that what was replaced can be put back bit by bit.

Invariant: a record is taken before its change, and restoring in reverse order is right from any point in between.

A record holds the old tensor itself; or, once it was told to `forget` it, the entries that the new one leaves out, so
that an edit of a large network needs no second copy of what it changes, and keeping it for `undo` neither.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from espalier.edit.tensors import Remainder, Sources, checksum, left_out, replace
from espalier.errors import SurgeryError

_MISSING: Final = object()  # the value of an attribute or a state entry that did not exist


@dataclass
class TensorRecord:
    """A tensor before its change: an alias of its old storage, sizes and strides; its gradient and version."""

    tensor: Tensor
    name: str
    old: Tensor | Remainder
    grad: Tensor | Remainder | None
    version: int
    preserved: _unsafe_preserve_version_counter
    guard: RemovableHandle | None = None
    sum: Tensor | None = None
    """Of the new entries, if the old ones are to be put back from them."""

    def forget(self, sources: Sources, undoable: bool) -> None:
        """Keep what the new tensor leaves out instead of the old one; of the gradient too, if none will change it."""
        self.old = _less(self.old, self.tensor, sources)
        if undoable:
            self.sum = checksum(self.tensor) if isinstance(self.old, Remainder) else None
        else:
            self.grad = _less(self.grad, self.tensor.grad, sources)

    def restore(self) -> None:
        replace(self.tensor, _whole(self.old, self.tensor), _whole(self.grad, self.tensor.grad), self.name)
        if self.guard is not None:  # graphs from before the change fit again
            self.guard.remove()


@dataclass
class StateRecord:
    """Entries of the optimizer's state of one parameter before their change, and what took their place."""

    optimizer: Optimizer
    parameter: Tensor
    name: str
    old: Mapping[str, Any]
    new: Mapping[str, Any]
    existed: bool

    def forget(self, shape: torch.Size, sources: Sources) -> None:
        """Keep what the new entries of the parameter's old shape leave out instead of the old ones."""
        self.old = {
            key: _less(value, self.new[key], sources) if isinstance(value, Tensor) and value.shape == shape else value
            for key, value in self.old.items()
        }

    def restore(self) -> None:
        if not self.existed:
            self.optimizer.state.pop(self.parameter, None)
            return
        entries = self.optimizer.state[self.parameter]
        for key, value in self.old.items():
            if value is _MISSING:
                entries.pop(key, None)
            else:
                entries[key] = _whole(value, entries[key])


@dataclass(frozen=True)
class AttributeRecord:
    """An attribute of any object before its change; `own` if the object itself held it, not its class or a property."""

    owner: object
    name: str
    old: Any
    own: bool

    def restore(self) -> None:
        present = getattr(self.owner, self.name, _MISSING)
        if not self.own and self.name in _own_attributes(self.owner):
            delattr(self.owner, self.name)  # it would hide what the class has, even where the value is the same
        elif present is self.old:
            return
        elif self.old is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.old)


@dataclass(frozen=True)
class ModulesRecord:
    """The children of a module before their change."""

    owner: nn.Module
    old: Mapping[str, nn.Module | None]

    def restore(self) -> None:
        self.owner._modules.clear()
        self.owner._modules.update(self.old)


@dataclass(frozen=True)
class HookRecord:
    """A hook that was put on a module."""

    handle: RemovableHandle

    def restore(self) -> None:
        self.handle.remove()


@dataclass(frozen=True)
class OutsideRecord:
    """A change of what no other record knows, made as a whole."""

    restore: Callable[[], None]


@dataclass(frozen=True)
class GroupRecord:
    """The parameters of a group of an optimizer, and the state of those that leave it, before their change."""

    optimizer: Optimizer
    group: dict[str, Any]
    old: list[Any]
    state: Mapping[Tensor, Any]
    order: list[Tensor]
    """Of all states, as they were."""
    names: list[str] | None
    """Of the parameters, where the optimizer was made with names."""

    def restore(self) -> None:
        present = set(map(id, self.old))
        for parameter in self.group["params"]:
            if id(parameter) not in present:
                self.optimizer.state.pop(parameter, None)
        self.group["params"][:] = self.old
        if self.names is not None:
            self.group["param_names"][:] = self.names
        known = {**self.optimizer.state, **self.state}
        in_order = {one: known[one] for one in self.order if one in known}
        self.optimizer.state.clear()
        self.optimizer.state.update({**in_order, **known})


class Journal:
    """Makes the changes of one edit, and keeps what each replaced: the tensors themselves, no copies."""

    def __init__(self) -> None:
        self._records: list[
            TensorRecord | StateRecord | AttributeRecord | ModulesRecord | HookRecord | GroupRecord | OutsideRecord
        ] = []

    def replace_tensor(self, tensor: Tensor, new: Tensor, grad: Tensor | None = None, name: str = "a tensor") -> None:
        """Make a parameter or buffer hold `new`, and its gradient be `grad`. Raises SurgeryError as `replace` does."""
        old_grad = tensor.grad if tensor.is_leaf else None
        preserved = _unsafe_preserve_version_counter(tensor)
        record = TensorRecord(tensor, name, tensor.detach(), old_grad, tensor._version, preserved)
        self._records.append(record)
        try:
            record.guard = replace(tensor, new, grad, name)
        except SurgeryError:  # refused, with nothing changed
            self._records.pop()
            raise

    def replace_state(
        self, optimizer: Optimizer, parameter: Tensor, entries: Mapping[str, Any], name: str = "a parameter"
    ) -> None:
        """Set some entries of the optimizer's state of one parameter; the others stay as they are."""
        if not entries:
            return
        existed = parameter in optimizer.state
        present = optimizer.state[parameter] if existed else {}
        old = {key: present.get(key, _MISSING) for key in entries}
        self._records.append(StateRecord(optimizer, parameter, name, old, dict(entries), existed))
        optimizer.state[parameter].update(entries)

    def set_attribute(self, owner: object, name: str, value: object) -> None:
        """Set an attribute of a module, a configuration or any other object; it need not exist yet."""
        own = name in _own_attributes(owner)
        self._records.append(AttributeRecord(owner, name, getattr(owner, name, _MISSING), own))
        setattr(owner, name, value)

    def set_modules(self, owner: nn.Module, modules: Mapping[str, nn.Module | None]) -> None:
        """Give a module other children."""
        self._records.append(ModulesRecord(owner, dict(owner._modules)))
        owner._modules.clear()
        owner._modules.update(modules)

    def keep_hook(self, handle: RemovableHandle) -> None:
        """Note a hook that was put on a module just now."""
        self._records.append(HookRecord(handle))

    def keep_way_back(self, restore: Callable[[], None]) -> None:
        """Note a change that was made just now, by what takes it back."""
        self._records.append(OutsideRecord(restore))

    def set_group(
        self, optimizer: Optimizer, group: dict[str, Any], parameters: Sequence[Tensor], names: Mapping[int, str]
    ) -> None:
        """Give a group of an optimizer other parameters, in its own list; the state of those that leave it goes.

        Names are by `id` of the parameter; an optimizer that was made with names gets them.
        """
        staying = set(map(id, parameters))
        leaving = [one for one in group["params"] if id(one) not in staying and one in optimizer.state]
        state = {one: optimizer.state[one] for one in leaving}
        known: list[str] | None = group.get("param_names")
        before = None if known is None else list(known)
        self._records.append(GroupRecord(optimizer, group, list(group["params"]), state, list(optimizer.state), before))
        if known is not None:
            own = {id(one): name for one, name in zip(group["params"], known, strict=True)}
            known[:] = [names[id(one)] if id(one) in names else own[id(one)] for one in parameters]
        group["params"][:] = parameters
        for one in leaving:
            del optimizer.state[one]

    def take_over(self, other: Journal) -> None:
        """Add the changes of another journal, made after all of these, which is empty then."""
        self._records += other._records
        other._records = []

    def forget(self, tensor: Tensor, sources: Sources, undoable: bool) -> None:
        """Let go of the old entries of the tensor that was replaced last, of its gradient and of its state.

        They can still be put back, byte by byte but in new memory, from the new ones and what these leave out; the
        sources are those with which the new ones were gathered. For an edit that can be undone later (`undoable`), what
        a forward or backward pass may change in between is kept whole: gradients, and tensors that are no parameters.
        """
        if undoable and not isinstance(tensor, nn.Parameter):
            return
        last = next(at for at in reversed(range(len(self._records))) if isinstance(self._records[at], TensorRecord))
        record, *following = self._records[last:]
        assert isinstance(record, TensorRecord)
        assert record.tensor is tensor
        assert isinstance(record.old, Tensor)
        shape = record.old.shape
        record.forget(sources, undoable)
        for state in following:
            if isinstance(state, StateRecord):
                state.forget(shape, sources)

    def rollback(self) -> None:
        """Put everything back as if the edit had never been tried, for one that failed half-way.

        Version counters too, which is safe since nobody can have used the tensors in between: graphs recorded before
        the edit still run backward, and older journals remain valid. Raises SurgeryError if something resists, after
        restoring everything else.
        """
        versions = [record.preserved for record in self._records if isinstance(record, TensorRecord)]
        self._restore()
        for preserved in reversed(versions):
            preserved.__exit__()

    def undo(self) -> None:
        """Put everything back, for an edit that was completed and perhaps used. Raises SurgeryError as `rollback`."""
        self._restore()

    def parameters(self) -> list[TensorRecord]:
        """The records of parameters (buffers, which a forward pass may change, are left out)."""
        return [
            record
            for record in self._records
            if isinstance(record, TensorRecord) and isinstance(record.tensor, nn.Parameter)
        ]

    def groups(self) -> list[GroupRecord]:
        """The records of groups of optimizers."""
        return [record for record in self._records if isinstance(record, GroupRecord)]

    def states(self) -> list[StateRecord]:
        """The records of optimizer state."""
        return [record for record in self._records if isinstance(record, StateRecord)]

    def _restore(self) -> None:
        failures: list[Exception] = []
        while self._records:
            try:
                self._records.pop().restore()
            except Exception as error:
                failures.append(error)
        if failures:
            raise SurgeryError(
                f"{len(failures)} of the changes of an edit could not be taken back, the first because of: "
                f"{failures[0]}. Everything else was restored; load a checkpoint before going on."
            ) from failures[0]


def _less(old: Any, new: Any, sources: Sources) -> Any:
    """What `new` leaves out of `old`, where both together are `old` again; else `old` itself."""
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return old
    return left_out(old, new, sources) or old


def _whole(old: Any, new: Any) -> Any:
    return old.rejoined(new) if isinstance(old, Remainder) else old


class UndoStack:
    """The journals of the last edits, newest last; all end with the next optimizer step, which frees their tensors.

    Steps are noticed by a hook on each optimizer, since fused optimizers change parameters without counting versions.
    Other changes of the edited parameters and of their state are noticed by version, identity and, for changes that go
    past autograd (`parameter.data.add_()`) in parameters that the old ones are put back from, by a checksum.
    """

    def __init__(self, optimizers: Sequence[Optimizer], limit: int) -> None:
        self._journals: deque[Journal] = deque(maxlen=limit)
        self._versions: dict[int, tuple[Tensor, int]] = {}  # of every parameter in a journal, after the last edit
        self._states: dict[tuple[_Place, str], Any] = {}  # likewise of every entry of optimizer state
        self._optimizers = tuple(optimizers)
        self._hooked = False

    def __len__(self) -> int:
        return len(self._journals)

    def push(self, journal: Journal) -> None:
        """Keep the journal of a completed edit; beyond the limit the oldest goes."""
        if self._journals.maxlen == 0:
            return
        if not self._hooked:  # only now: attaching to a model leaves its optimizer as it is
            self._hooked = True
            for optimizer in self._optimizers:
                optimizer.register_step_post_hook(lambda *_: self.clear())
        before = {id(record.tensor): record.version for record in reversed(journal.parameters())}
        if any(before[key] != version for key, (_, version) in self._versions.items() if key in before):
            self.clear()  # somebody changed a parameter between two edits: the older one cannot be undone any more
        self._journals.append(journal)
        self._note(journal.parameters(), journal.states())

    def undo(self) -> None:
        """Undo the last edit. Raises SurgeryError, with nothing changed, if there is none that can be undone."""
        if not self._journals:
            raise SurgeryError(
                "There is nothing to undo: no edit was made since the last optimizer step, or all were undone. "
                "Undo an edit before the next step (and attach with undo_limit above 0), or load a checkpoint."
            )
        journal = self._journals[-1]
        changed = self._changed_since(journal)
        if changed is not None:
            raise SurgeryError(
                f"The last edit cannot be undone: {changed} was changed since then by something else, which undoing "
                "would lose. Undo an edit before changing what it touched, or load a checkpoint."
            )
        self._journals.pop()
        parameters, states = journal.parameters(), journal.states()
        try:
            journal.undo()
        except SurgeryError:
            self.clear()
            raise
        self._note(parameters, states)

    def clear(self) -> None:
        """Forget all journals; the tensors that they hold are freed."""
        self._journals.clear()
        self._versions.clear()
        self._states.clear()

    def _note(self, parameters: Sequence[TensorRecord], states: Sequence[StateRecord]) -> None:
        self._versions.update({id(record.tensor): (record.tensor, record.tensor._version) for record in parameters})
        self._states.update({(place, key): value for place, entries in map(_present, states) for key, value in entries})

    def _changed_since(self, journal: Journal) -> str | None:
        for record in journal.parameters():
            if self._versions[id(record.tensor)][1] != record.tensor._version:
                return f"parameter {record.name}"
            if record.sum is not None and not torch.equal(record.sum, checksum(record.tensor)):
                return f"parameter {record.name}"
        for group in journal.groups():
            if not any(one is group.group for one in group.optimizer.param_groups):
                return "a parameter group of the optimizer"
        for state in journal.states():
            place, entries = _present(state)
            for key, value in entries:
                if self._states[place, key] is not value:
                    return f"optimizer state {key!r} of {state.name}"
        return None


_Place = tuple[int, int]
"""An optimizer and a parameter, by id."""


def _present(record: StateRecord) -> tuple[_Place, list[tuple[str, Any]]]:
    """Optimizer and parameter of a record, and what the entries that it names hold now."""
    entries = record.optimizer.state.get(record.parameter, {})
    place = id(record.optimizer), id(record.parameter)
    return place, [(key, entries.get(key, _MISSING)) for key in record.new]


def _own_attributes(owner: object) -> Mapping[str, Any]:
    attributes: Mapping[str, Any] = getattr(owner, "__dict__", {})
    return attributes

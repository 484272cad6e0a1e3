"""Carries out the part of a plan in which layers and cells come and go; or leaves everything as it is.

The tree of modules is changed, the model is read anew, and everywhere outside of what changed it has to run as before
(`elsewhere`). Then parameters join and leave the optimizer. All of it goes through one journal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from espalier.edit.attributes import AttributeChange
from espalier.edit.depth_attributes import following, lists_of
from espalier.edit.depth_edits import NO_STARTS, DepthEdit, Insert, Remove, Replace, Starts
from espalier.edit.elsewhere import Changed, difference, repeats
from espalier.edit.journal import Journal
from espalier.edit.membership import follow
from espalier.edit.promise import Promise, weakest
from espalier.edit.steps import Step, known_region, lookup, make, resolved
from espalier.edit.verify import changed_attribute
from espalier.errors import CaptureError, EspalierError, SurgeryError
from espalier.graph.backward import backward_problem
from espalier.graph.caches import drop_caches
from espalier.graph.flow import operator_name
from espalier.graph.named_tensors import TensorTable, tensor_table
from espalier.graph.topology import Topology, infer


@dataclass(frozen=True)
class Regrown:
    """A network after layers came or went, and what became of its names."""

    topology: Topology
    steps: tuple[Step, ...]
    """How it was done."""
    modules: Mapping[str, str]
    """Path before -> path now of all modules that are still there."""
    tensors: Mapping[str, str]
    """Parameters and buffers that are still there: name before -> name now."""
    copies: Mapping[str, str]
    """New parameters and buffers -> name before of what each is a copy of."""
    copied: Mapping[str, str]
    """New modules -> path before of what each is a copy of."""
    attributes: tuple[AttributeChange, ...]
    """Attributes that followed, at their paths now."""


def promise_of(topology: Topology, model: nn.Module, edits: Sequence[DepthEdit], starts: Starts = NO_STARTS) -> Promise:
    """What edits of layers promise together: the weakest of what each does alone. Raises PlanError as `regrow`.

    What starts from values of the plan keeps the promise of its recipe only where that does not rest on these.
    """
    modules = lookup(model)
    absorbed = {path for one in edits if isinstance(one, Replace) for path in one.by.absorbed()}
    found = [Promise("exact", "nothing changes")]
    for edit in edits:
        if isinstance(edit, Insert):
            found.append(edit.layer.promise(topology, modules, edit.at, before=edit.before))
        elif isinstance(edit, Replace):
            found.append(edit.by.promise(topology, modules, edit.module, before=False))
        elif edit.module not in absorbed:
            found.append(_of_removal(topology, edit))
    for number, values in starts.items():
        edit = edits[number]
        assert not isinstance(edit, Remove)
        at, recipe = (edit.at, edit.layer) if isinstance(edit, Insert) else (edit.module, edit.by)
        silent = recipe.silent()
        if any(silent is None or (name in silent and bool(value.any())) for name, value in values.items()):
            found.append(Promise("changing", f"the new layer at {at} starts from values that the plan brings"))
    return weakest(reversed(found))


def _of_removal(topology: Topology, edit: Remove) -> Promise:
    region = known_region(topology, edit.module)
    visits = [one for each in topology.predictions for one in each.visits if one.module == edit.module]
    idle = all(one.first == one.last for one in visits)
    if edit.leaves == "entry" and region.entry is not None and idle:
        return Promise("exact", f"{edit.module} gives back what it gets")
    return Promise("changing", f"{edit.module} is left out")


def regrow(
    journal: Journal,
    model: nn.Module,
    example: Any,
    topology: Topology,
    edits: Sequence[DepthEdit],
    optimizers: Sequence[Optimizer],
    followers: Sequence[nn.Module],
    starts: Starts = NO_STARTS,
) -> Regrown:
    """Carry out edits of layers, all changes through the journal, which the caller rolls back if this raises.

    Args:
        journal: takes the changes.
        model: the model.
        example: example inputs that it runs on.
        topology: what is known of it as it is.
        edits: what is to be done; modules go by their present paths.
        optimizers: whose groups follow.
        followers: in every copy of the model that shares its edits the module that has the model's own paths.
        starts: values that parameters of new layers start from, in copies too.

    Raises:
        PlanError: an edit does not fit the model.
        SurgeryError: the changed model would not run as before outside of what changed.
    """
    table = tensor_table(model)
    present = infer(model, example, table)  # operators with the sizes that they have now among their arguments
    trains = not _writes_in_place(present) or backward_problem(model, example, table) is None
    refused: SurgeryError | None = None
    for delete in (True, False):
        steps = resolved(topology, model, edits, delete=delete)
        if refused is not None and not any(isinstance(one.edit, Remove) for one in steps):
            break
        attempt = Journal()
        try:
            found = _tried(attempt, model, example, present, steps, optimizers, followers, starts)
            if trains and _writes_in_place(found.topology):
                _check_backward(model, example)
        except SurgeryError as problem:
            attempt.rollback()
            refused = refused or problem
        except BaseException as error:
            attempt.rollback()
            if isinstance(error, EspalierError) or not isinstance(error, Exception):
                raise
            raise SurgeryError(f"the edit failed half-way: {type(error).__name__}: {error}") from error
        else:
            journal.take_over(attempt)
            return found
    assert refused is not None
    raise refused


def _writes_in_place(topology: Topology) -> bool:
    return any(
        operator_name(call) != call.name.removeprefix("aten::") for one in topology.predictions for call in one.calls
    )


def _check_backward(model: nn.Module, example: Any) -> None:
    problem = backward_problem(model, example, tensor_table(model))
    if problem is not None:
        raise SurgeryError(
            f"the model could not be trained any more: {problem} Set inplace=False in the activation next to this "
            "place."
        )


def replay(
    journal: Journal,
    model: nn.Module,
    plans: Sequence[Sequence[Step]],
    optimizers: Sequence[Optimizer],
    followers: Sequence[nn.Module],
) -> None:
    """Do to a freshly built model what the steps of one plan after the other did to another one, apart from values.

    Raises PlanError if they do not fit it.
    """
    for steps in plans:
        _change(journal, model, steps, optimizers, followers, NO_STARTS)


@dataclass(frozen=True)
class _Change:
    """A changed tree of modules, of which nobody knows yet whether it runs."""

    made: Sequence[nn.Module | None]
    here: Mapping[int, str]
    """`id` of every module -> its path now."""
    table: TensorTable
    modules: Mapping[str, str]
    tensors: Mapping[str, str]
    copies: Mapping[str, str]
    copied: Mapping[str, str]


def _change(
    journal: Journal,
    model: nn.Module,
    steps: Sequence[Step],
    optimizers: Sequence[Optimizer],
    followers: Sequence[nn.Module],
    starts: Starts,
) -> _Change:
    old_modules, old_table = dict(model.named_modules()), tensor_table(model)
    made = make(journal, model, steps, starts)
    for root in followers:
        make(journal, root, steps, starts)
    here = {id(module): path for path, module in model.named_modules()}
    table = tensor_table(model)
    tensors = _still_there(old_table, table)
    present = set(tensors.values())
    copied = _copied(steps, made, here)
    new = [name for name in table.tensors if name not in present]
    copies = {name: origin for name in new if (origin := _original(name, copied)) in old_table.tensors}
    beside = {name: _beside(name, steps, made, here) for name in new}
    for optimizer in optimizers:
        follow(journal, optimizer, old_table.tensors, table.tensors, copies, beside)
    modules = {path: here[id(one)] for path, one in old_modules.items() if id(one) in here}
    return _Change(made, here, table, modules, tensors, copies, copied)


def _tried(
    journal: Journal,
    model: nn.Module,
    example: Any,
    present: Topology,
    steps: Sequence[Step],
    optimizers: Sequence[Optimizer],
    followers: Sequence[nn.Module],
    starts: Starts,
) -> Regrown:
    old_modules, lists = dict(model.named_modules()), lists_of(model)
    change = _change(journal, model, steps, optimizers, followers, starts)
    attributes = following(model, lists, {path: old_modules[path] for path in change.modules})
    for root in (model, *followers):
        for one in attributes:
            journal.set_attribute(*changed_attribute(root, one))
        drop_caches(root.modules())
    try:
        after = infer(model, example, change.table)
    except CaptureError as problem:
        raise SurgeryError(f"the model would not run any more: {problem}") from problem
    back = {name: old for old, name in change.tensors.items()}
    found = difference(present, after, _changed(steps, change.made, change.here, back))
    if found is not None:
        places = ", ".join(step.module for step in steps)
        raise SurgeryError(
            f"the model would not run as before outside of {places}: {found}; nothing was changed. Its code treats "
            "this place in a way of its own: choose another one."
        )
    for new, source in change.copied.items():
        if not repeats(present, source, after, new):
            raise SurgeryError(f"a copy of {source} would not run as {source} does; nothing was changed.")
    return Regrown(
        after, tuple(steps), change.modules, change.tensors, change.copies, change.copied, tuple(attributes)
    )  # fmt: skip


def _still_there(before: TensorTable, after: TensorTable) -> dict[str, str]:
    names = after.names
    return {name: names[id(tensor)] for name, tensor in before.tensors.items() if id(tensor) in names}


def _changed(
    steps: Sequence[Step],
    made: Sequence[nn.Module | None],
    here: Mapping[int, str],
    tensors: Mapping[str, str],
) -> Changed:
    pairs = list(zip(steps, made, strict=True))
    return Changed(
        {
            step.module: (step.places[0], step.exit)
            for step in steps
            if isinstance(step.edit, Remove) and not step.states
        },
        frozenset(
            step.module for step in steps if isinstance(step.edit, Remove) and step.edit.leaves == "zero"
        ),
        {
            here[id(one)]: None if step.edit.leaves == "zero" else step.places[0]
            for step, one in pairs
            if isinstance(step.edit, Remove) and one is not None
        },
        {here[id(one)]: step.runs_on for step, one in pairs if isinstance(step.edit, Insert) and not step.states},
        {step.module: here[id(one)] for step, one in pairs if isinstance(step.edit, Replace)},
        tensors,
        {step.module: (step.states, step.exit) for step in steps if isinstance(step.edit, Remove) and step.states},
        {here[id(one)]: step.states for step, one in pairs if isinstance(step.edit, Insert) and step.states},
    )  # fmt: skip


def _copied(steps: Sequence[Step], made: Sequence[nn.Module | None], here: Mapping[int, str]) -> dict[str, str]:
    """Path of every new module that is a copy -> path of its original."""
    found: dict[str, str] = {}
    for step, new in zip(steps, made, strict=True):
        if isinstance(step.edit, Insert) and new is not None:
            for inner, source in step.edit.layer.origins().items():
                for path, _ in new.get_submodule(inner).named_modules():
                    whole = ".".join(filter(None, (here[id(new)], inner, path)))
                    found[whole] = ".".join(filter(None, (source, path)))
    return found


def _original(name: str, copied: Mapping[str, str]) -> str:
    path, _, key = name.rpartition(".")
    return f"{copied[path]}.{key}" if path in copied else ""


def _beside(name: str, steps: Sequence[Step], made: Sequence[nn.Module | None], here: Mapping[int, str]) -> str:
    """The module, as it was, at which a new parameter came."""
    for step, new in zip(steps, made, strict=True):
        if new is not None and name.startswith(f"{here[id(new)]}."):
            return step.module
    return ""


__all__ = ["Regrown", "promise_of", "regrow"]

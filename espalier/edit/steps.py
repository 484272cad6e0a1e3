"""Edits of layers as changes to the tree of modules: first resolved against what is known of the network, then made.

A resolved step says everything that making it needs, so that it can be made on copies of the model, and again on a
freshly built one when a checkpoint is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from espalier.edit.depth_edits import NO_STARTS, DepthEdit, Insert, Remove, Replace, Starts, from_json, shown, to_json
from espalier.edit.journal import Journal
from espalier.edit.layers import Bypass
from espalier.edit.recipes.base import Lookup
from espalier.edit.tree import Spot, insert, remove_entry, replace
from espalier.errors import PlanError
from espalier.graph.peeking import read_attributes
from espalier.graph.regions import Boundaries, Refusal, Region, region_of
from espalier.graph.shifts import states
from espalier.graph.topology import Topology
from espalier.graph.visits import Place


@dataclass(frozen=True)
class Step:
    """One edit and how it is made."""

    edit: DepthEdit
    places: tuple[Place, ...] = ()
    """Where the tensor is that a new layer runs on, or that a removed one leaves: among the arguments of the module, or
    its results if a layer comes after it."""
    runs_on: Place = (0,)
    """Where a new layer finds that tensor among its own arguments."""
    as_entry: bool = False
    """Whether a module is inserted into, or deleted from, the list that it is in."""
    exit: Place = ()
    """Where a removed module's result is among what it gives back."""
    result: str = "tensor"
    items: int = 1
    order: tuple[int, ...] = ()
    copied: bool = False
    """As in `Region`: the form of what a removed module gives back."""
    states: tuple[Place, ...] = ()
    """Where among its arguments a module that comes into a list, or goes, gets the last results of that list."""

    @property
    def module(self) -> str:
        """The module which it is about."""
        return self.edit.at if isinstance(self.edit, Insert) else self.edit.module

    def to_json(self) -> dict[str, Any]:
        """As what JSON can hold."""
        return {**{one.name: getattr(self, one.name) for one in fields(self)}, "edit": to_json(self.edit)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Step:
        """What `to_json` gave. Raises PlanError, KeyError or TypeError for anything else."""
        places, states = (tuple(tuple(one) for one in data[key]) for key in ("places", "states"))
        runs_on, exit, order = (tuple(data[key]) for key in ("runs_on", "exit", "order"))
        as_entry, copied = data["as_entry"] is True, data["copied"] is True
        items, result = int(data["items"]), str(data["result"])
        return cls(from_json(data["edit"]), places, runs_on, as_entry, exit, result, items, order, copied, states)


def resolved(topology: Topology, model: nn.Module, edits: Sequence[DepthEdit], *, delete: bool) -> tuple[Step, ...]:
    """How edits are made. Raises PlanError if one does not fit.

    Args:
        topology: what is known of the network.
        model: the network.
        edits: what is to be done to it.
        delete: whether entries of lists are deleted where they are removed.
    """
    together = {path for one in edits if isinstance(one, Replace) for path in one.by.absorbed()}
    removed = [one.module for one in edits if isinstance(one, Remove)]
    if len(removed) > 1:
        together.update(removed)  # a run that only together gives back what it gets, which is seen when it is tried
    _check_apart(edits)
    return tuple(_resolved(topology, model, one, together, delete=delete) for one in edits)


def _check_apart(edits: Sequence[DepthEdit]) -> None:
    gone = [one.module for one in edits if not isinstance(one, Insert)]
    for path in gone:
        for other in gone:
            if other.startswith(f"{path}.") or (other == path and gone.count(path) > 1):
                raise PlanError(f"{other} is removed or replaced twice in one plan.")
    for one in edits:
        if isinstance(one, Insert):
            lost = next((path for path in gone if f"{one.at}.".startswith(f"{path}.")), None)
            if lost is not None:
                raise PlanError(f"a layer is to come beside {one.at}, but {lost} goes in the same plan.")


def _resolved(topology: Topology, model: nn.Module, edit: DepthEdit, together: set[str], *, delete: bool) -> Step:
    path = edit.at if isinstance(edit, Insert) else edit.module
    spot, region = Spot.at(model, path), known_region(topology, path)
    attribute = read_attributes(spot.parent).get(spot.key)
    if attribute is not None and not isinstance(edit, Insert):
        raise PlanError(f"{path} cannot be removed or replaced: the code around it reads its {attribute}.")
    match edit:
        case Insert(_, layer, before):
            source = layer.origins().get("")
            alike = source is not None and type(Spot.at(model, source).module) is type(spot.module)
            entry = spot.is_sequential or (spot.is_list and alike)
            reason = region.no_layer_before if before else region.no_layer_after
            if reason:
                raise PlanError(f"no layer can come {'before' if before else 'after'} {path}: it {reason}.")
            copied = None if source is None else known_region(topology, source)
            runs_on = (0,) if copied is None or copied.entry is None else copied.entry
            handed = () if source is None or before or spot.is_sequential else _states(topology, model, source)
            return Step(
                edit, region.takes if before else (region.exit,), runs_on, entry, states=handed if entry else ()
            )
        case Remove(_, "inputs", _):
            handed = _states(topology, model, path)
            if not handed or spot.is_sequential or not spot.is_list:
                raise PlanError(f"{path} cannot leave its inputs: it is in no list that hands on the last results.")
            return Step(edit, handed[-1:], (0,), True, region.exit, states=handed)
        case Remove(_, leaves, asked):
            start = region.entry if asked is None else asked
            if asked is not None and asked not in (*region.choices, region.entry):
                raise PlanError(
                    f"{path} cannot be removed: its argument {shown(asked)} has not the size of its result."
                )
            if start is None and path in together:
                start = next(iter(region.takes), None)
            if start is None:
                hint = ", or ".join(f"entry={one!r}" for one in region.choices)
                hint = hint and f" Say which takes its place: {hint}."
                raise PlanError(f"{path} cannot be removed: it {region.no_removal}.{hint}")
            entry = delete and leaves == "entry" and not region.written and (spot.is_sequential or spot.is_list)
            form = region.exit, region.result, region.items, region.order, region.written
            return Step(edit, (start,), (0,), entry, *form)
        case Replace():
            return Step(edit)


def _states(topology: Topology, model: nn.Module, path: str) -> tuple[Place, ...]:
    parent = path.rpartition(".")[0]
    listed = model.get_submodule(parent)._modules if parent else model._modules
    return states(Boundaries(topology), path, [f"{parent}.{key}" if parent else key for key in listed])


def known_region(topology: Topology, path: str) -> Region:
    """What a module does. Raises PlanError if it is none whose work could be told from that of others."""
    found = region_of(topology, path)
    if isinstance(found, Refusal):
        raise PlanError(f"{path or 'the model itself'} cannot change as a whole: it {found.reason}.")
    return found


def lookup(model: nn.Module) -> Lookup:
    """The modules of a model as it is now, by path."""
    modules: dict[str, nn.Module] = dict(model.named_modules())

    def module(path: str) -> nn.Module:
        if path not in modules:
            raise PlanError(f"there is no module {path!r} in the model.")
        return modules[path]

    return module


def make(
    journal: Journal, model: nn.Module, steps: Sequence[Step], starts: Starts = NO_STARTS
) -> list[nn.Module | None]:
    """Change the tree of modules; what each step put into it is returned.

    Copies of a model get what is made of their own weights, the same where these are the same.

    Args:
        journal: takes the changes.
        model: whose tree; the steps were resolved on it or on a like one.
        steps: what to do, all of one plan.
        starts: `Plan.starts`, by the number of the step.

    Raises:
        PlanError: something does not fit.
    """
    modules, spots = lookup(model), [Spot.at(model, step.module) for step in steps]
    present = {id(one) for one in model.parameters()}
    made: list[nn.Module | None] = []
    for step, spot in zip(steps, spots, strict=True):
        if isinstance(step.edit, Insert):
            made.append(step.edit.layer.build(modules, step.module))
        elif isinstance(step.edit, Replace):
            made.append(step.edit.by.build(modules, step.module))
        else:
            made.append(None if step.as_entry else _left(spot, step, zero=step.edit.leaves == "zero"))
    for number, values in starts.items():
        new = made[number]
        assert new is not None
        _start(new, values, steps[number], present)
    for step, spot, new in zip(steps, spots, made, strict=True):
        if new is None:
            remove_entry(journal, spot)
        elif isinstance(step.edit, Insert):
            insert(journal, spot, new, step.places, before=step.edit.before, as_entry=step.as_entry)
        else:
            replace(journal, spot, new)
    return made


def _start(new: nn.Module, values: Mapping[str, Tensor], step: Step, present: Collection[int]) -> None:
    """Give parameters of a new layer the values that a plan brings, unless they are `present`, by id, already."""
    parameters, what = dict(new.named_parameters()), f"the new layer at {step.module}"
    for name, value in values.items():
        parameter = parameters.get(name)
        if parameter is None or id(parameter) in present:
            own = ", ".join(one for one, tensor in parameters.items() if id(tensor) not in present)
            raise PlanError(f"{what} has no parameter {name!r} of its own that could start from values; it has {own}.")
        if parameter.shape != value.shape:
            raise PlanError(
                f"{what}: {name} has shape {tuple(parameter.shape)}, but is to start from {tuple(value.shape)}."
            )
        if not bool(torch.isfinite(value).all()):
            raise PlanError(f"{what}: {name} is to start from values that are not finite.")
        with torch.no_grad():
            parameter.copy_(value)


def _left(spot: Spot, step: Step, *, zero: bool) -> nn.Module:
    left = Bypass(step.places[0], step.exit, step.items, step.result, step.order, zero=zero, copied=step.copied)
    left.train(spot.module.training)
    left.remember(spot.module)
    return left


__all__ = ["Step", "known_region", "lookup", "make", "resolved"]

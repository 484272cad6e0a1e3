"""Everything that is tried on one model, in a process of its own."""

from __future__ import annotations

import copy
import random
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from oracles import call
from torch import nn
from torch.optim import SGD, Optimizer
from zero_and_remove import TOLERANCE, RemovalOracle, corruptions, difference, held_outputs
from zoo_parts.prepare import prepared
from zoo_parts.record import Record, StepError

import espalier as esp
from espalier.edit.changes import changes_of
from espalier.edit.contract import contract_of
from espalier.edit.plan import grow_plan
from espalier.graph.dims import axes_of
from espalier.graph.named_tensors import tensor_table
from espalier.graph.topology import INTERFACE, Topology
from espalier.graph.trees import flatten_tensors
from espalier.structure import Structure

PRUNED, GROWN = 0.3, 0.25
PLAIN = frozenset({"size"})
"""Kinds of reasons besides the interface's that hold a plain size: a number of tokens, a single broadcast unit."""


def check(name: str, path: Path, mutations: bool = False, each: bool = False) -> None:
    """Try everything on a model of the zoo; the findings are in `path`, also of the steps before a crash.

    Args:
        mutations: corrupt every weight of the pruned network, one at a time: the comparison has to see it.
        each: grow every axis by itself, too, and compare what was promised with what happened.
    """
    torch.set_num_threads(1)
    record = Record(name, path)
    with record.step("build"):
        model, example = prepared(name)
    if not record.passed("build"):
        return
    optimizer = SGD([one for one in model.parameters() if one.requires_grad], lr=1e-5, momentum=0.9)
    record.found["parameters"] = sum(one.numel() for one in model.parameters())
    with record.step("attach"):
        structure = esp.attach(model, example, optimizer=optimizer)
    if not record.passed("attach"):
        return
    with record.step("axes"):
        record.found |= _described(structure)
    with record.step("outputs"):
        before = {train: held_outputs(model, example, train) for train in (False, True)}
    if not record.passed("axes", "outputs"):
        return
    _prune(record, structure, mutations)
    _grow(record, structure, before)
    if each:
        _grow_each(record, structure, before)
    for factor in (0.5, 2.0):
        _scale(record, structure, factor)
    _train_and_save(record, structure, name)
    record.found["finished"] = True
    record.write()


def _described(structure: Structure) -> dict[str, Any]:
    """Axes, what holds the others, and how many parameters may change."""
    topology = structure.topology
    frozen: dict[str, list[str]] = defaultdict(list)
    for one in topology.axes.values():
        if not any(reason.kind in INTERFACE for reason in one.reasons):
            for reason in one.reasons:
                frozen[f"{reason.kind}: {reason.text}"].append(one.name)
    every, counted = shares(topology)
    return {
        "axes": len(topology.axes),
        "prunable": sum(axis.prunable for axis in structure.axes.values()),
        "growable": sum(axis.growable for axis in structure.axes.values()),
        "frozen": frozen,
        "unknown": dict(topology.unknown),
        "share_of_all": every,
        "share": counted,
    }


def shares(topology: Topology) -> tuple[float, float]:
    """The share of parameters on at least one axis that may change: of all parameters, and of those that have a
    dimension which is neither a kernel position nor a size of the interface.
    """
    free = {number for number, record in topology.axes.items() if not record.reasons}
    kinds = {number: {reason.kind for reason in record.reasons} for number, record in topology.axes.items()}
    fixed = {number for number, found in kinds.items() if found and (found & INTERFACE or found <= PLAIN)}
    total = on_axis = counted = 0
    for name in topology.parameters:
        numbers = {number for dim in topology.tensors[name] for number in axes_of(dim)}
        size = torch.Size(topology.shape(name)).numel()
        total += size
        on_axis += size if numbers & free else 0
        known = numbers & topology.axes.keys()
        counted += size if numbers & free or known - fixed else 0
    return on_axis / max(total, 1), on_axis / max(counted, 1)


def chosen_units(structure: Structure, share: float) -> dict[str, list[int]]:
    """A random share of the units of every axis that may shrink, down to two units."""
    rng = random.Random(0)
    return {
        axis.name: sorted(rng.sample(range(axis.size), max(1, int(axis.size * share))))
        for axis in structure.axes.values()
        if axis.prunable and axis.size > 2
    }


def _prune(record: Record, structure: Structure, mutations: bool) -> None:
    units = chosen_units(structure, PRUNED)
    with record.step("prune") as entry:
        edit = structure.prune(units)
        entry |= {"contract": edit.contract, "why": edit.why, "attributes": len(edit.attributes)}
    if not record.passed("prune"):
        return
    with record.step("forward after prune"):
        _run(structure)
    with record.step("undo prune"):
        structure.undo()
    tokens = [name for name in units if not _vanishes_at_zero(structure, name)]
    record.found["not compared"] = tokens
    units = {name: chosen for name, chosen in units.items() if name not in tokens}
    with record.step("oracle"):
        oracle = RemovalOracle(structure, units)
        structure.prune(units)
    if record.passed("forward after prune", "oracle"):
        with record.step("zero and remove") as entry:
            errors = oracle.errors(structure.model)
            entry["error_eval"], entry["error_train"] = errors[False], errors[True]
            if max(errors.values()) > TOLERANCE:
                entry["error_with_old_constants"] = max(oracle.errors(structure.model, hold_constants=True).values())
                raise StepError(f"outputs differ by {errors[False]:.1e} in eval and {errors[True]:.1e} in train mode")
        if mutations and record.passed("zero and remove"):
            with record.step("mutations") as entry:
                entry |= caught_corruptions(structure, oracle)
        structure.undo()


def _vanishes_at_zero(structure: Structure, axis: str) -> bool:
    """Whether units that are zero contribute nothing. Additional tokens, which nothing produces, are attended to."""
    return any(slot.role in ("produce", "contract", "filter", "group") for slot in structure.axes[axis].slots)


def caught_corruptions(structure: Structure, oracle: RemovalOracle) -> dict[str, Any]:
    """Roll what one weight reads by one position, for every weight; count which of it the oracle sees.

    A weight that has no influence at all on the outputs is left out: noise in its place changes nothing either.
    """
    model = copy.deepcopy(structure.model)
    tensors = tensor_table(model).tensors
    caught, missed, equivalent = 0, [], []
    for tensor, dim in corruptions(structure):
        held = tensors[tensor].detach().clone()
        if torch.equal(held.roll(1, dim), held):
            equivalent.append(tensor)
            continue
        if _error_with(oracle, model, tensors[tensor], held.roll(1, dim)) > TOLERANCE:
            caught += 1
        elif _error_with(oracle, model, tensors[tensor], torch.randn_like(held) * held.std()) > TOLERANCE:
            missed.append(tensor)
        else:
            equivalent.append(tensor)
        with torch.no_grad():
            tensors[tensor].copy_(held)
    return {"caught": caught, "missed": missed, "equivalent": equivalent}


def _error_with(oracle: RemovalOracle, model: nn.Module, tensor: torch.Tensor, values: torch.Tensor) -> float:
    with torch.no_grad():
        tensor.copy_(values)
    return oracle.error(model)


Outputs = Mapping[bool, list[torch.Tensor]]


def _grow(record: Record, structure: Structure, before: Outputs) -> None:
    """Every axis in one plan; then those alone that promise to be exact, whose outputs can be compared."""
    counts = {axis.name: max(1, int(axis.size * GROWN)) for axis in structure.axes.values() if axis.growable}
    exact = {name: count for name, count in counts.items() if _promise(structure, name) == "exact"}
    record.found["exact_growth"] = len(exact)
    _grow_these(record, structure, before, counts, "")
    if exact and exact != counts:
        _grow_these(record, structure, before, exact, " exact")


def _grow_these(record: Record, structure: Structure, before: Outputs, counts: Mapping[str, int], which: str) -> None:
    with record.step(f"grow{which}") as entry:
        edit = structure.grow(counts)
        entry |= {"contract": edit.contract, "why": edit.why, "attributes": len(edit.attributes)}
    if not record.passed(f"grow{which}"):
        return
    with record.step(f"forward after grow{which}") as entry:
        _run(structure)
        entry["error_eval"], entry["error_train"] = errors = _changes(structure, before)
        if edit.contract == "exact" and max(errors) > TOLERANCE:
            raise StepError(f"is said to be exact, but differs by {errors[0]:.1e} (eval), {errors[1]:.1e} (train)")
    with record.step(f"undo grow{which}"):
        structure.undo()


def _grow_each(record: Record, structure: Structure, before: Outputs) -> None:
    """Every axis by itself: what was promised against what happened."""
    with record.step("grow each") as entry:
        wrong, hidden, kept, refused = [], [], 0, {}
        for name in [axis.name for axis in structure.axes.values() if axis.growable]:
            try:
                promise = structure.grow(name, by=2).contract
            except esp.EspalierError as refusal:
                refused[name] = str(refusal)[:300]
                continue
            same = max(_changes(structure, before)) <= TOLERANCE
            structure.undo()
            kept += promise == "exact" and same
            wrong += [name] if promise == "exact" and not same else []
            hidden += [name] if promise != "exact" and same else []
        entry |= {"exact": kept, "wrong": wrong, "exact but not promised": hidden, "refused": refused}
        if wrong or refused:
            raise StepError(f"not exact though promised: {wrong}; refused: {list(refused)}")


def _changes(structure: Structure, before: Outputs) -> tuple[float, float]:
    """By how much the outputs differ from those before, in eval and in train mode."""
    errors = [
        difference(held_outputs(structure.model, structure.example, train), before[train]) for train in (False, True)
    ]
    return errors[0], errors[1]


def _promise(structure: Structure, axis: str) -> str:
    changes = changes_of(grow_plan({axis: 1}), structure.topology, {})
    return contract_of(changes, tensor_table(structure.model).tensors).kind


def _scale(record: Record, structure: Structure, factor: float) -> None:
    """Bring the network to `factor` times its FLOPs by one plan."""
    with record.step(f"{factor:g}x FLOPs") as entry:
        plan = esp.scaled_plan(structure, esp.FLOPs(factor, of="initial"))
        old = structure.cost().flops
        structure.apply(plan)
        entry["reached"] = structure.cost().flops / old
        _run(structure)
        structure.undo()
        if abs(entry["reached"] / factor - 1) > 0.05:
            raise StepError(f"{entry['reached']:.3f} times the FLOPs were reached")


def _train_and_save(record: Record, structure: Structure, name: str) -> None:
    optimizer = structure.optimizer
    assert optimizer is not None
    with record.step("train step"):
        _train(structure.model, structure.example, optimizer)
    with record.step("prune with optimizer"):
        structure.prune(chosen_units(structure, PRUNED))
    with record.step("train step after edit"):
        _train(structure.model, structure.example, optimizer)
    with record.step("save and load"), tempfile.TemporaryDirectory() as folder:
        esp.save(structure, folder)
        model, example = prepared(name)
        loaded = SGD([one for one in model.parameters() if one.requires_grad], lr=1e-5, momentum=0.9)
        esp.load(folder, model, example, optimizer=loaded)
        for again in (False, True):
            if again:
                _train(model, example, loaded, seed=7)
                _train(structure.model, structure.example, optimizer, seed=7)
            for train in (False, True):
                ours, theirs = (held_outputs(one, structure.example, train) for one in (model, structure.model))
                if not all(map(torch.equal, ours, theirs)):
                    when = "after another step" if again else "after loading"
                    raise StepError(f"outputs {when} differ by {difference(ours, theirs):.1e}")


def _run(structure: Structure) -> None:
    """A forward pass whose outputs are finite."""
    with torch.no_grad():
        result = call(structure.model.eval(), structure.example)
    _check_finite(tensor for path, tensor in flatten_tensors(result, "output"))


def _check_finite(tensors: Iterable[torch.Tensor]) -> None:
    if any(bool(tensor.isnan().any()) for tensor in tensors if tensor.is_floating_point()):
        raise StepError("there are NaNs")


def _train(model: nn.Module, example: Any, optimizer: Optimizer, seed: int = 3) -> None:
    """One step of training, on a loss that all outputs enter."""
    torch.manual_seed(seed)
    model.train()
    optimizer.zero_grad()
    outputs = [tensor for _, tensor in flatten_tensors(call(model, example), "output") if tensor.requires_grad]
    loss = sum(one.square().mean() for one in outputs)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    optimizer.step()
    _check_finite(parameter.detach() for parameter in model.parameters())
    model.eval()

"""The plans that follow from gates: what is shut leaves, what sleeps wakes, what is left joins the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from espalier.edit.depth_edits import DepthEdit, Remove
from espalier.edit.plan import Plan, Resize
from espalier.errors import MethodError
from espalier.parts.gates.dormant import Sleeper, values_of
from espalier.parts.gates.folding import Left, folded
from espalier.parts.gates.layer_memory import LayerGates
from espalier.parts.gates.masking import masked_too
from espalier.parts.gates.memory import GateMemory
from espalier.parts.gates.sleepers import Newcomer, Woken
from espalier.parts.gates.weight_memory import WeightGates
from espalier.parts.ghosts.ghosts import sides_of
from espalier.parts.goal import Goal
from espalier.parts.score import Context
from espalier.record import Preview

GatingMemory = GateMemory | WeightGates | LayerGates


@dataclass(frozen=True)
class SleepAndWake:
    """Units whose gates stay shut go to sleep, and others wake: `GateMemory.leaving` and `GateMemory.woken`.

    Columns that stay shut are masked. Once the search is over, gates that are left and are not judged as 1 become part
    of the weights (`espalier.parts.gates.folding`).
    """

    def __call__(self, context: Context, goal: Goal, /) -> Plan:
        memory, structure = _unit_gates(context), context.structure
        least = {axis: max(1, goal.least[axis] if goal.direction == "prune" else 1) for axis in goal.sizes}
        leaving = memory.leaving(context, goal.sizes, least)
        room = {axis: goal.most[axis] - size for axis, size in goal.sizes.items() if goal.most[axis] > size}
        woken = memory.woken(context, room, leaving)
        edits = tuple(
            Resize(axis, remove=leaving.get(axis, ()), add=len(woken.get(axis, ())))
            for axis in goal.sizes
            if axis in leaving or axis in woken
        )
        plan = Plan(edits, seed=context.seed, hold_norms=False)
        plan = replace(plan, masks=masked_too(structure, plan, memory.shut(context)))
        topology = structure.topology
        left = {
            axis: [unit for unit in range(topology.sizes[topology.by_name[axis].number]) if unit not in units]
            for axis, units in leaving.items()
        }
        if any(comer is not None for found in woken.values() for comer in found):
            preview = structure.preview(plan)
            sleepers = [one for found in woken.values() for one in found if isinstance(one, Sleeper)]
            values = values_of(sleepers, preview.after, memory.sleepers.after(left, woken), preview.tensors)
            plan = replace(plan, values=_with_newcomers(preview, woken, values))
        return with_folding(context, memory, plan, left)


def _with_newcomers(preview: Preview, woken: Woken, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values of a plan with those of new units that begin by weights of their own."""
    for axis, comers in woken.items():
        rows = {at: one.incoming for at, one in enumerate(comers) if isinstance(one, Newcomer)}
        if rows:
            incoming = sides_of(preview, axis).incoming
            tensors = {**preview.tensors, **values}
            entries = incoming.read(tensors).clone()
            for at, row in rows.items():
                entries[at] = row.to(entries)
            written = incoming.write(tensors, entries)
            values = values | {name: written[name] for name in incoming.names}
    return values


@dataclass(frozen=True)
class MaskShut:
    """Weights whose gates stay shut are masked; those of gates that are left are folded as by `SleepAndWake`."""

    def __call__(self, context: Context, goal: Goal, /) -> Plan:
        memory, structure = context.memory, context.structure
        if not isinstance(memory, WeightGates):
            raise MethodError(f"expected gates on weights, found {memory!r}: give the method memory=GatedWeights(...).")
        shut = {name: one for name, one in memory.shut(context).items() if name in goal.sizes}
        plan = Plan((), seed=context.seed, hold_norms=False)
        plan = replace(plan, masks=masked_too(structure, plan, shut))
        return with_folding(context, memory, plan, {})


@dataclass(frozen=True)
class RemoveShut:
    """Layers and cells whose gates stay shut are removed; those of gates that are left are folded as by `SleepAndWake`.

    The least likely go first, as far as their stages can spare some.
    """

    def __call__(self, context: Context, goal: Goal, /) -> Plan:
        memory = context.memory
        if not isinstance(memory, LayerGates):
            raise MethodError(f"expected gates on layers, found {memory!r}: give the method memory=GatedLayers(...).")
        shut, spare = memory.shut(context), dict(goal.spare)
        edits: list[DepthEdit] = []
        for name in sorted(shut, key=shut.__getitem__):
            candidate = goal.layers.get(name)
            if candidate is not None and spare[candidate.stage] > 0:
                spare[candidate.stage] -= 1
                edits += candidate.edits
        return with_folding(context, memory, Plan((), seed=context.seed, hold_norms=False, depth=tuple(edits)), {})


@dataclass(frozen=True)
class KeepAll:
    """Nothing leaves; gates are folded as by `SleepAndWake`."""

    def __call__(self, context: Context, goal: Goal, /) -> Plan:
        return with_folding(context, _unit_gates(context), Plan((), seed=context.seed, hold_norms=False), {})


def with_folding(context: Context, memory: GatingMemory, plan: Plan, left: Left) -> Plan:
    """A plan that, once the search is over, makes gates that are left part of the weights if they are not 1.

    Left as they are where what is shut could not leave an axis over which a norm runs: its statistics would not be the
    same with zeros.

    Args:
        context: as the method was asked.
        memory: which is told of it.
        plan: what leaves otherwise.
        left: axis -> the units that it leaves.
    """
    gates, table = memory.gates(context), memory.table
    judged = table.judged(context.progress)
    stays = {key: one[list(left[key])] if key in left else one for key, one in judged.items()}
    gone = {path.module for path in plan.depth if isinstance(path, Remove)}
    unsettled = [key for key, one in stays.items() if key not in gone and not bool((one == 1).all())]
    if table.stage < 2 or not unsettled:
        return plan
    if any(gates.counting(key) and bool((stays[key] != stays[key][0]).any()) for key in unsettled):
        return plan
    structure = context.structure
    preview = structure.preview(replace(plan, depth=()))
    staying = {key: one for key, one in judged.items() if key not in gone}
    deltas = {name: one for name, one in folded(structure, gates, staying, preview).items() if bool(one.any())}
    if not deltas:
        return plan
    memory.folding.note(left)
    return replace(plan, deltas=deltas)


def _unit_gates(context: Context) -> GateMemory:
    if not isinstance(context.memory, GateMemory):
        raise MethodError(f"expected gates on units, found {context.memory!r}: give the method memory=Gated(...).")
    return context.memory


__all__ = ["GatingMemory", "KeepAll", "MaskShut", "RemoveShut", "SleepAndWake"]

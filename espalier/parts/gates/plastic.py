"""Training with gates: the loss at gates that are drawn at every step, and the edits that follow from the gates.

What a kind of gates evaluates aside (`espalier.parts.gates.kinds`) is evaluated without a graph, with the same random
numbers (dropout masks), in the same modes, and with all buffers put back, so that all losses of a step are of one
function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from espalier.edit.plan import Plan, Resize
from espalier.errors import MethodError
from espalier.measure.stats import without_a_trace
from espalier.parts.gates.dormant import Sleeper, values_of
from espalier.parts.gates.gating import GateState
from espalier.parts.gates.kinds import Rows
from espalier.parts.gates.memory import GateMemory
from espalier.parts.gates.sleepers import Newcomer, Woken
from espalier.parts.gates.subnetwork import SubNetwork
from espalier.parts.ghosts import sides_of
from espalier.parts.goal import Goal, Scores
from espalier.parts.score import Context
from espalier.record import Preview


def gate_memory(context: Context) -> GateMemory:
    """The gates of a session. Raises MethodError if the method has another memory."""
    if not isinstance(context.memory, GateMemory):
        raise MethodError(f"gates need their memory, found {context.memory!r}: give the method memory=Gated(...).")
    return context.memory


@dataclass(frozen=True)
class SampledGates:
    """The loss under gates that are drawn at every step, shared by the batch."""

    def loss(self, context: Context, forward: Callable[[], Tensor], /) -> Tensor:
        """The loss at drawn gates with the penalty, in train mode with gradients; else at decided ones."""
        memory, model = gate_memory(context), context.structure.model
        gates, table = memory.gates(context), memory.table
        cost, slopes = table.cost(context.structure.topology, context.progress)
        if not (model.training and torch.is_grad_enabled()):
            with self.decided(context):
                return forward() + cost.to(torch.float32)
        at = _Evaluation(model, gates, forward)
        k = table.k_at(context.progress)
        drawn = table.settings.kind.loss(table.logits, k, at, context.generator("gates"))
        table.expect(slopes, drawn)
        return drawn.loss + cost.to(drawn.loss)

    @contextmanager
    def decided(self, context: Context, /) -> Iterator[None]:
        """Run the body with gates as they would be if they were decided now."""
        memory = gate_memory(context)
        with memory.gates(context).applied(memory.judged(context)):
            yield

    def state(self, context: Context, /) -> GateState:
        """Stage, k, probabilities and sleepers."""
        memory, progress = gate_memory(context), context.progress
        memory.gates(context)  # meets axes that are new
        table, stages = memory.table, memory.table.settings.stages
        asleep = {axis: len(found) for axis, found in memory.sleepers.asleep.items()}
        return GateState(stages.stage(progress), stages.at(progress), table.probabilities(progress), asleep)


@dataclass(frozen=True)
class _Evaluation:
    """The training loss at gates."""

    model: nn.Module
    gates: SubNetwork
    forward: Callable[[], Tensor]

    def __call__(self, gates: Rows, /) -> Tensor:
        return self.gates.loss(self.forward, gates)

    def aside(self, gates: Rows, /) -> Tensor:
        with without_a_trace(self.model):
            return self.gates.loss(self.forward, gates).detach()


@dataclass(frozen=True)
class Probability:
    """The probability of a unit's gate; 1 for units without a gate."""

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        memory = gate_memory(context)
        memory.gates(context)
        found = memory.table.probabilities(context.progress)
        return Scores({axis: found.get(axis, torch.ones(size)) for axis, size in goal.sizes.items()})


@dataclass(frozen=True)
class SleepAndWake:
    """Units whose gates stay shut go to sleep, and others wake: `GateMemory.leaving` and `GateMemory.woken`."""

    def __call__(self, context: Context, goal: Goal, /) -> Plan:
        memory, structure = gate_memory(context), context.structure
        least = {axis: max(1, goal.least[axis] if goal.direction == "prune" else 1) for axis in goal.sizes}
        leaving = memory.leaving(context, goal.sizes, least)
        room = {axis: goal.most[axis] - size for axis, size in goal.sizes.items() if goal.most[axis] > size}
        woken = memory.woken(context, room, leaving)
        edits = [
            Resize(axis, remove=leaving.get(axis, ()), add=len(woken.get(axis, ())))
            for axis in goal.sizes
            if axis in leaving or axis in woken
        ]
        plan = Plan(tuple(edits), seed=context.seed, hold_norms=False)
        if not any(comer is not None for found in woken.values() for comer in found):
            return plan
        topology = structure.topology
        left = {
            axis: [unit for unit in range(topology.sizes[topology.by_name[axis].number]) if unit not in units]
            for axis, units in leaving.items()
        }
        preview = structure.preview(plan)
        sleepers = [one for found in woken.values() for one in found if isinstance(one, Sleeper)]
        values = values_of(sleepers, preview.after, memory.sleepers.after(left, woken), preview.tensors)
        return replace(plan, values=_with_newcomers(preview, woken, values))


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


__all__ = ["Probability", "SampledGates", "SleepAndWake", "gate_memory"]

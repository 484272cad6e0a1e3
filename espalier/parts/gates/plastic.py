"""Training with stochastic gates: the loss at two antithetic samples, and the edits that follow from the gates.

The weights are trained at the gates z by autograd. The twin z' is evaluated before it without a graph, with the same
random numbers (dropout masks), in the same modes, and with all buffers put back, so that both losses are of one
function; where z' = z it is not evaluated at all. Both are needed for the logits only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.edit.plan import Plan, Resize
from espalier.errors import MethodError
from espalier.measure.stats import without_a_trace
from espalier.parts.gates.dormant import values_of
from espalier.parts.gates.estimators import antithetic, sampled
from espalier.parts.gates.gating import GateState
from espalier.parts.gates.memory import GateMemory
from espalier.parts.goal import Goal, Scores
from espalier.parts.score import Context


def gate_memory(context: Context) -> GateMemory:
    """The gates of a session. Raises MethodError if the method has another memory."""
    if not isinstance(context.memory, GateMemory):
        raise MethodError(f"gates need their memory, found {context.memory!r}: give the method memory=Gated(...).")
    return context.memory


@dataclass(frozen=True)
class SampledGates:
    """The loss under gates that are drawn at every step, shared by the batch."""

    def loss(self, context: Context, forward: Callable[[], Tensor], /) -> Tensor:
        """The loss at sampled gates with the penalty, in train mode with gradients; else at decided ones."""
        memory, model = gate_memory(context), context.structure.model
        gates = memory.gates(context)
        if not (model.training and torch.is_grad_enabled()):
            with self.decided(context):
                return forward() + memory.cost(context)[0].to(torch.float32)
        p = memory.probabilities(context)
        drawn = context.generator("gates")
        u = {axis: torch.rand(len(one), dtype=one.dtype, generator=drawn) for axis, one in p.items()}
        z = {axis: sampled(u[axis], one) for axis, one in p.items()}
        other = {axis: antithetic(u[axis], one) for axis, one in p.items()}
        cost, slopes = memory.cost(context)
        open_ = any(bool(((one > 0) & (one < 1)).any()) for one in p.values())
        estimator = memory.settings.estimator
        apart = estimator.twice and any(not torch.equal(z[axis], other[axis]) for axis in z)
        twin = None
        if apart:
            with without_a_trace(model), gates.applied(_numbers(other)):
                twin = forward().detach()
        with gates.applied(_numbers(z)):
            loss = forward()
        if open_ and (apart or not estimator.twice):
            here = loss.detach()
            losses = (here.double().cpu(), (here if twin is None else twin).double().cpu())
            k = memory.settings.stages.at(context.progress)
            for axis, one in p.items():
                chain = memory.settings.function.chain(memory.logits[axis], k)
                slopes[axis] = slopes[axis] + estimator(losses, u[axis], one, chain)
        memory.expect(slopes)
        return loss + cost.to(loss)

    @contextmanager
    def decided(self, context: Context, /) -> Iterator[None]:
        """Run the body with gates as they would be if they were decided now."""
        memory = gate_memory(context)
        with memory.gates(context).applied(memory.decided(context)):
            yield

    def state(self, context: Context, /) -> GateState:
        """Stage, k, probabilities and sleepers."""
        memory, stages = gate_memory(context), gate_memory(context).settings.stages
        probabilities = memory.probabilities(context)
        asleep = {axis: len(sleepers) for axis, sleepers in memory.asleep.items()}
        return GateState(stages.stage(context.progress), stages.at(context.progress), probabilities, asleep)


def _numbers(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {axis: one.to(torch.float32) for axis, one in gates.items()}


@dataclass(frozen=True)
class Probability:
    """The probability of a unit's gate; 1 for units without a gate."""

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        found = gate_memory(context).probabilities(context)
        return Scores({axis: found.get(axis, torch.ones(size)) for axis, size in goal.sizes.items()})


@dataclass(frozen=True)
class SleepAndWake:
    """Units whose gates stay shut go to sleep, and others wake: `GateMemory.leaving` and `GateMemory.waking`."""

    def __call__(self, context: Context, goal: Goal, /) -> Plan:
        memory, structure = gate_memory(context), context.structure
        least = {axis: max(1, goal.least[axis] if goal.direction == "prune" else 1) for axis in goal.sizes}
        leaving = memory.leaving(context, goal.sizes, least)
        woken = memory.waking(context, goal.sizes, goal.most)
        edits = [
            Resize(axis, remove=leaving.get(axis, ()), add=int(axis in woken))
            for axis in goal.sizes
            if axis in leaving or axis in woken
        ]
        plan = Plan(tuple(edits), seed=context.seed)
        sleepers = [one for one in woken.values() if one is not None]
        if not sleepers:
            return plan
        topology = structure.topology
        left = {
            axis: [unit for unit in range(topology.sizes[topology.by_name[axis].number]) if unit not in units]
            for axis, units in leaving.items()
        }
        preview = structure.preview(plan)
        values = values_of(sleepers, preview.after, memory.numbers(left, woken), preview.tensors)
        return Plan(tuple(edits), seed=context.seed, values=values)


__all__ = ["Probability", "SampledGates", "SleepAndWake", "gate_memory"]

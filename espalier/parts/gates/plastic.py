"""Training with gates: the loss at gates that are drawn at every step.

What a kind of gates evaluates aside (`espalier.parts.gates.kinds`) is evaluated without a graph, with the same random
numbers (dropout masks), in the same modes, and with all buffers put back, so that all losses of a step are of one
function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import MethodError
from espalier.graph.named_tensors import tensor_table
from espalier.measure.stats import without_a_trace
from espalier.parts.gates.by_sample import SampleEvaluation, samples_of
from espalier.parts.gates.gating import GateState, mean_of
from espalier.parts.gates.kinds import Evaluation, Rows
from espalier.parts.gates.memory import GateMemory
from espalier.parts.gates.planning import GatingMemory
from espalier.parts.gates.rows import joined, parted
from espalier.parts.gates.subnetwork import SubNetwork
from espalier.parts.gates.table import GateTable
from espalier.parts.goal import Goal, Scores
from espalier.parts.score import Context


def gate_memory(context: Context) -> GatingMemory:
    """The gates of a session. Raises MethodError if the method has another memory."""
    if not isinstance(context.memory, GatingMemory):
        raise MethodError(f"gates need their memory, found {context.memory!r}: give the method memory=Gated(...).")
    return context.memory


@dataclass(frozen=True)
class SampledGates:
    """The loss under gates that are drawn at every step, shared by the batch or for every sample (`Gated`)."""

    def loss(self, context: Context, forward: Callable[[], Tensor], /) -> Tensor:
        """The loss at drawn gates with the penalty, in train mode with gradients; else at decided ones."""
        memory, model = gate_memory(context), context.structure.model
        gates, table = memory.gates(context), memory.table
        if not table.logits:  # they have become part of the weights, or all that had one is gone
            return mean_of(forward())
        cost, slopes = table.cost(context.structure.topology, context.progress)
        if not (model.training and torch.is_grad_enabled()):
            with self.decided(context):
                return mean_of(forward()) + cost.to(torch.float32)
        by_sample = memory.by_sample(context) if isinstance(memory, GateMemory) else None
        at: Evaluation = _Evaluation(model, gates, lambda: mean_of(forward()), context.batch)
        if by_sample is not None:
            at = SampleEvaluation(by_sample, forward, samples_of(context.batch))
        k = table.k_at(context.progress)
        drawn = table.settings.kind.loss(table.logits, k, at, context.generator("gates"))
        decay, learnt = _decay(context, table, gates)
        table.expect(slopes if learnt is None else slopes + learnt, drawn)
        return drawn.loss + (cost if decay is None else cost + decay).to(drawn.loss)

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
        asleep = {axis: len(found) for axis, found in memory.asleep.items()}
        return GateState(stages.stage(progress), stages.at(progress), table.probabilities(progress), asleep)


def _decay(context: Context, table: GateTable, gates: SubNetwork) -> tuple[Tensor | None, Tensor | None]:
    """The group decay, and its gradient by the logits of all keys in a row if they learn from it."""
    decay = table.settings.decay
    chances = {} if decay is None else gates.factors(table.probabilities(context.progress))
    if decay is None or not chances:
        return None, None
    tensors = {name: tensor_table(context.structure.model).tensors[name] for name in chances}
    value = decay(tensors, chances)
    if not decay.learnt:
        return value, None
    leaf = joined(table.logits).requires_grad_()
    p = table.settings.kind.probability(leaf, table.k_at(context.progress))
    chances = gates.factors(parted(p, table.logits))
    (slope,) = torch.autograd.grad(decay({name: one.detach() for name, one in tensors.items()}, chances), leaf)
    return value, slope


@dataclass(frozen=True)
class _Evaluation:
    """The training loss at gates."""

    model: nn.Module
    gates: SubNetwork
    forward: Callable[[], Tensor]
    batch: Any

    @property
    def samples(self) -> int | None:
        return None

    def __call__(self, gates: Rows, /) -> Tensor:
        return self.gates.loss(self.forward, gates, self.batch)

    def aside(self, gates: Rows, /) -> Tensor:
        with without_a_trace(self.model):
            return self.gates.loss(self.forward, gates, self.batch).detach()


@dataclass(frozen=True)
class Probability:
    """The probability of the gate of a unit, a weight or a layer; 1 for what has none."""

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        memory = gate_memory(context)
        memory.gates(context)
        found = memory.table.probabilities(context.progress)
        shapes: dict[str, tuple[int, ...]] = {key: (size,) for key, size in goal.sizes.items()}
        shapes |= {key: tuple(one.live.shape) for key, one in goal.weights.items()}
        return Scores({key: found[key].view(at) if key in found else torch.ones(at) for key, at in shapes.items()})


__all__ = ["Probability", "SampledGates", "gate_memory"]

"""SynFlow: what flows through a weight from inputs of ones to the outputs, with all weights positive.

    R = sum of the outputs of f(1, |w|, no shifts),    score = |dR/d|w| * |w||     (Tanaka et al. 2020, 2006.05467)

The sum of scores into a unit equals that out of it, so that taking the smallest ones away in many rounds never cuts a
network in two as long as anything else is left. That holds where nothing is added on the way, so biases, other shifts
and running means are zero here (in the authors' code they are positive like weights, and feed layers whose inputs were
all cut). No data is needed. Rounds go down to the goal by one factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from espalier.errors import MethodError
from espalier.graph.named_tensors import tensor_table
from espalier.measure.stats import without_a_trace
from espalier.parts.checks import check_count
from espalier.parts.goal import Goal, Scores
from espalier.parts.score import Context


@dataclass(frozen=True)
class SynapticFlow:
    """The score, found in so many rounds; what goes in an early round is worth less than all that goes later.

    Runs in eval mode, in the network's own precision, on tensors beside the live ones, which are not touched. Buffers
    are made positive too.
    """

    rounds: int = 100

    def __post_init__(self) -> None:
        check_count("rounds", self.rounds)

    def __call__(self, context: Context, goal: Goal, /) -> Scores:
        model = context.structure.model
        inputs = tree_map(_ones, context.structure.example)
        table = tensor_table(model).tensors
        topology = context.structure.topology
        added = {tensor for one in topology.axes.values() for tensor, _, role in one.slots if role in ("shift", "mean")}
        tensors = {
            name: one.detach().clone() if not one.is_floating_point() else one.detach().abs() * (name not in added)
            for name, one in table.items()
        }
        live = {name: one.live for name, one in goal.weights.items()}
        gone_in = {name: torch.where(one, torch.inf, -1.0).to(torch.float64) for name, one in live.items()}
        present, final = sum(goal.sizes.values()), max(goal.live_weights(), 1)
        scores: dict[str, Tensor] = {}
        for turn in range(self.rounds):
            scores = self._flow(context, tensors, live, inputs)
            count = round(present * (final / max(present, 1)) ** ((turn + 1) / self.rounds))
            if turn + 1 < self.rounds:
                live = _best(scores, live, count)
                for name, one in live.items():
                    gone_in[name] = torch.where(~one & gone_in[name].isinf(), float(turn), gone_in[name])
        largest = max(float(one.max()) for one in scores.values()) or 1.0
        return Scores(
            {
                name: torch.where(gone_in[name].isinf(), self.rounds + one.double() / largest, gone_in[name])
                for name, one in scores.items()
            }
        )

    def _flow(
        self, context: Context, tensors: dict[str, Tensor], live: dict[str, Tensor], inputs: Any
    ) -> dict[str, Tensor]:
        model = context.structure.model
        with without_a_trace(model):
            for module in model.modules():
                module.training = False
            with torch.enable_grad():
                leaves = {name: (tensors[name] * one).requires_grad_() for name, one in live.items()}
                given = {**tensors, **leaves}
                if isinstance(inputs, dict):
                    outputs = functional_call(model, given, (), inputs)
                else:
                    outputs = functional_call(model, given, inputs if isinstance(inputs, tuple) else (inputs,))
                numbers = [one for one in tree_leaves(outputs) if isinstance(one, Tensor) and one.is_floating_point()]
                if not numbers:
                    raise MethodError("SynFlow sums the outputs of the network; expected tensors of numbers there.")
                total = torch.stack([one.sum() for one in numbers]).sum()
                found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        scores = {
            name: torch.zeros_like(leaf) if one is None else (one * leaf).detach().abs()
            for (name, leaf), one in zip(leaves.items(), found, strict=True)
        }
        for name, one in scores.items():
            if not bool(torch.isfinite(one).all()):
                raise MethodError(
                    f"{name}: the flow through it is beyond {one.dtype}; run the network in double precision, or score "
                    "by something else."
                )
        return scores


def _ones(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        raise MethodError(
            f"SynFlow asks for inputs of ones, but an example input is {value.dtype}; score by something else."
        )
    return torch.ones_like(value)


def _best(scores: dict[str, Tensor], live: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    pieces = [torch.where(live[name], one, -1.0).flatten().double().cpu() for name, one in scores.items()]
    order = torch.cat(pieces).sort(descending=True, stable=True).indices
    chosen = torch.zeros(len(order), dtype=torch.bool).index_fill_(0, order[:count], True)
    parts = torch.split(chosen, [len(piece) for piece in pieces])
    return {
        name: part.view(one.shape).to(one.device) & one for (name, one), part in zip(live.items(), parts, strict=True)
    }


__all__ = ["SynapticFlow"]

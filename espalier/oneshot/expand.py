"""`expand`: from a trained network to a larger one that computes the same, ready to train on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from espalier.attaching import LimitLike, attach
from espalier.errors import ShrinkError
from espalier.graph.trees import call_arguments
from espalier.measure.cost import Cost
from espalier.measure.runtimes import for_inference
from espalier.method import Method
from espalier.methods.gradmax import gradmax
from espalier.methods.random import random_growing
from espalier.parts.budget import Budget, FLOPs, Parameters
from espalier.parts.clock import Steps
from espalier.structure import Structure
from espalier.train.session import Session

Batch = Any
Loss = Callable[[nn.Module, Batch], Tensor]
Allocate = Literal["uniform", "gain"]
_NEARLY = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest change of the outputs, as a part of the largest output, that is rounding."""


@dataclass(frozen=True, eq=False)
class Expanded:
    """A network made larger without a change of what it computes. `print` it for a summary."""

    model: nn.Module = field(repr=False)
    structure: Structure = field(repr=False)
    """Its axes and the edit, which `espalier.save` and further edits need."""
    before: Cost
    after: Cost
    sizes: Mapping[str, tuple[int, int]]
    """Axis that grew -> (size before, size after)."""
    change: float
    """The largest change of the outputs, as a part of the largest of them: rounding."""

    def __str__(self) -> str:
        grown = ", ".join(f"{name} {old} to {new}" for name, (old, new) in self.sizes.items())
        return f"{self.before} to {self.after}; outputs differ by {self.change:.1e} of the largest. Grown: {grown}."


def expand(
    model: nn.Module,
    data: Any,
    *,
    to_params: float | None = None,
    to_flops: float | None = None,
    allocate: Allocate = "uniform",
    loss: Loss | None = None,
    example: Any = None,
    optimizer: Optimizer | None = None,
    axes: Sequence[str] | None = None,
    keep: Iterable[str] = (),
    limits: Mapping[str, LimitLike] | None = None,
    round_to: int = 1,
    seed: int = 0,
) -> Expanded:
    """Make a trained network larger, so that it computes the same and has room to learn more.

    Without an optimizer a copy grows, and the model stays as it is. With one the model itself grows, since the
    optimizer, and whatever else holds on to its parameters, has to follow: its state comes along, and it trains on.

    The outputs on `data` are compared before and after, in eval mode; if they differ by more than rounding, the growth
    is taken back.

    Args:
        model: a trained network.
        data: inputs: a tensor, a tuple of positional or a dict of keyword arguments. With a `loss`, a batch as that
            takes it; `example` then says what the inputs are.
        to_params: parameters afterwards, as a multiple of those there are.
        to_flops: instead: FLOPs of a forward pass afterwards, likewise.
        allocate: ``uniform`` grows all axes in proportion; ``gain`` lets axes compete by the gradients that new
            units would get on `data`, per cost (GradMax, Evci et al. 2022, arXiv:2201.05125): how fast the loss falls.
        loss: model and batch -> scalar loss; for ``gain``.
        example: example inputs, where `data` is a batch for the loss.
        optimizer: the optimizer that trains the model, to be followed.
        axes: names or patterns of the axes to grow; None for all that can without a change of the outputs.
        keep: modules or axes, by name, that have to stay as they are.
        limits: axis -> (smallest, largest) size, or `Limits`, as in `attach`.
        round_to: sizes at which all matrices divide by this.
        seed: seeds what new weights are drawn by.

    Raises:
        ShrinkError: an argument is not what it should be, nothing could grow, or the outputs changed, in which case
            everything is as before.
        MethodError: no axis can grow exactly, or the limits do not let it.
        CaptureError: the model's forward failed on the inputs.
    """
    budget = _budget(to_params, to_flops)
    if allocate not in get_args(Allocate):
        raise ShrinkError(f"allocate: expected 'uniform' or 'gain', found {allocate!r}.")
    if allocate == "gain" and (loss is None or example is None):
        raise ShrinkError("allocate='gain' compares losses; give loss=, model and batch -> loss, and example= inputs.")
    inputs = data if example is None else example
    grown, follower = (copy.deepcopy(model), None) if optimizer is None else (model, optimizer)
    structure = attach(grown, inputs, optimizer=follower or _idle(grown), keep=keep, limits=limits)
    with for_inference(grown):
        before, outputs = structure.cost(), _outputs(grown, inputs)
    method = _method(allocate, budget, axes, round_to)

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        """For batch norms, whose new units get the statistics of the inputs."""
        _outputs(model, inputs)
        return torch.zeros(())

    session = Session(structure, [method], loss=loss or forward, probe=[data], total_steps=1, seed=seed)
    session.step()
    edits = structure.history
    if not edits:
        why = "; ".join(event.why for event in session.events if event.why) or "limits leave no room"
        raise ShrinkError(f"nothing grew: {why}.")
    with for_inference(grown):
        change = _difference(outputs, _outputs(grown, inputs))
    allowed = max(_NEARLY.get(one.dtype, 0.0) for one in grown.parameters())
    if not change <= allowed:
        for _ in edits:
            structure.undo()
        raise ShrinkError(
            f"the outputs changed by {change:.1e} of the largest where at most {allowed:.0e} is rounding, so the "
            f"growth was taken back ({edits[0].contract}: {edits[0].why}); name axes that grow exactly in axes=[...]."
        )
    if optimizer is None:
        structure = attach(grown, structure.example, keep=keep, limits=limits)
    return Expanded(grown, structure, before, structure.cost(), dict(edits[0].sizes), change)


def _budget(to_params: float | None, to_flops: float | None) -> Budget:
    given = {"to_params": to_params, "to_flops": to_flops}
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) != 1:
        raise ShrinkError("expand: give either to_params= or to_flops=, how many times as many as now.")
    ((name, value),) = found.items()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 1):
        raise ShrinkError(f"{name}: expected a number above 1, how many times as many as now; found {value!r}.")
    return (Parameters if name == "to_params" else FLOPs)(value, of="initial")


def _method(allocate: Allocate, budget: Budget, axes: Sequence[str] | None, round_to: int) -> Method:
    make = gradmax if allocate == "gain" else random_growing
    scope: Literal["axis", "global"] = "global" if allocate == "gain" else "axis"
    return make(
        budget=budget, shape="constant", every=Steps(1), start=0.0, until=1.0, axes=axes, round_to=round_to, scope=scope
    )


def _idle(model: nn.Module) -> Optimizer:
    """An optimizer that never steps, for a session that only grows once."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All tensors that the network gives."""
    args, kwargs = call_arguments(inputs)
    with torch.no_grad():
        leaves = tree_leaves(model(*args, **kwargs))
    return [one.clone() for one in leaves if isinstance(one, Tensor)]


def _difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest change, as a part of the largest output; infinite where shapes differ or a number is none."""
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape:
            return math.inf
        if old.numel() == 0:
            continue
        old, new = old.double(), new.double()
        part = float((new - old).abs().max() / old.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
        worst = max(worst, part if math.isfinite(part) else math.inf)
    return worst


__all__ = ["Expanded", "expand"]

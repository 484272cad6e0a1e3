"""What the user's `train` is handed: how much of the training this call is, and the loss with the teacher's part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.errors import ShrinkError
from espalier.graph.trees import call_arguments
from espalier.measure.runtimes import for_inference

Between = Callable[[Any, Any], Tensor]
"""Outputs of the network and of the teacher on the same inputs -> how far they are apart, a scalar."""


@dataclass(frozen=True)
class Distillation:
    """How much the network learns from the teacher, and how.

    The loss is (1 - weight) own + weight T^2 KL(teacher || network), both softened by the temperature T (Hinton et al.
    2015, arXiv:1503.02531); the mean is over all that comes before the classes, which are the last dimension of
    outputs (N, classes) or (N, tokens, classes). A mapping of outputs is asked for its ``logits``.
    """

    weight: float = 0.9
    temperature: float = 4.0
    between: Between | None = None
    """Takes the place of T^2 KL, for outputs that are no logits of classes."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ShrinkError(f"Distillation: expected a weight from 0 to 1, found {self.weight!r}.")
        if not self.temperature > 0:
            raise ShrinkError(f"Distillation: expected a temperature above 0, found {self.temperature!r}.")

    def __call__(self, outputs: Any, teachers: Any) -> Tensor:
        """How far the outputs are from the teacher's.

        Raises:
            ShrinkError: they are no logits, and there is no function to compare them.
        """
        if self.between is not None:
            return self.between(outputs, teachers)
        ours, theirs = _logits(outputs), _logits(teachers)
        if ours.shape != theirs.shape:
            raise ShrinkError(
                f"the network gives logits of shape {tuple(ours.shape)} where the teacher gives {tuple(theirs.shape)}; "
                "give a teacher for the same classes."
            )
        ours, theirs = ours.flatten(0, -2).float(), theirs.flatten(0, -2).float()
        soft = F.log_softmax(ours / self.temperature, -1)
        aim = F.log_softmax(theirs / self.temperature, -1)
        return F.kl_div(soft, aim, reduction="batchmean", log_target=True) * self.temperature**2


@dataclass(frozen=True)
class Tuning:
    """One call of the user's `train`: which it is, how long it should be, and what its loss is."""

    number: int
    """From 1; 0 where a network without some blocks is tried out, which is a copy."""
    rounds: int
    share: float
    """The part of the whole training that this call is; all calls together make 1. For training for 1000 steps in all:
    ``round(1000 * tuning.share)`` steps."""
    teacher: nn.Module | None = None
    distillation: Distillation = Distillation()
    samples: int | None = None
    """With `max_training`: how many samples this call may train on, the teacher's passes accounted for:
    ``tuning.samples // batch`` steps. The smaller the network, the more there are."""

    def loss(self, outputs: Any, inputs: Any, own: Tensor) -> Tensor:
        """The loss to train with: your own, and the teacher's part where there is a teacher.

        Args:
            outputs: what the network gave for `inputs`.
            inputs: a tensor, a tuple of positional or a dict of keyword arguments, which the teacher is run on.
            own: your own loss of these outputs, a scalar.
        """
        if self.teacher is None or self.distillation.weight == 0:
            return own
        args, kwargs = call_arguments(inputs)
        with for_inference(self.teacher):
            teachers = self.teacher(*args, **kwargs)
        weight = self.distillation.weight
        return (1 - weight) * own + weight * self.distillation(outputs, teachers)


def shares(rounds: int, whole: float = 1.0) -> tuple[float, ...]:
    """The parts of the training after each pruning, `whole` together; the last one gets half, of several."""
    parts = (1.0,) if rounds == 1 else (*(0.5 / (rounds - 1) for _ in range(rounds - 1)), 0.5)
    return tuple(whole * part for part in parts)


def _logits(outputs: Any) -> Tensor:
    found = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
    if (
        not isinstance(found, Tensor)
        or not torch.is_floating_point(found)
        or found.dim() not in (2, 3)
        or found.shape[-1] < 2
    ):
        what = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else type(outputs).__name__
        raise ShrinkError(
            f"distillation: expected logits (N, classes) or (N, tokens, classes), or a mapping with such 'logits', "
            f"found {what}; say how far outputs are apart: distillation=Distillation(between=function)."
        )
    return found


__all__ = ["Between", "Distillation", "Tuning", "shares"]

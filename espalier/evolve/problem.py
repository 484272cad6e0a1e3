"""What a search trains: a problem makes, in any process, a fresh network with its optimizer, data and losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

Batch: TypeAlias = Any


@dataclass(frozen=True)
class Workbench:
    """A freshly built network and all that is needed to train and to judge it."""

    model: nn.Module
    optimizer: Optimizer
    """Of the model's parameters; its learning rates are the largest ones."""
    example: Any
    """Inputs for `espalier.attach`."""
    examples: int
    """Samples in the example."""
    batch: Callable[[int], Batch]
    """Step -> training batch; the same one for the same step, in every process."""
    samples: Callable[[Batch], int]
    """How many samples a batch holds."""
    loss: Callable[[nn.Module, Batch], Tensor]
    """The training loss: a scalar."""
    losses: Callable[[nn.Module, Batch], Tensor]
    """What networks are judged by: one number per sample, the lower the better, in eval mode."""
    right: Callable[[nn.Module, Batch], Tensor]
    """Per sample 1 where the network is right and 0 where it is wrong."""
    held_out: Sequence[Batch]
    """What branches are compared on; nothing is trained on it."""
    test: Sequence[Batch]
    """What is looked at once, at the end."""
    rate: Callable[[float], float]
    """Part of the search that is done, 0 to 1 -> factor of the learning rates."""
    latency: Callable[[nn.Module], float] | None = None
    """Measures what a network takes, in seconds or whatever is to be small, such as `espalier.measure.latency` on the
    target device; called wherever a network is judged. None: nothing is measured."""


class Problem(Protocol):
    """A value that is the same in every process: it can be pickled, and its `repr` tells it from all others."""

    def workbench(self) -> Workbench:
        """A fresh one; two of the same problem are equal to the last bit."""


__all__ = ["Batch", "Problem", "Workbench"]

"""What loggers are told: one interface, so that each logger is a few lines.

session = esp.Session(structure, methods, loss=loss, total_steps=steps, on_event=logged(structure, TensorBoard("runs")))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from espalier.structure import Structure
from espalier.train.events import Event


class Logger(Protocol):
    """Somewhere to write to."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Single numbers by name."""

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """Numbers (N,), of which the distribution is of interest."""

    def text(self, step: int, name: str, text: str) -> None:
        """What happened, in words."""


def logged(structure: Structure, *loggers: Logger) -> Callable[[Event], None]:
    """What to give a session as `on_event`: writes every event, and the network after it, to all loggers.

    Numbers are parameters, FLOPs of the example inputs, units, the sparsity of all masks together and the loss before
    and after; histograms are the widths of all axes, those widths in parts of the first ones, and the sparsity of each
    parameter that has a mask.
    """

    def tell(event: Event) -> None:
        numbers, histograms = _numbers(structure, event), _histograms(structure)
        for one in loggers:
            one.text(event.step, "espalier/event", str(event))
            one.numbers(event.step, numbers)
            for name, values in histograms.items():
                one.histogram(event.step, name, values)

    return tell


def _numbers(structure: Structure, event: Event) -> dict[str, float]:
    masks = structure.masks
    weights, live = (sum(int(one) for one in each) for each in (
        [mask.numel() for mask in masks.values()], [mask.sum() for mask in masks.values()]
    ))  # fmt: skip
    found: dict[str, float] = {
        "espalier/parameters": event.cost_after.parameters,
        "espalier/flops": event.cost_after.flops,
        "espalier/units": sum(axis.size for axis in structure.axes.values()),
        "espalier/sparsity": 1 - live / weights if weights else 0.0,
    }
    losses = {"espalier/loss_before": event.loss_before, "espalier/loss_after": event.loss_after}
    return {**found, **{name: loss for name, loss in losses.items() if loss is not None}}


def _histograms(structure: Structure) -> dict[str, Tensor]:
    sizes = {name: axis.size for name, axis in structure.axes.items() if axis.reason is None}
    parts = [size / structure.initial_sizes.get(name, size) for name, size in sizes.items()]
    found = {"espalier/widths": torch.tensor([*sizes.values()]), "espalier/widths_of_first": torch.tensor(parts)}
    if structure.masks:
        sparsities = [1 - float(mask.float().mean()) for mask in structure.masks.values()]
        found["espalier/sparsities"] = torch.tensor(sparsities)
    return {name: values.float() for name, values in found.items() if len(values)}


__all__ = ["Logger", "logged"]

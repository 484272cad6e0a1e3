"""A small network, batches and a method, for the smallest use of every extra."""

from typing import Any

import torch
from torch import Tensor, nn

import espalier as esp

WHEN = {"every": esp.steps(2), "start": 0.0, "until": 1.0}
x, y = torch.randn(32, 8), torch.randint(0, 2, (32,))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def pruning() -> list[esp.Method]:
    return [esp.prune.Magnitude(budget=esp.Parameters(100), **WHEN)]


def log(logger: Any) -> None:
    """All that a logger is told."""
    logger.numbers(1, {"espalier/loss": 0.5})
    logger.histogram(1, "espalier/widths", torch.arange(4.0))
    logger.text(1, "espalier/events", "pruned")

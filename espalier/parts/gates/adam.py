"""The optimizer of the logits of gates: Adam, with steps counted per gate, so that gates that come later start anew."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BETAS, _EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Adam:
    """The state of the gates of one key, each of the shape of their logits."""

    mean: Tensor
    square: Tensor
    steps: Tensor

    @classmethod
    def fresh(cls, logits: Tensor) -> Adam:
        """Before the first step."""
        return cls(*(torch.zeros_like(logits) for _ in range(3)))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that it is."""
        return self.mean, self.square, self.steps

    def step(self, gradient: Tensor) -> tuple[Adam, Tensor]:
        """The state after a step, and the step for a rate of 1."""
        steps = self.steps + 1
        mean = _BETAS[0] * self.mean + (1 - _BETAS[0]) * gradient
        square = _BETAS[1] * self.square + (1 - _BETAS[1]) * gradient.square()
        root = (square / (1 - _BETAS[1] ** steps)).sqrt()
        return Adam(mean, square, steps), mean / (1 - _BETAS[0] ** steps) / (root + _EPS)


__all__ = ["Adam"]

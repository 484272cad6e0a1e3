"""The user's own functions, called with care: what they return is checked, and what they do to modes is undone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from espalier.errors import ShrinkError
from espalier.oneshot.tuning import Tuning

Train = Callable[[nn.Module, Tuning], object]
"""Trains a network in place: changes the values of its parameters, and nothing else about it."""
Evaluate = Callable[[nn.Module], "float | Tensor"]
"""How good a network is, as one number."""
Mode = Literal["max", "min"]


@dataclass(frozen=True)
class Score:
    """The user's `evaluate`, and whether much of it is good."""

    evaluate: Evaluate
    mode: Mode

    def of(self, model: nn.Module) -> float:
        """The score of a network, which is evaluated in eval mode; NaN where that is what came back.

        Raises:
            ShrinkError: it is not one number.
        """
        model.eval()
        found = self.evaluate(model)
        if isinstance(found, Tensor):
            if found.numel() != 1:
                raise ShrinkError(f"evaluate: expected one number, found a tensor of shape {tuple(found.shape)}.")
            found = float(found.detach())
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            try:
                found = float(found)  # numbers of NumPy
            except (TypeError, ValueError):
                raise ShrinkError(f"evaluate: expected one number, found {found!r}.") from None
        return float(found)

    def floor(self, first: float, drop: float) -> float:
        """The worst score that is allowed."""
        return first - drop if self.mode == "max" else first + drop

    def rank(self, score: float) -> float:
        """A number that is larger for a better score."""
        return score if self.mode == "max" else -score

    def holds(self, score: float, floor: float) -> bool:
        """Whether a score is no worse than the floor; NaN never is."""
        if not math.isfinite(score):
            return False
        return score >= floor if self.mode == "max" else score <= floor


def put_modes(model: nn.Module, modes: dict[str, bool]) -> None:
    """Give the modules of a network the modes of another one."""
    for path, module in model.named_modules():
        if path in modes:
            module.training = modes[path]


__all__ = ["Evaluate", "Mode", "Score", "Train", "put_modes"]

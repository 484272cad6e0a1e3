"""Which optimizer steps were really taken: a gradient scaler leaves those out whose gradients are not finite."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class Taken:
    """Whether an optimizer has stepped since this was last asked."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._taken = False
        optimizer.register_step_post_hook(self._note)

    def _note(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
        overflow = vars(optimizer).get("found_inf")  # set by scalers for fused optimizers, which then do nothing
        self._taken = self._taken or overflow is None or not bool(overflow)

    def since(self) -> bool:
        """Whether it has; the next question counts from here."""
        taken, self._taken = self._taken, False
        return taken


__all__ = ["Taken"]

"""What follows an edit: how the network recovers from it, and whether it is kept at all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from espalier.errors import MethodError
from espalier.parts.clock import Steps

Rates = Literal["base", "norm"]


@dataclass(frozen=True)
class Recovery:
    """How training goes on after an edit. Without any argument: as before.

    The learning rate of new units is a scale on their part of every update of the optimizer, p + f (p' - p) where the
    optimizer alone leads from p to p', so it is exact for any optimizer, whose groups and state stay as they are. A
    weight between a new unit and an old one is new. While it lasts, each step costs a copy of the parameters that hold
    such units and one pass over them.
    """

    warm: Steps | None = None
    """Steps over which the learning rate of new units rises linearly from nothing to its full size."""
    rates: Rates = "base"
    """``norm``: the weights that came in one event learn at the rate of the others times |their norm| / |norm of those
    that were there at first|, tensor by tensor, to the end of the training (Yuan et al. 2023, arXiv:2306.12700, worth
    0.2 to 0.5 points there). Weights that start from zero, whose rate would be zero for ever, keep the full one."""
    calibrate: int | None = None
    """Number of batches on which all batch norms take their running statistics anew after an edit: held-out batches,
    or else the last training batch. New units have theirs taken in any case. None: 4 after growth that changes the
    outputs, since what the norms behind it see is changed as well, and 0 after any other edit."""

    def __post_init__(self) -> None:
        if self.warm is not None and not isinstance(self.warm, Steps):
            raise MethodError(f"Recovery: warm: expected steps(n) or None, found {self.warm!r}.")
        if self.rates not in get_args(Rates):
            raise MethodError(f"Recovery: rates: expected 'base' or 'norm', found {self.rates!r}.")
        if self.calibrate is not None and (type(self.calibrate) is not int or self.calibrate < 0):
            raise MethodError(f"Recovery: calibrate: expected a number of batches, found {self.calibrate!r}.")

    @property
    def slows(self) -> bool:
        """Whether new units learn at another rate than the others."""
        return self.warm is not None or self.rates != "base"


@dataclass(frozen=True)
class Accept:
    """An event is kept only if the held-out loss after it is not worse than before; else all of it is undone.

    The loss is the mean over the session's held-out batches in eval mode, right before and right after the edit (and
    what `Recovery.calibrate` does). Pruning nearly always costs something at first: give it a tolerance.
    """

    tolerance: float = 0.0
    """The part of the loss before by which the one after may exceed it."""

    def __post_init__(self) -> None:
        if isinstance(self.tolerance, bool) or not isinstance(self.tolerance, (int, float)) or not self.tolerance >= 0:
            raise MethodError(f"Accept: tolerance: expected a fraction of at least 0, found {self.tolerance!r}.")

    def allows(self, before: float, after: float) -> bool:
        """Whether an edit that led from one loss to the other is kept."""
        return math.isfinite(after) and after <= before + self.tolerance * abs(before)


__all__ = ["Accept", "Rates", "Recovery"]

"""The search for directions of units whose outgoing weights are zero."""

from __future__ import annotations

import torch
from torch import Tensor

from espalier.parts.ghosts.amplitude import row_norm, unit_rows
from espalier.parts.ghosts.metric import Metric
from espalier.parts.ghosts.passes import Asked, Passes
from espalier.parts.ghosts.rows import Found, independent, padded

_TINY = 1e-12


class Outward:
    """Alternates between D(A) and the gradient of |D(A)|^2 / 2, in the coordinates that a metric gives to A.

    The rows become that gradient, made orthonormal again (the generalised power method, Journee et al. 2010), or take a
    step of Adam.
    """

    def __init__(self, passes: Passes, axis: str, metric: Metric, climb: float | None) -> None:
        self._metric = metric
        self._zero = passes.zeros(axis, "incoming"), passes.zeros(axis, "outgoing")
        length = row_norm(passes.ghosts.sides[axis].outgoing, passes.ghosts.tensors) or 1.0
        self._small = torch.finfo(self._zero[1].dtype).eps ** 0.5 * length
        self._climb = None if climb is None else _Adam(climb)
        drawn = passes.drawn(axis, "incoming")
        self._ask_for_outgoing(independent(drawn) if climb is None else drawn)

    def _ask_for_outgoing(self, rows: Tensor) -> None:
        self._rows = self._metric.unit(rows)
        self._weights = self._metric.weights(self._rows)
        self.incoming, self.outgoing = padded(self._weights, self._zero[0]), self._zero[1]
        self.asked: Asked = "outgoing"

    def take(self, gradient: Tensor) -> None:
        """Go on with the gradient that was asked for."""
        gradient = gradient[: len(self._rows)]
        if self.asked == "outgoing":
            self._gradient = gradient
            self._gains = gradient.square().sum(1)
            self._factor = (float(self._gains.max()) ** 0.5 or 1.0) / self._small
            self.outgoing, self.asked = padded(gradient / self._factor, self._zero[1]), "incoming"
            return
        uphill = gradient * self._factor
        if self._climb is not None:
            step = self._climb.step(uphill / self._gains.sum().sqrt().clamp(min=_TINY))
            self._ask_for_outgoing(self._metric.coordinates(self._weights + step))
            return
        uphill = self._metric.uphill(uphill)
        # where D(A) does not depend on the length of A, as behind a norm, its gradient has no part along A
        kept = (self._gains - (uphill * self._rows).sum(1)).clamp(min=0) / self._rows.square().sum(1)
        better = uphill + kept[:, None] * self._rows
        order = torch.argsort(self._gains, descending=True, stable=True)
        self._ask_for_outgoing(independent(better[order]))

    def found(self) -> Found:
        """The rows, those of the largest gradient first."""
        order = torch.argsort(self._gains, descending=True, stable=True)
        outgoing = unit_rows(self._gradient[order])
        return Found(self._weights[order], outgoing, self._gains[order].float(), self._metric)


class _Adam:
    """The steps of Adam with its usual constants (Kingma and Ba 2015)."""

    def __init__(self, size: float) -> None:
        self._size, self._count = size, 0
        self._mean: Tensor | float = 0.0
        self._square: Tensor | float = 0.0

    def step(self, uphill: Tensor) -> Tensor:
        """The next step for that gradient."""
        self._count += 1
        self._mean = 0.9 * self._mean + 0.1 * uphill
        self._square = 0.999 * self._square + 0.001 * uphill.square()
        mean, square = self._mean / (1 - 0.9**self._count), self._square / (1 - 0.999**self._count)
        return self._size * mean / (square.sqrt() + _TINY)


__all__ = ["Outward"]

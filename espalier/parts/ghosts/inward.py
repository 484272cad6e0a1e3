"""The search for directions of units whose incoming weights are zero."""

from __future__ import annotations

import torch
from torch import Tensor

from espalier.parts.ghosts.passes import Asked, Passes, is_adjoint
from espalier.parts.ghosts.rows import Found, independent, padded

_SAME = 1e-3
"""What a row has left of its length, if it is nearly a mixture of others."""


class Inward:
    """Power iteration for units whose incoming weights are zero: O, then G(O), then O again."""

    def __init__(self, passes: Passes, axis: str, straight: bool) -> None:
        self._passes, self._axis, self._straight = passes, axis, straight
        self._zero = passes.zeros(axis, "incoming"), passes.zeros(axis, "outgoing")
        self._small = passes.small(axis)
        self._rows = independent(passes.drawn(axis, "outgoing"))
        self._seen: list[tuple[Tensor, Tensor]] = []
        self.asked: Asked = "outgoing"
        self._ask_for_incoming()

    def _ask_for_incoming(self) -> None:
        self.incoming, self.outgoing, self.asked = self._zero[0], padded(self._rows, self._zero[1]), "incoming"

    def take(self, gradient: Tensor) -> None:
        """Go on with the gradient that was asked for."""
        if self.asked == "incoming":
            self._gradient = gradient[: len(self._rows)]
            self._seen.append((self._rows, self._gradient))
            self._there = independent(self._gradient)
            self.incoming, self.outgoing = padded(self._small * self._there, self._zero[0]), self._zero[1]
            self.asked = "outgoing"
            return
        back = gradient[: len(self._there)] / self._small
        if not self._straight and not is_adjoint(
            (self._gradient * self._there).sum(), (self._rows[: len(back)] * back).sum()
        ):
            rows = padded(self._rows, self._zero[1])
            there = padded(self._there, self._zero[0])
            back = self._passes.transposed({self._axis: rows}, {self._axis: there})[self._axis][: len(self._there)]
        self._rows = independent(back)
        self._ask_for_incoming()

    def found(self) -> Found:
        """The best in the span of all rows that were tried, since G is linear (Rayleigh and Ritz; block Krylov)."""
        rows, gradients = (torch.cat(found).double() for found in zip(*self._seen, strict=True))
        u, lengths, basis = torch.linalg.svd(rows, full_matrices=False)
        new = lengths > _SAME * lengths[0]
        u, lengths, basis = u[:, new], lengths[new], basis[new]
        v, values, _ = torch.linalg.svd((u / lengths).T @ gradients, full_matrices=False)
        best = (v.T @ basis)[: len(self._zero[1])].to(self._rows)
        return Found(self._zero[0][:1].expand(len(best), -1), best, values[: len(best)].square().float())


__all__ = ["Inward"]

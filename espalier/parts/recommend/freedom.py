"""Effective degrees of freedom: how many directions in the space of the parameters the data determine.

    gamma = trace of  n F (n F + A)^-1

with F the covariance of the gradients of single samples' losses (the empirical Fisher matrix, which is the Hessian of a
likelihood that is right), n the number of samples, and A the precisions of the weights: one number a_t for every tensor
t, the solution of a_t |w_t|^2 = gamma_t, the part of gamma that is in this tensor: MacKay's evidence framework (1992,
Bayesian interpolation). So no scale enters that the network has not itself. What no sample's loss depends on counts 0,
what the data determine counts 1, and exact duplicates count once.

F is that of R parts of the data, m samples each, whose mean gradients have the covariance F / m. With J = these R
gradients as rows, centred and scaled, nF = J'J, and

    gamma = trace of  K (K + 1)^-1,   K = sum over tensors of J_t J_t' / a_t,

an R x R matrix. It is at most R - 1, so that of few rows it is too small: a network of 3,298 parameters on 1,200 digits
has 60, 92, 110, 123 and 128 degrees of freedom by 64, 128, 256, 512 and 1,024 rows. With the diagonal of F alone, the
usual short cut, it would be 1,587.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from espalier.errors import MethodError
from espalier.parts.recommend.batches import samples_in
from espalier.parts.recommend.planned import Planned, Tensors

_NO_MASKS: Tensors = MappingProxyType({})
ROWS = 128
"""Gradients that are taken."""
_NUMBERS = 1 << 27
"""Numbers that all gradients together hold at most: half a gigabyte in single precision."""
_STEPS = 100
_CLOSE = 1e-6
"""Rounds of the iteration for the precisions, and by which relative change it ends."""


def rows_for(parameters: int) -> int:
    """How many gradients of so many parameters are taken."""
    return max(2, min(ROWS, _NUMBERS // max(parameters, 1)))


def gradient_rows(planned: Planned, parts: Sequence[Any], values: Tensors, masks: Tensors) -> dict[str, Tensor]:
    """Parameter -> the mean gradients of parts of the data, times the root of their sizes and centred: (parts, ...).

    Args:
        planned: the network.
        parts: batches.
        values: parameter -> value to take gradients at.
        masks: the parameters that are asked about -> entries that are, of booleans; of these the last dimension of the
            rows is then made.
    """
    names, root = sorted(masks), [math.sqrt(samples_in(part)) for part in parts]
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for part, scale in zip(parts, root, strict=True):
        _, found = planned.gradients(part, values, names)
        for name, one in found.items():
            rows[name].append((scale * one[masks[name]]).float().cpu())
    # gradients weigh as their parts do: sqrt(m) g - sqrt(m) * mean, where the mean is over all samples
    scales, result = torch.tensor(root), {}
    for name, found_rows in rows.items():
        stacked = torch.stack(found_rows)
        mean = (scales @ stacked) / scales.square().sum()
        result[name] = stacked - torch.outer(scales, mean)
    return result


class Freedoms:
    """The degrees of freedom of a network, and what plans make of them."""

    def __init__(self, planned: Planned, parts: Sequence[Any], count: int, masks: Tensors = _NO_MASKS) -> None:
        """Of the network as it is.

        Args:
            planned: the network under the empty plan.
            parts: batches to take gradients on, `rows_for` of them.
            count: the number of samples that it was trained on, n.
            masks: parameter -> which of its entries are live; the others count nothing.

        Raises:
            MethodError: gradients are not finite.
        """
        self._parts = tuple(parts)
        self._scale = count / max(len(parts) - 1, 1)
        values = planned.parameters
        trained = sorted(planned.trained)
        whole = {name: torch.ones(values[name].shape, dtype=torch.bool, device=values[name].device) for name in trained}
        rows = gradient_rows(planned, parts, values, whole)
        self._rows = {name: one.view(-1, *values[name].shape) for name, one in rows.items()}
        for name in masks.keys() & self._rows.keys():
            self._rows[name] *= masks[name].cpu()
        squares = {name: float(values[name].double().square().sum()) for name in trained}
        grams = {name: self._gram(one) for name, one in self._rows.items() if squares[name] > 0}
        if not all(bool(torch.isfinite(one).all()) for one in grams.values()):
            raise MethodError("gradients of the loss are not finite on these batches; degrees of freedom need them.")
        self.precisions = _precisions(grams, squares, {name: whole[name].numel() for name in trained})
        self._kernel = _weighted(grams, self.precisions, len(self._parts))
        self.total = _trace(self._kernel)

    def change(self, planned: Planned) -> float:
        """What a plan changes gamma by.

        Tensors keep their precisions; new ones have the inverse of their own mean square.
        """
        total = torch.zeros_like(self._kernel)
        for name, precision in self.precisions.items():
            kept = planned.kept(name, self._rows[name])
            if kept is not None:
                total += self._gram(kept) / precision
        values = planned.parameters
        masks = {name: planned.fresh[name] for name in planned.fresh.keys() & planned.trained}
        if masks:
            for name, one in gradient_rows(planned, self._parts, values, masks).items():
                of_whole = bool(masks[name].all()) or name not in self.precisions
                square = float(values[name].double().square().mean())
                precision = self.precisions[name] if not of_whole else 1 / square if square > 0 else math.inf
                total += self._gram(one) / precision
        return _trace(total) - self.total

    def _gram(self, rows: Tensor) -> Tensor:
        flat = rows.flatten(1)
        return (flat @ flat.T).double() * self._scale


def _precisions(
    grams: Mapping[str, Tensor], squares: Mapping[str, float], sizes: Mapping[str, int]
) -> dict[str, float]:
    """a_t of every tensor; of those that no gradient reaches, from their mean square."""
    found = {name: sizes[name] / squares[name] for name in grams}
    count = len(next(iter(grams.values()))) if grams else 0
    identity = torch.eye(count, dtype=torch.float64)
    for _ in range(_STEPS):
        left = torch.linalg.inv(_weighted(grams, found, count) + identity)
        parts = {name: float((gram * left).sum()) / found[name] for name, gram in grams.items()}
        then = {name: part / squares[name] if part > 0 else found[name] for name, part in parts.items()}
        moved = max((abs(math.log(then[name] / one)) for name, one in found.items()), default=0.0)
        found = then
        if moved < _CLOSE:
            break
    return found


def _weighted(grams: Mapping[str, Tensor], precisions: Mapping[str, float], count: int) -> Tensor:
    total = torch.zeros(count, count, dtype=torch.float64)
    for name, gram in grams.items():
        total += gram / precisions[name]
    return total


def _trace(kernel: Tensor) -> float:
    values = torch.linalg.eigvalsh(kernel).clamp(min=0)
    return float((values / (values + 1)).sum())


__all__ = ["ROWS", "Freedoms", "gradient_rows", "rows_for"]

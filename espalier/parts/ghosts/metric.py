"""In which sense incoming weights are long, and orthogonal to each other.

Without a norm on the units, a row of weights is as long as it is. Behind a batch norm its length means nothing: what
the norm divides by is the deviation of a.x, so that directions compare per unit of variance, with a S a^T in the place
of a a^T, where S is the covariance of what the producer reads (whitening; Cholesky: S = L L^T, coordinates a L).

Measured on digits after 20 steps, 5 seeds: the held-out loss falls 1.13 times (a small CNN) and 1.4 times (ResNet-20)
as fast along the gradient of units found so as along that of units found without S, in as many passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.measure.stats import without_a_trace
from espalier.parts.ghosts.amplitude import mean_norm, unit_rows, widths
from espalier.parts.ghosts.ghosts import Ghosts, Part, Side
from espalier.parts.score import Context, seed_random_numbers

_RIDGE = 0.1
"""Part of its mean diagonal that is added to S, which one batch knows roughly."""
_WIDEST = 1024
"""More inputs per unit than that are not whitened: S would cost more than the passes."""
_ROWS = 4096
"""Rows of inputs from which S is estimated."""


@dataclass(frozen=True)
class Metric:
    """Coordinates of the incoming weights of one axis, in which every part of a row is of length one."""

    parts: tuple[int, ...]
    """Entries of each part of a row."""
    lengths: tuple[float, ...]
    """How long each part of old rows is on average, in coordinates: how strongly old units respond."""
    factors: tuple[Tensor | None, ...]
    """L of each part; None for one that is not whitened."""

    def unit(self, rows: Tensor) -> Tensor:
        """The rows with every part of length one."""
        return torch.cat([unit_rows(piece) for piece in torch.split(rows, list(self.parts), dim=1)], dim=1)

    def weights(self, rows: Tensor) -> Tensor:
        """The weights that rows of coordinates stand for: x l L^-1."""
        return self._each(rows, lambda x, length, factor: length * _solved(x, factor))

    def coordinates(self, weights: Tensor) -> Tensor:
        """The rows of coordinates that stand for weights: a L / l."""
        return self._each(weights, lambda a, length, factor: (a if factor is None else a @ factor.to(a)) / length)

    def uphill(self, gradient: Tensor) -> Tensor:
        """A gradient by weights as one by coordinates: g l L^-T."""
        return self._each(gradient, lambda g, length, factor: length * _solved(g, factor, by_transpose=True))

    def _each(self, rows: Tensor, change: Callable[[Tensor, float, Tensor | None], Tensor]) -> Tensor:
        pieces = torch.split(rows, list(self.parts), dim=1)
        return torch.cat([change(*one) for one in zip(pieces, self.lengths, self.factors, strict=True)], dim=1)


def _solved(rows: Tensor, factor: Tensor | None, *, by_transpose: bool = False) -> Tensor:
    """Rows times L^-1, or times L^-T."""
    if factor is None:
        return rows
    triangle = factor.to(rows).T if by_transpose else factor.to(rows)
    result: Tensor = torch.linalg.solve_triangular(triangle, rows, upper=by_transpose, left=False)
    return result


def metrics(
    context: Context, ghosts: Ghosts, batch: object, axes: Iterable[str], white: Iterable[str]
) -> dict[str, Metric]:
    """The metric of every axis, whitened for those of `white`, with one pass forward for all of these."""
    sides = {axis: ghosts.sides[axis].incoming for axis in axes}
    factors = _factors(context, ghosts, batch, [part for axis in white for part in sides[axis].parts])
    return {axis: _metric(ghosts, side, factors) for axis, side in sides.items()}


def _metric(ghosts: Ghosts, side: Side, factors: dict[str, Tensor]) -> Metric:
    found = tuple(factors.get(part.tensor) for part in side.parts)
    lengths = []
    for part, factor in zip(side.parts, found, strict=True):
        old = part.read(ghosts.tensors[part.tensor], part.old).detach()
        lengths.append(mean_norm(old if factor is None else old @ factor.to(old)) or 1.0)
    return Metric(tuple(widths(side, ghosts.tensors)), tuple(lengths), found)


def _factors(context: Context, ghosts: Ghosts, batch: object, parts: list[Part]) -> dict[str, Tensor]:
    """Tensor -> L of what its module reads, where the module is known to read rows of inputs."""
    model, seen = context.structure.model, dict[str, list[Tensor]]()
    hooks = []
    for part in parts:
        path, _, name = part.tensor.rpartition(".")
        module = model.get_submodule(path)
        if part.tensor not in seen and name == "weight" and _reads_rows(module, part):
            found = seen[part.tensor] = []
            hooks.append(module.register_forward_pre_hook(_remember(found)))
    if not hooks:
        return {}
    try:
        with without_a_trace(model):
            seed_random_numbers(context.seed)
            context.loss(batch)
    finally:
        for hook in hooks:
            hook.remove()
    result = {}
    for tensor, inputs in seen.items():
        factor = _factor(torch.cat(inputs)) if inputs else None
        if factor is not None:
            result[tensor] = factor
    return result


def _reads_rows(module: nn.Module, part: Part) -> bool:
    """Whether a module multiplies rows of its inputs with the weights of each unit, and these are not too many."""
    if part.dim != 0 or part.new.shape[1] != 1:
        return False
    if isinstance(module, nn.Linear):
        return module.in_features <= _WIDEST
    if not isinstance(module, nn.Conv2d) or isinstance(module.padding, str) or module.padding_mode != "zeros":
        return False
    return module.groups == 1 and module.weight[0].numel() <= _WIDEST


def _remember(found: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs = arguments[0].detach() if arguments else None
        if isinstance(inputs, Tensor) and inputs.is_floating_point():
            found.append(_rows(module, inputs))

    return hook


def _rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """Some of the rows with which a module multiplies weights: (at most `_ROWS`, inputs per unit)."""
    if isinstance(module, nn.Conv2d):
        images = inputs if inputs.dim() == 4 else inputs[None]
        some = images[: max(1, 4 * _ROWS * math.prod(module.stride) // images[0, 0].numel())]
        assert not isinstance(module.padding, str)
        unfolded = F.unfold(some, module.kernel_size, module.dilation, module.padding, module.stride)
        rows = unfolded.transpose(1, 2).flatten(0, 1)
    else:
        rows = inputs.reshape(-1, inputs.shape[-1])
    return rows[:: -(-len(rows) // _ROWS)]


def _factor(rows: Tensor) -> Tensor | None:
    """L of the covariance of rows; None if that is not positive."""
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / len(rows)
    diagonal = covariance.diagonal()
    diagonal += _RIDGE * diagonal.mean()
    factor, failed = torch.linalg.cholesky_ex(covariance)
    return None if bool(failed) or not bool(torch.isfinite(factor).all()) else factor


__all__ = ["Metric", "metrics"]

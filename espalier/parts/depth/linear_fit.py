"""A layer or cell replaced by the linear map that comes nearest to it on a few batches.

For a module that makes y of x, W and b are the solution of

    min over W, b   mean |W x + b - y|^2  +  rho |W - W_0|^2,      rho = ridge * mean of the variances of x,

where W_0 is the identity as far as there are features for it, which is what is left of a block with a connection past
it: W = W_0 + C_rx (C_xx + rho)^-1, with r = y - W_0 x and C the covariances; b makes up for the means. For whole
transformer blocks this is ReplaceMe (Shopkhoev et al. 2025, arXiv:2505.02819). The module is taken as it is in eval
mode.

Two of four pre-norm blocks of an MLP (width 48, trained on digits) replaced, no training afterwards: accuracy on
held-out digits falls from 98.0% to 97.0%; where they are just left out, to 90.6% (means of ten seeds of the training in
tests/test_linear_fit.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.edit.depth_edits import Replace
from espalier.edit.plan import Plan
from espalier.edit.recipes.linear import LinearMap, linear_like
from espalier.errors import MethodError
from espalier.measure.stats import without_a_trace
from espalier.record import Edit
from espalier.structure import Structure


@dataclass(frozen=True)
class LinearFit:
    """The linear map nearest to a module."""

    layer: LinearMap
    weight: Tensor
    """(out, in), in double precision on the CPU."""
    bias: Tensor
    error: float
    """Root of the mean of |W x + b - y|^2, relative to that of |y|^2."""
    without: float
    """The same of W_0 x, what there would be if the module were just left out."""


def linear_fit(
    structure: Structure, path: str, forwards: Sequence[Callable[[], object]], *, ridge: float = 1e-3
) -> LinearFit:
    """Fit a linear map to a module. Changes nothing and leaves no trace.

    Args:
        structure: of the model.
        path: the module; it gets one tensor alone and gives one of as many places.
        forwards: each runs the model on one batch.
        ridge: part of the mean variance of the inputs that is added to all of them.

    Raises:
        PlanError: no linear map fits in place of the module.
        MethodError: the module did not run, or gave numbers that are not finite.
    """
    if not ridge >= 0:
        raise MethodError(f"ridge: expected a number of at least 0, found {ridge!r}.")
    layer = linear_like(structure.topology, path)
    sums = _Sums(layer)
    hook = structure.model.get_submodule(path).register_forward_hook(sums.note)
    try:
        with without_a_trace(structure.model):
            structure.model.eval()
            for forward in forwards:
                forward()
    finally:
        hook.remove()
    return sums.solved(path, ridge)


def linearise(
    structure: Structure, path: str, forwards: Sequence[Callable[[], object]], *, ridge: float = 1e-3
) -> tuple[Edit, LinearFit]:
    """Replace a module by the linear map that is nearest to it: see `linear_fit`, whose arguments these are.

    Copies that follow the model get the same map.

    Raises:
        PlanError: no linear map fits in place of the module.
        SurgeryError: the model would not run with it; nothing was changed.
        MethodError: the module did not run, or gave numbers that are not finite.
    """
    fit = linear_fit(structure, path, forwards, ridge=ridge)
    weight = fit.weight.reshape(fit.layer.out, fit.layer.into, *(1,) * fit.layer.dimensions)
    plan = Plan((), depth=(Replace(path, fit.layer),), starts={0: {"weight": weight, "bias": fit.bias}})
    return structure.apply(plan), fit


class _Sums:
    """First and second moments of what a module gets (x) and of what it makes besides (r = y - W_0 x)."""

    def __init__(self, layer: LinearMap) -> None:
        self._layer = layer
        self._start = torch.eye(layer.out, layer.into, dtype=torch.float64)
        width = layer.into + layer.out
        self._count = 0
        self._first = torch.zeros(width, dtype=torch.float64)
        self._second = torch.zeros(width, width, dtype=torch.float64)
        self._made = 0.0

    def note(self, module: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
        """A forward hook."""
        inputs, outputs = self._rows(args[0]), self._rows(result)
        both = torch.cat([inputs, outputs - inputs @ self._start.T], dim=1)
        self._count += len(both)
        self._first += both.sum(0)
        self._second += both.T @ both
        self._made += float(outputs.square().sum())

    def _rows(self, values: Tensor) -> Tensor:
        features = values.movedim(1, -1) if self._layer.dimensions else values
        return features.detach().double().cpu().flatten(0, -2)

    def solved(self, path: str, ridge: float) -> LinearFit:
        """The nearest map."""
        if self._count == 0:
            raise MethodError(f"{path} did not run on these batches, so that no linear map can be fitted to it.")
        if not bool(torch.isfinite(self._second).all()):
            raise MethodError(f"{path} got or gave numbers that are not finite.")
        into, mean = self._layer.into, self._first / self._count
        covariance = self._second / self._count - mean.outer(mean)
        inputs, cross, rest = covariance[:into, :into], covariance[:into, into:], covariance[into:, into:]
        variances = inputs.diagonal().mean()
        change = torch.linalg.pinv(inputs + ridge * variances * torch.eye(into, dtype=torch.float64), hermitian=True)
        change = (change @ cross).T
        left = rest.trace() - 2 * (change * cross.T).sum() + (change @ inputs * change).sum()
        made = self._made / self._count
        without = self._second[into:, into:].trace() / self._count
        return LinearFit(
            self._layer,
            self._start + change,
            mean[into:] - change @ mean[:into],
            math.sqrt(max(float(left), 0.0) / made) if made > 0 else 0.0,
            math.sqrt(float(without) / made) if made > 0 else 0.0,
        )


__all__ = ["LinearFit", "linear_fit", "linearise"]

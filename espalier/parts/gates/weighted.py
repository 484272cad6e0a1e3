"""The normalisation of a LayerNorm under weights of its positions, with a backward of its own: half the time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def normalised(x: Tensor, shares: Tensor, eps: float) -> Tensor:
    """(x - m) / sqrt(v + eps) along the last dimension, with m = sum s x and v = sum s (x - m)^2.

    Args:
        x: shape (..., positions).
        shares: s, shape (positions,), without gradient; they sum to 1.
        eps: added to the variance.
    """
    with torch.autocast(x.device.type, enabled=False):
        found: Tensor = _Normalised.apply(x, shares, eps)  # type: ignore[no-untyped-call]
    return found


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Tensor, eps: float) -> Tensor:
        found, root = _evaluated(x, shares, eps)
        ctx.save_for_backward(x, shares, found, root)
        ctx.eps = eps
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """With y the result and r = 1 / sqrt(v + eps): g becomes r (g - s (sum g + y sum g y))."""
        (given,) = gradients
        x, shares, found, root = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients of gradients are wanted, to which the root matters as well
            (whole,) = torch.autograd.grad(_evaluated(x, shares, ctx.eps)[0], x, given, create_graph=True)
            return whole, None, None
        ones = torch.ones_like(shares)
        sums, along = given @ ones, (given * found) @ ones
        mixed = torch.addcmul(sums.unsqueeze(-1), found, along.unsqueeze(-1)).mul_(shares)
        return (given - mixed).mul_(root), None, None


def _evaluated(x: Tensor, shares: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    centred = x - (x @ shares).unsqueeze(-1)
    root = (centred.square() @ shares + eps).rsqrt().unsqueeze(-1)
    return centred * root, root


__all__ = ["normalised"]

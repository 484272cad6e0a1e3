"""The polarization regulariser as a function of scales: pure mathematics, on tensors alone.

Zhuang et al. 2020, Neuron-level structured pruning using polarization regularizer (NeurIPS). For n scales g in [0, a]

    R(g) = sum_i  t |g_i| - |g_i - mean(g)|,

where the mean is one over all scales of the network. The first term pulls all scales to zero, as L1 does; the second
pushes each away from their mean, so that scales end at 0 or at a and a threshold between lies in a wide gap. With a
part r of the scales at a and the others at 0 it is a * n * (2 r^2 + (t - 2) r), least at r = 1/2 - t/4: so t sets the
part that stays. A gradient flow stops earlier, at min(p, 1 - t/2) where p is the part above the mean at first: above
the mean the slope is t + 2 p - 2, below it t + 2 p. Where all scales are equal, as at first, it is t: that of L1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def polarization(scales: Tensor, t: float, weights: Tensor | None = None) -> Tensor:
    """The regulariser of scales of shape (n,), a scalar; `weights` of shape (n,) multiply the terms of the sum."""
    terms = t * scales.abs() - (scales - scales.mean()).abs()
    return (terms if weights is None else weights * terms).sum()


def polarization_gradient(scales: Tensor, t: float, weights: Tensor | None = None) -> Tensor:
    """Its subgradient, of shape (n,): t sign(g_i) - s_i + mean(s) with s_i = sign(g_i - mean(g)).

    The mean is part of what is differentiated. With weights w the last two terms are -w_i s_i + mean(w s).
    """
    away = torch.sign(scales - scales.mean())
    pulled = torch.sign(scales).mul_(t)
    if weights is not None:
        away, pulled = away.mul_(weights), pulled.mul_(weights)
    return pulled.sub_(away).add_(away.mean())


__all__ = ["polarization", "polarization_gradient"]

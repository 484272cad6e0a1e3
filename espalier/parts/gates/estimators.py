"""Gradients of an expected loss by the logits of Bernoulli gates, from a few evaluations at sampled gates.

With u uniform on (0, 1), gates z = 1[u < p] and their antithetic twins z' = 1[u > 1 - p], both distributed as the gates
are, the gradient of E f(z) by the logit of p is the mean of

    AR       f(z) (1 - 2u)                                                 (one evaluation)
    ARM      (f(z') - f(z)) (u - 1/2)                                      (Yin & Zhou 2019, arXiv:1807.11143)
    DisARM   (f(z') - f(z)) / 2 * (-1)^z * 1[z' != z] * max(p, 1 - p)      (Dong, Mnih & Tucker 2020, arXiv:2006.10680)

DisARM is ARM with the mean over u taken for given z and z', so that its variance is never larger. Each is multiplied by
the gate function's c (`espalier.parts.gates.functions`). Where z and z' agree everywhere, ARM and DisARM give zero, and
the loss need not be evaluated twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from espalier.errors import MethodError


def sampled(uniforms: Tensor, probabilities: Tensor) -> Tensor:
    """The gates z, as booleans."""
    return uniforms < probabilities


def antithetic(uniforms: Tensor, probabilities: Tensor) -> Tensor:
    """Their twins z', as booleans."""
    return uniforms > 1 - probabilities


class Estimator(Protocol):
    """A gradient by logits."""

    @property
    def twice(self) -> bool:
        """Whether the loss at z' is needed too, which has to be evaluated only where z' differs from z."""

    def __call__(self, losses: tuple[Tensor, Tensor], uniforms: Tensor, probabilities: Tensor, chain: Tensor) -> Tensor:
        """The gradient by the logits, shape (gates,).

        Args:
            losses: at z and at z'; scalars, or one per sample, shape (samples,), for gates that differ between samples.
                With `twice` False the second is not looked at.
            uniforms: shape (gates,), or (samples, gates) for one set of gates per sample.
            probabilities: of every gate, shape (gates,).
            chain: c of every gate, shape (gates,).

        Raises:
            MethodError: gates differ between samples, and the losses do not, or the other way round.
        """


@dataclass(frozen=True)
class AR:
    """Augment-REINFORCE: one evaluation, and by far the largest variance."""

    @property
    def twice(self) -> bool:
        return False

    def __call__(self, losses: tuple[Tensor, Tensor], uniforms: Tensor, probabilities: Tensor, chain: Tensor) -> Tensor:
        return _mean(_column(losses[0], uniforms) * (1 - 2 * uniforms)) * chain


@dataclass(frozen=True)
class ARM:
    """Augment-REINFORCE-merge."""

    @property
    def twice(self) -> bool:
        return True

    def __call__(self, losses: tuple[Tensor, Tensor], uniforms: Tensor, probabilities: Tensor, chain: Tensor) -> Tensor:
        return _mean(_column(losses[1] - losses[0], uniforms) * (uniforms - 0.5)) * chain


@dataclass(frozen=True)
class DisARM:
    """ARM without the noise that u adds where it does not change the gates."""

    @property
    def twice(self) -> bool:
        return True

    def __call__(self, losses: tuple[Tensor, Tensor], uniforms: Tensor, probabilities: Tensor, chain: Tensor) -> Tensor:
        first, second = sampled(uniforms, probabilities), antithetic(uniforms, probabilities)
        sign = second.to(uniforms.dtype) - first.to(uniforms.dtype)  # (-1)^z where they differ, else 0
        weight = sign * probabilities.maximum(1 - probabilities) / 2
        return _mean(_column(losses[1] - losses[0], uniforms) * weight) * chain


def _column(losses: Tensor, uniforms: Tensor) -> Tensor:
    """Losses as what multiplies the uniforms of all gates."""
    expected = tuple(uniforms.shape[:-1])
    if tuple(losses.shape) != expected:
        raise MethodError(
            f"uniforms of shape {tuple(uniforms.shape)} go with losses of shape {expected}, found "
            f"{tuple(losses.shape)}: gates of every sample need a loss of every sample, and gates that a batch shares "
            "the loss of the batch."
        )
    return losses.detach().unsqueeze(-1)


def _mean(gradient: Tensor) -> Tensor:
    return gradient if gradient.dim() == 1 else gradient.mean(0)


__all__ = ["AR", "ARM", "DisARM", "Estimator", "antithetic", "sampled"]

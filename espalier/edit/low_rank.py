"""Weights as products of two thinner ones: truncated singular value decompositions, in double precision.

A weight W (out x in; kernels count as inputs) is U S V^T. Of all matrices of rank r, the r largest singular values keep
the one with the smallest |W - W_r|, whose square is the sum of the squares of those left out (Eckart and Young 1936).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.errors import PlanError


@dataclass(frozen=True)
class Rank:
    """A rank at which to factorise a weight, and what comes of it."""

    rank: int
    full: int
    """At this rank nothing is lost."""
    break_even: float
    """in x out / (in + out): from this rank on, two factors have no fewer weights than the one that they replace."""
    error: float
    """Relative error, of the weight or of the outputs."""

    @property
    def worth_it(self) -> bool:
        """Whether the factors have fewer weights than what they replace."""
        return self.rank < self.break_even

    def __str__(self) -> str:
        text = f"rank {self.rank} of {self.full}, relative error {self.error:.2g}"
        return (
            text if self.worth_it else f"{text}; not worth it: two factors save only below rank {self.break_even:.4g}"
        )


def as_matrix(weight: Tensor) -> Tensor:
    """A weight as (out, in) in double precision. Raises PlanError unless it has two dimensions and finite numbers."""
    if weight.dim() < 2 or not (weight.is_floating_point() or weight.is_complex()):
        raise PlanError(f"expected a weight (out, in, ...) of numbers, found {weight.dtype} of {tuple(weight.shape)}.")
    matrix = weight.detach().flatten(1)
    matrix = matrix.to(torch.complex128 if weight.is_complex() else torch.float64)
    if not matrix.is_meta and not bool(torch.isfinite(matrix).all()):
        raise PlanError(f"a weight of shape {tuple(weight.shape)} holds numbers that are not finite.")
    return matrix


def spectrum(weight: Tensor) -> Tensor:
    """The singular values of a weight, largest first."""
    values: Tensor = torch.linalg.svdvals(as_matrix(weight))
    return values


def rank_of(weight: Tensor, rank: int, errors: Tensor) -> Rank:
    """A rank of a weight, where `errors` are the relative errors at every rank from 0 on."""
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    return Rank(rank, min(rows, columns), rows * columns / (rows + columns), float(errors[rank]))


def tail_errors(squares: Tensor) -> Tensor:
    """The relative error at every rank from 0 on, from what each direction adds to the square of the whole."""
    tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    return (tails / tails[0]).sqrt() if float(tails[0]) > 0 else torch.zeros_like(tails)


def least_rank(errors: Tensor, most: float) -> int:
    """The smallest rank of at least 1 at which the error is at most `most`, with a little room for rounding."""
    fitting = errors <= most * (1 + 1e-12) + 1e-15
    return max(int(fitting.nonzero()[0, 0]), 1)


def relative_error(weight: Tensor, rank: int) -> float:
    """|W - W_r| / |W| (Frobenius) of the best approximation of that rank."""
    errors = tail_errors(spectrum(weight).square())
    return float(errors[min(rank, len(errors) - 1)])


def rank_by_energy(weight: Tensor, energy: float = 0.9) -> Rank:
    """The smallest rank that keeps a part of the squared singular values of a weight: (out, in) or (out, in, kernel).

    Raises PlanError unless 0 < energy <= 1.
    """
    if not 0 < energy <= 1:
        raise PlanError(f"energy: expected a part of the squared singular values, above 0 and up to 1, found {energy}.")
    errors = tail_errors(spectrum(weight).square())
    return rank_of(weight, least_rank(errors, math.sqrt(1 - energy)), errors)


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """first (rank, in, *kernel) and second (out, rank), whose product is the best approximation of that rank.

    The root of every singular value goes to either side, so that both learn at the same pace. Beyond full rank, the
    rest is zero.
    """
    left, values, right = torch.linalg.svd(as_matrix(weight), full_matrices=False)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    second = left.new_zeros(weight.shape[0], rank)
    first = right.new_zeros(rank, right.shape[1])
    second[:, :kept] = left[:, :kept] * root
    first[:kept] = root[:, None] * right[:kept]
    return first.reshape(rank, *weight.shape[1:]), second


__all__ = [
    "Rank",
    "as_matrix",
    "factors",
    "least_rank",
    "rank_by_energy",
    "rank_of",
    "relative_error",
    "spectrum",
    "tail_errors",
]

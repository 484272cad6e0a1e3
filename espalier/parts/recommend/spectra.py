"""How many directions activations and weights fill.

    effective rank   exp H(p), p = eigenvalues of the centred covariance of activations, as parts of their sum
    stable rank      |W|_F^2 / s_1^2 for the largest singular value s_1 of a weight
    signal rank      singular values of a weight above the largest one that its entries have in another order

The first is Roy and Vetterli's (2007, The effective rank) for variances; the third is Horn's (1965) parallel analysis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.parts.recommend.nulls import apart, p_low


def covariance(rows: Tensor) -> Tensor:
    """The covariance of units over samples and positions: (..., units) -> (units, units), in double precision."""
    flat = rows.double().flatten(0, -2)
    flat = flat - flat.mean(0)
    return flat.T @ flat / max(len(flat), 1)


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the eigenvalues of a covariance, from 1 to the number of units; 0 if nothing varies."""
    values = torch.linalg.eigvalsh(matrix).clamp(min=0)
    if not bool(values.sum() > 0):
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


def stable_rank(matrix: Tensor) -> float:
    """|W|_F^2 / s_1^2 of a matrix; 0 if all of it is zero."""
    largest = float(torch.linalg.matrix_norm(matrix, 2))
    return float(matrix.square().sum()) / largest**2 if largest > 0 else 0.0


def signal_rank(matrix: Tensor, permutations: int, generator: torch.Generator) -> int:
    """How many singular values are above all that the same entries have in other orders."""
    largest = 0.0
    for _ in range(permutations):
        order = torch.randperm(matrix.numel(), generator=generator).to(matrix.device)
        mixed = matrix.flatten()[order].view_as(matrix)
        largest = max(largest, float(torch.linalg.matrix_norm(mixed, 2)))
    return int((torch.linalg.svdvals(matrix) > largest).sum())


@dataclass(frozen=True)
class RankTest:
    """An effective rank beside that of units that have nothing in common."""

    rank: float
    null: float
    """The median over permutations."""
    p: float
    """How probable a rank as small is if units have nothing in common."""


def rank_test(rows: Tensor, permutations: int, generator: torch.Generator) -> RankTest:
    """The effective rank of activations, (samples, positions, units), against permuted ones.

    Units that do not vary are left out of both.
    """
    spread = rows.double().flatten(0, 1).std(0)
    rows = rows[..., spread > 0]
    rank = effective_rank(covariance(rows)) if rows.shape[-1] else 0.0
    if rows.shape[-1] < 2:
        return RankTest(rank, rank, 1.0)
    null = [effective_rank(covariance(apart(rows, generator))) for _ in range(permutations)]
    return RankTest(rank, float(torch.tensor(null).median()), p_low(rank, null))


__all__ = ["RankTest", "covariance", "effective_rank", "rank_test", "signal_rank", "stable_rank"]

"""How many directions activations and weights fill, and how nearly units repeat each other.

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

_ROUNDING = 1e-6
"""Part of the largest spread of any unit within which one does not vary; in single precision."""


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


def correlations(matrix: Tensor) -> Tensor:
    """Of a covariance, (units, units): zero on the diagonal and for units that do not vary."""
    varies, spread = _varying(matrix)
    divisor = torch.where(varies, spread, 1.0)
    scaled = matrix / divisor.outer(divisor)
    scaled = torch.where(varies[:, None] & varies, scaled, 0.0).clamp(-1, 1)
    return scaled.fill_diagonal_(0.0)


def _varying(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Which units vary, by their covariance, and by how much."""
    spread = matrix.diagonal().clamp(min=0).sqrt()
    return spread > _ROUNDING * spread.amax().clamp(min=1e-300), spread


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
class Unrelated:
    """What the same units show when they have nothing in common: one number for each permutation."""

    ranks: tuple[float, ...]
    """Effective ranks of their activations."""
    correlations: tuple[float, ...]
    """The largest correlation of any two of them, without its sign."""


def unrelated(rows: Tensor, permutations: int, generator: torch.Generator) -> Unrelated:
    """Activations, (samples, positions, units), with the samples of each unit in an order of its own."""
    ranks, largest = [], []
    for _ in range(permutations):
        mixed = covariance(apart(rows, generator))
        ranks.append(effective_rank(mixed))
        largest.append(float(correlations(mixed).abs().max()))
    return Unrelated(tuple(ranks), tuple(largest))


@dataclass(frozen=True)
class RankTest:
    """An effective rank beside that of units that have nothing in common."""

    rank: float
    null: float
    """The median over permutations."""
    p: float
    """How probable a rank as small is if units have nothing in common."""


def rank_test(matrix: Tensor, null: Unrelated) -> RankTest:
    """The effective rank of activations, by their covariance, against permuted ones."""
    rank = effective_rank(matrix)
    if int(_varying(matrix)[0].sum()) < 2:
        return RankTest(rank, rank, 1.0)
    return RankTest(rank, float(torch.tensor(null.ranks).median()), p_low(rank, null.ranks))


__all__ = [
    "RankTest", "Unrelated", "correlations", "covariance", "effective_rank", "rank_test", "signal_rank", "stable_rank",
    "unrelated",
]  # fmt: skip

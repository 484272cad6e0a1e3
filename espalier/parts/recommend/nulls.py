"""What chance alone would show: permutations, and how often they give what was seen.

The p-value of a permutation test is (1 + how many permutations are as extreme) / (1 + all permutations): of data for
which the null hypothesis holds it is below any level at most as often as the level says (Phipson and Smyth 2010).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_SIGNS = 999
"""Random changes of sign."""
_ALL = 10
"""Up to so many differences, all changes of sign are tried."""


def p_low(value: float, null: Sequence[float]) -> float:
    """How probable a value as small as this one is under the null."""
    return (1 + sum(one <= value for one in null)) / (1 + len(null))


def p_high(value: float, null: Sequence[float]) -> float:
    """How probable a value as large as this one is under the null."""
    return (1 + sum(one >= value for one in null)) / (1 + len(null))


def until_settled(value: float, draw: Callable[[], float], permutations: int, level: float) -> tuple[float, ...]:
    """Values under the null, drawn one by one, until so many are as large as `value` that it cannot pass the test.

    Whatever the others would be, `p_high` of all of them would be above the level, as that of the ones that are drawn
    is, which is no smaller (sequential Monte Carlo p-values: Besag and Clifford 1991, Biometrika 78: 301-304).
    """
    enough = math.floor(level * (1 + permutations))
    null: list[float] = []
    while len(null) < permutations and sum(one >= value for one in null) < enough:
        null.append(draw())
    return tuple(null)


def apart(rows: Tensor, generator: torch.Generator) -> Tensor:
    """The activations of units, (samples, positions, units), those of each unit with the samples in another order.

    What a unit does by itself stays, at all positions of a sample together; what units have in common goes.
    """
    samples, _, units = rows.shape
    drawn = torch.rand(units, samples, generator=generator)
    order = torch.from_numpy(drawn.numpy().argsort(1)).T.to(rows.device)  # several times as fast as that of torch
    return rows.gather(0, order[:, None, :].expand_as(rows))


def shuffled(count: int, generator: torch.Generator) -> Tensor:
    """The samples in another order: (count,)."""
    return torch.randperm(count, generator=generator)


def falls(differences: Tensor, weights: Tensor, generator: torch.Generator) -> float:
    """How probable a weighted mean as small as that of these differences is if each is as often up as down.

    The test that changes signs: exact where differences are symmetric under the null. (parts,) each.
    """
    terms = differences * weights
    count = len(terms)
    if count <= _ALL:
        signs = torch.tensor([[1.0 if code >> bit & 1 else -1.0 for bit in range(count)] for code in range(2**count)])
        null = signs.to(terms) @ terms
        return float((null <= terms.sum() + _rounding(terms)).double().mean())
    signs = torch.randint(0, 2, (_SIGNS, count), generator=generator).to(terms) * 2 - 1
    return p_low(float(terms.sum() + _rounding(terms)), (signs @ terms).tolist())


def _rounding(terms: Tensor) -> Tensor:
    return 1e-12 * terms.abs().sum()


__all__ = ["apart", "falls", "p_high", "p_low", "shuffled", "until_settled"]

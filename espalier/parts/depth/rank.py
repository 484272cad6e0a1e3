"""At which rank to factorise a weight: by its own singular values, or by what the inputs that it meets show of them.

The error of the outputs of W_r on inputs X (n x in) is |X W^T - X W_r^T|. For the truncated decomposition of W itself,
which is what a factorised layer starts from, it follows from the lengths of X v_i: the left vectors are orthonormal, so
that its square is the sum over the directions left out of s_i^2 |X v_i|^2. The best W_r for these inputs is another
one: with any L for which L L^T = X^T X, the error is |(W - W_r) L|, so that truncating W L = U S V^T and multiplying
by L^-1 gives the smallest, whose square is the sum of the s_i^2 left out (whitening: SVD-LLM, Wang et al. 2024,
arXiv:2403.07378, there by Cholesky; ASVD, Yuan et al. 2023, arXiv:2312.05821, has a diagonal L). Here L is the
symmetric root of X^T X, which exists where inputs are dependent too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from espalier.edit.low_rank import Rank, as_matrix, least_rank, rank_by_energy, rank_of, tail_errors
from espalier.errors import MethodError

_SMALLEST = 1e-12
"""Directions in which inputs have less than this part of their largest variance are taken as never met."""


def rank_by_error(weight: Tensor, activations: Tensor, max_error: float, *, whitened: bool = False) -> Rank:
    """The smallest rank at which the relative error of the outputs on some inputs stays within a bound.

    Args:
        weight: (out, in) or (out, in, *kernel).
        activations: (n, in), the inputs; for kernels the patches that they meet, (n, in x kernel).
        max_error: of |X W^T - X W_r^T| / |X W^T|, 0 to 1.
        whitened: for the best factors on these inputs (`whitened_factors`), not those of the weight itself.

    Raises:
        MethodError: the inputs do not fit the weight, or the bound is none.
    """
    if not 0 <= max_error <= 1:
        raise MethodError(f"max_error: expected a relative error between 0 and 1, found {max_error}.")
    matrix, inputs = as_matrix(weight), _inputs(weight, activations)
    if whitened:
        root, _ = _roots(inputs)
        squares = torch.linalg.svdvals(matrix @ root).square()
    else:
        _, values, right = torch.linalg.svd(matrix, full_matrices=False)
        squares = values.square() * (inputs @ right.mT).abs().square().sum(0)
    errors = tail_errors(squares)
    return rank_of(weight, least_rank(errors, max_error), errors)


def whitened_factors(weight: Tensor, activations: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """first (rank, in, *kernel) and second (out, rank) whose outputs on some inputs are nearest to those of the weight.

    In directions that no input has, the product is zero. The arguments are those of `rank_by_error`.

    Raises:
        MethodError: the inputs do not fit the weight, or the rank is not between 1 and the full one.
    """
    matrix, inputs = as_matrix(weight), _inputs(weight, activations)
    if not 1 <= rank <= min(matrix.shape):
        raise MethodError(f"rank: expected 1 to {min(matrix.shape)} for {tuple(weight.shape)}, found {rank}.")
    root, inverse = _roots(inputs)
    left, values, right = torch.linalg.svd(matrix @ root, full_matrices=False)
    share = values[:rank].sqrt()
    first = share[:, None] * right[:rank] @ inverse
    return first.reshape(rank, *weight.shape[1:]), left[:, :rank] * share


def _inputs(weight: Tensor, activations: Tensor) -> Tensor:
    columns = weight[0].numel()
    if activations.dim() != 2 or activations.shape[1] != columns or len(activations) == 0:
        raise MethodError(f"activations: expected rows of {columns} inputs, found {tuple(activations.shape)}.")
    if not bool(torch.isfinite(activations).all()):
        raise MethodError("activations: expected finite numbers.")
    return activations.detach().to(as_matrix(weight))


def _roots(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """(X^T X)^1/2, and its inverse where it has one; zero elsewhere."""
    values, vectors = torch.linalg.eigh(inputs.mT @ inputs.conj())
    met = values > _SMALLEST * values[-1]
    root = torch.where(met, values.clamp_min(0), 0).sqrt()
    inverse = torch.where(met, 1 / root, 0)
    return (vectors * root) @ vectors.mH, (vectors * inverse) @ vectors.mH


__all__ = ["Rank", "rank_by_energy", "rank_by_error", "whitened_factors"]

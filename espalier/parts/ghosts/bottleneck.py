"""Expressivity bottlenecks: what the loss asks of a layer's outputs, its weights cannot give and new units could.

Verbockhaven, Rudkiewicz, Chevallier & Charpiat 2024, Growing tiny networks: spotting expressivity bottlenecks and
fixing them optimally (arXiv:2405.19816). With h the inputs of the weights that read an axis, x those of the weights
that make its units, and g = -dL/dz for the outputs z of the former:

    dW* = E[g h'] E[h h']^-1      the best update of the weights there are
    v   = g - dW* h               what is left
    S = E[x x'] = R R',  N = E[x v'],  R^-1 N = U s V'
    incoming = R'^-1 U s^1/2,  outgoing = V s^1/2

are the new units, in order of what they contribute, s^2, for units that are linear where they start. What lies between
makers and readers is taken for the identity (activations, norms) or for means over windows (pooling).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from espalier.parts.ghosts.products import Product
from espalier.parts.ghosts.reach import Between, crossed, looked_at
from espalier.parts.score import Context

_LEAST_RIDGE = 1e-13
_MORE, _ROUNDS = 16, 2
"""Of the search for singular vectors: how many more than asked for, and how often."""


@dataclass(frozen=True)
class Wanted:
    """Sums over batches of what `Between` asks for."""

    root: Tensor
    """A root of S: its Cholesky factor."""
    cross: Tensor
    """N', one row per entry of the weights that read a unit."""
    mean: Tensor
    """E[x]."""


def wanted(
    context: Context, axes: Mapping[str, Between], batches: Sequence[Any], ridge: float
) -> tuple[dict[str, Wanted], dict[str, Tensor]]:
    """For every axis what new units are found from, and for all weights that read axes their best update dW*.

    Each batch is looked at once: the first half, or the only one, tells dW* and S, and the others tell what is left.
    Updates have the shape (outputs, entries), with a last column for the bias where there is one. To the diagonals of
    E[h h'] and S `ridge` times their trace is added, divided by the number of rows (samples times positions) that they
    come from: the fewer rows per entry there are, the less their small eigenvalues tell.

    Raises:
        MethodError: on some batch the weights are not used as they are on others.
    """
    first = (len(batches) + 1) // 2
    grams, means, updates = _fitted(context, axes, batches[:first], ridge)
    crosses = _Sums()
    for batch in batches[first:] or batches:
        products, gradients = looked_at(context, axes, batch)
        left = {name: _left(products[name], one, updates[name]) for name, one in gradients.items()}
        for axis, one in axes.items():
            maker = products[one.maker]
            rows = maker.rows()
            parts = [
                crossed(maker, products[name], places, rows, left[name])
                for name, places in zip(one.readers, one.places, strict=True)
            ]
            crosses.add(axis, torch.cat(parts) / len(batches[first:] or batches))
    found = {axis: Wanted(grams[one.maker], crosses.total[axis], means[one.maker]) for axis, one in axes.items()}
    return found, updates


def new_units(one: Wanted, count: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """The best `count` units, or as many as there are: incoming (k, d), outgoing (k, e) and what each contributes.

    Units whose singular value is below `floor` times the largest are left out. Of the two signs of a unit that one is
    taken under which it is positive on the mean input.
    """
    left, values, right = leading(one.root, one.cross.T, count)
    kept = min(count, int((values > floor * values[:1]).sum()))
    roots = values[:kept, None].sqrt()
    incoming = roots * torch.linalg.solve_triangular(one.root.T, left[:, :kept], upper=True).T
    outgoing = roots * right[:kept]
    sign = torch.where(incoming @ one.mean < 0, -1.0, 1.0)[:, None]
    return sign * incoming, sign * outgoing, values[:kept].square()


def leading(root: Tensor, matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values of root^-1 matrix; the first `count` can be relied on (Halko et al. 2011)."""
    wide = min(count + _MORE, *matrix.shape)
    if 2 * wide >= min(matrix.shape):
        left, values, right = torch.linalg.svd(torch.linalg.solve_triangular(root, matrix, upper=False), False)
        return left, values, right
    start = torch.randn(matrix.shape[1], wide, generator=torch.Generator().manual_seed(0))  # any will do
    basis = start.to(matrix)
    for _ in range(_ROUNDS):
        image = torch.linalg.qr(torch.linalg.solve_triangular(root, matrix @ basis, upper=False)).Q
        basis = torch.linalg.qr(matrix.T @ torch.linalg.solve_triangular(root.T, image, upper=True)).Q
    image = torch.linalg.solve_triangular(root, matrix @ basis, upper=False)
    left, values, right = torch.linalg.svd(image, full_matrices=False)
    return left, values, right @ basis.T


def singular_values(root: Tensor, matrix: Tensor) -> Tensor:
    """Of root^-1 matrix, the largest first; what is below the root of the machine precision of it is rounding."""
    image = torch.linalg.solve_triangular(root, matrix, upper=False)
    square = image @ image.T if image.shape[0] <= image.shape[1] else image.T @ image
    values: Tensor = torch.linalg.eigvalsh(square)
    return values.clamp(min=0).sqrt().flip(0)


def largest(root: Tensor, matrix: Tensor) -> float:
    """The largest singular value of root^-1 matrix."""
    few = min(matrix.shape) > 2 * (1 + _MORE)
    return float((leading(root, matrix, 1)[1] if few else singular_values(root, matrix))[0])


def triangle(gram: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of a matrix with `ridge` times its trace added to the diagonal."""
    more = max(ridge, _LEAST_RIDGE) * (float(gram.trace()) or 1.0)
    factor: Tensor = torch.linalg.cholesky(gram + more * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return factor


def _fitted(
    context: Context, axes: Mapping[str, Between], batches: Sequence[Any], ridge: float
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """For all weights: the root of E[h h'], E[h]; for those that read axes: the best update."""
    grams, slopes, means = _Sums(), _Sums(), _Sums()
    counts: dict[str, int] = {}
    for batch in batches:
        products, gradients = looked_at(context, axes, batch)
        for name, seen in products.items():
            rows = seen.rows()
            grams.add(name, rows.T @ rows / (seen.samples * len(batches)))
            means.add(name, rows.mean(0) / len(batches))
            counts[name] = counts.get(name, 0) + len(rows)
            if name in gradients:
                slopes.add(name, seen.units_last(gradients[name]).T @ rows / len(batches))
    roots = {name: triangle(gram, ridge / counts[name]) for name, gram in grams.total.items()}
    updates = {name: -torch.cholesky_solve(slope.T, roots[name]).T for name, slope in slopes.total.items()}
    return roots, means.total, updates


class _Sums:
    """Sums by name, in double precision."""

    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        value = value.double()
        self.total[name] = self.total[name] + value if name in self.total else value


def _left(reader: Product, gradient: Tensor, update: Tensor) -> Tensor:
    """v / samples, in the shape of the reader's outputs."""
    done = reader.rows() @ update.to(gradient).T / reader.samples
    left = -reader.units_last(gradient) - done
    if not reader.is_convolution:
        return left.reshape(reader.output.shape)
    return left.reshape(reader.samples, *reader.positions, -1).movedim(-1, 1)


__all__ = ["Wanted", "largest", "leading", "new_units", "singular_values", "triangle", "wanted"]

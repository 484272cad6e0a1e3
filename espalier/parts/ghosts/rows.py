"""Matrices with one row for each unit, and what a search for directions finds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.parts.ghosts.metric import Metric


@dataclass(frozen=True)
class Found:
    """Directions of one axis, best first."""

    incoming: Tensor
    """(n, d): incoming weights as they would begin; zeros where these stay zero."""
    outgoing: Tensor
    """(n, d): unit rows: the outgoing weights, or the direction in which they would move."""
    gains: Tensor
    """(n,): squared norm of the gradient that a unit would get."""
    metric: Metric | None = None
    """That of incoming weights; None if they are zero."""


def orthonormal(rows: Tensor) -> Tensor:
    """Rows made orthonormal one after the other; more rows than columns in several sets of their own."""
    found = []
    for piece in torch.split(rows, max(rows.shape[1], 1)):
        q, r = torch.linalg.qr(piece.double().T)
        found.append((q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T.to(rows))
    return torch.cat(found)


def independent(rows: Tensor) -> Tensor:
    """As many rows as can be orthonormal, in their order, made so."""
    return orthonormal(rows[: rows.shape[1]])


def padded(rows: Tensor, like: Tensor) -> Tensor:
    """The rows and rows of zeros after them."""
    return torch.cat([rows.to(like), like.new_zeros(len(like) - len(rows), like.shape[1])])


__all__ = ["Found", "independent", "orthonormal", "padded"]

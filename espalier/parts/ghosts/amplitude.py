"""How large the weights of new units are: in proportion to those of the units that are there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from espalier.parts.ghosts.ghosts import Side, Tensors


def row_norm(side: Side, tensors: Tensors) -> float:
    """The mean over the old units of the l2 norm of all their entries on one side; 0 if that is not finite."""
    return mean_norm(side.read_old(tensors))


def part_norms(side: Side, tensors: Tensors) -> Tensor:
    """(d,): for every entry of a unit the mean norm of old units over the part of the side that it belongs to.

    Where all entries of a part are zero, as in layers that are initialised so: 1, the norm of a fresh layer.
    """
    found = []
    for part in side.parts:
        entries = part.read(tensors[part.tensor], part.old)
        found.append(torch.full((entries.shape[1],), mean_norm(entries) or 1.0, device=entries.device))
    return torch.cat(found)


def widths(side: Side, tensors: Tensors) -> list[int]:
    """How many entries each part of a side has per unit."""
    return [part.read(tensors[part.tensor], part.old[:1]).shape[1] for part in side.parts]


def with_norms(rows: Tensor, parts: list[int], norms: Tensor) -> Tensor:
    """The rows with every part scaled so that its l2 norm is the one given for its entries; zero stays zero."""
    pieces = []
    for piece, norm in zip(torch.split(rows, parts, dim=1), torch.split(norms.to(rows), parts), strict=True):
        pieces.append(unit_rows(piece) * norm)
    return torch.cat(pieces, dim=1)


def unit_rows(rows: Tensor) -> Tensor:
    """The rows divided by their l2 norms; rows of zeros stay zero."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where(norms > 0, rows / norms, torch.zeros_like(rows))


def mean_norm(rows: Tensor) -> float:
    """The mean l2 norm of rows; 0 if it is not finite."""
    mean = float(torch.linalg.vector_norm(rows.detach().double(), dim=1).mean())
    return mean if math.isfinite(mean) else 0.0


__all__ = ["mean_norm", "part_norms", "row_norm", "unit_rows", "widths", "with_norms"]

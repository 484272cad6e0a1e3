"""Units that others can stand in for: constant ones, near-duplicates, and in which order the rest can go.

With C the covariance of the units of an axis and W (outputs x units) all weights that read them, taking unit j away and
refitting W to the units that stay adds

    |W_j|^2 / (C^-1)_jj

to the squared error of what the readers make, summed over their outputs: Optimal Brain Surgeon (Hassibi and Stork 1993)
for a layer's own outputs, whose Hessian is C. The unit of the smallest one goes, W and C^-1 follow, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.graph.named_tensors import tensor_table
from espalier.parts.ghosts.ghosts import INCOMING, OUTGOING
from espalier.parts.recommend.spectra import Unrelated, correlations
from espalier.structure import Structure

_ROUNDING = 1e-6
"""Part of the largest activation of an axis within which a unit is constant; in single precision."""
_RIDGE = 1e-9
"""Part of the mean variance that is added to every unit's, so that C has an inverse."""


@dataclass(frozen=True)
class Twins:
    """Units that are nearly affine functions of one other unit."""

    pairs: tuple[tuple[int, int, float], ...]
    """(unit, the earlier unit that it repeats, their correlation)."""
    null: float
    """The largest correlation, without its sign, of any two units over all permutations."""

    @property
    def units(self) -> tuple[int, ...]:
        """Those that may go."""
        return tuple(unit for unit, _, _ in self.pairs)


@dataclass(frozen=True)
class Elimination:
    """Units in the order in which they can go."""

    order: tuple[int, ...]
    lost: tuple[float, ...]
    """What the readers have then lost of the variance of their outputs, a part of it: one after each unit."""


def constant_units(low: Tensor, high: Tensor) -> tuple[int, ...]:
    """Units whose activations do not vary beyond rounding, from the smallest and the largest of each: (units,)."""
    largest = torch.maximum(low.abs(), high.abs()).amax().clamp(min=1e-30)
    return tuple((high - low <= _ROUNDING * largest).nonzero().flatten().tolist())


def unread_units(readers: Tensor) -> tuple[int, ...]:
    """Units that all weights that read them, (outputs, units), multiply with nothing, up to rounding."""
    norms = readers.square().sum(0).sqrt()
    return tuple((norms <= _ROUNDING * norms.amax().clamp(min=1e-30)).nonzero().flatten().tolist())


def twins(matrix: Tensor, unexplained: float, unrelated: Unrelated) -> Twins:
    """Pairs of units of which one explains the other but for a part of its variance.

    A pair counts if its correlation is also larger than that of any two units under permutations of the samples.

    Args:
        matrix: the covariance of the units.
        unexplained: the part of a unit's variance that may be left unexplained, 1 - correlation^2.
        unrelated: the units under permutations of the samples of each by itself.
    """
    null, found = max(unrelated.correlations, default=0.0), correlations(matrix)
    alike = (1 - found.square() <= unexplained) & (found.abs() > null)
    pairs, gone = [], set[int]()
    for unit in range(len(found)):
        for other in (alike[unit, :unit]).nonzero().flatten().tolist():
            if other not in gone:
                gone.add(unit)
                pairs.append((unit, other, float(found[unit, other])))
                break
    return Twins(tuple(pairs), null)


def elimination(matrix: Tensor, readers: Tensor) -> Elimination:
    """The order in which units go, and what is lost of what readers make: see the module.

    Args:
        matrix: the covariance of the units.
        readers: (outputs, units), all weights that read the units.
    """
    weights = readers.double().cpu().clone()
    count = len(matrix)
    made = float(torch.einsum("oi,ij,oj->", weights, matrix, weights))
    ridge = _RIDGE * float(matrix.diagonal().mean()) or 1.0
    inverse = torch.linalg.inv(matrix + ridge * torch.eye(count, dtype=matrix.dtype))
    waiting = torch.ones(count, dtype=torch.bool)
    order, lost, total = [], [], 0.0
    for _ in range(count - 1):
        costs = weights.square().sum(0) / inverse.diagonal().clamp(min=1e-300)
        unit = int(torch.where(waiting, costs, torch.inf).argmin())
        total += float(costs[unit])
        order.append(unit)
        lost.append(total / made if made > 0 else 0.0)
        waiting[unit] = False
        column = inverse[:, unit] / inverse[unit, unit]
        weights -= torch.outer(weights[:, unit], column)
        inverse -= torch.outer(column, inverse[unit])
    return Elimination(tuple(order), tuple(lost))


def readers_of(structure: Structure, axis: str) -> Tensor | None:
    """All weights that read the units of an axis: (outputs, units); None if there are none.

    Each tensor is divided by its norm, so that readers count alike.
    """
    return _side(structure, axis, OUTGOING)


def makers_of(structure: Structure, axis: str) -> Tensor | None:
    """All weights that the units of an axis are made by: (entries, units); None if there are none."""
    return _side(structure, axis, INCOMING)


def _side(structure: Structure, axis: str, roles: frozenset[str]) -> Tensor | None:
    topology, record = structure.topology, structure.topology.by_name[axis]
    table, found = tensor_table(structure.model).tensors, []
    for name, dim, role in record.slots:
        tensor = table.get(name)
        if role not in roles or tensor is None or not tensor.is_floating_point():
            continue
        positions = torch.tensor(topology.slot(record.number, name, dim, role).positions)
        rows = tensor.detach().double().cpu().movedim(dim, -1)[..., positions.flatten()]
        rows = rows.reshape(-1, *positions.shape).movedim(-1, 0).flatten(0, 1)
        norm = float(rows.norm())
        found.append(rows / norm if norm > 0 else rows)
    return torch.cat(found) if found else None


__all__ = [
    "Elimination", "Twins", "constant_units", "elimination", "makers_of", "readers_of", "twins", "unread_units",
]  # fmt: skip

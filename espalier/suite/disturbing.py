"""The control for everything about an edit but the edit: units lose their optimizer state, and keep their weights."""

from __future__ import annotations

import torch

from espalier.parts.score import derived_seed
from espalier.structure import Structure


def disturb(structure: Structure, part: float, seed: int) -> dict[str, int]:
    """Set to zero what the optimizer remembers of the weights of random units, as it would be of new ones.

    Args:
        structure: attached with its optimizer.
        part: of the units of every axis that may change, at least one.
        seed: of the choice.

    Returns: axis -> number of units.
    """
    optimizer = structure.optimizer
    assert optimizer is not None
    parameters = dict(structure.model.named_parameters())
    chosen = {}
    for name, axis in structure.axes.items():
        if axis.reason is not None:
            continue
        generator = torch.Generator().manual_seed(derived_seed(seed, name))
        units = torch.randperm(axis.size, generator=generator)[: max(1, round(part * axis.size))].tolist()
        chosen[name] = len(units)
        for slot in axis.slots:
            parameter = parameters.get(slot.tensor)
            if parameter is None:
                continue
            rows = torch.tensor(slot.index(units), device=parameter.device)
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    value.movedim(slot.dim, 0)[rows] = 0
    return chosen


__all__ = ["disturb"]

"""What a run records of gates: how they are spread, and what the network says of every point of a plane."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from espalier.bench.data import Dataset
from espalier.parts.gates.gating import GateState

BINS = 20
COLUMNS = 40
"""Points of a map along each side."""
MAPS = 10
"""Maps in a run, besides those at its first epoch and at the ends of the search."""
POINTS = 500
_MARGIN = 0.15
"""What a map shows beyond the points, as a part of their extent."""

Record = dict[str, Any]


def gates_record(state: GateState) -> Record:
    """Stage, k, and for every axis the number of gates in each of `BINS` equal parts of the probabilities."""
    return {
        "stage": state.stage,
        "k": state.k,
        "axes": {
            name: torch.histc(one.double(), bins=BINS, min=0.0, max=1.0).long().tolist()
            for name, one in state.probabilities.items()
        },
        "asleep": dict(state.asleep),
    }


def can_be_drawn(data: Dataset) -> bool:
    """Whether inputs are points of a plane in two classes."""
    return data.input_shape == (2,) and data.classes == 2


def is_shown(epoch: int, epochs: int, stages: tuple[int, int]) -> bool:
    """Whether a map is made after an epoch: after the first, every tenth of a run, and where the stage changed."""
    return epoch in (1, epochs) or epoch % max(1, epochs // MAPS) == 0 or stages[0] != stages[1]


def points_record(data: Dataset) -> Record:
    """Points that are trained on."""
    return {"inputs": _rounded(data.x_train[:POINTS]), "labels": data.y_train[:POINTS].tolist()}


def map_record(model: nn.Module, data: Dataset) -> Record:
    """The probability of class 1 over the plane, in rows from the lowest y on; the model is in eval mode."""
    low, high = data.x_train.amin(dim=0), data.x_train.amax(dim=0)
    margin = _MARGIN * (high - low)
    x, y = (
        torch.linspace(float(low[side] - margin[side]), float(high[side] + margin[side]), COLUMNS) for side in (0, 1)
    )
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    with torch.no_grad():
        grid = torch.stack([columns, rows], dim=-1).view(-1, 2).to(data.x_train)
        found = model(grid).softmax(dim=1)[:, 1].view(COLUMNS, COLUMNS)
    return {"x": _rounded(x[[0, -1]]), "y": _rounded(y[[0, -1]]), "values": _rounded(found)}


def _rounded(values: Tensor) -> Any:
    return values.double().cpu().mul(1000).round().div(1000).tolist()

"""What a run writes down of its gates: how probable units are, and what the network says of the plane in between.

A record is a JSON object for `metrics.jsonl` (`espalier.bench.records`). Histograms are small and come with every
epoch; pictures hold every unit, and of inputs of two dimensions a map of the plane, and come with a few epochs only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BINS = 20
"""Of a histogram of probabilities from 0 to 1."""
MOST_UNITS = 512
"""Gates of one place that a picture holds one by one; of more it holds none."""
MOST_POINTS = 400
COLUMNS, ROWS = 48, 40
MARGIN = 0.12
"""Of the map, around the points, as a part of what they span."""


def gates_record(
    stage: int, k: float, probabilities: Mapping[str, Tensor], asleep: Mapping[str, int]
) -> dict[str, Any]:
    """`gates` of a record.

    Args:
        stage: 0 before the search, 1 in it, 2 after it.
        k: of the gates.
        probabilities: place (an axis, a parameter, a layer) -> the probability of each gate that is in the network.
        asleep: place -> how many of its units sleep outside of the network; 0 where it is missing.
    """
    places = {}
    for place, found in probabilities.items():
        p = found.detach().double().flatten().cpu().clamp(0, 1)
        places[place] = {
            "awake": p.numel(),
            "asleep": asleep.get(place, 0),
            "open": int((p >= 0.5).sum()),
            "expected": round(float(p.sum()), 3),
            "histogram": torch.histc(p, BINS, 0.0, 1.0).long().tolist(),
        }
    return {"stage": stage, "k": k, "places": places}


def units_record(probabilities: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """`units` of a picture: place -> the probability of each gate in the network, to three digits."""
    flat = {place: found.detach().flatten() for place, found in probabilities.items()}
    return {
        place: [round(value, 3) for value in p.tolist()] for place, p in flat.items() if 0 < p.numel() <= MOST_UNITS
    }


@dataclass(frozen=True)
class Plane:
    """The part of the plane that is mapped: x and y from the first number to the second."""

    x: tuple[float, float]
    y: tuple[float, float]

    def record(self, logits: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """`grid` of a picture: row by row from the lowest y, the class that wins and its probability in hundredths.

        `logits` takes points (N, 2), float32 on the CPU, and gives logits (N, classes) of the network as it is judged.
        """
        x, y = torch.linspace(*self.x, COLUMNS), torch.linspace(*self.y, ROWS)
        points = torch.cartesian_prod(y, x).flip(1)
        with torch.no_grad():
            chance, winner = logits(points).double().softmax(1).max(1)
        return {
            "x": list(self.x),
            "y": list(self.y),
            "columns": COLUMNS,
            "rows": ROWS,
            "winner": winner.tolist(),
            "confidence": (100 * chance).nan_to_num(0.0).round().int().tolist(),
        }


def plane_of(inputs: Tensor) -> Plane | None:
    """The part of the plane around inputs (N, 2); None for inputs that are no points of a plane."""
    if inputs.dim() != 2 or inputs.shape[1] != 2 or not len(inputs):
        return None
    low, high = inputs.amin(0).double().tolist(), inputs.amax(0).double().tolist()
    spans = [(a - MARGIN * (b - a or 1.0), b + MARGIN * (b - a or 1.0)) for a, b in zip(low, high, strict=True)]
    return Plane(spans[0], spans[1])


def points_record(inputs: Tensor, labels: Tensor) -> list[list[float]]:
    """`points` of the start: [x, y, class] of the first inputs (N, 2) with labels (N,)."""
    shown = zip(inputs[:MOST_POINTS].tolist(), labels[:MOST_POINTS].tolist(), strict=True)
    return [[round(x, 4), round(y, 4), label] for (x, y), label in shown]


def picture_epochs(epochs: int, start: float, until: float) -> frozenset[int]:
    """The epochs after which a picture is taken: a few in each stage, most of them in the search.

    `start` and `until` are where the search begins and ends, as fractions of the training. 0 is the network as built.
    """
    begins, ends = start * epochs, until * epochs
    early = [begins / 2, begins]
    search = [begins + part * (ends - begins) for part in (0.05, 0.15, 0.3, 0.5, 0.75, 1.0)]
    late = [(ends + epochs) / 2, float(epochs)]
    return frozenset({0, *(max(1, min(epochs, round(at))) for at in (*early, *search, *late))})


__all__ = ["BINS", "Plane", "gates_record", "picture_epochs", "plane_of", "points_record", "units_record"]
